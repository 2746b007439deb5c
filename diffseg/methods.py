"""DiffSeg and its baselines as methods that label one image, with one forward pass for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from . import baselines, ops
from .datasets import Sample
from .loading import UsageError
from .metrics import Labels
from .ops import Rule, Weights
from .reference import Grid

if TYPE_CHECKING:
    from .pipeline import DiffSegPipeline

TITLES = {
    "diffseg": "DiffSeg",
    "diffseg-official": "DiffSeg, official rule",
    "kmeans-c": "K-Means-C (k = {clusters})",
    "kmeans-s": "K-Means-S (k = truth's)",
    "kmeans-colour": "k-means, colour + position (k = truth's)",
    "one-segment": "one segment",
}
"""The methods; the truth's k is the number of its labels, over several truths the rounded mean."""

_NEED_ATTENTION = {"diffseg", "diffseg-official", "kmeans-c", "kmeans-s"}


@dataclass(frozen=True)
class Settings:
    """What the labels follow from, besides the model and the image."""

    threshold: float
    timestep: int
    anchors: int = 16
    iterations: int = 3
    weights: Weights = "proportional"
    rule: Rule = "paper"
    refine: bool = False
    processing_resolution: int | None = None
    backend: str = "auto"

    @classmethod
    def of(cls, pipe: DiffSegPipeline, **changes: Any) -> Settings:
        """The model's own settings, with ``changes``; None leaves a setting as it is."""
        own = {name: pipe.config[name] for name in ("threshold", "timestep", "weights")}
        values = {**own, **{name: value for name, value in changes.items() if value is not None}}
        if not isinstance(values["weights"], str):
            values["weights"] = tuple(values["weights"])
        return cls(**values)


def predictions(
    pipe: DiffSegPipeline,
    sample: Sample,
    settings: Settings,
    methods: Sequence[str],
    *,
    clusters: int | None = None,
    seed: int = baselines.SEED,
) -> dict[str, Labels]:
    """Labels [H, W] of one image by each method; one forward pass serves them all.

    ``clusters`` is K-Means-C's constant, which it needs.
    """
    height, width, _ = sample.image.shape
    size, own = (height, width), count_segments(sample.truths)
    if _NEED_ATTENTION.intersection(methods):
        attention, grid = pipe.attention(
            sample.image,
            timestep=settings.timestep,
            processing_resolution=settings.processing_resolution,
            weights=settings.weights,
            backend=settings.backend,
        )
        check_finite(attention, sample.name)
    ways: dict[str, Callable[[], Labels]] = {
        "diffseg": lambda: diffseg_labels(attention, grid, size, replace(settings, rule="paper")),
        "diffseg-official": lambda: diffseg_labels(attention, grid, size, replace(settings, rule="official")),
        "kmeans-c": lambda: baselines.kmeans_attention(attention, grid, clusters or 1, size, seed=seed),
        "kmeans-s": lambda: baselines.kmeans_attention(attention, grid, own, size, seed=seed),
        "kmeans-colour": lambda: baselines.kmeans_colour(sample.image, own, seed=seed),
        "one-segment": lambda: np.zeros(size, np.int32),  # what any method must beat
    }
    return {method: ways[method]() for method in methods}


def diffseg_labels(attention: Tensor, grid: Grid, size: Grid, settings: Settings) -> Labels:
    """DiffSeg of one image from A_f [1, N, N]: labels 0..S-1, int32 [H, W]."""
    proposals = ops.merge(
        attention,
        grid=grid,
        anchors=min(settings.anchors, *grid),
        iterations=settings.iterations,
        threshold=settings.threshold,
        rule=settings.rule,
        backend=settings.backend,
    )
    if settings.refine:
        proposals = ops.refine(attention, proposals)
    labels: Labels = ops.numbered_labels(proposals, size, backend=settings.backend)[0][0].cpu().numpy()
    return labels


def check_finite(attention: Tensor, name: str) -> None:
    if not bool(attention.sum().isfinite()):
        raise UsageError(f"{name}: expected finite attention, found NaN or infinity; try --dtype bfloat16 or float32")


def count_segments(truths: Sequence[Labels]) -> int:
    """The number of labels in a truth, over several truths the rounded mean; at least 1."""
    return max(1, round(np.mean([len(np.unique(truth[truth >= 0])) for truth in truths])))
