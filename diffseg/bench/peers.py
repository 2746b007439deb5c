"""What the ops are compared with: eager PyTorch, the published code's own form, compiled code, other libraries."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..reference import Grid
from .cases import Case

WALKS = ("host", "device")
"""Where the eager baseline may walk the list: the faster counts. On the device nothing waits; on the host a step is a
row of bits."""


def eager_merge(
    attention: Tensor, grid: Grid, anchors: Sequence[int], thresholds: Sequence[float], rule: Any, walk: Any
) -> ops.Proposals:
    """The GEMM form in plain torch."""
    maps, counts = reference.merge(attention, grid, anchors, thresholds, rule, walk=walk)
    return ops.Proposals(maps, counts, grid)


def eager_labels(proposals: ops.Proposals, size: Grid) -> Tensor:
    labels = reference.label(proposals.maps, proposals.counts, proposals.grid, size)
    reference.renumber(labels, proposals.maps.shape[1])
    return labels


def sdpa(queries: Sequence[Tensor], keys: Sequence[Tensor], scales: Sequence[float] | None) -> list[Tensor]:
    """Fused attention on the same layers, keys as values: the products and exponentials of aggregate, without A_f."""
    return [
        F.scaled_dot_product_attention(query, key, key, scale=None if scales is None else scales[layer])
        for layer, (query, key) in enumerate(zip(queries, keys, strict=True))
    ]


def copy_of(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy between two tensors that reads and writes ``moved`` bytes together: the machine's copy bandwidth."""
    source = torch.rand(moved // 8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def compiler_missing() -> str | None:
    """Why ``torch.compile`` cannot run here."""
    if torch.cuda.is_available():
        return None
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return None if found else "torch.compile needs a C++ compiler"


@functools.cache
def compiled_first_round() -> Callable[..., Tensor]:
    """Round 1 in GEMM form under ``torch.compile``: [B, N, N] -> [B, P, N]."""

    def first_round(attention: Tensor, index: Tensor, threshold: float) -> Tensor:
        clamped = attention.clamp_min(reference.SMALLEST_PROBABILITY)
        log = (clamped * attention.shape[-1]).log()
        entropy = (clamped * log).sum(-1)
        anchor, anchor_log = clamped[:, index], log[:, index]
        cross = anchor @ log.mT + anchor_log @ clamped.mT
        near = (entropy[:, index, None] + entropy[:, None] - cross) / 2 < threshold
        near = near | (index[:, None] == torch.arange(attention.shape[-1], device=attention.device))
        return (near.to(attention.dtype) @ attention) / near.sum(-1, keepdim=True)

    compiled: Callable[..., Tensor] = torch.compile(first_round, dynamic=False)
    return compiled


def literal_aggregate_maps(
    maps: Sequence[Tensor], grids: Sequence[Grid], ratios: Sequence[float], output: Grid
) -> Tensor:
    """The published code's aggregation, step by step in torch: every upsampled and repeated tensor exists. [N, N]."""
    height, width = output
    total = torch.zeros(height, width, height, width, device=maps[0].device)
    for layer, (rows, columns), ratio in zip(maps, grids, ratios, strict=True):
        averaged = layer.float().mean(0).view(-1, 1, rows, columns)
        upsampled = F.interpolate(averaged, (height, width), mode="bilinear", align_corners=False)
        upsampled = (upsampled / upsampled.sum((2, 3), keepdim=True)).view(rows, columns, height, width)
        repeated = upsampled.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
        total += repeated * ratio
    return total.view(height * width, -1)


def literal_first_round(attention: Tensor, anchors: Sequence[int], threshold: float) -> Tensor:
    """The published first round: differences of all pairs, broadcast to [anchors / 16, N, N]. [N, N] -> [P, N].

    It runs in float32 here, in float16 in the published code.
    """
    chosen = attention[torch.tensor(anchors, device=attention.device)]
    bits = [literal_divergence(some[:, None], attention[None]) < threshold for some in chosen.split(16)]
    near = torch.cat(bits).to(attention.dtype)
    return near @ attention / near.sum(1, keepdim=True)


def literal_divergence(first: Tensor, second: Tensor) -> Tensor:
    smallest = reference.SMALLEST_PROBABILITY
    quotient = first.clamp_min(smallest).log() - second.clamp_min(smallest).log()
    return (first * quotient).sum(-1) / 2 - (second * quotient).sum(-1) / 2


def literal_later_round(elements: Tensor, threshold: float) -> Tensor:
    """The published later rounds: a group holds every element that is near, taken or not."""
    taken: set[int] = set()
    merged = []
    for number, element in enumerate(elements):
        if number in taken:
            continue
        near = literal_divergence(element[None], elements) < threshold
        near[number] = True
        taken.update(near.nonzero()[:, 0].tolist())
        merged.append(elements[near].mean(0))
    return torch.stack(merged)


def literal_labels(proposals: Tensor, grid: Grid, size: Grid) -> Tensor:
    upsampled = F.interpolate(proposals.view(1, -1, *grid), size, mode="bilinear", align_corners=False)
    return upsampled[0].argmax(0).to(torch.int32)


def literal_from_maps(case: Case, anchors: Sequence[int], iterations: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """Maps to labels as the published code does it, in torch."""
    ratios = ops.resolve_weights(case.weights, case.grids)

    def run(maps: Sequence[Tensor]) -> Tensor:
        labels = []
        for item in range(case.batch):
            attention = literal_aggregate_maps([layer[item] for layer in maps], case.grids, ratios, case.grid)
            elements = literal_first_round(attention, anchors, case.threshold)
            for _ in range(iterations - 1):
                elements = literal_later_round(elements, case.threshold)
            labels.append(literal_labels(elements, case.grid, case.size))
        return torch.stack(labels)

    return run


def kmeans_missing() -> str | None:
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError as error:
        return f"scikit-learn is not installed ({error}): pip install -e '.[evaluate]' in a checkout"
    return None


def kmeans(attention: Tensor, grid: Grid, clusters: int, size: Grid) -> Any:
    """scikit-learn's k-means on the rows of A_f of the first image: other labels, for the same purpose. [H, W]"""
    from ..baselines import kmeans_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct maps than clusters
        return kmeans_attention(attention[:1], grid, clusters, size)
