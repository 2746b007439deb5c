"""aggregate and aggregate_maps in C++ against the float64 reference, on every instruction set of this machine."""

import pytest
import torch
from contract import assert_layers_without_a_share_are_not_read, assert_same_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffseg

pytest.importorskip("diffseg._cpu")

HALF = [torch.float16, torch.bfloat16]
STACKS = {  # (grid, depth) of each layer
    "square": [((8, 8), 40), ((16, 16), 80), ((8, 8), 7), ((4, 4), 160)],
    "wide": [((6, 10), 16), ((12, 20), 33), ((3, 5), 8)],
    "non-divisible": [((7, 9), 16), ((12, 20), 24), ((5, 20), 13), ((12, 20), 8)],
    "one": [((5, 7), 11)],
}


def layers(stack: str, *, batch: int = 1, heads: int = 3, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(2, batch, heads, h * w, d, generator=generator) for (h, w), d in STACKS[stack]]
    grids = [grid for grid, _ in STACKS[stack]]
    return [(3 * each[0]).to(dtype) for each in draw], [each[1].to(dtype) for each in draw], grids


def scores(query: Tensor, key: Tensor) -> Tensor:
    return query.double() @ key.double().mT * query.shape[-1] ** -0.5


def oracle(queries, keys, grids, **options) -> Tensor:
    wide = [[each.double() for each in tensors] for tensors in (queries, keys)]
    return diffseg.aggregate(*wide, grids=grids, dtype=torch.float64, backend="reference", **options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stack", STACKS)
def test_aggregate(isa, stack, batch, dtype):
    queries, keys, grids = layers(stack, batch=batch, dtype=dtype)
    expected = oracle(queries, keys, grids)
    found = diffseg.aggregate(queries, keys, grids=grids, backend="cpu")
    assert_same_attention(found, expected)
    logsumexps = [scores(query, key).logsumexp(-1).float() for query, key in zip(queries, keys, strict=True)]
    found = diffseg.aggregate(queries, keys, grids=grids, logsumexps=logsumexps, backend="cpu")
    assert_same_attention(found, expected)


@pytest.mark.parametrize("depth", [8, 40, 77, 160])
def test_depths_and_scales(isa, depth):
    queries, keys = torch.randn(2, 1, 2, 81, depth, generator=torch.Generator().manual_seed(depth))
    expected = oracle([queries], [keys], None, scales=[0.3])
    assert_same_attention(diffseg.aggregate([queries], [keys], scales=[0.3], backend="cpu"), expected)


def test_a_tap_of_no_weight_adds_nothing(isa):
    """At some pixels of 13 a tap on 7 cells weighs exactly 0; rounded, it would show beside a much larger neighbour."""
    generator = torch.Generator().manual_seed(2)
    queries, keys = ([torch.randn(1, 2, n, 16, generator=generator) * 4 for n in (7, 13)] for _ in range(2))
    grids = [(1, 7), (1, 13)]
    expected = oracle(queries, keys, grids)
    assert_same_attention(diffseg.aggregate(queries, keys, grids=grids, backend="cpu"), expected)
    maps = [torch.softmax(scores(query, key), -1).float() for query, key in zip(queries, keys, strict=True)]
    expected = diffseg.aggregate_maps([each.double() for each in maps], grids=grids, dtype=torch.float64)
    assert_same_attention(diffseg.aggregate_maps(maps, grids=grids, backend="cpu"), expected)


@pytest.mark.parametrize("stack", ["square", "wide", "non-divisible"])
def test_layers_without_a_share_are_not_read(isa, stack):
    assert_layers_without_a_share_are_not_read("cpu", *layers(stack, batch=2))


def test_strided_inputs(isa):
    queries, keys, grids = layers("wide", batch=2)
    strided = [
        [each.transpose(1, 2).contiguous().transpose(1, 2) for each in queries],
        [torch.cat([each, each], -1)[..., ::2].copy_(each) for each in keys],
    ]
    assert not any(each.is_contiguous() for each in strided[0] + strided[1])
    expected = diffseg.aggregate(queries, keys, grids=grids, backend="cpu")
    assert torch.equal(diffseg.aggregate(*strided, grids=grids, backend="cpu"), expected)


def test_scores_far_above_those_of_the_first_keys(isa):
    queries, keys, grids = layers("square")
    for each in keys:
        each[:, :, -2:] *= 100  # two: of one alone any large power would be all of the sum
    assert max(scores(*pair).amax() for pair in zip(queries, keys, strict=True)) > 200
    found = diffseg.aggregate(queries, keys, grids=grids, backend="cpu")
    # float32 scores of several hundred carry an error of several 1e-5, and so do their exponentials
    torch.testing.assert_close(found.double(), oracle(queries, keys, grids), rtol=1e-3, atol=1e-7)
    assert torch.isfinite(found).all()


def test_logsumexps_that_leave_no_mass_leave_zeros(isa):
    queries = [torch.ones(1, 2, 16, 4)]
    for backend in ("cpu", "reference"):
        found = diffseg.aggregate(queries, queries, logsumexps=[torch.full((1, 2, 16), 1e3)], backend=backend)
        assert found.eq(0).all()


def test_threads_change_no_bit(isa):
    queries, keys, grids = layers("non-divisible", batch=2)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(diffseg.aggregate(queries, keys, grids=grids, backend="cpu"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_non_finite_layers_are_named(isa, layer, value):
    queries, keys, grids = layers("square")
    queries[layer][0, 1, 5, 3] = value
    with pytest.raises(ValueError, match=f"layer {layer}: expected finite attention"):
        diffseg.aggregate(queries, keys, grids=grids, backend="cpu")
    maps = [torch.rand(1, 2, h * w, h * w) for h, w in grids]
    maps[layer][0, 1, 5, 3] = value
    with pytest.raises(ValueError, match=f"layer {layer}: expected finite attention"):
        diffseg.aggregate_maps(maps, grids=grids, backend="cpu")


def test_non_finite_logsumexps_are_reported(isa):
    queries, keys, grids = layers("square")
    logsumexps = [scores(query, key).logsumexp(-1).float() for query, key in zip(queries, keys, strict=True)]
    logsumexps[2][0, 2, 63] = torch.nan
    with pytest.raises(ValueError, match="layer 2: expected finite attention"):
        diffseg.aggregate(queries, keys, grids=grids, logsumexps=logsumexps, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("stack", STACKS)
def test_aggregate_maps(isa, stack, heads, batch, dtype):
    grids = [grid for grid, _ in STACKS[stack]]
    generator = torch.Generator().manual_seed(heads)
    maps = [torch.rand(batch, heads, h * w, h * w, generator=generator).pow(8).to(dtype) for h, w in grids]
    expected = diffseg.aggregate_maps(
        [each.double() for each in maps], grids=grids, dtype=torch.float64, backend="reference"
    )
    assert_same_attention(diffseg.aggregate_maps(maps, grids=grids, backend="cpu"), expected)
    strided = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in maps]
    assert_same_attention(diffseg.aggregate_maps(strided, grids=grids, backend="cpu"), expected)


def test_every_float16_is_widened(isa):
    values = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16)
    size = 180  # 180^2 cells hold the 31744 finite non-negative numbers
    maps = torch.zeros(size * size, dtype=torch.float16)
    maps[: len(values)] = values
    maps = maps.view(1, 1, size, size)
    expected = diffseg.aggregate_maps([maps.double()], grids=[(12, 15)], dtype=torch.float64, backend="reference")
    found = diffseg.aggregate_maps([maps], grids=[(12, 15)], backend="cpu")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cell", [0, 24], ids=["in a vector", "beyond the last"])
def test_infinity_of_float16_stays(isa, cell):
    maps = torch.ones(1, 1, 25, 25, dtype=torch.float16)
    maps[0, 0, 3, cell] = torch.inf
    with pytest.raises(ValueError, match="layer 0: expected finite attention"):
        diffseg.aggregate_maps([maps], backend="cpu")


def test_bfloat16_storage(isa):
    queries, keys, grids = layers("square")
    found = diffseg.aggregate(queries, keys, grids=grids, dtype=torch.bfloat16, backend="cpu")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, diffseg.aggregate(queries, keys, grids=grids, backend="cpu").bfloat16())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    depth=st.integers(1, 21),
    heads=st.integers(1, 4),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_rows_sum_to_one_and_order_of_heads_and_images_is_nothing(seed, grid, depth, heads, sharpness):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(2, 3, heads, grid[0] * grid[1], depth, generator=generator)
    queries *= sharpness
    found = diffseg.aggregate([queries], [keys], grids=[grid], backend="cpu")
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)
    order = torch.randperm(heads, generator=generator)
    permuted = diffseg.aggregate([queries[:, order]], [keys[:, order]], grids=[grid], backend="cpu")
    torch.testing.assert_close(permuted, found, rtol=1e-5, atol=1e-9)
    flipped = diffseg.aggregate([queries.flip(0)], [keys.flip(0)], grids=[grid], backend="cpu")
    assert torch.equal(flipped.flip(0), found)
