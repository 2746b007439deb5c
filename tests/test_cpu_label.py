"""label in C++ against the float64 reference, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffseg
from diffseg import Proposals

pytest.importorskip("diffseg._cpu")

GRIDS = [(1, 1), (1, 7), (9, 1), (5, 7), (8, 8), (33, 17)]
SIZES = [(1, 1), (1, 9), (40, 1), (3, 2), (5, 7), (31, 29), (64, 130), (8, 200)]


def random_proposals(
    grid: tuple[int, int], counts: list[int], length: int, *, smooth: bool = False, seed: int = 0
) -> Proposals:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(len(counts), length, *grid, generator=generator)
    if smooth:
        maps = F.avg_pool2d(maps, 5, 1, 2)
    return Proposals(maps.flatten(2), torch.tensor(counts, dtype=torch.int32), grid)


def label(proposals: Proposals, size: tuple[int, int]) -> Tensor:
    return diffseg.label(proposals, size, backend="cpu")


def assert_winners(found: Tensor, proposals: Proposals, size: tuple[int, int], *, most_others: float = 1e-3) -> None:
    """The winner's value is the largest, but for rounding, and it is the reference's winner but for ``most_others``."""
    exact = proposals._replace(maps=proposals.maps.double())
    upsampled = F.interpolate(exact.maps.unflatten(-1, proposals.grid), size, mode="bilinear", align_corners=False)
    assert found.dtype == torch.int32
    assert found.shape == (len(proposals.maps), *size)
    for values, count, winners in zip(upsampled, proposals.counts, found.long(), strict=True):
        assert 0 <= int(winners.min()) <= int(winners.max()) < count
        torch.testing.assert_close(values.gather(0, winners[None])[0], values[:count].amax(0), rtol=1e-5, atol=1e-9)
    expected = diffseg.label(exact, size, backend="reference")
    assert (found != expected).double().mean() <= most_others


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("smooth", [True, False])
def test_label(isa: str, grid: tuple[int, int], size: tuple[int, int], smooth: bool) -> None:
    proposals = random_proposals(grid, [37, 1, 12], 37, smooth=smooth)
    assert_winners(label(proposals, size), proposals, size)


def test_at_the_size_of_use(isa: str) -> None:
    proposals = random_proposals((64, 64), [9], 256, seed=1)
    assert_winners(label(proposals, (512, 512)), proposals, (512, 512), most_others=1e-4)


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e30])
def test_padding_never_wins(isa: str, poison: float) -> None:
    proposals = random_proposals((5, 7), [1, 8, 20], 20)
    expected = label(proposals, (31, 29))
    for maps, count in zip(proposals.maps, proposals.counts.tolist(), strict=True):
        maps[count:] = poison
    assert torch.equal(label(proposals, (31, 29)), expected)


@pytest.mark.parametrize("pair", [(0, 1), (2, 9), (3, 19)])
def test_ties_go_to_the_lowest_index(isa: str, pair: tuple[int, int]) -> None:
    proposals = random_proposals((5, 7), [20], 20)
    proposals.maps[:, pair, :] = 2.0
    assert (label(proposals, (31, 29)) == pair[0]).all()


def test_ties_of_maps_that_vary(isa: str) -> None:
    maps = random_proposals((4, 4), [3], 3).maps[:, [0, 1, 0, 1, 2]]
    found = label(Proposals(maps, torch.tensor([5], dtype=torch.int32), (4, 4)), (64, 64))
    assert found.unique().tolist() == [0, 1, 4]


def test_the_largest_of_negative_values_wins(isa: str) -> None:
    proposals = random_proposals((5, 7), [20, 3], 20)
    proposals.maps.neg_()
    expected = diffseg.label(proposals, (31, 29), backend="reference")
    assert expected.unique().numel() > 3
    assert torch.equal(label(proposals, (31, 29)), expected)
    proposals.maps[:, 2] = 0.0  # its bounds are the floor itself, less no rounding
    assert (label(proposals, (31, 29)) == 2).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), -float("inf")])
def test_maps_in_which_nothing_wins_are_labelled_zero(isa: str, value: float) -> None:
    maps = torch.full((1, 6, 35), value)
    assert not label(Proposals(maps, torch.tensor([6], dtype=torch.int32), (5, 7)), (31, 29)).any()


@pytest.mark.parametrize("layout", ["transposed", "every other proposal", "offset", "expanded"])
def test_strided_proposals(isa: str, layout: str) -> None:
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


def test_threads_change_no_bit(isa: str) -> None:
    proposals = random_proposals((33, 17), [37, 1, 12], 37)
    results = []
    for threads in (2, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(label(proposals, (131, 64)))
    assert all(torch.equal(result, results[0]) for result in results)


def test_input_is_left_alone(isa: str) -> None:
    proposals = random_proposals((5, 7), [6, 2], 6)
    maps, counts = proposals.maps.clone(), proposals.counts.clone()
    label(proposals, (31, 29))
    assert torch.equal(proposals.maps, maps)
    assert torch.equal(proposals.counts, counts)


@pytest.mark.parametrize("length", [1, 3, 70, 1024])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 13, 17), (2, 250, 301)])
def test_renumber(isa: str, shape: tuple[int, int, int], length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, length, shape, dtype=torch.int32, generator=generator)
    labels[0] = labels[0] // 2 * 2  # gaps
    strided = labels.mT.contiguous().mT
    expected, present = zip(*(image.unique(return_inverse=True)[::-1] for image in labels), strict=True)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for each in (labels.clone(), strided.clone()):
            segments = torch.ops.diffseg.renumber(each, length, "cpu")
            assert segments.tolist() == [len(image) for image in present]
            assert torch.equal(each.long(), torch.stack(expected))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    length=st.integers(1, 20),
)
def test_winners_are_listed_and_order_of_images_is_nothing(
    seed: int, grid: tuple[int, int], size: tuple[int, int], length: int
) -> None:
    counts = torch.randint(1, length + 1, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    proposals = random_proposals(grid, counts, length, seed=seed)
    found = label(proposals, size)
    assert (found >= 0).all()
    assert (found < proposals.counts[:, None, None]).all()
    flipped = Proposals(proposals.maps.flip(0), proposals.counts.flip(0), grid)
    assert torch.equal(label(flipped, size).flip(0), found)
