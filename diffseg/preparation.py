"""Doing ahead of the first image what an implementation does once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .checks import check_integer
from .ops import segment
from .reference import Grid


def warmup(
    layers: Sequence[tuple[Grid, int, int]],
    size: Grid,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    **options: Any,
) -> None:
    """Runs the stage once on layers of the shapes given, so that no later call compiles or loads a kernel.

    Kernels are compiled for shapes and layouts: the tensors here lie as projections do, heads beside each other in a
    row of channels, both with and without log-sum-exps. A call must have come before a stage is recorded in a graph.

    Args:
        layers: (grid, heads, channels a head) of each self-attention layer.
        size: (H, W) of the labels.
        batch_size, dtype, device: of the queries and keys.
        options: of :func:`diffseg.segment`: weights, anchors, iterations, threshold, rule, backend.

    Raises:
        ValueError, TypeError: as :func:`diffseg.segment`; ValueError where torch cannot use ``device``.
    """
    check_integer("batch_size", batch_size, 1)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device: expected one that torch can use, got {device}: {error}") from error
    queries = [
        torch.zeros(batch_size, grid[0] * grid[1], heads, channels, dtype=dtype, device=device).transpose(1, 2)
        for grid, heads, channels in layers
    ]
    grids = [grid for grid, _, _ in layers]
    rows = [
        torch.full(query.shape[:3], math.log(query.shape[2]), dtype=torch.float32, device=device) for query in queries
    ]
    for logsumexps in (rows, None):
        segment(queries, queries, size, grids=grids, logsumexps=logsumexps, **options)
