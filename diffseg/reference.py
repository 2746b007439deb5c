"""The ops in plain torch, in GEMM form: the oracle for every kernel, and the backend that runs anywhere.

Arguments arrive validated by :mod:`diffseg.ops`. Arithmetic is in float64 where an input, or the output asked for, is
float64, and in float32 otherwise. No function here waits for the device, except where its docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]

SMALLEST_PROBABILITY = 1e-30
"""Probabilities are clamped from below to this inside logarithms, so that zeros stay finite and nothing is lost."""

SMALLEST_NORM = 1e-15
"""Norms are clamped from below to this before they divide: of what is smaller, float32 loses the squares."""

_ENTRIES_AT_ONCE = 1 << 20  # of a temporary tensor on a CPU: it stays in a cache, in memory that malloc need not map
_GPU_ENTRIES_AT_ONCE = 1 << 25  # on a GPU: few kernels, and long ones
_PROPOSALS_AT_ONCE = 16  # proposals that are upsampled at one time
_PIXELS_AT_ONCE = 65536  # pixels whose membership in all masks exists at one time
_LARGEST_DEVICE_WALK = 1024  # proposals: beyond it (anchors > 32) the greedy walk is taken to the host


class NonFiniteAttentionError(Exception):
    """NaN or infinity in the attention of ``layer``, of those that a backend was given; :mod:`diffseg.library` says it.

    Every backend raises it where looking costs no wait.
    """

    def __init__(self, layer: int) -> None:
        super().__init__(layer)
        self.layer = layer


def aggregate(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    grids: Sequence[Grid],
    scales: Sequence[float],
    logsumexps: Sequence[Tensor] | None,
    ratios: Sequence[float],
    grid: Grid,
    out: Tensor,
) -> None:
    """Into ``out``, A_f [B, N, N] over ``grid``, from Q and K [B, heads, n, d] and log-sum-exps [B, heads, n]."""

    def layer_maps(layer: int, item: int, compute: torch.dtype) -> Iterator[Tensor]:
        query, key = queries[layer][item].to(compute) * scales[layer], keys[layer][item].to(compute)
        rows = None if logsumexps is None else logsumexps[layer][item, :, :, None].to(compute)
        _check_finite(layer, query, key, *(() if rows is None else (rows,)))
        step = _at_once(len(key) * key.shape[1], key.device)
        for start in range(0, query.shape[1], step):
            scores = query[:, start : start + step] @ key.mT
            yield (scores.softmax(-1) if rows is None else scores.sub_(rows[:, start : start + step]).exp_()).mean(0)

    _aggregate(layer_maps, grids, ratios, grid, _compute_dtype(out.dtype, *queries, *keys), out)


def aggregate_maps(
    maps: Sequence[Tensor],
    grids: Sequence[Grid],
    ratios: Sequence[float],
    grid: Grid,
    out: Tensor,
) -> None:
    """Into ``out``, A_f [B, N, N] over ``grid``, from attention maps, lists of [B, heads, n, n]."""

    def layer_maps(layer: int, item: int, compute: torch.dtype) -> Iterator[Tensor]:
        heads = maps[layer][item]
        for rows in heads.split(_at_once(len(heads) * heads.shape[2], heads.device), dim=1):
            yield rows.mean(0, dtype=compute)

    _aggregate(layer_maps, grids, ratios, grid, _compute_dtype(out.dtype, *maps), out)


def _aggregate(
    layer_maps: Callable[[int, int, torch.dtype], Iterator[Tensor]],
    grids: Sequence[Grid],
    ratios: Sequence[float],
    grid: Grid,
    compute: torch.dtype,
    out: Tensor,
) -> None:
    """Sums ratio * normalise(upsample(M_k)) over the layers k, each row repeated to the output grid's queries.

    ``layer_maps`` gives M_k of a layer and an image, some rows at a time. Upsampling is linear: maps are divided by the
    sums that they will have, and those of one grid are added up, before they are upsampled.
    """
    shares = {small: _shares_of_cells(small, grid, compute, out.device) for small in dict.fromkeys(grids)}
    for item in range(len(out)):
        total = out[item] if out.dtype == compute else torch.empty_like(out[item], dtype=compute)
        sums = {grid: total.zero_()}
        for layer, (small, ratio) in enumerate(zip(grids, ratios, strict=True)):
            if small not in sums:
                sums[small] = total.new_zeros(len(shares[small]), len(shares[small]))
            start = 0
            for averaged in layer_maps(layer, item, compute):
                mass = averaged @ shares[small]
                _check_finite(layer, mass)
                some = sums[small][start : start + len(averaged)]
                some.addcmul_(averaged, (ratio / mass.clamp_min(SMALLEST_PROBABILITY))[:, None])
                start += len(averaged)
        for small, maps in sums.items():
            if small != grid:
                _add_upsampled(maps, small, grid, total)
        if out.dtype != compute:
            out[item] = total


def _shares_of_cells(small: Grid, grid: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How much each cell of a map over ``small`` adds to the sum of the map upsampled to ``grid``, [n]."""
    if grid[0] % small[0] == 0 and grid[1] % small[1] == 0:  # all as much, edges too
        return torch.full(
            (small[0] * small[1],), grid[0] // small[0] * (grid[1] // small[1]), dtype=dtype, device=device
        )
    down, across = (
        _interpolation(cells, upsampled, device, dtype).sum(0) for cells, upsampled in zip(small, grid, strict=True)
    )
    return torch.outer(down, across).flatten()


def _add_upsampled(maps: Tensor, small: Grid, grid: Grid, total: Tensor) -> None:
    """Adds maps [n, n] over the grid ``small``, upsampled and repeated, to ``total`` [N, N] over ``grid``."""
    (rows, columns), (height, width) = small, grid
    cells = height * width
    row = torch.arange(height, device=maps.device) * rows // height
    column = torch.arange(width, device=maps.device) * columns // width
    step = _at_once(width * cells, maps.device)
    for start in range(0, height, step):
        stop = min(start + step, height)
        first, last = start * rows // height, (stop - 1) * rows // height
        some = maps[first * columns : (last + 1) * columns].view(-1, 1, rows, columns)
        upsampled = F.interpolate(some, grid, mode="bilinear", align_corners=False).view(-1, columns, cells)
        total.view(height, width, cells)[start:stop] += upsampled[row[start:stop, None] - first, column]


def _at_once(entries: int, device: torch.device) -> int:
    """How many rows of so many entries exist at one time."""
    return max(1, (_ENTRIES_AT_ONCE if device.type == "cpu" else _GPU_ENTRIES_AT_ONCE) // entries)


def aggregate_cross(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    grids: Sequence[Grid],
    scales: Sequence[float],
    shares: Tensor,
    size: Grid,
) -> Tensor:
    """Maps of words [B, W, *size], each of norm 1, from queries [B, heads, n, d] and keys [B, heads, tokens, d].

    ``shares`` [B, W, tokens] says how much of each token makes a word.
    """
    compute = _compute_dtype(queries[0].dtype)
    shares = shares.to(compute)
    total = torch.zeros(*shares.shape[:2], *size, dtype=compute, device=shares.device)
    for layer, (query, key, grid, scale) in enumerate(zip(queries, keys, grids, scales, strict=True)):
        _check_finite(layer, query, key)
        tokens = query.new_zeros(len(query), query.shape[2], key.shape[2], dtype=compute)
        for head in range(query.shape[1]):
            scores = query[:, head].to(compute) * scale @ key[:, head].to(compute).mT
            tokens += scores.softmax(-1)
        words = shares @ tokens.mT / query.shape[1]
        _check_finite(layer, words)
        total += F.interpolate(words.unflatten(-1, grid), size, mode="bilinear", align_corners=False)
    return total / torch.linalg.vector_norm(total, dim=(2, 3), keepdim=True).clamp_min(SMALLEST_NORM)


def _check_finite(layer: int, *tensors: Tensor) -> None:
    """On the CPU, where looking costs no wait. A score of -inf leaves finite attention behind: look at inputs too."""
    if any(tensor.device.type == "cpu" and not bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NonFiniteAttentionError(layer)


def merge(
    attention: Tensor,
    grid: Grid,
    anchors: Sequence[int],
    thresholds: Sequence[float],
    rule: Literal["paper", "official"],
    *,
    walk: Literal["device", "host"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Proposals ``(maps [B, P, N], counts [B] int32)``, P = len(anchors), padded with zeros.

    ``walk`` says where the greedy walk of the later rounds runs: on the device as P steps of small tensor ops, without
    waiting for it, or on the host, which does wait. Left out, it is the host for CPU tensors and for lists too long to
    step through on a device.
    """
    if walk is None:
        walk = "host" if attention.device.type == "cpu" or len(anchors) > _LARGEST_DEVICE_WALK else "device"
    index = _positions(grid, anchors, attention.device)
    maps = torch.stack([_first_round(item, index, thresholds[0], image) for image, item in enumerate(attention)])
    counts = torch.full((len(maps),), len(anchors), dtype=torch.int32, device=maps.device)
    for threshold in thresholds[1:]:
        maps, counts = later_round(maps, counts, threshold, rule, walk)
    return maps, counts


def evenly_spaced(grid: Grid, side: int) -> tuple[int, ...]:
    """Flat cells of side x side anchors: rows ((2i + 1) h - side) // (2 side), columns alike."""
    height, width = grid
    rows = [((2 * i + 1) * height - side) // (2 * side) for i in range(side)]
    columns = [((2 * i + 1) * width - side) // (2 * side) for i in range(side)]
    return tuple(row * width + column for row in rows for column in columns)


def _positions(grid: Grid, anchors: Sequence[int], device: torch.device) -> Tensor:
    """Flat cells of the anchors, int64 [P]; evenly spaced ones are computed on the device: a copy would wait for it."""
    side = isqrt(len(anchors))
    if tuple(anchors) != evenly_spaced(grid, side):
        return torch.tensor(anchors, device=device)
    odd = torch.arange(1, 2 * side, 2, device=device)
    rows, columns = ((odd * length - side) // (2 * side) for length in grid)
    return (rows[:, None] * grid[1] + columns).flatten()


def _first_round(attention: Tensor, index: Tensor, threshold: float, image: int = 0) -> Tensor:
    """For each anchor the mean of all maps within ``threshold`` of it: [N, N], cells [P] -> [P, N]."""
    compute = _compute_dtype(attention.dtype)
    anchor, anchor_log, anchor_entropy = log_terms(attention[index].to(compute))
    total = torch.zeros_like(anchor)
    count = anchor.new_zeros(len(index), 1)
    step = _at_once(attention.shape[1], attention.device)
    for start in range(0, len(attention), step):
        maps = attention[start : start + step].to(compute)
        clamped, log, entropy = log_terms(maps)
        if maps.device.type == "cpu" and not bool(torch.isfinite(maps.sum(-1) + entropy).all()):
            raise ValueError(f"attention: expected finite values, found NaN or infinity in image {image}")
        cross = torch.addmm(anchor @ log.T, anchor_log, clamped.T)
        near = (anchor_entropy[:, None] + entropy - cross) / 2 < threshold
        near |= index[:, None] == torch.arange(start, start + len(maps), device=index.device)  # matches itself
        total.addmm_(near.to(compute), maps)
        count += near.sum(-1, keepdim=True)
    return total / count


def later_round(maps: Tensor, counts: Tensor, threshold: float, rule: str, walk: str) -> tuple[Tensor, Tensor]:
    """Merges the lists greedily: [B, P, N], [B] -> the same shapes, with counts no larger."""
    length = maps.shape[1]
    clamped, log, entropy = log_terms(maps)
    cross = clamped @ log.mT
    near = (entropy[:, :, None] + entropy[:, None] - cross - cross.mT) / 2 < threshold
    near |= torch.eye(length, dtype=torch.bool, device=maps.device)
    listed = torch.arange(length, device=maps.device) < counts[:, None]
    near &= listed[:, :, None] & listed[:, None]
    groups = walk_on_device(near, rule) if walk == "device" else walk_on_host(near, rule)
    heads = groups.any(-1)
    order = torch.argsort(heads.logical_not().to(torch.int8), dim=-1, stable=True)
    groups = groups.gather(1, order[:, :, None].expand_as(groups)).to(maps.dtype)
    return (groups @ maps) / groups.sum(-1, keepdim=True).clamp_min(1), heads.sum(-1, dtype=torch.int32)


def walk_on_device(near: Tensor, rule: str) -> Tensor:
    """Greedy grouping of bool [B, P, P] (row i: the elements near i, itself included, rows past the count empty).

    Row i of the result is the group that element i heads, empty where i is no head.
    """
    groups = torch.zeros_like(near)
    taken = torch.zeros_like(near[:, 0])
    for element in range(near.shape[1]):
        head = near[:, element, element] & ~taken[:, element]
        group = near[:, element] & head[:, None]
        groups[:, element] = group & ~taken if rule == "paper" else group
        taken |= group
    return groups


def walk_on_host(near: Tensor, rule: str) -> Tensor:
    """The same grouping as :func:`walk_on_device`, walked on the host, so that each step costs a row of bits."""
    rows = near.cpu().numpy()
    groups = torch.zeros(near.shape, dtype=torch.bool)
    for bits, group in zip(rows, groups.numpy(), strict=True):
        free = bits.diagonal().copy()
        for element in range(len(bits)):
            if free[element]:
                group[element] = bits[element] & free if rule == "paper" else bits[element]
                free &= ~bits[element]
    return groups.to(near.device)


def log_terms(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p', log(p' N) and sum p' log(p' N) over the last axis; the factor N keeps the logarithms near 0 and drops out."""
    clamped = maps.clamp_min(SMALLEST_PROBABILITY)
    log = (clamped * maps.shape[-1]).log_()
    return clamped, log, (clamped * log).sum(-1)


def refine(attention: Tensor, maps: Tensor, counts: Tensor, max_iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations on the rows of A_f from the proposals as centres. Waits for the device at every iteration."""
    compute = maps.dtype
    refined, kept = torch.zeros_like(maps), torch.zeros_like(counts)
    for item in range(len(maps)):
        points = attention[item].to(compute)
        offset = points.mean(0)  # distances do not change, and their rounding error falls
        if offset.device.type == "cpu" and not bool(offset.isfinite().all()):
            raise ValueError(f"attention: expected finite values, found NaN or infinity in image {item}")
        points = points - offset
        centres = maps[item, : int(counts[item])] - offset
        labels = _nearest(points, centres)
        for _ in range(max_iterations):
            means, sizes = _cluster_means(points, labels, len(centres))
            centres = torch.where(sizes[:, None] > 0, means, centres)
            previous, labels = labels, _nearest(points, centres)
            if torch.equal(previous, labels):
                break
        means, sizes = _cluster_means(points, labels, len(centres))
        means = means[sizes > 0] + offset
        refined[item, : len(means)] = means
        kept[item] = len(means)
    return refined, kept


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return torch.addmm(centres.square().sum(-1), points, centres.T, alpha=-2).argmin(-1)


def _cluster_means(points: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    members = F.one_hot(labels, clusters).to(points.dtype)
    sizes = members.sum(0)
    return (members.T @ points) / sizes.clamp_min(1)[:, None], sizes


def label(maps: Tensor, counts: Tensor, grid: Grid, size: Grid) -> Tensor:
    """The winning proposal of each pixel, int32 [B, H, W]; ties go to the lowest index."""
    length = maps.shape[1]
    if maps.device.type == "cpu":
        length = int(counts.max())  # costs no wait here, and the padding is most of the list
    compute = _compute_dtype(maps.dtype)
    lowest = torch.finfo(compute).min / 2  # padding: whatever interpolation rounds, it stays finite and loses

    def winner_from(start: int) -> tuple[Tensor, Tensor]:
        some = maps[:, start : min(start + _PROPOSALS_AT_ONCE, length)].to(compute)
        listed = torch.arange(start, start + some.shape[1], device=maps.device) < counts[:, None]
        some = some.masked_fill(~listed[:, :, None], lowest)
        # Each is an image of its own: torch may round channels differently, and equal maps would not tie.
        upsampled = F.interpolate(some.reshape(-1, 1, *grid), size, mode="bilinear", align_corners=False)
        best, index = upsampled.view(*some.shape[:2], *size).max(1)
        return best, index + start

    best, winner = winner_from(0)
    for start in range(_PROPOSALS_AT_ONCE, length, _PROPOSALS_AT_ONCE):
        value, index = winner_from(start)
        better = value > best
        best, winner = torch.where(better, value, best), torch.where(better, index, winner)
    return winner.to(torch.int32)


def renumber(labels: Tensor, length: int) -> Tensor:
    """Numbers the labels [B, H, W] of each image 0..S-1 in place, in order of index, and returns S, int32 [B]."""
    flat = labels.flatten(1).long()
    present = torch.zeros(len(flat), length, dtype=torch.int32, device=labels.device).scatter_(1, flat, 1)
    numbers = present.cumsum(1, dtype=torch.int32)
    labels.copy_((numbers - 1).gather(1, flat).view_as(labels))
    return numbers[:, -1].contiguous()


def score_masks(maps: Tensor, labels: Tensor, masks: int) -> Tensor:
    """Means [B, masks, W] of maps [B, W, h, w], upsampled, over the pixels of each label of [B, H, W]; 0 over none."""
    compute = _compute_dtype(maps.dtype)
    down = _interpolation(maps.shape[2], labels.shape[1], maps.device, compute)
    across = _interpolation(maps.shape[3], labels.shape[2], maps.device, compute)
    index = torch.arange(masks, device=maps.device)[:, None]
    sums = torch.zeros(len(maps), masks, maps.shape[1], dtype=compute, device=maps.device)
    pixels = torch.zeros(len(maps), masks, 1, dtype=compute, device=maps.device)
    lines = max(1, _PIXELS_AT_ONCE // labels.shape[2])
    for item, image in enumerate(maps.to(compute)):
        for start in range(0, labels.shape[1], lines):
            values = down[start : start + lines] @ image @ across.T
            members = (labels[item, start : start + lines].reshape(-1) == index).to(compute)
            sums[item] += members @ values.flatten(1).T
            pixels[item] += members.sum(-1, keepdim=True)
    return sums / pixels.clamp_min(1)


def _interpolation(cells: int, pixels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights [pixels, cells] of bilinear upsampling along one axis."""
    identity = torch.eye(cells, dtype=dtype, device=device)[None]
    return F.interpolate(identity, pixels, mode="linear", align_corners=False)[0].T


def _compute_dtype(dtype: torch.dtype, *tensors: Tensor) -> torch.dtype:
    wide = dtype == torch.float64 or any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
