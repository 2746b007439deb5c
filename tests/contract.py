"""The exactness contract, and what results are held against in several test files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import diffseg
from diffseg import Proposals

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


class MergeContract:
    """What ``merge`` of ``backend`` is held to: tests of a GPU's kernels inherit from this."""

    backend: str

    def check(self, attention: Tensor, grid: tuple[int, int], **options: Any) -> Proposals:
        """Compares with the reference, given that no pair is within the contract's band around the threshold."""
        found = diffseg.merge(attention, grid=grid, backend=self.backend, **options)
        expected = diffseg.merge(attention.to(torch.float64), grid=grid, backend="reference", **options)
        assert found.counts.tolist() == expected.counts.tolist()
        torch.testing.assert_close(found.maps.double(), expected.maps, rtol=1e-4, atol=1e-9)
        return found

    @pytest.mark.parametrize("rule", ["paper", "official"])
    @pytest.mark.parametrize(("grid", "batch", "anchors"), [((5, 7), 3, 4), ((6, 6), 1, 6)])
    def test_equals_the_reference(
        self, attention: Callable[..., Tensor], grid: tuple[int, int], batch: int, anchors: int, rule: Any
    ) -> None:
        maps = attention(grid, batch=batch, regions=6, dtype=torch.float32)
        positions = torch.tensor(diffseg.ops.anchor_indices(grid, anchors))
        margin = (distances(maps[:, positions], maps) - 0.4).abs().min()
        assert margin > 1e-3, "the scene has a pair within the band: the test would show nothing"
        found = self.check(maps, grid, anchors=anchors, threshold=0.4, rule=rule)
        assert 1 < int(found.counts.max()) < anchors**2

    def test_given_anchors_may_repeat(self, attention: Callable[..., Tensor]) -> None:
        self.check(attention((4, 5), dtype=torch.float32), (4, 5), anchors=[3, 19, 3, 0, 7], threshold=0.5)

    def test_strided_attention(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((5, 5), batch=2, dtype=torch.float32)
        padded = torch.full((25, 2, 50), torch.nan)
        padded[:, :, ::2] = maps.transpose(0, 1)
        strided = padded[:, :, ::2].transpose(0, 1)
        found = self.check(strided, (5, 5), anchors=3, threshold=0.5)
        torch.testing.assert_close(found, diffseg.merge(maps, anchors=3, threshold=0.5, backend=self.backend))

    def test_maps_of_one_cell_each_stay_apart(self) -> None:
        found = self.check(torch.eye(16)[None], (4, 4), anchors=4)
        assert found.counts.tolist() == [16]

    def test_equal_maps_become_one(self) -> None:
        row = torch.rand(20).square()
        found = self.check((row / row.sum()).expand(2, 20, 20), (4, 5), anchors=4, threshold=1e-4)
        assert found.counts.tolist() == [1, 1]
        assert found.maps[:, 1:].eq(0).all()


class LabelContract:
    """The same of ``label``."""

    backend: str

    @pytest.mark.parametrize(
        ("grid", "size"), [((5, 4), (13, 17)), ((1, 6), (2, 9)), ((4, 4), (3, 3)), ((6, 5), (6, 5)), ((8, 8), (64, 64))]
    )
    def test_equals_the_reference(self, grid: tuple[int, int], size: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(3)
        maps = torch.rand(3, 14, grid[0] * grid[1], generator=generator)[:, ::2]
        proposals = Proposals(maps, torch.tensor([7, 1, 4], dtype=torch.int32), grid)
        found = diffseg.label(proposals, size, backend=self.backend)
        assert torch.equal(found, diffseg.label(proposals, size, backend="reference"))

    def test_ties_go_to_the_lowest_and_padding_never_wins(self) -> None:
        maps = torch.stack([torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([9.0, 9.0])])[None]
        proposals = Proposals(maps, torch.tensor([2], dtype=torch.int32), (1, 2))
        assert diffseg.label(proposals, (3, 3), backend=self.backend).eq(0).all()
