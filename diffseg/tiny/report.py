"""Chooses the bundled model's timestep and threshold, and reports its accuracy, each on scenes of its own seeds.

    python -m diffseg.tiny.report                         # the table, on 200 held-out scenes
    python -m diffseg.tiny.report --choose --scenes 50    # writes the best choice into the model's configuration

With ``--weights`` the choice is made for other weights of the layers in A_f than the model's own, and written with
them.

No scene of either set was trained on, and the two sets do not meet (see ``diffseg.tiny.scenes``).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..checks import WEIGHT_SCHEMES
from ..datasets import Sample
from ..evaluate import markdown_table
from ..methods import TITLES, Settings, diffseg_labels, predictions
from ..metrics import RegionScores, confusion, matched_accuracy
from ..pipeline import DiffSegPipeline
from . import MODEL
from .scenes import REPORT_SEEDS, THRESHOLD_SEEDS, scene

TIMESTEPS = (10, 30, 100, 300)
THRESHOLDS = tuple(round(0.02 * 1.12**step, 4) for step in range(46))  # 0.02 to 3.3
SCENES = 200


def choose(pipe: DiffSegPipeline, count: int) -> dict[tuple[int, float], float]:
    """Mean accuracy over ``count`` scenes of each timestep and threshold."""
    accuracies = {(timestep, threshold): 0.0 for timestep in TIMESTEPS for threshold in THRESHOLDS}
    base = Settings.of(pipe)
    for seed in tqdm(THRESHOLD_SEEDS[:count], desc="choosing", unit="scene"):
        image, truth = scene(seed)
        for timestep in TIMESTEPS:
            attention, grid = pipe.attention(image, timestep=timestep)
            labels = None
            for threshold in THRESHOLDS:
                if labels is None or labels.max() > 0:  # all one segment: so it stays at larger thresholds
                    labels = diffseg_labels(attention, grid, truth.shape, replace(base, threshold=threshold))
                accuracies[timestep, threshold] += matched_accuracy(labels, truth) / count
    return accuracies


def typical_segments(count: int) -> int:
    """The mean number of regions in the scenes on which choices are made: K-Means-C's constant."""
    return round(np.mean([scene(seed)[1].max() + 1 for seed in THRESHOLD_SEEDS[:count]]))


def report(pipe: DiffSegPipeline, count: int) -> dict[str, dict[str, float]]:
    """The figures of each method on ``count`` held-out scenes."""
    settings, clusters = Settings.of(pipe), typical_segments(count)
    scores = {method: RegionScores() for method in TITLES}
    for seed in tqdm(REPORT_SEEDS[:count], desc="held-out scenes", unit="scene"):
        image, truth = scene(seed)
        sample = Sample(str(seed), image, [truth.astype(np.int32)])
        for method, labels in predictions(pipe, sample, settings, list(TITLES), clusters=clusters).items():
            scores[method].add([confusion(labels, truth)])
    return {TITLES[method].format(clusters=clusters): each.figures() for method, each in scores.items()}


def write(model: Path, **options: Any) -> None:
    """Writes ``options`` into the model's configuration, as its own."""
    path = model / DiffSegPipeline.config_name
    config = {**json.loads(path.read_text()), **options}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    print(f"wrote {', '.join(f'{name} {value}' for name, value in options.items())} to {path}")


def _weights(text: str) -> str | list[float]:
    return text if text in WEIGHT_SCHEMES else [float(share) for share in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffseg.tiny.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="a pipeline's folder (default: the bundled model)")
    parser.add_argument("--scenes", type=int, default=SCENES, help="how many (default: %(default)s)")
    parser.add_argument("--choose", action="store_true", help="choose timestep and threshold, write them to the model")
    parser.add_argument(
        "--weights", type=_weights, metavar="SCHEME|W,W,...",
        help="to choose for: a scheme of diffseg.aggregate or a float a layer (default: the model's own)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.weights is not None and not arguments.choose:
        parser.error("--weights: expected --choose with it")

    pipe = DiffSegPipeline.from_pretrained(arguments.model)
    if arguments.weights is not None:
        pipe.register_to_config(weights=arguments.weights)
    if arguments.choose:
        accuracies = choose(pipe, arguments.scenes)
        best = max(accuracies, key=lambda choice: accuracies[choice])
        for (timestep, threshold), accuracy in accuracies.items():
            if timestep == best[0] or threshold == best[1]:
                print(f"t = {timestep:3}, threshold {threshold:.4f}: accuracy {accuracy:.3f}")
        write(Path(arguments.model), timestep=best[0], threshold=best[1], weights=pipe.config.weights)
    else:
        print(f"{arguments.scenes} held-out scenes, t = {pipe.config.timestep}, threshold {pipe.config.threshold}")
        print("\n".join(markdown_table(report(pipe, arguments.scenes))))


if __name__ == "__main__":
    main()
