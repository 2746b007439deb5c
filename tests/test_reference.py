"""The reference implementation against the paper written out in loops (algorithm.py), and the exactness contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import algorithm
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

import diffseg
from diffseg import Proposals, reference
from diffseg.ops import anchor_indices, resolve_weights

DIVISIBLE = [(12, 10), (6, 5), (6, 5)]
INDIVISIBLE = [(6, 5), (12, 10), (4, 3), (5, 4)]
SQUARE = [(8, 8), (4, 4), (2, 2)]
RULES = ("paper", "official")


def reference_merge(attention: Tensor, **options: Any) -> Proposals:
    return diffseg.merge(attention, backend="reference", **options)


def listed(proposals: Proposals, item: int) -> np.ndarray:
    return proposals.maps[item, : int(proposals.counts[item])].numpy()


class TestAggregate:
    @pytest.mark.parametrize("weights", ["proportional", "per_layer", "literal", "floats"])
    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE, SQUARE], ids=["divisible", "indivisible", "square"])
    def test_from_queries_and_from_maps_equal_the_loops(
        self, layers: Callable[..., Any], grids: list[tuple[int, int]], weights: Any
    ) -> None:
        batch = 3 if grids is SQUARE else 1
        scene = layers(grids, batch=batch, seed=len(weights))
        weights = [0.5, 2.0, 0.25, 1.0][: len(grids)] if weights == "floats" else weights
        options = {"grids": grids, "weights": weights, "dtype": torch.float64, "backend": "reference"}
        from_queries = diffseg.aggregate(scene.queries, scene.keys, **options)
        maps = [
            np.stack([algorithm.softmax_maps(q, k, q.shape[-1] ** -0.5) for q, k in zip(query, key, strict=True)])
            for query, key in zip(map(Tensor.numpy, scene.queries), map(Tensor.numpy, scene.keys), strict=True)
        ]
        from_maps = diffseg.aggregate_maps([torch.from_numpy(layer) for layer in maps], **options)
        for item in range(batch):
            expected = algorithm.aggregate([layer[item] for layer in maps], grids, weights)
            np.testing.assert_allclose(from_queries[item].numpy(), expected, rtol=1e-10, atol=1e-15)
            np.testing.assert_allclose(from_maps[item].numpy(), expected, rtol=1e-10, atol=1e-15)

    @pytest.mark.parametrize("grid", [(12, 10), (13, 11)], ids=["divisible", "indivisible"])
    def test_the_output_grid_may_be_larger_than_all_layers(self, layers: Callable[..., Any], grid: Any) -> None:
        grids = [(6, 5), (4, 5), (6, 5)]
        scene = layers(grids)
        weights = [1.0, 2.0, 0.0]
        options: dict[str, Any] = {"grids": grids, "grid": grid, "weights": weights, "dtype": torch.float64}
        maps = scene.maps()
        expected = algorithm.aggregate([layer[0].numpy() for layer in maps], grids, weights, grid)
        scene.queries[2] = maps[2] = torch.full_like(maps[2], torch.nan)
        scene.keys[2] = scene.queries[2]
        for found in (
            diffseg.aggregate(scene.queries, scene.keys, backend="reference", **options),
            diffseg.aggregate_maps(maps, backend="reference", **options),
        ):
            np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-10, atol=1e-15)

    def test_literal_weights_are_the_text_with_one_normalisation_at_the_end(self, layers: Callable[..., Any]) -> None:
        scene = layers(SQUARE)
        maps = scene.maps()
        expected = algorithm.aggregate_by_the_text([layer[0].numpy() for layer in maps], SQUARE)
        found = diffseg.aggregate_maps(maps, weights="literal", dtype=torch.float64, backend="reference")
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-10)

    def test_maps_without_heads_are_averaged_maps(self, layers: Callable[..., Any]) -> None:
        maps = layers(SQUARE, batch=2).maps()
        with_heads = diffseg.aggregate_maps(maps, backend="reference")
        without = diffseg.aggregate_maps([layer.mean(1) for layer in maps], backend="reference")
        torch.testing.assert_close(with_heads, without, rtol=1e-6, atol=0)

    def test_rows_of_maps_are_normalised(self, layers: Callable[..., Any]) -> None:
        maps = [layer.mean(1) for layer in layers(INDIVISIBLE).maps()]
        mass = [1 + torch.rand(layer.shape[1], 1, dtype=layer.dtype) for layer in maps]
        options: dict[str, Any] = {"grids": INDIVISIBLE, "dtype": torch.float64, "backend": "reference"}
        scaled = diffseg.aggregate_maps([a * b for a, b in zip(maps, mass, strict=True)], **options)
        torch.testing.assert_close(scaled, diffseg.aggregate_maps(maps, **options))

    def test_scales(self, layers: Callable[..., Any]) -> None:
        scene = layers(SQUARE)
        scales = [0.1, 0.7, 0.3]
        found = diffseg.aggregate(scene.queries, scene.keys, scales=scales, dtype=torch.float64, backend="reference")
        maps = [
            algorithm.softmax_maps(query[0].numpy(), key[0].numpy(), scale)
            for query, key, scale in zip(scene.queries, scene.keys, scales, strict=True)
        ]
        expected = algorithm.aggregate(maps, SQUARE, "proportional")
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-10)

    def test_given_logsumexps_replace_the_softmax(self, layers: Callable[..., Any]) -> None:
        scene = layers(SQUARE, batch=2)
        logsumexps = [
            (query @ key.mT * 0.3).logsumexp(-1) for query, key in zip(scene.queries, scene.keys, strict=True)
        ]
        options: dict[str, Any] = {"scales": [0.3] * 3, "dtype": torch.float64, "backend": "reference"}
        given = diffseg.aggregate(scene.queries, scene.keys, logsumexps=logsumexps, **options)
        torch.testing.assert_close(given, diffseg.aggregate(scene.queries, scene.keys, **options))
        # Rows are weighed by exp(-logsumexp) before heads are averaged: proof that they are used.
        logsumexps[0][:, 0] += 1.0
        shifted = diffseg.aggregate(scene.queries, scene.keys, logsumexps=logsumexps, **options)
        assert (shifted - given).abs().max() > 1e-4

    def test_large_scores_do_not_overflow(self, layers: Callable[..., Any]) -> None:
        scene = layers(SQUARE, dtype=torch.float32)
        found = diffseg.aggregate([100 * query for query in scene.queries], scene.keys, backend="reference")
        torch.testing.assert_close(found.sum(-1), torch.ones(1, 64), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE], ids=["divisible", "indivisible"])
    @pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_float32_keeps_the_contract(
        self, layers: Callable[..., Any], grids: list[tuple[int, int]], stored: torch.dtype
    ) -> None:
        scene = layers(grids, batch=2, dim=40, dtype=stored)
        found = diffseg.aggregate(scene.queries, scene.keys, grids=grids, backend="reference")
        exact = diffseg.aggregate(
            [query.double() for query in scene.queries], [key.double() for key in scene.keys],
            grids=grids, dtype=torch.float64, backend="reference",
        )  # fmt: skip
        assert found.dtype == torch.float32
        assert (found.double().sum(-1) - 1).abs().max() < 1e-5
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-9)

    @pytest.mark.parametrize("entries", [1, 700])
    @pytest.mark.parametrize("grids", [DIVISIBLE, INDIVISIBLE], ids=["divisible", "indivisible"])
    def test_rows_in_blocks(
        self, layers: Callable[..., Any], grids: list[tuple[int, int]], entries: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scene = layers(grids, batch=2, heads=2)
        maps = scene.maps()
        rows = [
            (query @ key.mT * query.shape[-1] ** -0.5).logsumexp(-1)
            for query, key in zip(scene.queries, scene.keys, strict=True)
        ]
        options: dict[str, Any] = {"grids": grids, "dtype": torch.float64, "backend": "reference"}

        def found() -> Tensor:
            given = diffseg.aggregate(scene.queries, scene.keys, logsumexps=rows, **options)
            return torch.stack(
                [
                    diffseg.aggregate(scene.queries, scene.keys, **options),
                    given,
                    diffseg.aggregate_maps(maps, **options),
                ]
            )

        whole = found()
        monkeypatch.setattr(reference, "_ENTRIES_AT_ONCE", entries)
        torch.testing.assert_close(found(), whole, rtol=1e-12, atol=0)

    def test_bfloat16_storage(self, layers: Callable[..., Any]) -> None:
        scene = layers([(16, 16), (8, 8)], dtype=torch.float32)
        stored = diffseg.aggregate(scene.queries, scene.keys, dtype=torch.bfloat16, backend="reference")
        full = diffseg.aggregate(scene.queries, scene.keys, backend="reference")
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, full.bfloat16())
        labels = [diffseg.label(reference_merge(maps, anchors=4), (64, 64)) for maps in (stored, full)]
        assert labels[0].unique().numel() >= 3
        assert (labels[0] == labels[1]).double().mean() >= 0.99

    def test_order_of_heads_images_and_layers(self, layers: Callable[..., Any]) -> None:
        scene = layers(INDIVISIBLE, batch=3, heads=4)
        options: dict[str, Any] = {"dtype": torch.float64, "backend": "reference"}
        expected = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, **options)
        order = torch.tensor([2, 0, 3, 1])
        heads = diffseg.aggregate(
            [query[:, order] for query in scene.queries], [key[:, order] for key in scene.keys],
            grids=scene.grids, **options,
        )  # fmt: skip
        torch.testing.assert_close(heads, expected, rtol=1e-12, atol=0)
        order = torch.tensor([1, 2, 0])
        images = diffseg.aggregate(
            [query[order] for query in scene.queries], [key[order] for key in scene.keys], grids=scene.grids, **options
        )
        assert torch.equal(images, expected[order])
        layers_reversed = diffseg.aggregate(scene.queries[::-1], scene.keys[::-1], grids=scene.grids[::-1], **options)
        torch.testing.assert_close(layers_reversed, expected, rtol=1e-12, atol=0)

    def test_strided_inputs(self, layers: Callable[..., Any]) -> None:
        scene = layers(SQUARE, batch=2, heads=4)
        strided = [query.transpose(1, 2).contiguous().transpose(1, 2) for query in scene.queries]
        assert not strided[0].is_contiguous()
        found = diffseg.aggregate(strided, scene.keys, dtype=torch.float64, backend="reference")
        expected = diffseg.aggregate(scene.queries, scene.keys, dtype=torch.float64, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class TestWeights:
    def test_of_stable_diffusion(self) -> None:
        grids = [(side, side) for side in (64, 32, 16, 8, 16, 32, 64) for _ in range(1 if side == 8 else 2)]
        shares = resolve_weights("proportional", grids)
        total = {side: sum(s for s, g in zip(shares, grids, strict=True) if g[0] == side) for side in (64, 32, 16, 8)}
        assert total == pytest.approx({64: 64 / 120, 32: 32 / 120, 16: 16 / 120, 8: 8 / 120})
        assert shares[0] == shares[-1] == pytest.approx(64 / 120 / 4)
        assert resolve_weights("per_layer", [(4, 4), (4, 4), (2, 2)]) == pytest.approx([0.4, 0.4, 0.2])
        assert resolve_weights("literal", [(4, 4), (4, 4), (2, 2)]) == pytest.approx([0.25, 0.25, 0.5])
        assert resolve_weights([1, 0, 3], [(4, 4), (4, 4), (2, 2)]) == pytest.approx([0.25, 0, 0.75])
        for huge_or_tiny in (1e308, 1e-308):
            assert resolve_weights([huge_or_tiny] * 4, [(2, 2)] * 4) == [0.25] * 4

    def test_equal_cells_but_other_shapes_are_other_grids(self) -> None:
        assert resolve_weights("proportional", [(8, 8), (2, 2), (1, 4)]) == pytest.approx([8 / 12, 2 / 12, 2 / 12])

    @pytest.mark.parametrize("weights", ["proportional", "per_layer", "literal", [3.0, 1.0, 2.0, 5.0]], ids=str)
    def test_equal_the_loops(self, weights: Any) -> None:
        assert resolve_weights(weights, INDIVISIBLE) == pytest.approx(algorithm.layer_weights(weights, INDIVISIBLE))


class TestAnchors:
    def test_of_the_published_code(self) -> None:
        line = range(1, 64, 4)
        assert anchor_indices((64, 64), 16) == tuple(64 * row + column for row in line for column in line)

    @pytest.mark.parametrize("grid", [(12, 10), (7, 16), (1, 5), (64, 96)])
    def test_equal_the_loops(self, grid: tuple[int, int]) -> None:
        for side in range(1, min(grid) + 1):
            found = anchor_indices(grid, side)
            assert list(found) == algorithm.anchors(grid, side)
            assert len(set(found)) == side**2

    @pytest.mark.parametrize("given", [[5, 3, 5], (5, 3, 5), range(3), np.array([5, 3, 5]), torch.tensor([5, 3, 5])])
    def test_explicit_ones_stay_in_order(self, given: Any) -> None:
        assert anchor_indices((4, 4), given) == tuple(int(index) for index in given)


class TestMerge:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("anchors", [5, 2, [7, 3, 55, 20, 3, 40, 62]], ids=str)
    @pytest.mark.parametrize("thresholds", [[1.0], [0.5, 0.5, 0.5], [0.3, 0.6, 1.2, 0.2]], ids=str)
    @pytest.mark.parametrize(("grid", "batch"), [((9, 7), 1), ((8, 8), 3)], ids=str)
    def test_equals_the_loops(
        self,
        attention: Callable[..., Tensor],
        grid: tuple[int, int],
        batch: int,
        thresholds: list[float],
        anchors: Any,
        rule: str,
    ) -> None:
        maps = attention(grid, batch=batch, regions=6, seed=1)
        threshold: Any = thresholds[0] if len(set(thresholds)) == 1 else thresholds
        found = reference_merge(
            maps, grid=grid, anchors=anchors, iterations=len(thresholds), threshold=threshold, rule=rule
        )
        positions = algorithm.anchors(grid, anchors) if isinstance(anchors, int) else anchors
        assert found.maps.shape == (batch, len(positions), maps.shape[1])
        assert found.grid == grid
        for item in range(batch):
            expected = algorithm.merge(maps[item].numpy(), positions, thresholds, rule)
            assert int(found.counts[item]) == len(expected)
            np.testing.assert_allclose(listed(found, item), np.stack(expected), rtol=1e-9)
            assert not found.maps[item, len(expected) :].any()

    def test_the_rules_differ_in_overlapping_groups_only(self) -> None:
        """Elements on a line, each near its neighbours: 0 takes 1, then 2 heads a group that holds 1 or not."""
        rows = [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.4, 0.5, 0.1]]
        maps = torch.tensor([rows], dtype=torch.float64)
        first, middle, last = maps[0].numpy()
        near, far = algorithm.divergence(first, middle), algorithm.divergence(first, last)
        assert algorithm.divergence(middle, last) < 0.2
        assert near < 0.2 < far
        options: dict[str, Any] = {"grid": (1, 3), "anchors": [0, 1, 2], "iterations": 2, "threshold": [1e-9, 0.2]}
        paper, official = (reference_merge(maps, rule=rule, **options) for rule in RULES)
        assert paper.counts.tolist() == official.counts.tolist() == [2]
        np.testing.assert_allclose(listed(paper, 0), [(first + middle) / 2, last])
        np.testing.assert_allclose(listed(official, 0), [(first + middle) / 2, (middle + last) / 2])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_divergence_that_equals_the_threshold_does_not_match(self, dtype: torch.dtype) -> None:
        """Maps whose divergence, log(2) / 4, comes out without any rounding."""
        rows = [[0.5, 0.25, 0.25, 0.25], [0.25, 0.5, 0.25, 0.25], [0.0] * 4, [0.0] * 4]
        maps = torch.tensor([rows], dtype=dtype)
        equal = torch.full((4, 4), 2.0, dtype=dtype).log()[0, 0] / 4
        above = torch.nextafter(equal, torch.tensor(1.0, dtype=dtype))
        for threshold, matches in ((equal.item(), False), (above.item(), True)):
            one_round = reference_merge(maps, anchors=[0], iterations=1, threshold=threshold)
            assert torch.equal(one_round.maps[0, 0], maps[0, :2].mean(0) if matches else maps[0, 0])
            if dtype == torch.float32:  # log(2) ends in zeros there, so that 3/4 of it, met on the way, is exact too
                later = reference_merge(maps, anchors=[0, 1], iterations=2, threshold=[1e-9, threshold])
                assert later.counts.tolist() == [1 if matches else 2]

    def test_float32_divergences_are_within_1e_4_in_the_first_round(self, attention: Callable[..., Tensor]) -> None:
        """For each map that stands alone around its divergence from the anchor, thresholds 1e-4 below and above it."""
        exact = attention((12, 12), regions=6, seed=3)[0]
        maps = exact.float()
        exact = maps.double()
        checked = 0
        for anchor in (0, 50, 100):
            distance = np.array([algorithm.divergence(exact[anchor].numpy(), row) for row in exact.numpy()])
            for other in range(0, 144, 4):
                gaps = np.abs(np.delete(distance, other) - distance[other])
                if distance[other] < 2e-4 or gaps.min() < 2.1e-4:
                    continue
                for threshold in (distance[other] - 1e-4, distance[other] + 1e-4):
                    found = reference_merge(maps[None], anchors=[anchor], iterations=1, threshold=threshold)
                    expected = exact[distance < threshold].mean(0)
                    torch.testing.assert_close(found.maps[0, 0].double(), expected, rtol=1e-5, atol=0)
                    checked += 1
        assert checked > 80

    def test_float32_divergences_are_within_1e_4_in_later_rounds(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((12, 12), regions=6, seed=3, dtype=torch.float32)
        pairs = list(itertools.combinations(range(0, 144, 9), 2))
        for first, second in pairs:
            distance = algorithm.divergence(*maps[0, [first, second]].double().numpy())
            assert distance > 2e-4
            for threshold, count in ((distance - 1e-4, 2), (distance + 1e-4, 1)):
                found = reference_merge(
                    maps, anchors=[first, second], iterations=2, threshold=[1e-4, threshold], rule="paper"
                )
                assert found.counts.tolist() == [count], (first, second, distance)

    @pytest.mark.parametrize("rule", RULES)
    def test_float32_equals_float64_away_from_the_threshold(self, attention: Callable[..., Tensor], rule: str) -> None:
        maps = attention((16, 16), batch=3, regions=6, seed=5, dtype=torch.float32)
        single = reference_merge(maps, anchors=8, threshold=0.7, rule=rule)
        double = reference_merge(maps.double(), anchors=8, threshold=0.7, rule=rule)
        assert single.maps.dtype == torch.float32
        assert double.maps.dtype == torch.float64
        assert torch.equal(single.counts, double.counts)
        torch.testing.assert_close(single.maps.double(), double.maps, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("smallest", [0.0, 1e-42, 1e-35, 1e-31])
    def test_zeros_and_probabilities_below_the_clamp(self, smallest: float, dtype: torch.dtype) -> None:
        """Three blocks of cells that attend to themselves alone are three proposals, whatever the other cells hold."""
        block = torch.arange(36) // 12
        same = block[:, None] == block
        maps = torch.where(same, 1 / 12, smallest * torch.rand(36, 36)).to(dtype)[None]
        found = reference_merge(maps, anchors=6, threshold=1.0)
        assert found.counts.tolist() == [3]
        assert torch.isfinite(found.maps).all()
        expected = torch.where(same[::12], maps[0, 0, 0].to(found.maps.dtype), 0)
        torch.testing.assert_close(found.maps[0, :3], expected, rtol=1e-6, atol=1e-30)
        labels = diffseg.label(found, (6, 6), backend="reference")
        assert torch.equal(labels.flatten().long(), block)

    @pytest.mark.parametrize("walk", ["host", "device"])
    @pytest.mark.parametrize("rule", RULES)
    def test_padding_joins_no_group(self, rule: Any, walk: Any) -> None:
        """Three blocks lie at 66.6 from each other; the zeros after them would be at 33 from each."""
        same = torch.eye(3, dtype=torch.bool).repeat_interleave(12, 0).repeat_interleave(12, 1)
        maps = (same / 12.0)[None]
        found, counts = reference.merge(maps, (6, 6), range(36), [1.0, 1.0, 60.0, 60.0], rule, walk=walk)
        assert counts.tolist() == [3]
        torch.testing.assert_close(found[0, :3], maps[0, ::12])
        assert not found[0, 3:].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_the_clamp_is_1e_30(self, dtype: torch.dtype) -> None:
        """Cells that attend to themselves alone lie at 30 log(10) = 69.078 from each other."""
        maps = torch.eye(16, dtype=dtype)[None]
        assert reference_merge(maps, anchors=4, threshold=69.07).counts.tolist() == [16]
        joined = reference_merge(maps, anchors=4, iterations=1, threshold=69.09)
        torch.testing.assert_close(joined.maps, torch.full_like(maps, 1 / 16))

    def test_a_map_matches_itself_at_any_threshold(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((8, 8), dtype=torch.float32)
        found = reference_merge(maps, anchors=8, threshold=1e-30)
        assert found.counts.tolist() == [64]
        assert torch.equal(found.maps, maps)

    def test_copies_of_one_map_are_one_proposal(self) -> None:
        maps = torch.full((2, 16, 16), 1 / 16)
        found = reference_merge(maps, anchors=4, threshold=1e-6)
        assert found.counts.tolist() == [1, 1]
        torch.testing.assert_close(found.maps[:, 0], maps[:, 0])

    @pytest.mark.parametrize("rule", RULES)
    def test_a_batch_equals_its_images(self, attention: Callable[..., Tensor], rule: str) -> None:
        maps = attention((9, 7), batch=3, regions=5, seed=0)
        options: dict[str, Any] = {"grid": (9, 7), "anchors": 7, "threshold": 0.4, "rule": rule}
        together = reference_merge(maps, **options)
        assert len(set(together.counts.tolist())) > 1
        for item, image in enumerate(maps):
            alone = reference_merge(image[None], **options)
            assert torch.equal(alone.counts[0], together.counts[item])
            torch.testing.assert_close(alone.maps[0], together.maps[item], rtol=1e-12, atol=0)
        order = [2, 0, 1]
        permuted = reference_merge(maps[order], **options)
        torch.testing.assert_close(permuted.maps, together.maps[order], rtol=1e-12, atol=0)
        assert torch.equal(permuted.counts, together.counts[order])

    def test_counts(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((8, 8), batch=2)
        before = 64
        for iterations in range(1, 6):
            found = reference_merge(maps, anchors=8, iterations=iterations, threshold=0.2)
            assert found.counts.dtype == torch.int32
            assert found.counts.min() >= 1
            assert found.counts.max() <= before
            before = int(found.counts.max())
        assert reference_merge(maps, anchors=8, iterations=1).counts.tolist() == [64, 64]

    def test_rows_in_blocks(self, attention: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
        maps = attention((9, 7))
        whole = reference_merge(maps, grid=(9, 7), anchors=4, threshold=0.5)
        monkeypatch.setattr(reference, "_ENTRIES_AT_ONCE", 10 * 63)
        blocks = reference_merge(maps, grid=(9, 7), anchors=4, threshold=0.5)
        assert torch.equal(whole.counts, blocks.counts)
        torch.testing.assert_close(whole.maps, blocks.maps, rtol=1e-12, atol=0)


class TestWalk:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("density", [0.03, 0.2, 0.6])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_on_random_bits(self, symmetric: bool, density: float, rule: str) -> None:
        """Device, host and sets agree, on matrices that rounding could not even produce."""
        generator = torch.Generator().manual_seed(0)
        counts = torch.tensor([23, 1, 17, 8])
        near = torch.rand(4, 23, 23, generator=generator) < density
        near = near | near.mT if symmetric else near
        in_list = torch.arange(23) < counts[:, None]
        near = (near | torch.eye(23, dtype=torch.bool)) & in_list[:, None] & in_list[:, :, None]
        on_host, on_device = reference.walk_on_host(near, rule), reference.walk_on_device(near, rule)
        assert torch.equal(on_host, on_device)
        for bits, groups in zip(near, on_host, strict=True):
            expected = algorithm.greedy_groups([set(row.nonzero().flatten().tolist()) for row in bits], rule)
            found = {head: set(row.nonzero().flatten().tolist()) for head, row in enumerate(groups) if row.any()}
            assert found == expected

    @pytest.mark.parametrize("rule", RULES)
    def test_merge_on_the_device(self, attention: Callable[..., Tensor], rule: str) -> None:
        maps = attention((9, 7), batch=2, regions=6)
        arguments = (maps, (9, 7), anchor_indices((9, 7), 6), [0.2, 0.3, 0.3], rule)
        host, device = (reference.merge(*arguments, walk=walk) for walk in ("host", "device"))
        assert host[1].max() > 2
        assert torch.equal(host[0], device[0])
        assert torch.equal(host[1], device[1])


class TestRefine:
    @pytest.mark.parametrize(("batch", "seed"), [(1, 0), (3, 1)])
    def test_equals_scikit_learn(self, attention: Callable[..., Tensor], batch: int, seed: int) -> None:
        maps = attention((12, 10), batch=batch, regions=10, seed=seed)
        proposals = reference_merge(maps, grid=(12, 10), anchors=5, threshold=0.8)
        refined = diffseg.refine(maps, proposals)
        assert torch.equal(refined.counts, proposals.counts)
        assert refined.grid == proposals.grid
        for item in range(batch):
            initial = listed(proposals, item)
            means = KMeans(len(initial), init=initial, n_init=1, tol=0, algorithm="lloyd").fit(maps[item].numpy())
            np.testing.assert_allclose(listed(refined, item), means.cluster_centers_, rtol=1e-9, atol=1e-15)
            assert not refined.maps[item, len(initial) :].any()
        assert ((refined.maps - proposals.maps).abs().amax((1, 2)) > 1e-3).all()

    @pytest.mark.parametrize("iterations", [1, 2, 3, 300])
    def test_equals_the_loops(self, attention: Callable[..., Tensor], iterations: int) -> None:
        maps = attention((8, 8), regions=6, seed=2)
        centres = maps[:, [0, 1, 2, 3, 9]]  # poor ones, so that iterations make a difference
        proposals = Proposals(centres, torch.tensor([5], dtype=torch.int32), (8, 8))
        refined = diffseg.refine(maps, proposals, max_iterations=iterations)
        expected = algorithm.lloyd(maps[0].numpy(), centres[0].numpy(), iterations)
        np.testing.assert_allclose(listed(refined, 0), np.stack(expected), rtol=1e-9)

    def test_iterations_stop_where_they_are_told(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((8, 8), regions=6, seed=2)
        proposals = Proposals(maps[:, [0, 1, 2, 3, 9]], torch.tensor([5], dtype=torch.int32), (8, 8))
        early, late = diffseg.refine(maps, proposals, max_iterations=1), diffseg.refine(maps, proposals)
        assert (early.maps - late.maps).abs().max() > 1e-3

    def test_what_all_maps_share_costs_no_precision(self) -> None:
        """In float32 squares of 1000 hide differences of 0.01."""
        points = torch.full((1, 4, 4), 1000.0)
        points[0, :, 0] += torch.tensor([0.0, 0.01, 0.02, 0.03])
        proposals = Proposals(points[:, [0, 3]], torch.tensor([2], dtype=torch.int32), (2, 2))
        refined = diffseg.refine(points, proposals)
        torch.testing.assert_close(refined.maps[0, :, 0], points[0, :, 0].view(2, 2).mean(1))

    def test_an_empty_cluster_keeps_its_centre_and_may_win_points_back(self) -> None:
        """On a line: the first centre takes 0, 0 and 1.5, moves to 0.5, and loses 1.5 to the idle centre at 2.1."""
        points = torch.zeros(1, 4, 4)
        points[0, :, 0] = torch.tensor([0.0, 0.0, 1.5, 100.0])
        centres = torch.zeros(1, 3, 4)
        centres[0, :, 0] = torch.tensor([1.0, 2.1, 99.0])
        refined = diffseg.refine(points, Proposals(centres, torch.tensor([3], dtype=torch.int32), (2, 2)))
        assert refined.counts.tolist() == [3]
        torch.testing.assert_close(refined.maps[0, :, 0], torch.tensor([0.0, 1.5, 100.0]))

    def test_a_cluster_that_ends_empty_is_dropped(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((8, 8), batch=2, dtype=torch.float32)
        proposals = reference_merge(maps, anchors=4)
        assert (proposals.counts > 1).all()
        far = torch.full_like(proposals.maps[:, :1], 5.0)
        longer = Proposals(torch.cat([far, proposals.maps], 1), proposals.counts + 1, (8, 8))
        expected, found = diffseg.refine(maps, proposals), diffseg.refine(maps, longer)
        assert torch.equal(found.counts, expected.counts)
        torch.testing.assert_close(found.maps[:, :-1], expected.maps)
        assert not found.maps[:, -1].any()


class TestLabel:
    @pytest.mark.parametrize("size", [(25, 20), (5, 4), (12, 10), (1, 1), (17, 3), (2, 31)])
    @pytest.mark.parametrize(("grid", "batch"), [((12, 10), 1), ((7, 7), 3), ((1, 6), 1)], ids=str)
    def test_equals_the_loops(self, grid: tuple[int, int], batch: int, size: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        maps = torch.rand(batch, 19, grid[0] * grid[1], generator=generator, dtype=torch.float64)
        counts = torch.tensor([19, 4, 1][:batch], dtype=torch.int32)
        found = diffseg.label(Proposals(maps, counts, grid), size, backend="reference")
        assert found.shape == (batch, *size)
        assert found.dtype == torch.int32
        for item in range(batch):
            expected, _ = algorithm.label(maps[item, : int(counts[item])].numpy(), grid, size)
            np.testing.assert_array_equal(found[item].numpy(), expected)

    @pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e30])
    def test_padding_never_wins(self, poison: float) -> None:
        maps = torch.rand(2, 40, 12)
        counts = torch.tensor([3, 20], dtype=torch.int32)
        expected = diffseg.label(Proposals(maps, counts, (3, 4)), (9, 9), backend="reference")
        maps[0, 3:], maps[1, 20:] = poison, poison
        assert torch.equal(diffseg.label(Proposals(maps, counts, (3, 4)), (9, 9), backend="reference"), expected)

    @pytest.mark.parametrize("pair", [(0, 1), (2, 9), (3, 20), (17, 39)])
    def test_ties_go_to_the_lowest_index(self, pair: tuple[int, int]) -> None:
        """Within one block of proposals and across blocks."""
        maps = torch.rand(1, 40, 12)
        maps[0, pair, :] = 2.0
        proposals = Proposals(maps, torch.tensor([40], dtype=torch.int32), (3, 4))
        assert (diffseg.label(proposals, (7, 9), backend="reference") == pair[0]).all()

    def test_equal_maps_tie(self) -> None:
        maps = torch.rand(2, 1, 56, dtype=torch.float64).repeat(1, 17, 1)
        proposals = Proposals(maps, torch.tensor([17, 17], dtype=torch.int32), (7, 8))
        assert not diffseg.label(proposals, (21, 40), backend="reference").any()


class TestSegment:
    @pytest.mark.parametrize("refine", [False, True])
    @pytest.mark.parametrize("rule", RULES)
    def test_is_the_ops_in_a_row(self, layers: Callable[..., Any], rule: str, refine: bool) -> None:
        scene = layers([(12, 10), (6, 5)], batch=2, regions=6)
        common: dict[str, Any] = {"grids": scene.grids, "scales": [0.2, 0.4], "weights": "per_layer"}
        options: dict[str, Any] = {"anchors": 6, "iterations": 2, "threshold": [0.2, 0.4], "rule": rule}
        found = diffseg.segment(
            scene.queries, scene.keys, (33, 21), refine=refine, backend="reference", **common, **options
        )
        maps = diffseg.aggregate(scene.queries, scene.keys, backend="reference", **common)
        proposals = reference_merge(maps, grid=(12, 10), **options)
        proposals = diffseg.refine(maps, proposals) if refine else proposals
        winners = diffseg.label(proposals, (33, 21), backend="reference")
        assert found.dtype == torch.int32
        for item in range(2):
            present, expected = np.unique(winners[item].numpy(), return_inverse=True)
            assert len(present) > 2
            np.testing.assert_array_equal(found[item].numpy(), expected.reshape(33, 21))

    def test_logsumexps_are_passed_on(self, layers: Callable[..., Any]) -> None:
        scene = layers([(8, 8)])
        flat = [torch.full(scene.queries[0].shape[:3], float("nan"))]
        with pytest.raises(ValueError, match="layer 0: expected finite attention"):
            diffseg.segment(scene.queries, scene.keys, (8, 8), anchors=4, logsumexps=flat, backend="reference")

    def test_renumber(self) -> None:
        labels = torch.tensor([[[7, 2, 2, 5]], [[0, 1, 9, 0]]], dtype=torch.int32)
        segments = reference.renumber(labels, 10)
        assert labels.tolist() == [[[2, 0, 0, 1]], [[0, 1, 2, 0]]]
        assert segments.tolist() == [3, 3]
        assert segments.dtype == labels.dtype == torch.int32

    def test_regions_of_the_scene_come_out(self) -> None:
        """Two halves that attend to themselves: a known answer at another size."""
        side = torch.arange(64) % 8 < 4
        queries = torch.stack([side.float(), (~side).float()], -1)[None, None] * 6
        labels = diffseg.segment([queries], [queries], (32, 32), anchors=4)
        assert torch.equal(labels[0, 0], torch.arange(32, dtype=torch.int32) // 16)
        assert (labels == labels[:, :1]).all()

    def test_the_same_bits_twice(self, layers: Callable[..., Any]) -> None:
        scene = layers([(12, 10), (6, 5)], batch=2, dtype=torch.float32)

        def run() -> tuple[Tensor, ...]:
            maps = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend="reference")
            proposals = reference_merge(maps, grid=(12, 10), anchors=5)
            refined = diffseg.refine(maps, proposals)
            return maps, proposals.maps, proposals.counts, refined.maps, diffseg.label(refined, (40, 40))

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)
