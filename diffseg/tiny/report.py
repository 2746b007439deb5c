"""Chooses the bundled model's timestep and threshold, and reports its accuracy, each on scenes of its own seeds.

    python -m diffseg.tiny.report                         # the table, on 200 held-out scenes
    python -m diffseg.tiny.report --choose --scenes 50    # writes the best choice into the model's configuration

No scene of either set was trained on, and the two sets do not meet (see ``diffseg.tiny.scenes``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .. import Proposals, label, merge
from ..baselines import kmeans_attention, kmeans_colour
from ..metrics import matched_accuracy, matched_iou
from ..ops import Rule, renumber
from ..pipeline import DiffSegPipeline
from . import MODEL
from .scenes import REPORT_SEEDS, THRESHOLD_SEEDS, scene

TIMESTEPS = (10, 30, 100, 300)
THRESHOLDS = tuple(round(0.005 * 1.25**step, 4) for step in range(26))  # 0.005 to 1.3
SCENES = 200

Array = NDArray[Any]


def diffseg_labels(attention: torch.Tensor, threshold: float, rule: Rule, size: int) -> Array:
    """DiffSeg of one scene: A_f [1, N, N] to labels [size, size]."""
    proposals = merge(attention, threshold=threshold, rule=rule)
    return renumber(label(proposals, (size, size)), proposals.maps.shape[1])[0].numpy()


def choose(pipe: DiffSegPipeline, count: int) -> dict[tuple[int, float], float]:
    """Mean accuracy over ``count`` scenes of each timestep and threshold."""
    accuracies = {(timestep, threshold): 0.0 for timestep in TIMESTEPS for threshold in THRESHOLDS}
    for seed in tqdm(THRESHOLD_SEEDS[:count], desc="choosing", unit="scene"):
        image, truth = scene(seed)
        for timestep in TIMESTEPS:
            attention, _ = pipe.attention(image, timestep=timestep)
            labels = None
            for threshold in THRESHOLDS:
                if labels is None or labels.max() > 0:  # all one segment: so it stays at larger thresholds
                    labels = diffseg_labels(attention, threshold, "paper", len(image))
                accuracies[timestep, threshold] += matched_accuracy(labels, truth) / count
    return accuracies


def typical_segments(count: int) -> int:
    """The mean number of regions in the scenes on which choices are made: K-Means-C's constant."""
    return round(np.mean([scene(seed)[1].max() + 1 for seed in THRESHOLD_SEEDS[:count]]))


def report(pipe: DiffSegPipeline, count: int) -> dict[str, tuple[float, float]]:
    """Mean accuracy and mean IoU of each method on ``count`` held-out scenes."""
    threshold, constant = pipe.config.threshold, typical_segments(count)
    methods: dict[str, Callable[[torch.Tensor, Array, Array], Array]] = {
        "DiffSeg": lambda a, image, truth: diffseg_labels(a, threshold, "paper", len(image)),
        "DiffSeg, official rule": lambda a, image, truth: diffseg_labels(a, threshold, "official", len(image)),
        f"K-Means-C (k = {constant})": lambda a, image, truth: _clustered(a, constant, len(image)),
        "K-Means-S (k = truth's)": lambda a, image, truth: _clustered(a, int(truth.max()) + 1, len(image)),
        "k-means, colour + position (k = truth's)": lambda a, image, truth: kmeans_colour(image, int(truth.max()) + 1),
        "one segment": lambda a, image, truth: np.zeros_like(truth),
    }
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for seed in tqdm(REPORT_SEEDS[:count], desc="held-out scenes", unit="scene"):
        image, truth = scene(seed)
        attention, _ = pipe.attention(image)
        for name, method in methods.items():
            labels = method(attention, image, truth)
            scores[name].append((matched_accuracy(labels, truth), matched_iou(labels, truth)))
    return {name: tuple(np.mean(values, axis=0)) for name, values in scores.items()}  # type: ignore[misc]


def _clustered(attention: torch.Tensor, clusters: int, size: int) -> Array:
    """k-means on rows of A_f, its cluster means upsampled like proposals."""
    cells = torch.from_numpy(kmeans_attention(attention[0].numpy(), clusters)).long()
    means = torch.stack([attention[0][cells == cluster].mean(0) for cluster in range(clusters)])
    side = round(attention.shape[1] ** 0.5)
    proposals = Proposals(means[None], torch.tensor([clusters], dtype=torch.int32), (side, side))
    return label(proposals, (size, size))[0].numpy()


def table(scores: dict[str, tuple[float, float]]) -> Iterable[str]:
    yield "| method | pixel accuracy | mean IoU |"
    yield "| --- | --- | --- |"
    for name, (accuracy, iou) in scores.items():
        yield f"| {name} | {accuracy:.3f} | {iou:.3f} |"


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
