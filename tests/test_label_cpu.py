"""The C++ label kernel against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import diffseg
from diffseg import Proposals, backends

GRIDS = [(1, 1), (1, 7), (9, 1), (5, 7), (12, 10), (33, 17)]
SIZES = [(1, 1), (1, 9), (40, 1), (3, 2), (5, 7), (31, 29), (64, 130)]


def random_proposals(grid: tuple[int, int], counts: list[int], length: int, *, seed: int = 0) -> Proposals:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(len(counts), length, grid[0] * grid[1], generator=generator)
    return Proposals(maps, torch.tensor(counts, dtype=torch.int32), grid)


def label(proposals: Proposals, size: tuple[int, int]) -> Tensor:
    return diffseg.label(proposals, size, backend="cpu")


def top_two_margin(proposals: Proposals, size: tuple[int, int]) -> Tensor:
    """Distance of the two largest values over the largest, [B, H, W]; infinite where there is one proposal."""
    values = F.interpolate(proposals.maps.double().unflatten(-1, proposals.grid), size, mode="bilinear")
    listed = torch.arange(values.shape[1]) < proposals.counts[:, None]
    values = values.masked_fill(~listed[:, :, None, None], -torch.inf)
    top = values.topk(2, 1).values if values.shape[1] > 1 else F.pad(values, (0, 0, 0, 0, 0, 1), value=-torch.inf)
    return (top[:, 0] - top[:, 1]) / top[:, 0].abs()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_reference(grid: tuple[int, int], size: tuple[int, int]) -> None:
    proposals = random_proposals(grid, [37, 1, 12], 37)
    exact = proposals._replace(maps=proposals.maps.double())
    found, expected = label(proposals, size), diffseg.label(exact, size, backend="reference")
    assert found.dtype == torch.int32
    assert found.shape == (3, *size)
    flipped = found != expected
    assert not (flipped & (top_two_margin(proposals, size) >= 1e-3)).any()
    assert flipped.double().mean() <= 1e-3


def test_at_the_size_of_use() -> None:
    proposals = random_proposals((64, 64), [9], 256, seed=1)
    exact = proposals._replace(maps=proposals.maps.double())
    flipped = label(proposals, (512, 512)) != diffseg.label(exact, (512, 512), backend="reference")
    assert not (flipped & (top_two_margin(proposals, (512, 512)) >= 1e-3)).any()
    assert flipped.double().mean() <= 1e-4


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e30])
def test_padding_never_wins(poison: float) -> None:
    proposals = random_proposals((5, 7), [1, 8, 20], 20)
    expected = label(proposals, (31, 29))
    for maps, count in zip(proposals.maps, proposals.counts.tolist(), strict=True):
        maps[count:] = poison
    assert torch.equal(label(proposals, (31, 29)), expected)


@pytest.mark.parametrize("pair", [(0, 1), (2, 9), (3, 19)])
def test_ties_go_to_the_lowest_index(pair: tuple[int, int]) -> None:
    proposals = random_proposals((5, 7), [20], 20)
    proposals.maps[:, pair, :] = 2.0
    assert (label(proposals, (31, 29)) == pair[0]).all()


def test_the_largest_of_negative_values_wins() -> None:
    proposals = random_proposals((5, 7), [20, 3], 20)
    proposals.maps.neg_()
    expected = diffseg.label(proposals, (31, 29), backend="reference")
    assert expected.unique().numel() > 3
    assert torch.equal(label(proposals, (31, 29)), expected)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_maps_in_which_nothing_wins_are_labelled_zero(value: float) -> None:
    maps = torch.full((1, 6, 35), value)
    assert not label(Proposals(maps, torch.tensor([6], dtype=torch.int32), (5, 7)), (31, 29)).any()


@pytest.mark.parametrize("layout", ["transposed", "every other proposal", "offset", "expanded"])
def test_strided_proposals(layout: str) -> None:
    proposals = random_proposals((5, 7), [6, 2], 6)
    maps = proposals.maps
    strided = {
        "transposed": maps.mT.contiguous().mT,
        "every other proposal": maps.repeat_interleave(2, dim=1)[:, ::2],
        "offset": torch.cat([torch.full((2, 1, 35), 9.0), maps], 1)[:, 1:],
        "expanded": maps[:1].expand(2, -1, -1),
    }[layout]
    assert not strided.is_contiguous()
    counts = torch.stack([proposals.counts, proposals.counts], 1)[:, 1]
    found = label(Proposals(strided, counts, (5, 7)), (31, 29))
    assert torch.equal(found, label(Proposals(strided.contiguous(), proposals.counts, (5, 7)), (31, 29)))
    assert found.unique().numel() > 3


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    proposals = random_proposals((33, 17), [37, 1, 12], 37)
    results = []
    for threads in (2, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(label(proposals, (131, 64)))
    assert all(torch.equal(result, results[0]) for result in results)


def test_input_is_left_alone() -> None:
    proposals = random_proposals((5, 7), [6, 2], 6)
    maps, counts = proposals.maps.clone(), proposals.counts.clone()
    label(proposals, (31, 29))
    assert torch.equal(proposals.maps, maps)
    assert torch.equal(proposals.counts, counts)


def test_auto_picks_the_kernel_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    native = backends.BACKENDS["cpu"].load()
    original = native.label

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments[0].dtype)
        return original(*arguments)

    monkeypatch.setattr(native, "label", counted)
    proposals = random_proposals((5, 7), [6], 6)
    diffseg.label(proposals, (31, 29))
    diffseg.label(proposals._replace(maps=proposals.maps.double()), (31, 29))
    diffseg.label(proposals, (31, 29), backend="reference")
    assert calls == [torch.float32]
