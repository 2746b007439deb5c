"""The Triton kernels under Triton's interpreter, on the CPU: run by test_triton.py, in a process of its own.

TRITON_INTERPRET is read when Triton is imported and holds for the whole process, in which nothing can then be compiled;
so pytest does not collect this file by itself. By hand:

    TRITON_INTERPRET=1 python -P -m pytest tests/triton_interpreted.py
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from contract import (
    LabelContract,
    MergeContract,
    as_double,
    assert_layers_without_a_share_are_not_read,
    assert_numbered_as_the_reference,
    assert_same_attention,
    distances,
    logsumexps_of,
)
from diffseg.kernels import aggregate as aggregate_kernels
from diffseg.kernels import cross as cross_kernels
from diffseg.kernels import label as label_kernels
from diffseg.kernels import launch
from diffseg.kernels import merge as merge_kernels
from torch import Tensor

import diffseg
from diffseg import Proposals, backends, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIVISIBLE = [(6, 4), (3, 4), (6, 4), (3, 2)]
INDIVISIBLE = [(5, 3), (5, 7), (2, 4), (5, 3)]
RULES = ("paper", "official")


def check_aggregate(queries: Sequence[Tensor], keys: Sequence[Tensor], **options: Any) -> None:
    found = diffseg.aggregate(queries, keys, backend="triton", **options)
    expected = diffseg.aggregate(
        as_double(queries), as_double(keys), backend="reference", **(options | {"dtype": torch.float64})
    )
    assert_same_attention(found, expected)


def test_integers_of_any_size_arrive() -> None:
    """Those from 2**31 to 2**32 come by way of four bytes in the interpreter: a negative scale, and a share of one."""
    values = [0, -1, 2**31 - 1, -(2**31), *range(2**31, 2**32, 2**25), 2**32, 2**62, -(2**63)]
    assert launch.integers_on_device(values, torch.device("cpu")).tolist() == values


class TestAggregate:
    @pytest.mark.parametrize("given", [True, False], ids=["logsumexps", "computed"])
    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE], ids=["divisible", "indivisible"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_meets_the_contract(
        self, layers: Callable[..., Any], dtype: torch.dtype, grids: list[tuple[int, int]], given: bool
    ) -> None:
        scene = layers(grids, batch=3 if grids is DIVISIBLE and given else 1, dim=24, dtype=dtype)
        logsumexps = logsumexps_of(scene.queries, scene.keys) if given else None
        check_aggregate(scene.queries, scene.keys, grids=grids, logsumexps=logsumexps)

    @pytest.mark.parametrize("dim", [8, 40, 63, 96, 160])
    def test_heads_of_any_width(self, layers: Callable[..., Any], dim: int) -> None:
        scene = layers([(4, 5)], heads=1, dim=dim, dtype=torch.float16)
        check_aggregate(scene.queries, scene.keys, grids=scene.grids)

    @pytest.mark.parametrize("step", [1, 2], ids=["projections", "every other channel"])
    def test_strided_inputs_are_read_where_they_lie(self, layers: Callable[..., Any], step: int) -> None:
        scene = layers(DIVISIBLE, batch=2, heads=3, dim=16 * step, dtype=torch.float16)
        queries, keys = (
            [tensor.transpose(1, 2).contiguous().transpose(1, 2)[..., ::step] for tensor in tensors]
            for tensors in (scene.queries, scene.keys)
        )
        assert not queries[0].is_contiguous()
        logsumexps = [rows.transpose(1, 2).contiguous().transpose(1, 2) for rows in logsumexps_of(queries, keys)]
        check_aggregate(queries, keys, grids=DIVISIBLE, logsumexps=logsumexps)

    def test_layers_of_one_grid_need_not_be_alike(self, layers: Callable[..., Any]) -> None:
        grids = [(3, 3), (6, 6), (6, 6), (3, 3), (6, 6)]
        shapes = [(1, 8), (2, 8), (3, 20), (2, 16), (2, 8)]
        made = [layers([grid], heads=heads, dim=dim) for grid, (heads, dim) in zip(grids, shapes, strict=True)]
        queries, keys = [scene.queries[0].float() for scene in made], [scene.keys[0].float() for scene in made]
        check_aggregate(
            queries, keys, grids=grids, scales=[0.2, 0.3, 0.1, 0.25, 0.4], weights=[1.0, 2.0, 0.0, 3.0, 0.5]
        )

    def test_large_scores_do_not_overflow(self, layers: Callable[..., Any]) -> None:
        scene = layers([(4, 4)], dtype=torch.float32)
        queries, keys = [scene.queries[0] * 8], scene.keys
        assert (queries[0] @ keys[0].mT).max() > 128  # 2 ** 128 is beyond float32
        check_aggregate(queries, keys, grids=scene.grids, scales=[1.0])

    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE], ids=["divisible", "indivisible"])
    def test_layers_without_a_share_are_not_read(
        self, layers: Callable[..., Any], grids: list[tuple[int, int]]
    ) -> None:
        scene = layers(grids, batch=2, dtype=torch.float32)
        assert_layers_without_a_share_are_not_read("triton", scene.queries, scene.keys, grids)

    def test_storage_in_bfloat16_of_layers_that_are_not_alike(self, layers: Callable[..., Any]) -> None:
        """Each is a launch of its own; the sum is rounded once."""
        made = [layers([(4, 4)], heads=1 + layer % 3, dim=8 + layer, dtype=torch.float32) for layer in range(12)]
        queries, keys = [scene.queries[0] for scene in made], [scene.keys[0] for scene in made]
        maps = [(query @ key.mT).softmax(-1) for query, key in zip(queries, keys, strict=True)]
        expected = diffseg.aggregate(queries, keys, backend="reference")
        found = diffseg.aggregate(queries, keys, dtype=torch.bfloat16, backend="triton")
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)
        expected = diffseg.aggregate_maps(maps, backend="reference")
        found = diffseg.aggregate_maps(maps, dtype=torch.bfloat16, backend="triton")
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)

    def test_storage_in_bfloat16(self, layers: Callable[..., Any]) -> None:
        scene = layers(DIVISIBLE, dtype=torch.float32)
        options = {"grids": scene.grids, "dtype": torch.bfloat16}
        found = diffseg.aggregate(scene.queries, scene.keys, backend="triton", **options)
        expected = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend="reference")
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)  # the interpreter cuts off

    def test_into_a_tensor(self, layers: Callable[..., Any]) -> None:
        scene = layers([(4, 4), (2, 2)], dtype=torch.float32)
        options = {"grids": scene.grids, "backend": "triton"}
        maps = [(query @ key.mT).softmax(-1) for query, key in zip(scene.queries, scene.keys, strict=True)]
        for run in (
            lambda **more: diffseg.aggregate(scene.queries, scene.keys, **options, **more),
            lambda **more: diffseg.aggregate_maps(maps, **options, **more),
        ):
            out = torch.full((1, 16, 16), torch.nan)
            assert run(out=out) is out
            assert torch.equal(out, run())

    def test_nan_reaches_the_result(self, layers: Callable[..., Any]) -> None:
        scene = layers([(4, 4), (2, 2)], dtype=torch.float32)
        scene.queries[1][0, 0, 2, 0] = torch.nan
        found = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend="triton")
        rows = found.isnan().any(-1).view(4, 4)
        assert rows[2:, :2].all()
        assert rows.sum() == 4

    def test_same_bits_again(self, layers: Callable[..., Any]) -> None:
        scene = layers(INDIVISIBLE, dtype=torch.bfloat16)
        first, second = (
            diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend="triton") for _ in range(2)
        )
        assert torch.equal(first, second)


class TestAggregateMaps:
    @pytest.mark.parametrize(
        ("dtype", "grids", "longest"),
        [
            (torch.float32, DIVISIBLE, 4096),
            (torch.float16, INDIVISIBLE, 4096),
            (torch.bfloat16, [(4, 4), (2, 2)], 4096),
            (torch.float32, [(4, 5), (3, 3), (4, 5)], 8),  # rows in blocks
        ],
    )
    def test_rows_need_not_sum_to_one(
        self, dtype: torch.dtype, grids: list[tuple[int, int]], longest: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(aggregate_kernels, "_LARGEST_ROW", longest)
        generator = torch.Generator().manual_seed(0)
        maps = [
            (3 * torch.rand(1, 1 + index % 2, h * w, h * w, generator=generator)).to(dtype)
            for index, (h, w) in enumerate(grids)
        ]
        found = diffseg.aggregate_maps(maps, grids=grids, backend="triton")
        expected = diffseg.aggregate_maps(as_double(maps), grids=grids, dtype=torch.float64, backend="reference")
        assert_same_attention(found, expected)

    def test_heads_further_apart_than_32_bits_tell(self) -> None:
        memory = mmap.mmap(-1, 2**33 + 64)  # of which two pages are touched
        maps = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 2, 4, 4), (0, 2**32, 8, 1))
        maps.copy_(torch.rand(maps.shape))
        found = diffseg.aggregate_maps([maps], backend="triton")
        assert_same_attention(found, diffseg.aggregate_maps([maps.double()], dtype=torch.float64, backend="reference"))

    def test_maps_averaged_over_heads_and_strided(self) -> None:
        maps = [torch.rand(2, 12, 24).transpose(1, 2)[:, ::2], torch.rand(2, 3, 3)]
        grids = [(3, 4), (3, 1)]
        found = diffseg.aggregate_maps(maps, grids=grids, backend="triton")
        expected = diffseg.aggregate_maps(as_double(maps), grids=grids, dtype=torch.float64, backend="reference")
        assert_same_attention(found, expected)


class TestMerge(MergeContract):
    backend = "triton"

    def test_a_list_longer_than_the_block_of_the_walk(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((7, 7), regions=12, dtype=torch.float32)
        found = self.check(maps, (7, 7), anchors=6, threshold=[0.02, 0.05], iterations=2)
        assert int(found.counts) > 2

    def test_attention_in_bfloat16(self, attention: Callable[..., Tensor]) -> None:
        self.check(attention((5, 6), dtype=torch.bfloat16), (5, 6), anchors=5, threshold=0.5)

    @pytest.mark.parametrize("sharpness", [1.0, 8.0, 25.0])
    def test_distances_are_within_the_contract(self, sharpness: float) -> None:
        generator = torch.Generator().manual_seed(1)
        shared = torch.randn(1, 1, 300, generator=generator)
        logits = sharpness * (shared + 0.1 * torch.randn(1, 24, 300, generator=generator))
        maps = logits.double().softmax(-1).float()
        pairs = merge_kernels._all_pairs(maps, maps, None)
        found = (pairs.entropies[:, :, None] + pairs.map_entropies.sum(0)[:, None] - pairs.products.sum(0)) / 8192
        expected = distances(maps, maps)
        assert expected.max() > 0.005 * sharpness
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)  # the contract: within 1e-4

    @pytest.mark.parametrize("rule", RULES)
    def test_the_walk_on_random_bits(self, rule: str) -> None:
        generator = torch.Generator().manual_seed(2)
        near = torch.rand(4, 70, 70, generator=generator) < torch.tensor([0.0, 0.02, 0.1, 0.5])[:, None, None]
        near |= near.mT.clone() | torch.eye(70, dtype=torch.bool)
        counts = torch.tensor([70, 64, 33, 1], dtype=torch.int32)
        listed = torch.arange(70) < counts[:, None]
        near &= listed[:, None] & listed[:, :, None]
        heads, owners, merged = merge_kernels._walk(near.to(torch.int8), counts)
        expected = reference.walk_on_host(near, rule)
        for item, count in enumerate(merged.tolist()):
            head = heads[item, :count].long()
            assert head.tolist() == expected[item].any(-1).nonzero().flatten().tolist()
            group = near[item, head]
            if rule == "paper":
                group = group & (owners[item] == head[:, None])
            assert torch.equal(group, expected[item, head])

    def test_nan_reaches_the_proposals(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((4, 4), dtype=torch.float32)
        maps[0, 5, 7] = torch.nan
        found = diffseg.merge(maps, anchors=4, backend="triton")
        assert found.maps[0, : int(found.counts), 7].isnan().all()


class TestLabel(LabelContract):
    backend = "triton"

    def test_counts_of_any_stride(self) -> None:
        maps = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
        maps[:, 3] += 5
        for counts in (
            torch.tensor([[3, 4]] * 3, dtype=torch.int32)[:, 0],
            torch.tensor([3], dtype=torch.int32).expand(3),
        ):
            found = diffseg.label(Proposals(maps, counts, (2, 3)), (4, 4), backend="triton")
            assert int(found.max()) <= 2

    def test_no_proposals_label_everything_zero(self) -> None:
        found = label_kernels.label(torch.rand(1, 3, 4), torch.zeros(1, dtype=torch.int32), (2, 2), (5, 5))
        assert found.eq(0).all()

    @pytest.mark.parametrize(("length", "size"), [(1, (3, 3)), (33, (9, 11)), (64, (16, 16))])
    def test_numbering_equals_the_reference(self, length: int, size: tuple[int, int]) -> None:
        assert_numbered_as_the_reference("triton", length, size)


class TestCross:
    GRIDS = ((6, 4), (5, 3), (6, 4), (1, 3))
    HEADS = ((2, 24), (3, 40), (2, 24), (1, 8))  # number and channels

    def layers(self, dtype: torch.dtype, batch: int = 1, tokens: int = 9) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(4)
        shapes = [(h * w, heads, d) for (h, w), (heads, d) in zip(self.GRIDS, self.HEADS, strict=True)]
        queries = [3 * torch.randn(batch, heads, n, d, generator=generator) for n, heads, d in shapes]
        keys = [torch.randn(batch, tokens, heads, d, generator=generator).transpose(1, 2) for _, heads, d in shapes]
        return [each.to(dtype) for each in queries], [each.to(dtype) for each in keys]

    @pytest.mark.parametrize("size", [None, (13, 17)])
    @pytest.mark.parametrize(
        ("dtype", "batch", "tokens"), [(torch.float32, 1, 9), (torch.float16, 3, 20), (torch.bfloat16, 1, 77)]
    )
    def test_maps_meet_the_contract(
        self, dtype: torch.dtype, batch: int, tokens: int, size: tuple[int, int] | None
    ) -> None:
        queries, keys = self.layers(dtype, batch, tokens)
        options: dict[str, Any] = {
            "tokens": [[1], [2, 3], [0, tokens - 1, 4]], "grids": self.GRIDS, "size": size,
            "scales": [0.3, 0.2, 0.4, 0.1],
        }  # fmt: skip
        found = diffseg.aggregate_cross(queries, keys, backend="triton", **options)
        expected = diffseg.aggregate_cross(as_double(queries), as_double(keys), backend="reference", **options)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)

    def test_nan_reaches_the_maps(self) -> None:
        queries, keys = self.layers(torch.float32)
        queries[3][0, 0, 1, 0] = torch.nan
        found = diffseg.aggregate_cross(queries, keys, tokens=[[1]], grids=self.GRIDS, backend="triton")
        assert found.isnan().any()

    @pytest.mark.parametrize("masks", [3, 40])
    @pytest.mark.parametrize(
        ("grid", "size", "words"), [((5, 4), (13, 17), 3), ((6, 6), (6, 6), 1), ((3, 2), (40, 2), 20)]
    )
    def test_scores_equal_the_reference(
        self, grid: tuple[int, int], size: tuple[int, int], words: int, masks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        maps = torch.rand(2, words, *grid, generator=generator)
        labels = torch.randint(-1, masks + 2, (2, *size), generator=generator, dtype=torch.int32)
        expected = diffseg.score_masks(maps.double(), labels, masks=masks, backend="reference")
        for bands in (2, 256):
            monkeypatch.setattr(cross_kernels, "_MOST_BANDS", bands)
            found = diffseg.score_masks(maps, labels, masks=masks, backend="triton")
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)

    def test_a_longer_text_is_refused_by_name(self) -> None:
        queries, keys = self.layers(torch.float32, tokens=129)
        with pytest.raises(ValueError, match="expected at most 128 tokens, got 129"):
            diffseg.aggregate_cross(queries[:1], keys[:1], tokens=[[0]], grids=[(6, 4)], backend="triton")


@pytest.mark.parametrize("rule", RULES)
def test_segment_agrees_with_the_reference(layers: Callable[..., Any], rule: Any) -> None:
    scene = layers([(6, 8), (3, 4), (2, 2)], batch=2, dtype=torch.float32)
    options = {"grids": scene.grids, "anchors": 4, "threshold": 0.3, "rule": rule}
    found = diffseg.segment(scene.queries, scene.keys, (24, 32), backend="triton", **options)
    expected = diffseg.segment(
        as_double(scene.queries), as_double(scene.keys), (24, 32), backend="reference", **options
    )
    assert expected.max() > 1
    assert (found == expected).float().mean() >= 0.999


def test_warmup_runs_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    for module in (aggregate_kernels, merge_kernels, label_kernels):
        run = module.launch

        def noted(kernel: Any, *args: Any, run: Callable[..., None] = run, **more: Any) -> None:
            run(kernel, *args, **more)
            launched.append(kernel.__name__)

        monkeypatch.setattr(module, "launch", noted)
    diffseg.warmup([((4, 4), 2, 8), ((2, 2), 1, 16)], (8, 8), device="cpu", anchors=2, backend="triton")
    counts = Counter(launched)
    assert counts.keys() >= {"_products_kernel", "_walk_kernel", "_means_kernel"}
    assert counts["_logsumexps_kernel"] == 2  # one a grid, in the run that is not given them
    assert (counts["_tiles_kernel"], counts["_label_kernel"]) == (4, 2)  # two runs


class TestChoice:
    @pytest.mark.parametrize("op", backends.OPS)
    def test_the_interpreter_is_never_chosen(self, op: str) -> None:
        dtype = backends.BACKENDS["triton"].dtypes[op][0]
        chosen = backends.implementation("auto", op, torch.device("cpu"), dtype)
        assert "kernels" not in chosen.__module__

    def test_what_is_beyond_the_kernels_is_refused_by_name(self, layers: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=r"expected at most 1024 anchors \(32 a side\), got 1089"):
            diffseg.merge(torch.rand(1, 33 * 33, 33 * 33), anchors=33, backend="triton")
        scene = layers([(2, 2)], dim=257, dtype=torch.float32)
        with pytest.raises(ValueError, match="heads of at most 256 channels, got 257"):
            diffseg.aggregate(scene.queries, scene.keys, backend="triton")
        with pytest.raises(ValueError, match=r"got dtype=torch\.float64"):
            diffseg.aggregate_maps([torch.rand(1, 4, 4)], dtype=torch.float64, backend="triton")
