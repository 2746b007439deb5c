"""``diffseg evaluate``: DiffSeg and its baselines against true segmentations."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__, baselines, datasets, loading, metrics, runs
from .datasets import Dataset, Sample
from .loading import UsageError
from .methods import TITLES, Settings, count_segments, predictions
from .metrics import Labels, Scores

if TYPE_CHECKING:
    from .pipeline import DiffSegPipeline

FIGURES = {
    "accuracy_per_image": "pixel accuracy (matched per image)",
    "miou_per_image": "mIoU (matched per image)",
    "accuracy_pooled": "pixel accuracy (matched once, pooled)",
    "miou_pooled": "mIoU (matched once, pooled)",
    "accuracy": "pixel accuracy",
    "miou": "mIoU",
    "covering": "covering",
    "covering_best": "covering, best truth",
    "variation_of_information": "VI (bits, lower is better)",
    "rand_index": "Rand index",
}

_SPLIT = "val"
_LARGEST_SEED = 2**32 - 1  # of scikit-learn
_ROWS_A_KIND = 3  # of the picture sheet: best, median, worst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(parser, output="evaluation")
    parser.add_argument(
        "--methods",
        default="diffseg",
        help=f"comma-separated, of {', '.join(TITLES)}, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--clusters", type=int, help="of kmeans-c (default: the mean number of segments in the truth, as in the paper)"
    )
    parser.add_argument("--seed", type=int, default=baselines.SEED, help="of the k-means (default: %(default)s)")


def add_shared_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Arguments that name the data, the model and DiffSeg's parameters."""
    parser.add_argument("dataset", choices=datasets.KINDS, help="the layout of ROOT")
    parser.add_argument("root", type=Path, metavar="ROOT", help="the data set's folder")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(output), metavar="DIR",
        help="results; a run into the same folder goes on where the last one stopped (default: %(default)s)",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--split", help=f"of a layout that has splits (default: {_SPLIT})")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    data.add_argument(
        "--image-list", type=Path, metavar="FILE",
        help="only the images that FILE names, one a line (coco-stuff without it: IIC's rule for the 2,175)",
    )  # fmt: skip
    data.add_argument(
        "--crop", dest="resolution", type=int, metavar="SIDE",
        help="centre-crop to a square and resize to this side (default: 512 for coco-stuff and cityscapes, else none)",
    )  # fmt: skip
    data.add_argument("--classes", type=int, help="folder: labels are this many classes (default: an image's regions)")
    data.add_argument("--unlabelled", type=int, metavar="VALUE", help="folder: pixel value that counts nowhere")
    loading.add_arguments(parser.add_argument_group("model"))
    loading.add_parameters(parser.add_argument_group("DiffSeg"))


def run(options: argparse.Namespace) -> int:
    """Measures DiffSeg and its baselines on a data set; a killed run goes on where it stopped."""
    methods = _methods(options.methods)
    if options.clusters is not None and options.clusters < 1:
        raise UsageError(f"--clusters: expected at least 1, got {options.clusters}")
    if not 0 <= options.seed <= _LARGEST_SEED:
        raise UsageError(f"--seed: expected 0 to {_LARGEST_SEED}, got {options.seed}")
    state = runs.processes(options.device)
    dataset, pipe, settings = start(state, options, ("scipy", "sklearn"))
    clusters = options.clusters
    if clusters is None and "kmeans-c" in methods:
        clusters = runs.on_main(state, lambda: typical_segments(dataset))
    described = {
        **described_run(options, pipe, settings),
        "methods": methods,
        "clusters": clusters,
        "seed": options.seed,
    }

    def predict(sample: Sample, wanted: Sequence[str] = methods) -> dict[str, Labels]:
        return predictions(pipe, sample, settings, wanted, clusters=clusters, seed=options.seed)

    running = new_scores(dataset)

    def watch(result: runs.Result) -> str:
        running.add([metrics.from_entries(each) for each in result[methods[0]]])
        return progress_text(running)

    with runs.claimed(state, options.output, described):
        results = runs.process_dataset(
            state, dataset, options.output, lambda sample: confusion_entries(predict(sample), sample.truths), watch
        )
        if state.is_main_process:
            figures = {method: summarise(dataset, results.values(), method) for method in methods}
            titles = {method: TITLES[method].format(clusters=clusters) for method in methods}
            chosen = {"limit": options.limit, "image_list": options.image_list and options.image_list.name}
            _write_results(options.output, dataset, {**described, **chosen}, titles, figures)
            picture = options.output / "sheet.png"
            first = methods[0]
            _sheet(dataset, results, first, lambda sample: predict(sample, [first])[first]).save(picture)
            print("\n".join(markdown_table({titles[method]: figures[method] for method in methods})))
            print(f"{len(dataset)} images; {options.output / 'results.json'}, {picture}")
    state.destroy_process_group()
    return 0


def start(state: Any, options: argparse.Namespace, needed: Sequence[str]) -> tuple[Dataset, DiffSegPipeline, Settings]:
    """The data set, its files checked, the pipeline, and the settings with the model's own filled in.

    ``needed``: packages without which the run would fail at its end.
    """
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed: pip install -e '.[evaluate]' in a checkout")
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit: expected at least 1, got {options.limit}")
    if options.dataset == "folder" and options.split is not None:
        raise UsageError(f"--split: expected a layout that has splits, got folder and {options.split!r}")
    device = runs.device_of(state, options.device)
    loading.check_backend(options.backend, loading.find_device(device))
    loading.check_output("--output", options.output)
    dataset = runs.on_main(state, lambda: _checked_dataset(options))
    pipe = loading.load_pipeline(
        options.model, device, options.dtype, variant=options.variant, announce=state.is_main_process
    )
    settings = Settings.of(pipe, **{each.name: getattr(options, each.name, None) for each in fields(Settings)})
    loading.check_options(pipe, asdict(settings))
    return dataset, pipe, settings


def described_run(options: argparse.Namespace, pipe: DiffSegPipeline, settings: Settings) -> dict[str, Any]:
    """What results depend on: they may be continued only under the same."""
    model = options.model or "bundled"
    return {
        "diffseg": __version__,
        "dataset": options.dataset,
        "root": str(options.root.resolve()),
        "split": options.split or _SPLIT,
        "resolution": options.resolution,
        "classes": options.classes,
        "unlabelled": options.unlabelled,
        "model": str(Path(model).resolve()) if options.model and Path(model).is_dir() else model,
        "variant": options.variant,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        **{name: value for name, value in asdict(settings).items() if name != "backend"},
    }


def _checked_dataset(options: argparse.Namespace) -> Dataset:
    dataset = datasets.open_dataset(
        options.dataset,
        options.root,
        split=options.split or _SPLIT,
        resolution=options.resolution,
        image_list=options.image_list,
        classes=options.classes,
        unlabelled=options.unlabelled,
        watch=lambda paths: runs.watched(paths, len(paths), "choosing images"),
    )
    dataset = dataset.first(options.limit)
    datasets.check(runs.watched(dataset.problems(), len(dataset), "checking files"), len(dataset))
    return dataset


def _methods(given: str) -> list[str]:
    methods = list(TITLES) if given == "all" else list(dict.fromkeys(given.split(",")))
    unknown = [method for method in methods if method not in TITLES]
    if unknown:
        raise UsageError(f"--methods: expected some of {', '.join(TITLES)}, or all, got {', '.join(unknown)}")
    return methods


def typical_segments(dataset: Dataset) -> int:
    """The mean number of segments in the truths: the paper's constant for K-Means-C."""
    samples = (runs.load(dataset, index) for index in range(len(dataset)))
    return round(np.mean([count_segments(each.truths) for each in runs.watched(samples, len(dataset), "counting")]))


def new_scores(dataset: Dataset) -> Scores:
    return metrics.RegionScores() if dataset.classes is None else metrics.ClassScores(dataset.classes)


def confusion_entries(labels: dict[str, Labels], truths: Sequence[Labels]) -> runs.Result:
    """Of each method and truth, the entries of their table."""
    return {
        method: [metrics.entries(metrics.confusion(predicted, truth)) for truth in truths]
        for method, predicted in labels.items()
    }


def progress_text(scores: Scores) -> str:
    """The first two figures, for a progress bar."""
    return ", ".join(f"{name} {value:.3f}" for name, value in list(scores.figures().items())[:2])


def summarise(dataset: Dataset, results: Iterable[runs.Result], method: str) -> dict[str, float]:
    """The figures of one method over all images."""
    scores = new_scores(dataset)
    for result in results:
        scores.add([metrics.from_entries(each) for each in result[method]])
    return scores.figures()


def markdown_table(figures: dict[str, dict[str, float]]) -> Iterable[str]:
    """A Markdown table, a row each."""
    names = list(next(iter(figures.values())))
    yield f"| method | {' | '.join(FIGURES[name] for name in names)} |"
    yield "| --- |" + " --- |" * len(names)
    for title, row in figures.items():
        yield f"| {title} | {' | '.join(f'{row[name]:.3f}' for name in names)} |"


def _write_results(
    folder: Path,
    dataset: Dataset,
    described: dict[str, Any],
    titles: dict[str, str],
    figures: dict[str, dict[str, float]],
) -> None:
    summary = {
        "images": len(dataset),
        "settings": {name: value for name, value in described.items() if name != "root"},
        "methods": {method: {"title": titles[method], **figures[method]} for method in titles},
    }
    runs.write_text(folder / "results.json", json.dumps(summary, indent=2) + "\n")


def _sheet(dataset: Dataset, results: dict[str, runs.Result], method: str, predict: Callable[[Sample], Labels]) -> Any:
    """Image, truth and prediction of the best, median and worst images by matched accuracy."""
    from . import visualize

    accuracies = []
    for index, item in enumerate(dataset.items):
        values = [metrics.table_accuracy(metrics.from_entries(each)) for each in results[item.name][method]]
        if not np.isnan(values).all():
            accuracies.append((float(np.nanmean(values)), index))
    accuracies.sort(reverse=True)
    rows = []
    for kind, chosen in _best_median_worst(accuracies).items():
        for accuracy, index in chosen:
            sample = dataset.load(index)
            truth, predicted = sample.truths[0], predict(sample)
            pictures = [sample.image, visualize.coloured(truth), visualize.coloured(aligned(predicted, truth))]
            rows.append((f"{kind}: {sample.name}, accuracy {accuracy:.3f}", pictures))
    return visualize.sheet(rows, f"{dataset.kind}: image, truth, {TITLES[method].partition(' (')[0]}")


def _best_median_worst(ranked: list[tuple[float, int]]) -> dict[str, list[tuple[float, int]]]:
    """Up to three of each, from the best to the worst, none twice."""
    each = max(1, min(_ROWS_A_KIND, len(ranked) // 3))
    middle = max(each, (len(ranked) - each) // 2)
    last = max(middle + each, len(ranked) - each)
    return {"best": ranked[:each], "median": ranked[middle : middle + each], "worst": ranked[last:]}


def aligned(predicted: Labels, truth: Labels) -> Labels:
    """The prediction under the numbers of the true labels that it matches; the others follow after those."""
    pixels = metrics.confusion(predicted, truth)
    numbers = pixels.shape[1] + np.arange(pixels.shape[0])
    rows, columns = metrics.matching(pixels)
    agree = pixels[rows, columns] > 0
    numbers[rows[agree]] = columns[agree]
    return numbers[predicted]
