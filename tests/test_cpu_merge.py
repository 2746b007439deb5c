"""merge in C++ against the float64 reference, on every instruction set of this machine."""

import pytest
import torch
from contract import distances
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffseg
from diffseg.ops import anchor_indices

_cpu = pytest.importorskip("diffseg._cpu")


def scene(grid: tuple[int, int], *, batch: int = 1, noise: float = 0.3, seed: int = 0) -> Tensor:
    """Attention of a few regions, smooth within each: [B, N, N], float64."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, grid[0]), torch.linspace(-1, 1, grid[1]), indexing="ij")
    features = torch.stack([(y + x > 0.1), (x - y > 0.4), (y > 0)], -1).flatten(0, 1) * 2.0 - 1
    features = features + noise * torch.randn(batch, *features.shape, generator=generator)
    return (2 * features.double() @ features.double().mT).softmax(-1)


def divergence(maps: Tensor, others: Tensor) -> Tensor:
    return distances(maps[None], others[None])[0]


def measured(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """The kernel's lower bound, upper bound and value of D of all pairs."""
    out = torch.empty(len(maps), len(maps), 3)
    _cpu.divergences(maps.data_ptr(), len(maps), grid, out.data_ptr())
    return out


def assert_first_round(found: Tensor, attention: Tensor, anchors, threshold: float) -> None:
    """Proposals agree where no pair is near the threshold; elsewhere they lie between the means the band allows."""
    attention = attention.double()
    d = divergence(attention[list(anchors)], attention)
    band = (d - threshold).abs() < max(1e-4, 1e-3 * threshold)
    assert band.double().mean() < 0.01
    near = d < threshold
    near[range(len(anchors)), list(anchors)] = True
    expected = (near.double() @ attention) / near.sum(-1, keepdim=True)
    clear = ~band.any(-1)
    assert clear.any()
    torch.testing.assert_close(found[clear].double(), expected[clear], rtol=1e-4, atol=1e-9)
    slack = band.sum(-1, keepdim=True) / near.sum(-1, keepdim=True)
    assert ((found.double() - expected).abs() <= slack * attention.amax() + 1e-6).all()


@pytest.mark.parametrize("threshold", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("grid", [(16, 16), (11, 13), (5, 24)])
@pytest.mark.parametrize("batch", [1, 3])
def test_first_round(isa, grid, batch, threshold):
    attention = scene(grid, batch=batch).float()
    found = diffseg.merge(attention, grid=grid, anchors=5, iterations=1, threshold=threshold, backend="cpu")
    for item in range(batch):
        assert_first_round(found.maps[item], attention[item], anchor_indices(grid, 5), threshold)
    assert found.counts.tolist() == [25] * batch


@pytest.mark.parametrize("threshold", [0.3, 0.5, 1.0])
def test_first_round_on_noise(isa, threshold):
    attention = torch.rand(1, 400, 400, generator=torch.Generator().manual_seed(1))
    attention /= attention.sum(-1, keepdim=True)
    found = diffseg.merge(attention, anchors=7, iterations=1, threshold=threshold, backend="cpu")
    d = divergence(attention[0, list(anchor_indices((20, 20), 7))], attention[0])
    near = d < threshold
    counts = near.sum(-1)
    flips = ((d - threshold).abs() < max(1e-4, 1e-3 * threshold)).sum(-1)
    expected = (near.double() @ attention[0].double()) / counts[:, None]
    tight = flips == 0
    torch.testing.assert_close(found.maps[0][tight].double(), expected[tight], rtol=1e-4, atol=1e-9)
    assert ((found.maps[0] - expected).abs() <= 2 * flips[:, None] / counts[:, None] * attention.amax() + 1e-7).all()


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("thresholds", [(0.2, 0.2, 0.2), (0.5, 0.7, 0.4), (0.05, 1.0, 1.0, 1.0)])
def test_all_rounds(isa, rule, thresholds):
    attention = scene((16, 12), batch=2, seed=3)
    options = {"grid": (16, 12), "anchors": 6, "iterations": len(thresholds), "threshold": thresholds, "rule": rule}
    expected = diffseg.merge(attention, backend="reference", **options)
    found = diffseg.merge(attention.float(), backend="cpu", **options)
    assert found.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(found.maps.double(), expected.maps, rtol=1e-4, atol=1e-9)
    for maps, count in zip(found.maps, found.counts, strict=True):
        assert not maps[count:].any()


def test_rules_differ_where_groups_overlap(isa):
    """A chain a - b - c - d in which neighbours match: the second head takes b again under the official rule only."""
    centre = torch.tensor([0.0, 1.0, 2.0, 3.0])
    maps = torch.exp(-((torch.arange(4)[None] - centre[:, None]) ** 2) / 4)
    maps /= maps.sum(-1, keepdim=True)
    threshold = float(divergence(maps, maps)[[0, 1, 2], [1, 2, 3]].max()) * 1.01
    options = {"grid": (2, 2), "anchors": [0, 1, 2, 3], "threshold": [1e-6, threshold], "iterations": 2}
    for rule in ("paper", "official"):
        expected = diffseg.merge(maps[None].double(), rule=rule, backend="reference", **options)
        found = diffseg.merge(maps[None], rule=rule, backend="cpu", **options)
        assert found.counts.tolist() == expected.counts.tolist() == [2]
        torch.testing.assert_close(found.maps.double(), expected.maps, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("length", [1, 7, 143, 300])
def test_explicit_anchors(isa, length):
    attention = scene((11, 13), seed=4)
    anchors = torch.randint(0, 143, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    expected = diffseg.merge(attention, grid=(11, 13), anchors=anchors, threshold=0.4, backend="reference")
    found = diffseg.merge(attention.float(), grid=(11, 13), anchors=anchors, threshold=0.4, backend="cpu")
    assert found.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(found.maps.double(), expected.maps, rtol=1e-4, atol=1e-9)


def test_more_anchors_than_the_kernels_serve():
    attention = scene((8, 8)).float()
    with pytest.raises(ValueError, match=r"expected at most 1024 anchors .*got 1025"):
        diffseg.merge(attention, anchors=[3] * 1025, backend="cpu")
    assert diffseg.merge(attention, anchors=[3] * 1025).counts.tolist() == [1]


def test_bfloat16_and_strided_attention(isa):
    attention = scene((12, 12), batch=2).bfloat16()
    options = {"anchors": 4, "threshold": 0.5}
    expected = diffseg.merge(attention.float(), backend="cpu", **options)
    strided = attention.mT.contiguous().mT
    for given_attention in (attention, strided, torch.cat([attention, attention], -1)[..., :144]):
        found = diffseg.merge(given_attention, backend="cpu", **options)
        assert torch.equal(found.maps, expected.maps)
        assert torch.equal(found.counts, expected.counts)


def test_zeros_and_tiny_values(isa):
    attention = scene((12, 12)).float()
    attention[:, :, ::5] = 0
    attention[:, ::3, 1::7] = 1e-34
    attention[:, 70] = 0
    options = {"anchors": 5, "threshold": [0.7, 5.0, 5.0]}
    expected = diffseg.merge(attention.double(), backend="reference", **options)
    found = diffseg.merge(attention, backend="cpu", **options)
    assert found.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(found.maps.double(), expected.maps, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("structured", [True, False])
def test_non_finite_attention_is_reported(isa, value, structured):
    attention = scene((20, 20), batch=2).float() if structured else torch.rand(2, 400, 400) / 200
    for row, column in ((0, 399), (399, 0), (211, 77)):
        broken = attention.clone()
        broken[1, row, column] = value
        with pytest.raises(ValueError, match="attention: expected finite values, found NaN or infinity"):
            diffseg.merge(broken, anchors=4, threshold=0.1, backend="cpu")


def test_threads_change_no_bit(isa):
    attention = scene((16, 16), batch=2).float()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(diffseg.merge(attention, anchors=9, threshold=[0.4, 0.1, 0.1], backend="cpu"))
    for other in found[1:]:
        assert torch.equal(found[0].maps, other.maps)
        assert torch.equal(found[0].counts, other.counts)


def test_bounds_hold_and_decide_most_pairs_of_structured_maps(isa):
    maps = scene((32, 32), noise=0.05)[0, ::19].float().contiguous()
    lower, upper, _ = measured(maps, (32, 32)).unbind(-1)
    d = divergence(maps, maps)
    assert (lower <= d + 1e-4).all()
    assert (upper >= d - 1e-4).all()
    assert ((lower >= 1.0) | (upper < 1.0)).double().mean() > 0.9
    assert (upper < 1.0).any()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    sharpness=st.sampled_from([0.1, 1.0, 8.0, 60.0]),
    zeros=st.booleans(),
)
def test_divergence(seed, grid, sharpness, zeros):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(9, grid[0] * grid[1], generator=generator) ** sharpness
    if zeros:
        maps *= torch.rand(maps.shape, generator=generator) > 0.3
    maps /= maps.sum(-1, keepdim=True).clamp_min(1e-20)
    lower, upper, value = measured(maps, grid).unbind(-1)
    expected = divergence(maps, maps)
    torch.testing.assert_close(value.double(), expected.clamp_min(0), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(value, value.T, rtol=1e-6, atol=1e-5)
    assert value.diagonal().abs().max() < 1e-5
    assert (lower <= value + 1e-4 + 1e-6 * value).all()
    assert (upper >= value - 1e-4 - 1e-6 * value).all()
