"""What a result must satisfy before it is timed: the exactness contract, against float64.

The first and the last image of a batch are checked. What a gate compares with is computed when it is first asked: a
pass that does not check does not pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..memory import of_images
from ..reference import Grid
from .cases import Case

ROW_SUM = 1e-5
ENTRY, ENTRY_FLOOR = 1e-4, 1e-9  # relative, absolute
AGREEMENT = 0.999  # share of pixels
_MARGIN = 1e-3  # of the top value: within it a pixel may go to either
_ROWS = 48  # of A_f that are computed in float64

Gate = Callable[[Any], None]

P = ParamSpec("P")


class GateError(Exception):
    """A result that must not be timed; says what is wrong."""


def _made_when_asked(make: Callable[P, Gate]) -> Callable[P, Gate]:
    @wraps(make)
    def promise(*args: P.args, **kwargs: P.kwargs) -> Gate:
        made = cache(lambda: make(*args, **kwargs))
        return lambda found: made()(found)

    return promise


@_made_when_asked
def attention_gate(case: Case, maps: Sequence[Tensor] | None = None) -> Gate:
    """Checks A_f: every row sums to 1 and equals the reference's, and some rows, drawn anew, equal the oracle's."""
    ratios = ops.resolve_weights(case.weights, case.grids)
    cells = math.prod(case.grid)
    items = _items(case.batch)
    rows = torch.randperm(cells)[:_ROWS].sort().values
    expected = [_oracle_rows(case, maps, ratios, item, rows) for item in items]
    whole = [_reference(case, maps, slice(item, item + 1)) for item in items]

    def gate(found: Tensor) -> None:
        if found.shape != (case.batch, cells, cells):
            raise GateError(f"expected A_f {[case.batch, cells, cells]}, got {list(found.shape)}")
        off = float((found.sum(-1, dtype=torch.float64) - 1).abs().max())
        if not off < ROW_SUM:
            raise GateError(f"a row sums to 1 within {off:.2g}, expected {ROW_SUM}")
        for item, exact in zip(items, expected, strict=True):
            error = (found[item, rows.to(found.device)].double() - exact).abs()
            worst = float((error - ENTRY * exact.abs()).max())
            if not worst < ENTRY_FLOOR:
                raise GateError(f"image {item}: an entry of A_f is {worst:.2g} beyond {ENTRY} of the oracle's")
        for item, reference_rows in zip(items, whole, strict=True):
            if not torch.allclose(found[item], reference_rows, rtol=2 * ENTRY, atol=2 * ENTRY_FLOOR):  # both may be off
                raise GateError(f"image {item}: an entry of A_f is more than {2 * ENTRY} off the reference's")

    return gate


@_made_when_asked
def entries_gate(compute: Callable[[], Tensor]) -> Gate:
    """Checks every entry against the tensor that ``compute`` returns, float64."""
    expected = compute()

    def gate(found: Tensor) -> None:
        if found.shape != expected.shape:
            raise GateError(f"expected {list(expected.shape)}, got {list(found.shape)}")
        worst = float(((found.double() - expected).abs() - ENTRY * expected.abs()).max())
        if not worst < ENTRY_FLOOR:
            raise GateError(f"an entry is {worst:.2g} beyond {ENTRY} of the oracle's")

    return gate


def _oracle_rows(case: Case, maps: Sequence[Tensor] | None, ratios: Sequence[float], item: int, rows: Tensor) -> Tensor:
    """Rows of A_f in float64, written down anew: not the code of any backend."""
    height, width = case.grid
    rows = rows.to(case.queries[0].device)
    total = torch.zeros(len(rows), height * width, dtype=torch.float64, device=rows.device)
    for layer, ((small_height, small_width), ratio) in enumerate(zip(case.grids, ratios, strict=True)):
        row = (rows // width) * small_height // height * small_width + (rows % width) * small_width // width
        if maps is None:
            query, key = case.queries[layer][item].double(), case.keys[layer][item].double()
            scale = case.scales[layer] if case.scales else query.shape[-1] ** -0.5
            averaged = (query[:, row] @ key.mT * scale).softmax(-1).mean(0)
        else:
            averaged = maps[layer][item][:, row].double().mean(0)
        upsampled = F.interpolate(
            averaged.view(-1, 1, small_height, small_width), (height, width), mode="bilinear", align_corners=False
        ).flatten(1)
        total += ratio * upsampled / upsampled.sum(-1, keepdim=True)
    return total


@_made_when_asked
def first_round_gate(attention: Tensor, anchors: Sequence[int], threshold: float) -> Gate:
    """Checks the means of round 1, each over the maps within ``threshold`` of an anchor.

    A pair inside the band of the contract may go either way: it moves a mean by no more than its share of the group.
    """
    items = _items(len(attention))
    expected, shares = [], []
    for item in items:
        maps = attention[item].double()
        near, exact = _near(maps, anchors, threshold)
        sizes = near.sum(-1, keepdim=True)
        band = (exact - threshold).abs() < max(1e-4, 1e-3 * threshold)
        expected.append(near.double() @ maps / sizes)
        shares.append(band.sum(-1) / sizes[:, 0])

    def gate(found: ops.Proposals) -> None:
        for item, exact, share in zip(items, expected, shares, strict=True):
            means = found.maps[item].double()
            off = (means - exact).abs().sum(-1)
            if not bool((off <= 2.1 * share + 1e-4).all()):
                raise GateError(f"image {item}: a mean of round 1 is {float(off.max()):.2g} off the oracle's")

    return gate


def density(attention: Tensor, anchors: Sequence[int], threshold: float) -> float:
    """The share of pairs that match in round 1, in float32: a description, no check."""
    near = [_near(attention[item].float(), anchors, threshold)[0] for item in _items(len(attention))]
    return float(torch.stack(near).double().mean())


def _near(maps: Tensor, anchors: Sequence[int], threshold: float) -> tuple[Tensor, Tensor]:
    """Which maps each anchor takes in round 1, and all divergences, [P, N]."""
    index = torch.tensor(anchors, device=maps.device)
    exact = divergences(maps[index], maps)
    near = exact < threshold
    near[torch.arange(len(index), device=near.device), index] = True
    return near, exact


def divergences(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric KL divergence of all pairs, written down anew: [P, N], [F, N] -> [P, F]."""
    first, second = (maps.clamp_min(reference.SMALLEST_PROBABILITY) for maps in (first, second))
    log_first, log_second = first.log(), second.log()
    entropies = (first * log_first).sum(-1)[:, None] + (second * log_second).sum(-1)
    return (entropies - first @ log_second.mT - log_first @ second.mT) / 2


@_made_when_asked
def merge_gate(
    attention: Tensor, grid: Grid, size: Grid, anchors: Sequence[int], thresholds: Sequence[float], rule: Any
) -> Gate:
    """Checks that proposals give the labels that the oracle's proposals give."""
    items = _items(len(attention))
    some = attention[items].double()
    maps, counts = reference.merge(some, grid, anchors, thresholds, rule)
    expected = reference.label(maps, counts, grid, size)

    def gate(found: ops.Proposals) -> None:
        if not bool(((found.counts >= 1) & (found.counts <= len(anchors))).all()):
            raise GateError(f"expected 1 to {len(anchors)} proposals, got {found.counts.tolist()}")
        labels = reference.label(found.maps[items].double(), found.counts[items], grid, size)
        _check_agreement(labels, expected, items)

    return gate


@_made_when_asked
def label_gate(proposals: ops.Proposals, size: Grid) -> Gate:
    """Checks that each pixel went to the largest proposal there, or to one within the margin of it."""
    items = _items(len(proposals.maps))

    def gate(found: Tensor) -> None:
        if found.shape != (len(proposals.maps), *size) or found.dtype != torch.int32:
            raise GateError(f"expected int32 labels {[len(proposals.maps), *size]}, got {list(found.shape)}")
        for item in items:
            best = torch.full(size, -math.inf, dtype=torch.float64, device=found.device)
            chosen = torch.full_like(best, -math.inf)
            for number in range(int(proposals.counts[item])):
                one = proposals.maps[item, number].double().view(1, 1, *proposals.grid)
                value = F.interpolate(one, size, mode="bilinear", align_corners=False)[0, 0]
                best = torch.maximum(best, value)
                chosen = torch.where(found[item] == number, value, chosen)
            lost = int((chosen < (1 - _MARGIN) * best).sum())
            if lost:
                raise GateError(f"image {item}: {lost} pixels went to a proposal that is not the winner")

    return gate


@_made_when_asked
def labels_gate(compute: Callable[[], Tensor]) -> Gate:
    """Checks that label maps agree with those that ``compute`` returns, whatever the numbers of the labels."""
    expected = compute()
    items = _items(len(expected))

    def gate(found: Any) -> None:
        labels = torch.as_tensor(found, device=expected.device)
        if labels.shape != expected.shape:
            raise GateError(f"expected labels {list(expected.shape)}, got {list(labels.shape)}")
        _check_agreement(labels[items], expected[items], items)

    return gate


def _check_agreement(found: Tensor, expected: Tensor, items: Sequence[int]) -> None:
    for item, one, other in zip(items, found, expected, strict=True):
        share = agreement(one, other)
        if not share >= AGREEMENT:
            raise GateError(
                f"image {item}: labels agree with the oracle's on {share:.4%} of pixels, not {AGREEMENT:.1%}"
            )


def agreement(found: Tensor, expected: Tensor) -> float:
    """Share of equal pixels after labels are renamed one to one, largest overlap first: a lower bound."""
    columns = int(expected.max()) + 1
    pairs, pixels = (found.flatten().long() * columns + expected.flatten()).unique(return_counts=True)
    rows_taken, columns_taken, total = set(), set(), 0
    for index in pixels.argsort(descending=True).tolist():
        row, column = divmod(int(pairs[index]), columns)
        if row not in rows_taken and column not in columns_taken:
            rows_taken.add(row)
            columns_taken.add(column)
            total += int(pixels[index])
    return total / found.numel()


def _reference(case: Case, maps: Sequence[Tensor] | None, image: slice) -> Tensor:
    """A_f [N, N] of one image by the reference."""
    if maps is not None:
        return case.aggregate_maps(of_images(list(maps), image), backend="reference")[0]
    logsumexps = case.logsumexps and of_images(case.logsumexps, image)
    given = (of_images(case.queries, image), of_images(case.keys, image), logsumexps)
    return case.aggregate(given, backend="reference")[0]


def _items(batch: int) -> list[int]:
    return sorted({0, batch - 1})
