"""``diffseg study``: what DiffSeg's parameters do (the paper's figure 10), and how far heads differ (its table 4)."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import evaluate, loading, metrics, reference, runs
from .checks import RULES, WEIGHT_SCHEMES
from .datasets import Dataset, Sample
from .loading import UsageError
from .methods import Settings, check_finite, diffseg_labels

_THRESHOLD_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_SWEEPS: dict[str, tuple[Callable[[str], Any], tuple[Any, ...]]] = {
    "timestep": (int, (1, 100, 200, 300, 400, 500, 700, 900)),
    "anchors": (int, (2, 4, 8, 16, 32)),
    "iterations": (int, (1, 2, 3, 4, 5, 6)),
    "threshold": (float, ()),  # multiples of the model's own
    "weights": (str, WEIGHT_SCHEMES),
    "rule": (str, RULES),
}
"""How each parameter's values are read, and those swept where none are given."""

_AXES = {
    "timestep": "time step t",
    "anchors": "anchors a side M",
    "iterations": "iterations N",
    "threshold": "threshold tau",
    "weights": "weights",
    "rule": "rule",
}
_ROWS_AT_ONCE = 256  # of the attention maps of all heads, when heads are compared


@dataclass(frozen=True)
class Point:
    """One value of one parameter, the others at their base."""

    parameter: str
    value: Any
    settings: Settings

    @property
    def key(self) -> str:
        return f"{self.parameter}={self.value}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    evaluate.add_shared_arguments(parser, output="study")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="NAME[=V,V,...]",
        help=f"vary one of {', '.join(_SWEEPS)}, the others as given above; may be repeated (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", action="store_true",
        help="the mean divergence between the heads of a layer, by resolution; without --sweep, that alone",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Varies DiffSeg's parameters one at a time over a data set; a killed run goes on where it stopped."""
    sweeps = _parsed(options.sweep or ([] if options.heads else list(_SWEEPS)))
    state = runs.processes(options.device)
    dataset, pipe, base = evaluate.start(state, options, ("scipy", "matplotlib"))
    points = list(_points(base, sweeps))
    for point in points:
        loading.check_options(pipe, asdict(point.settings), "--sweep ")
    described = {
        **evaluate.described_run(options, pipe, base),
        "points": [point.key for point in points],
        "heads": options.heads,
    }

    def work(sample: Sample) -> runs.Result:
        result: runs.Result = {"tables": _confusion_entries(pipe, sample, points)} if points else {}
        return {**result, "heads": _heads(pipe, sample, base)} if options.heads else result

    running = evaluate.new_scores(dataset)

    def watch(result: runs.Result) -> str:
        if not points:
            return ""
        running.add([metrics.from_entries(each) for each in result["tables"][points[0].key]])
        return f"{points[0].key}: " + evaluate.progress_text(running)

    with runs.claimed(state, options.output, described):
        results = list(runs.process_dataset(state, dataset, options.output, work, watch).values())
        if state.is_main_process:
            if points:
                _write_sweeps(options.output, dataset, base, points, results)
            if options.heads:
                _write_heads(options.output, results)
    state.destroy_process_group()
    return 0


def _parsed(sweeps: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The values of each parameter that is swept: those that its option names, else the default ones."""
    parsed: dict[str, tuple[Any, ...]] = {}
    for sweep in sweeps:
        name, _, values = sweep.partition("=")
        if name not in _SWEEPS:
            raise UsageError(f"--sweep: expected one of {', '.join(_SWEEPS)}, got {name!r}")
        convert, default = _SWEEPS[name]
        try:
            given = tuple(convert(value) for value in values.split(",")) if values else default
        except ValueError as error:
            raise UsageError(f"--sweep {name}: expected {convert.__name__} values, got {values!r}") from error
        parsed[name] = parsed.get(name, ()) + given
    return parsed


def _points(base: Settings, sweeps: dict[str, tuple[Any, ...]]) -> Iterator[Point]:
    """A point for each value of each sweep and for the base's own value, numbers in ascending order."""
    for parameter, given in sweeps.items():
        own = getattr(base, parameter)
        if parameter == "threshold" and not given:
            given = tuple(float(f"{own * factor:.4g}") for factor in _THRESHOLD_FACTORS)
        values = dict.fromkeys((*given, own))
        for value in values if isinstance(own, (str, tuple)) else sorted(values):
            shown = "own" if isinstance(value, tuple) else value  # the model's weights, a float a layer
            yield Point(parameter, shown, replace(base, **{parameter: value}))


def _confusion_entries(pipe: Any, sample: Sample, points: Sequence[Point]) -> runs.Result:
    """Table entries of each point; one forward pass a time step, one A_f a time step and weights serve all others."""
    size = (sample.image.shape[0], sample.image.shape[1])
    entries: dict[Settings, Any] = {}
    wanted = sorted({point.settings for point in points}, key=lambda each: (each.timestep, str(each.weights)))
    for timestep, of_timestep in groupby(wanted, key=lambda each: each.timestep):
        record = None
        for weights, group in groupby(of_timestep, key=lambda each: each.weights):
            alike = list(group)
            record = record or pipe.record(
                sample.image, timestep=timestep, processing_resolution=alike[0].processing_resolution
            )
            attention = record.aggregate(weights=weights, backend=alike[0].backend)
            check_finite(attention, sample.name)
            for settings in alike:
                labels = diffseg_labels(attention, record.output_grid, size, settings)
                entries[settings] = [metrics.entries(metrics.confusion(labels, truth)) for truth in sample.truths]
    return {point.key: entries[point.settings] for point in points}


def _write_sweeps(
    folder: Path, dataset: Dataset, base: Settings, points: Sequence[Point], results: Sequence[runs.Result]
) -> None:
    rows = []
    for point in points:
        tables = [result["tables"] for result in results]
        segments = [len({row for row, _, _ in each[point.key][0]}) for each in tables]
        rows.append(
            {
                "parameter": point.parameter,
                "value": point.value,
                "base": int(point.settings == base),
                **evaluate.summarise(dataset, tables, point.key),
                "segments": sum(segments) / len(segments),
            }
        )
    _write_csv(folder / "study.csv", rows)
    _plot(folder / "study.png", rows, f"{dataset.kind}, {len(dataset)} images")
    print(f"{len(dataset)} images; {folder / 'study.csv'}, {folder / 'study.png'}")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    runs.write_text(path, text.getvalue())


def _plot(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draws a panel a parameter, as in the paper's figure 10: accuracy and mIoU, the base marked by a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(parameter, list(group)) for parameter, group in groupby(rows, key=lambda row: row["parameter"])]
    figure = Figure(figsize=(3.2 * len(panels), 3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    names = [name for name in rows[0] if name.startswith(("accuracy", "miou")) and not name.endswith("pooled")]
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (parameter, group) in zip(all_axes, panels, strict=True):
        values = [row["value"] for row in group]
        line = "none" if isinstance(values[0], str) else "-"
        for name in names:
            figures = [row[name] for row in group]
            axes.plot(values, figures, marker="o", linestyle=line, label=evaluate.FIGURES[name])
        for row in group:
            if row["base"]:
                axes.axvline(row["value"], color="grey", linewidth=0.8, linestyle="--")
        axes.set_xlabel(_AXES[parameter])
        axes.grid(alpha=0.3)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=150)


def _heads(pipe: Any, sample: Sample, base: Settings) -> dict[str, list[float]]:
    """The mean divergence between the heads of each layer, listed by the longer side of its grid."""
    record = pipe.record(sample.image, timestep=base.timestep, processing_resolution=base.processing_resolution)
    found: dict[str, list[float]] = {}
    for query, key, grid, scale in zip(record.queries, record.keys, record.grids, record.scales, strict=True):
        found.setdefault(str(max(grid)), []).append(head_divergence(query[0], key[0], scale))
    return found


def head_divergence(query: Tensor, key: Tensor, scale: float) -> float:
    """Mean symmetric KL divergence D, in nats, between the maps of two heads, over all pairs of heads and all rows.

    Args:
        query, key: of one layer, [heads, n, d]; one head: NaN.
        scale: factor of Q K^T.
    """
    heads, cells, _ = query.shape
    if heads < 2:
        return float("nan")
    total = 0.0
    for rows in query.split(_ROWS_AT_ONCE, dim=1):
        maps, logs, _ = reference.log_terms((rows.float() @ key.float().mT * scale).softmax(-1))
        cross = torch.einsum("hrn,grn->hg", maps, logs).double()
        own = cross.diagonal()
        divergences = (own[:, None] + own[None] - cross - cross.mT) / 2
        total += float(divergences.triu(1).sum())
    return total / (cells * heads * (heads - 1) / 2)


def _write_heads(folder: Path, results: Sequence[runs.Result]) -> None:
    """Writes the mean over images and layers by resolution into a CSV file, and prints it."""
    by_side: dict[int, list[float]] = {}
    for result in results:
        for side, values in result["heads"].items():
            by_side.setdefault(int(side), []).extend(values)
    rows = [
        {"resolution": side, "mean_divergence": sum(values) / len(values), "layers": len(values) // len(results)}
        for side, values in sorted(by_side.items())
    ]
    _write_csv(folder / "heads.csv", rows)
    for row in rows:
        print(f"heads at resolution {row['resolution']:3}: mean pairwise divergence {row['mean_divergence']:.4f}")
    print(f"{len(results)} images; {folder / 'heads.csv'}")
