"""label in C++ against the float64 reference, on every instruction set of this machine."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffseg

_cpu = pytest.importorskip("diffseg._cpu")


@pytest.fixture(params=_cpu.available_isas())
def isa(request):
    previous = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(previous)


def proposals(grid, length: int, counts, *, smooth: bool = False, seed: int = 0) -> diffseg.Proposals:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(len(counts), length, *grid, generator=generator)
    if smooth:
        maps = F.avg_pool2d(maps, 5, 1, 2)
    return diffseg.Proposals(maps.flatten(2), torch.tensor(counts, dtype=torch.int32), grid)


def assert_winners(found: Tensor, given_proposals: diffseg.Proposals, size) -> None:
    """The winner's value is the largest, but for rounding; where the margin is clear, it is the reference's winner."""
    maps, counts, grid = given_proposals
    upsampled = F.interpolate(maps.double().unflatten(-1, grid), size, mode="bilinear", align_corners=False)
    for values, count, winners in zip(upsampled, counts, found.long(), strict=True):
        assert 0 <= int(winners.min()) <= int(winners.max()) < count
        top = values[:count].amax(0)
        torch.testing.assert_close(values.gather(0, winners[None])[0], top, rtol=1e-5, atol=1e-9)
    expected = diffseg.label(diffseg.Proposals(maps.double(), counts, grid), size, backend="reference")
    assert (found == expected).double().mean() >= 0.999


@pytest.mark.parametrize("size", [(64, 64), (37, 91), (5, 3), (1, 1), (8, 200)])
@pytest.mark.parametrize("grid", [(8, 8), (6, 11), (1, 7), (9, 1)])
@pytest.mark.parametrize("smooth", [True, False])
def test_label(isa, grid, size, smooth):
    given_proposals = proposals(grid, 19, [19, 1, 7], smooth=smooth)
    found = diffseg.label(given_proposals, size, backend="cpu")
    assert found.dtype == torch.int32
    assert_winners(found, given_proposals, size)


def test_ties_go_to_the_lowest_index(isa):
    maps = torch.rand(1, 3, 16)
    given_proposals = diffseg.Proposals(maps[:, [0, 1, 0, 1, 2]], torch.tensor([5], dtype=torch.int32), (4, 4))
    found = diffseg.label(given_proposals, (64, 64), backend="cpu")
    assert set(found.unique().tolist()) <= {0, 1, 4}
    zeros = diffseg.Proposals(torch.zeros(1, 4, 16), torch.tensor([4], dtype=torch.int32), (4, 4))
    assert not diffseg.label(zeros, (32, 32), backend="cpu").any()


def test_padding_and_layout_are_nothing(isa):
    given_proposals = proposals((8, 8), 12, [5, 12])
    found = diffseg.label(given_proposals, (50, 60), backend="cpu")
    padded = given_proposals.maps.clone()
    padded[0, 5:] = torch.inf
    assert torch.equal(diffseg.label(given_proposals._replace(maps=padded), (50, 60), backend="cpu"), found)
    strided = given_proposals._replace(maps=given_proposals.maps.mT.contiguous().mT)
    assert torch.equal(diffseg.label(strided, (50, 60), backend="cpu"), found)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    length=st.integers(1, 20),
)
def test_winners_are_listed_and_order_of_images_is_nothing(seed, grid, size, length):
    count = torch.randint(1, length + 1, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    given_proposals = proposals(grid, length, count, seed=seed)
    found = diffseg.label(given_proposals, size, backend="cpu")
    assert (found >= 0).all()
    assert (found < given_proposals.counts[:, None, None]).all()
    flipped = diffseg.Proposals(given_proposals.maps.flip(0), given_proposals.counts.flip(0), grid)
    assert torch.equal(diffseg.label(flipped, size, backend="cpu").flip(0), found)
