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
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RULES = ("paper", "official")
DIVISIBLE = [(6, 4), (3, 4), (6, 4), (3, 2)]
INDIVISIBLE = [(5, 3), (5, 7), (2, 4), (5, 3)]
NETWORKS = {  # (number, side of the grid, heads, channels a head) of the self-attention layers, and the image's side
    "SD 1.4": (((5, 64, 8, 40), (5, 32, 8, 80), (5, 16, 8, 160), (1, 8, 8, 160)), 512),
    "SD 2.1": (((5, 96, 5, 64), (5, 48, 10, 64), (5, 24, 20, 64), (1, 12, 20, 64)), 768),
    "SDXL": (((10, 64, 10, 64), (60, 32, 20, 64)), 1024),
}


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


class AggregateContract:
    """What ``aggregate`` of ``backend`` is held to: tests of a GPU's kernels inherit from this."""

    backend: str
    rounding = 2**-8 + 1e-4  # of storage in bfloat16

    def check(self, queries: Sequence[Tensor], keys: Sequence[Tensor], **options: Any) -> None:
        found = diffseg.aggregate(queries, keys, backend=self.backend, **options)
        options["dtype"] = torch.float64
        expected = diffseg.aggregate(as_double(queries), as_double(keys), backend="reference", **options)
        assert_same_attention(found, expected)

    @pytest.mark.parametrize("given", [True, False], ids=["logsumexps", "computed"])
    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE], ids=["divisible", "indivisible"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_meets_the_contract(
        self, layers: Callable[..., Any], dtype: torch.dtype, grids: list[tuple[int, int]], given: bool
    ) -> None:
        scene = layers(grids, batch=3 if grids is DIVISIBLE and given else 1, dim=24, dtype=dtype)
        logsumexps = logsumexps_of(scene.queries, scene.keys) if given else None
        self.check(scene.queries, scene.keys, grids=grids, logsumexps=logsumexps)

    @pytest.mark.parametrize("dim", [8, 40, 63, 96, 160])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_heads_of_any_width(self, layers: Callable[..., Any], dtype: torch.dtype, dim: int) -> None:
        scene = layers([(4, 5)], heads=1, dim=dim, dtype=dtype)
        self.check(scene.queries, scene.keys, grids=scene.grids)

    @pytest.mark.parametrize("step", [1, 2], ids=["projections", "every other channel"])
    def test_strided_inputs(self, layers: Callable[..., Any], step: int) -> None:
        scene = layers(DIVISIBLE, batch=2, heads=3, dim=16 * step, dtype=torch.float16)
        queries, keys = (
            [tensor.transpose(1, 2).contiguous().transpose(1, 2)[..., ::step] for tensor in tensors]
            for tensors in (scene.queries, scene.keys)
        )
        assert not queries[0].is_contiguous()
        logsumexps = [rows.transpose(1, 2).contiguous().transpose(1, 2) for rows in logsumexps_of(queries, keys)]
        self.check(queries, keys, grids=DIVISIBLE, logsumexps=logsumexps)

    def test_layers_of_one_grid_need_not_be_alike(self, layers: Callable[..., Any]) -> None:
        grids = [(3, 3), (6, 6), (6, 6), (3, 3), (6, 6)]
        shapes = [(1, 8), (2, 8), (3, 28), (2, 40), (2, 8)]
        made = [layers([grid], heads=heads, dim=dim) for grid, (heads, dim) in zip(grids, shapes, strict=True)]
        queries, keys = [scene.queries[0].float() for scene in made], [scene.keys[0].float() for scene in made]
        self.check(queries, keys, grids=grids, scales=[0.2, 0.3, 0.1, 0.25, 0.4], weights=[1.0, 2.0, 0.0, 3.0, 0.5])

    def test_large_scores_do_not_overflow(self, layers: Callable[..., Any]) -> None:
        scene = layers([(4, 4)], dtype=torch.float32)
        queries, keys = [scene.queries[0] * 8], scene.keys
        assert (queries[0] @ keys[0].mT).max() > 128  # 2 ** 128 is beyond float32
        self.check(queries, keys, grids=scene.grids, scales=[1.0])

    def test_a_negative_scale(self, layers: Callable[..., Any]) -> None:
        scene = layers([(3, 5)], dtype=torch.float32)
        self.check(scene.queries, scene.keys, grids=scene.grids, scales=[-0.5])

    def test_where_upsampling_weighs_a_large_neighbour_with_nearly_nothing(self) -> None:
        """A weight of 1e-7 in place of 0 is 1e-7 of the neighbour."""
        grids = [(1, 7), (1, 13)]  # in float32 the seventh cell of 13 lies 2e-7 beyond the fourth of 7
        generator = torch.Generator().manual_seed(4)
        queries = [5 * torch.eye(h * w).view(1, 1, h * w, h * w) for h, w in grids]
        keys = [query + 0.1 * torch.randn(query.shape, generator=generator) for query in queries]
        self.check(queries, keys, grids=grids, scales=[1.0, 1.0], weights=[1.0, 0.0])

    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE], ids=["divisible", "indivisible"])
    def test_layers_without_a_share_are_not_read(
        self, layers: Callable[..., Any], grids: list[tuple[int, int]]
    ) -> None:
        scene = layers(grids, batch=2, dtype=torch.float32)
        assert_layers_without_a_share_are_not_read(self.backend, scene.queries, scene.keys, grids)

    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE], ids=["rows of 16 bytes", "odd rows"])
    def test_storage_in_bfloat16(self, layers: Callable[..., Any], grids: list[tuple[int, int]]) -> None:
        scene = layers(grids, dtype=torch.float32)
        options = {"grids": scene.grids, "dtype": torch.bfloat16}
        found = diffseg.aggregate(scene.queries, scene.keys, backend=self.backend, **options)
        expected = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend="reference")
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=self.rounding, atol=0)

    def test_into_a_tensor(self, layers: Callable[..., Any]) -> None:
        scene = layers([(4, 4), (2, 2)], dtype=torch.float32)
        options = {"grids": scene.grids, "backend": self.backend}
        for run in (
            partial(diffseg.aggregate, scene.queries, scene.keys, **options),
            partial(diffseg.aggregate_maps, scene.maps(), **options),
        ):
            out = torch.full((1, 16, 16), torch.nan)
            assert run(out=out) is out
            assert torch.equal(out, run())

    def test_nan_reaches_the_result(self, layers: Callable[..., Any]) -> None:
        scene = layers([(4, 4), (2, 2)], dtype=torch.float32)
        scene.queries[1][0, 0, 2, 0] = torch.nan
        found = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend=self.backend)
        rows = found.isnan().any(-1).view(4, 4)
        assert rows[2:, :2].all()
        assert rows.sum() == 4

    def test_an_image_does_not_depend_on_its_batch(self, layers: Callable[..., Any]) -> None:
        scene = layers(DIVISIBLE, batch=3, dtype=torch.float16)
        together = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend=self.backend)
        queries, keys = ([each[1:2] for each in tensors] for tensors in (scene.queries, scene.keys))
        assert torch.equal(together[1:2], diffseg.aggregate(queries, keys, grids=scene.grids, backend=self.backend))


class MapsContract:
    """The same of ``aggregate_maps``."""

    backend: str

    def check(self, maps: Sequence[Tensor], grids: list[tuple[int, int]]) -> None:
        found = diffseg.aggregate_maps(maps, grids=grids, backend=self.backend)
        expected = diffseg.aggregate_maps(as_double(maps), grids=grids, dtype=torch.float64, backend="reference")
        assert_same_attention(found, expected)

    def check_random(self, dtype: torch.dtype, grids: list[tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        maps = [
            (3 * torch.rand(1, 1 + index % 2, h * w, h * w, generator=generator)).to(dtype)
            for index, (h, w) in enumerate(grids)
        ]
        self.check(maps, grids)

    @pytest.mark.parametrize(
        ("dtype", "grids"),
        [(torch.float32, DIVISIBLE), (torch.float16, INDIVISIBLE), (torch.bfloat16, [(4, 4), (2, 2)])],
        ids=["float32", "float16", "bfloat16"],
    )
    def test_rows_need_not_sum_to_one(self, dtype: torch.dtype, grids: list[tuple[int, int]]) -> None:
        self.check_random(dtype, grids)

    def test_maps_averaged_over_heads_and_strided(self) -> None:
        self.check([torch.rand(2, 12, 24).transpose(1, 2)[:, ::2], torch.rand(2, 3, 3)], [(3, 4), (3, 1)])

    def test_nan_reaches_the_result(self) -> None:
        maps = torch.rand(1, 6, 6)
        maps[0, 4, 2] = torch.nan
        found = diffseg.aggregate_maps([maps], grids=[(2, 3)], backend=self.backend)
        assert found.isnan().any(-1).nonzero().tolist() == [[0, 4]]


class MergeContract:
    """The same of ``merge``."""

    backend: str

    def check(self, attention: Tensor, grid: tuple[int, int], **options: Any) -> Proposals:
        """Compares with the reference, given that no pair is within the contract's band around the threshold."""
        found = diffseg.merge(attention, grid=grid, backend=self.backend, **options)
        expected = diffseg.merge(attention.to(torch.float64), grid=grid, backend="reference", **options)
        assert found.counts.tolist() == expected.counts.tolist()
        torch.testing.assert_close(found.maps.double(), expected.maps, rtol=1e-4, atol=1e-9)
        return found

    @pytest.mark.parametrize("rule", RULES)
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

    def test_attention_in_bfloat16(self, attention: Callable[..., Tensor]) -> None:
        self.check(attention((5, 6), dtype=torch.bfloat16), (5, 6), anchors=5, threshold=0.5)
        self.check(attention((4, 6), dtype=torch.bfloat16), (4, 6), anchors=4, threshold=0.5)

    def test_nan_reaches_the_proposals(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((12, 12), dtype=torch.float32)
        maps[0, 130, 7] = torch.nan
        found = diffseg.merge(maps, anchors=4, backend=self.backend)
        assert found.maps[0, : int(found.counts), 7].isnan().all()

    def test_maps_of_one_cell_each_stay_apart(self) -> None:
        found = self.check(torch.eye(16)[None], (4, 4), anchors=4)
        assert found.counts.tolist() == [16]

    def test_equal_maps_become_one(self) -> None:
        row = torch.rand(20).square()
        found = self.check((row / row.sum()).expand(2, 20, 20), (4, 5), anchors=4, threshold=1e-4)
        assert found.counts.tolist() == [1, 1]
        assert found.maps[:, 1:].eq(0).all()


class LabelContract:
    """The same of ``label`` and of numbering."""

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

    @pytest.mark.parametrize(("length", "size"), [(1, (3, 3)), (33, (9, 11)), (256, (64, 70)), (1024, (40, 60))])
    def test_numbering_equals_the_reference(self, length: int, size: tuple[int, int]) -> None:
        assert_numbered_as_the_reference(self.backend, length, size)


class SegmentContract:
    """The same of ``segment``."""

    backend: str

    @pytest.mark.parametrize("rule", RULES)
    def test_agrees_with_the_reference(self, layers: Callable[..., Any], rule: Any) -> None:
        scene = layers([(6, 8), (3, 4), (2, 2)], batch=2, dtype=torch.float32)
        options = {"grids": scene.grids, "anchors": 4, "threshold": 0.3, "rule": rule}
        found = diffseg.segment(scene.queries, scene.keys, (24, 32), backend=self.backend, **options)
        expected = diffseg.segment(
            as_double(scene.queries), as_double(scene.keys), (24, 32), backend="reference", **options
        )
        assert expected.max() > 1
        assert (found == expected).float().mean() >= 0.999
