"""Chooses the bundled model's timestep and threshold, and reports its accuracy, each on scenes of its own seeds.

    python -m diffseg.tiny.report                         # the table, on 200 held-out scenes
    python -m diffseg.tiny.report --choose --scenes 50    # writes the best choice into the model's configuration

No scene of either set was trained on, and the two sets do not meet (see ``diffseg.tiny.scenes``).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from ..datasets import Sample
from ..evaluate import table
from ..methods import TITLES, Settings, diffseg_labels, predictions
from ..metrics import RegionScores, confusion, matched_accuracy
from ..pipeline import DiffSegPipeline
from . import MODEL
from .scenes import REPORT_SEEDS, THRESHOLD_SEEDS, scene

TIMESTEPS = (10, 30, 100, 300)
THRESHOLDS = tuple(round(0.02 * 1.12**step, 4) for step in range(38))  # 0.02 to 1.3
SCENES = 200


def choose(pipe: DiffSegPipeline, count: int) -> dict[tuple[int, float], float]:
    """Mean accuracy over ``count`` scenes of each timestep and threshold."""
    accuracies = {(timestep, threshold): 0.0 for timestep in TIMESTEPS for threshold in THRESHOLDS}
    base = _settings(pipe)
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
    settings, clusters = _settings(pipe), typical_segments(count)
    scores = {method: RegionScores() for method in TITLES}
    for seed in tqdm(REPORT_SEEDS[:count], desc="held-out scenes", unit="scene"):
        image, truth = scene(seed)
        sample = Sample(str(seed), image, [truth.astype(np.int32)])
        for method, labels in predictions(pipe, sample, settings, list(TITLES), clusters=clusters).items():
            scores[method].add([confusion(labels, truth)])
    return {TITLES[method].format(clusters=clusters): each.figures() for method, each in scores.items()}


def _settings(pipe: DiffSegPipeline) -> Settings:
    return Settings(threshold=pipe.config.threshold, timestep=pipe.config.timestep)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffseg.tiny.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="a pipeline's folder (default: the bundled model)")
    parser.add_argument("--scenes", type=int, default=SCENES, help="how many (default: %(default)s)")
    parser.add_argument("--choose", action="store_true", help="choose timestep and threshold, write them to the model")
    arguments = parser.parse_args()

    pipe = DiffSegPipeline.from_pretrained(arguments.model)
    if arguments.choose:
        accuracies = choose(pipe, arguments.scenes)
        best = max(accuracies, key=lambda choice: accuracies[choice])
        for (timestep, threshold), accuracy in accuracies.items():
            if timestep == best[0] or threshold == best[1]:
                print(f"t = {timestep:3}, threshold {threshold:.4f}: accuracy {accuracy:.3f}")
        pipe.register_to_config(timestep=best[0], threshold=best[1])
        pipe.save_config(arguments.model)
        print(f"wrote t = {best[0]}, threshold {best[1]} to {arguments.model}/model_index.json")
    else:
        print(f"{arguments.scenes} held-out scenes, t = {pipe.config.timestep}, threshold {pipe.config.threshold}")
        print("\n".join(table(report(pipe, arguments.scenes))))


if __name__ == "__main__":
    main()
