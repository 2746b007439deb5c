"""The Triton kernels under Triton's interpreter, on the CPU: run by test_triton.py, in a process of its own.

TRITON_INTERPRET is read when Triton is imported and holds for the whole process, in which nothing can then be compiled;
so pytest does not collect this file by itself. By hand:

    TRITON_INTERPRET=1 python -P -m pytest tests/triton_interpreted.py
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    INDIVISIBLE,
    RULES,
    AggregateContract,
    LabelContract,
    MapsContract,
    MergeContract,
    SegmentContract,
    as_double,
    distances,
)
from diffseg.kernels import aggregate as aggregate_kernels
from diffseg.kernels import cross as cross_kernels
from diffseg.kernels import label as label_kernels
from diffseg.kernels import launch
from diffseg.kernels import merge as merge_kernels
from torch import Tensor

import diffseg
from diffseg import Proposals, backends, reference


def test_integers_of_any_size_arrive() -> None:
    """Those from 2**31 to 2**32 come by way of four bytes in the interpreter: a negative scale, and a share of one."""
    values = [0, -1, 2**31 - 1, -(2**31), *range(2**31, 2**32, 2**25), 2**32, 2**62, -(2**63)]
    assert launch.integers_on_device(values, torch.device("cpu")).tolist() == values


class TestAggregate(AggregateContract):
    backend = "triton"
    rounding = 2**-7  # the interpreter cuts off

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

    def test_heads_in_parts(self, layers: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Layers of unlike heads add to the same parts, of which some get fewer heads than others, or none."""
        monkeypatch.setattr(aggregate_kernels, "_PROGRAMS", 3)
        made = [layers([(4, 4)]), *(layers([(2, 2)], heads=heads) for heads in (2, 4, 5))]
        queries, keys = ([getattr(scene, name)[0].float() for scene in made] for name in ("queries", "keys"))
        self.check(queries, keys)

    def test_same_bits_again(self, layers: Callable[..., Any]) -> None:
        scene = layers(INDIVISIBLE, dtype=torch.bfloat16)
        first, second = (
            diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend="triton") for _ in range(2)
        )
        assert torch.equal(first, second)


class TestAggregateMaps(MapsContract):
    backend = "triton"

    def test_rows_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(aggregate_kernels, "_LARGEST_ROW", 8)
        self.check_random(torch.float32, [(4, 5), (3, 3), (4, 5)])

    def test_heads_further_apart_than_32_bits_tell(self) -> None:
        memory = mmap.mmap(-1, 2**33 + 64)  # of which two pages are touched
        maps = torch.frombuffer(memory, dtype=torch.float16).as_strided((1, 2, 4, 4), (0, 2**32, 8, 1))
        self.check([maps.copy_(torch.rand(maps.shape))], [(2, 2)])


class TestMerge(MergeContract):
    backend = "triton"

    def test_a_list_longer_than_the_block_of_the_walk(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((7, 7), regions=12, dtype=torch.float32)
        found = self.check(maps, (7, 7), anchors=6, threshold=[0.02, 0.05], iterations=2)
        assert int(found.counts) > 2

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
        heads, owners, merged = merge_kernels._walk(near.bfloat16(), counts)
        expected = reference.walk_on_host(near, rule)
        for item, count in enumerate(merged.tolist()):
            head = heads[item, :count].long()
            assert head.tolist() == expected[item].any(-1).nonzero().flatten().tolist()
            group = near[item, head]
            if rule == "paper":
                group = group & (owners[item] == head[:, None])
            assert torch.equal(group, expected[item, head])


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


class TestSegment(SegmentContract):
    backend = "triton"


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
