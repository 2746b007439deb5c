"""The exactness contract on the aggregated attention, and what results are held against in several test files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import diffseg

SIDES = (64, 32, 16, 8)  # of the golden layers' grids


@cache
def golden(case: int) -> dict[str, NDArray[np.generic]]:
    """Inputs of the published code, and its results (see data/README.md); case: 1, 2 or 3."""
    with np.load(Path(__file__).parent / "data" / f"case{case}.npz") as arrays:
        return dict(arrays)


def skip_unless_it_runs(backend: str, device: str = "cuda") -> None:
    """Ends a test as skipped, with the reason, where a backend is not there."""
    if backend not in diffseg.available_backends(device):
        pytest.skip(diffseg.explain_backends()[backend])


def as_double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def logsumexps_of(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> list[Tensor]:
    """Of the rows of Q K^T d ** -0.5, computed in float64, float32."""
    return [
        (query.double() @ key.double().mT * query.shape[-1] ** -0.5).logsumexp(-1).float()
        for query, key in zip(queries, keys, strict=True)
    ]


def assert_same_attention(found: Tensor, expected: Tensor) -> None:
    """The contract on A_f: entries within 1e-4 relative + 1e-9, rows that sum to 1 within 1e-5."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    assert (found.double().sum(-1) - 1).abs().max() < 1e-5


def assert_layers_without_a_share_are_not_read(
    backend: str, queries: Sequence[Tensor], keys: Sequence[Tensor], grids: Sequence[tuple[int, int]]
) -> None:
    """With no share for the output grid's layers: their NaN does not show, and A_f is as of the others on that grid."""
    output = max(grids)
    shares = [0.0 if grid == output else 1.0 + layer for layer, grid in enumerate(grids)]
    used = [layer for layer, share in enumerate(shares) if share > 0]
    maps = [(query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) for query, key in zip(queries, keys, strict=True)]
    for op, inputs in (
        (diffseg.aggregate, (queries, keys)),
        (partial(diffseg.aggregate, logsumexps=logsumexps_of(queries, keys)), (queries, keys)),
        (diffseg.aggregate_maps, (maps,)),
    ):
        spoiled = [
            [each * torch.nan if share == 0 else each for each, share in zip(tensors, shares, strict=True)]
            for tensors in inputs
        ]
        found = op(*spoiled, grids=grids, weights=shares, backend=backend)
        rest = {"grids": [grids[layer] for layer in used], "weights": [shares[layer] for layer in used], "grid": output}
        kept = [[tensors[layer] for layer in used] for tensors in inputs]
        bare = op.func if isinstance(op, partial) else op
        expected = bare(*map(as_double, kept), dtype=torch.float64, backend="reference", **rest)
        assert_same_attention(found, expected)
        assert_same_attention(bare(*kept, backend=backend, **rest), expected)


def distances(first: Tensor, second: Tensor) -> Tensor:
    """D of all pairs, float64, [B, P, N] and [B, F, N] -> [B, P, F]."""
    first, second = first.double().clamp_min(1e-30), second.double().clamp_min(1e-30)
    difference = first[:, :, None] - second[:, None]
    return (difference * (first.log()[:, :, None] - second.log()[:, None])).sum(-1) / 2


def assert_numbered_as_the_reference(
    backend: str, length: int, size: tuple[int, int], device: str = "cpu", *, batch: int = 2
) -> None:
    """Labels below ``length``, some of which do not occur, contiguous and not."""
    generator = torch.Generator(device).manual_seed(length)
    labels = torch.randint(0, length, (batch, *size), dtype=torch.int32, device=device, generator=generator) // 3 * 2
    expected, strided = labels.clone(), labels.mT.contiguous().mT
    segments = torch.ops.diffseg.renumber(expected, length, "reference")
    for given in (labels, strided):
        assert torch.equal(torch.ops.diffseg.renumber(given, length, backend), segments)
        assert torch.equal(given, expected)
