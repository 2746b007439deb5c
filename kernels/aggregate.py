# ruff: noqa: N803  (compile-time arguments are in capitals, as is usual in Triton)
"""Aggregation in Triton: A_f written once, from queries and keys or from maps.

With p = exp(q.k scale - logsumexp) the sum over layers and heads of (ratio / heads) p is one loop over exp2 of a fused
multiply-add: the ratio, the number of heads and the mass by which a map is normalised stand in the exponent. Layers
below the output grid are summed a grid at a time, at their own resolution, into one small buffer. A small kernel
stretches these sums to the output's width; the one that writes A_f interpolates between their lines and repeats them.

Addresses of the layers' tensors reach a kernel in a table that is written on the device, so any number of layers is one
launch, and nothing waits or copies.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from diffseg.reference import SMALLEST_PROBABILITY, Grid

from .launch import OTHER, Config, choose, integers_on_device, launch
from .products import common_unit, product_constants, tile_scores
from .sampling import taps

_TILES = {  # of A_f
    "interpreter": Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=1, num_stages=1),
    "sm_80": Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    "sm_90": Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
    "sm_100": Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    OTHER: Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
}
_SMALL_TILES = {  # of the low-resolution sums, which are few, and of heads too wide for a large tile
    "interpreter": Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=1, num_stages=1),
    "sm_80": Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=3),
    "sm_90": Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    "sm_100": Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    OTHER: Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=1),
}
_WIDE_TILES = {  # float32 operands
    "interpreter": Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=1, num_stages=1),
    "sm_90": Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    "sm_100": Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    OTHER: Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=1),
}
_LARGEST_LARGE_TILE_WIDTH = 96
_MANY_CELLS = 1024  # from here on large tiles, or some parts of their heads each, fill the GPU
_PROGRAMS = 128  # tiles times parts of the heads: the sums of a low-resolution grid are split to fill the GPU
_LARGEST_ROW = 4096  # cells of a row of maps that one program holds: such rows are read once, longer ones twice
_UPSAMPLED_BLOCK = 1024  # cells that a program upsamples at a time where nothing else is in a row
_LAYER_WORDS = tl.constexpr(4)  # in the table: three addresses, and the scale and the offset of its exponent
_GRID_WORDS = tl.constexpr(5)  # in the table: the offsets of its sums and of the stretched ones, height, width, parts
_SMALLEST = tl.constexpr(SMALLEST_PROBABILITY)


class _Group(NamedTuple):
    """Layers of one grid whose tensors are laid out alike: one launch."""

    grid: Grid
    layers: list[int]
    table: int  # first word of the group in the table


def aggregate(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    grids: Sequence[Grid],
    scales: Sequence[float],
    logsumexps: Sequence[Tensor] | None,
    ratios: Sequence[float],
    output: Grid,
    out: Tensor,
) -> None:
    """Into ``out``, A_f [B, N, N] over the grid ``output``; as :func:`diffseg.reference.aggregate`."""
    batch_size, device = queries[0].shape[0], queries[0].device
    computed = [logsumexps is None or not _divides(grid, output) for grid in grids]
    rows = [
        torch.empty(query.shape[:3], dtype=torch.float32, device=device)
        if logsumexps is None or computed[layer]
        else logsumexps[layer].float()
        for layer, query in enumerate(queries)
    ]
    layouts = [(q.shape, q.stride(), k.stride(), row.stride()) for q, k, row in zip(queries, keys, rows, strict=True)]
    groups = _groups(grids, layouts)
    words = []
    for layer in (layer for group in groups for layer in group.layers):
        share = math.log2(ratios[layer]) - math.log2(queries[layer].shape[1])
        if _divides(grids[layer], output):  # upsampling multiplies the sum of a map by N / n
            share += math.log2(_cells(grids[layer]) / _cells(output))
        exponent = _pack(scales[layer] * math.log2(math.e), share)
        words += [queries[layer].data_ptr(), keys[layer].data_ptr(), rows[layer].data_ptr(), exponent]
    parts = {group.grid: _parts(group, queries) for group in groups}
    staged = _Staging(groups, parts, output, batch_size, device)
    table = integers_on_device(words + staged.words(), device)
    for group in groups:
        if computed[group.layers[0]]:
            _fill_logsumexps(group, output, queries, keys, rows, table)

    _sum_groups(
        groups, output, table, staged, out,
        lambda group, memory, arguments: _sum_tiles(group, memory, arguments, output, queries, keys, rows),
    )  # fmt: skip


def aggregate_maps(
    maps: Sequence[Tensor],
    grids: Sequence[Grid],
    ratios: Sequence[float],
    output: Grid,
    out: Tensor,
) -> None:
    """Into ``out``, A_f [B, N, N] over the grid ``output``, from maps [B, heads, n, n].

    As :func:`diffseg.reference.aggregate_maps`.
    """
    batch_size, device = maps[0].shape[0], maps[0].device
    groups = _groups(grids, [(layer.shape, layer.stride()) for layer in maps])
    words = []
    for layer in (layer for group in groups for layer in group.layers):
        words += [maps[layer].data_ptr(), 0, 0, _pack(ratios[layer], 0.0)]
    staged = _Staging(groups, dict.fromkeys(grids, 1), output, batch_size, device)
    table = integers_on_device(words + staged.words(), device)
    _sum_groups(
        groups, output, table, staged, out,
        lambda group, memory, arguments: _sum_rows(group, memory, arguments, output, maps),
    )  # fmt: skip


def _sum_groups(
    groups: Sequence[_Group],
    output: Grid,
    table: Tensor,
    staged: _Staging,
    out: Tensor,
    sum_group: Callable[[_Group, Tensor, dict[str, Any]], None],
) -> None:
    """Sums the layers of each group: into the staging buffer, or, at the output grid, with that buffer into ``out``.

    ``sum_group`` launches a group's kernel, given the memory of the sum, [B, parts, n, n], and the arguments that all
    kernels take.
    """
    launches = sum(group.grid == output for group in groups)
    rounded = launches > 1 and out.dtype == torch.bfloat16  # each launch would round the sum
    attention = torch.empty_like(out, dtype=torch.float32) if rounded else out
    written: set[Grid] = set()
    for group in groups:
        full, first = group.grid == output, group.grid not in written
        if full and first:
            _stretch(output, table, staged)
        memory = attention[:, None] if full else staged.of(group.grid)
        arguments = {
            "table": table[group.table :], "out": memory, "stride_ob": memory.stride(0), "layers": len(group.layers),
            **_upsampling(staged, table, output, full and first), "ACCUMULATE": not first,
        }  # fmt: skip
        sum_group(group, memory, arguments)
        written.add(group.grid)
    if output not in written:
        _store_staged(output, table, staged, attention)
    if attention is not out:
        out.copy_(attention)


def _cells(grid: Grid) -> int:
    return grid[0] * grid[1]


def _divides(grid: Grid, output: Grid) -> bool:
    return output[0] % grid[0] == 0 and output[1] % grid[1] == 0


def _pack(first: float, second: float) -> int:
    """Two float32 as the halves of one int64, the first in the low half."""
    packed: int = struct.unpack("<q", struct.pack("<ff", first, second))[0]
    return packed


def _groups(grids: Sequence[Grid], layouts: Sequence[object]) -> list[_Group]:
    """Layers of equal grid and layout together, the smallest grids first."""
    members: dict[tuple[Grid, object], list[int]] = {}
    for layer, (grid, layout) in enumerate(zip(grids, layouts, strict=True)):
        members.setdefault((grid, layout), []).append(layer)
    groups: list[_Group] = []
    table = 0
    for (grid, _), layers in sorted(members.items(), key=lambda item: _cells(item[0][0])):
        groups.append(_Group(grid, layers, table))
        table += _LAYER_WORDS.value * len(layers)
    return groups


class _Staging:
    """The sums of the low-resolution layers, a grid after the other, then the same stretched: float32 [B, size].

    A sum is in parts, [parts, n, n], that is [parts, n, h, w]; stretched to the output's width it is one, [n, h, W].
    """

    def __init__(
        self,
        groups: Sequence[_Group],
        parts: Mapping[Grid, int],
        output: Grid,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.grids = list(dict.fromkeys(group.grid for group in groups if group.grid != output))
        self.parts = [parts[grid] for grid in self.grids]
        sizes = [count * _cells(grid) ** 2 for grid, count in zip(self.grids, self.parts, strict=True)]
        sizes += [_cells(grid) * grid[0] * output[1] for grid in self.grids]
        ends = list(accumulate((triton.cdiv(size, 16) * 16 for size in sizes), initial=0))
        self.offsets = ends[: len(self.grids)]
        self.stretched = ends[len(self.grids) : -1]
        self.table = groups[-1].table + _LAYER_WORDS.value * len(groups[-1].layers)  # the first word of the grids
        self.memory = torch.empty(batch_size, ends[-1], dtype=torch.float32, device=device)

    def words(self) -> list[int]:
        entries = zip(self.offsets, self.stretched, self.grids, self.parts, strict=True)
        return [word for offset, stretched, grid, parts in entries for word in (offset, stretched, *grid, parts)]

    def of(self, grid: Grid) -> Tensor:
        """[B, parts, n, n], the sum of the layers of ``grid``."""
        index, cells = self.grids.index(grid), _cells(grid)
        offset, parts = self.offsets[index], self.parts[index]
        return self.memory[:, offset : offset + parts * cells**2].unflatten(1, (parts, cells, cells))


def _parts(group: _Group, queries: Sequence[Tensor]) -> int:
    """In how many parts the heads of a grid's layers are summed: as fill the GPU, no more than there are heads."""
    query, cells = queries[group.layers[0]], _cells(group.grid)
    return min(triton.cdiv(_PROGRAMS, _tiles(cells, _tile_config(query, cells))), query.shape[1])


def _tiles(cells: int, config: Config) -> int:
    return triton.cdiv(cells, config.blocks["BLOCK_M"]) * triton.cdiv(cells, config.blocks["BLOCK_N"])


def _upsampling_weights(grid: Grid, output: Grid, device: torch.device) -> Tensor:
    """What each cell of ``grid`` adds to the sum of the upsampled map, float32 [n]."""

    def weights(side: int, upsampled: int) -> Tensor:
        identity = torch.eye(side, dtype=torch.float32, device=device)[None]
        return F.interpolate(identity, upsampled, mode="linear", align_corners=False)[0].sum(-1)

    return (weights(grid[0], output[0])[:, None] * weights(grid[1], output[1])).flatten()


def _products(
    group: _Group, queries: Sequence[Tensor], keys: Sequence[Tensor], rows: Sequence[Tensor]
) -> dict[str, Any]:
    """The arguments that :func:`_tiles_kernel` and :func:`_logsumexps_kernel` share."""
    layer = group.layers[0]
    query, key, row = queries[layer], keys[layer], rows[layer]
    unit = common_unit([each[layer] for each in (queries, keys) for layer in group.layers])
    q, k, r = query.stride(), key.stride(), row.stride()
    return {
        "query": query, "row": row, "heads": query.shape[1], "cells": _cells(group.grid),
        "stride_qb": q[0] // unit, "stride_qh": q[1] // unit, "stride_qn": q[2] // unit, "stride_qd": q[3],
        "stride_kb": k[0] // unit, "stride_kh": k[1] // unit, "stride_kn": k[2] // unit, "stride_kd": k[3],
        "stride_rb": r[0], "stride_rh": r[1], "stride_rn": r[2],
        "UNIT": unit, **product_constants(query),
    }  # fmt: skip


def _tile_config(query: Tensor, cells: int) -> Config:
    if query.dtype == torch.float32:
        return choose(_WIDE_TILES, query.device)
    large = cells >= _MANY_CELLS and query.shape[3] <= _LARGEST_LARGE_TILE_WIDTH
    return choose(_TILES if large else _SMALL_TILES, query.device)


def _fill_logsumexps(
    group: _Group,
    output: Grid,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Sequence[Tensor],
    table: Tensor,
) -> None:
    """Writes the log-sum-exps of the group's layers, plus the log of the mass of the upsampled map where it varies."""
    query = queries[group.layers[0]]
    batch_size, heads, cells, _ = query.shape
    weights, masses = None, None
    if not _divides(group.grid, output):
        weights = _upsampling_weights(group.grid, output, query.device)
        masses = torch.empty(len(group.layers), *query.shape[:3], dtype=torch.float32, device=query.device)
    config = _tile_config(query, cells)
    blocks = triton.cdiv(cells, config.blocks["BLOCK_M"])
    launch(
        _logsumexps_kernel, (blocks, heads, batch_size * len(group.layers)), config, query.device,
        table=table[group.table :], weights=weights, masses=masses, batch_size=batch_size,
        **_products(group, queries, keys, rows),
    )  # fmt: skip
    if masses is not None:
        for layer, mass in zip(group.layers, masses, strict=True):
            rows[layer].add_(mass.mean(1, keepdim=True).log_())


def _sum_tiles(
    group: _Group,
    out: Tensor,
    arguments: dict[str, Any],
    output: Grid,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Sequence[Tensor],
) -> None:
    """Sums a group's layers into ``out`` [B, parts, n, n]; ``arguments`` as of :func:`_sum_groups`."""
    batch_size, parts, cells, _ = out.shape
    query = queries[group.layers[0]]
    config = _tile_config(query, cells)
    launch(
        _tiles_kernel, (_tiles(cells, config), parts, batch_size), config, out.device,
        **arguments, share=None if group.grid == output else triton.cdiv(query.shape[1], parts),
        **_products(group, queries, keys, rows),
    )  # fmt: skip


def _sum_rows(group: _Group, out: Tensor, arguments: dict[str, Any], output: Grid, maps: Sequence[Tensor]) -> None:
    """:func:`_sum_tiles` of maps, in one part; each row counts as divided by its sum on the grid ``output``."""
    first = maps[group.layers[0]]
    batch_size, _, cells, _ = out.shape
    weights = None if group.grid == output else _upsampling_weights(group.grid, output, out.device)
    unit = common_unit([maps[layer] for layer in group.layers])
    config = _row_config(_LARGEST_ROW, cells)
    launch(
        _rows_kernel, (cells, batch_size), config, out.device,
        **arguments, first=first, weights=weights, heads=first.shape[1], cells=cells,
        stride_mb=first.stride(0) // unit, stride_mh=first.stride(1) // unit, stride_mq=first.stride(2) // unit,
        stride_mk=first.stride(3),
        UNIT=unit, LAYERS=triton.next_power_of_2(len(group.layers)), SINGLE=cells <= config.blocks["BLOCK"],
    )  # fmt: skip


def _row_config(longest: int, cells: int) -> Config:
    block = min(triton.next_power_of_2(cells), longest)
    return Config({"BLOCK": block}, num_warps=max(1, block // 256), num_stages=1)


def _stretch(output: Grid, table: Tensor, staged: _Staging) -> None:
    """Upsamples the columns of the low-resolution sums, once for all the rows of A_f that repeat them."""
    if not staged.grids:
        return
    rows = max(_cells(grid) for grid in staged.grids)
    config = _row_config(_UPSAMPLED_BLOCK, max(height for height, _ in staged.grids) * output[1])
    launch(
        _stretch_kernel, (rows, len(staged.grids), len(staged.memory)), config, staged.memory.device,
        **_staged_arguments(staged, table), width=output[1],
    )  # fmt: skip


def _store_staged(output: Grid, table: Tensor, staged: _Staging, attention: Tensor) -> None:
    """Writes A_f where no layer is on the output grid: the upsampled low-resolution sums are all of it."""
    _stretch(output, table, staged)
    cells = _cells(output)
    launch(
        _rows_kernel, (cells, len(attention)), _row_config(_UPSAMPLED_BLOCK, cells), attention.device,
        table=table, first=staged.memory, weights=None,
        out=attention, stride_ob=attention.stride(0), layers=0, heads=0, cells=cells,
        stride_mb=0, stride_mh=0, stride_mq=0, stride_mk=0,
        **_upsampling(staged, table, output, True), ACCUMULATE=False, UNIT=1, LAYERS=1, SINGLE=True,
    )  # fmt: skip


def _upsampling(staged: _Staging, table: Tensor, output: Grid, needed: bool) -> dict[str, Any]:
    """The arguments with which a kernel adds the low-resolution sums."""
    return {
        **_staged_arguments(staged, table), "height": output[0], "width": output[1],
        "GRIDS": len(staged.grids) if needed else 0,
    }  # fmt: skip


def _staged_arguments(staged: _Staging, table: Tensor) -> dict[str, Any]:
    return {"staged": staged.memory, "grids": table[staged.table :], "stride_sb": staged.memory.stride(0)}


@triton.jit
def _layer(table, layer, like, UNIT: tl.constexpr):
    """The three addresses of a layer, as pointers like ``like``, and its two floats."""
    word = table + layer * _LAYER_WORDS
    alignment: tl.constexpr = UNIT * like.dtype.element_ty.primitive_bitwidth // 8
    first = tl.multiple_of(tl.load(word).to(like.dtype), alignment)
    second = tl.multiple_of(tl.load(word + 1).to(like.dtype), alignment)
    third = tl.load(word + 2)
    floats = tl.load(word + 3)
    low = floats.to(tl.int32).to(tl.float32, bitcast=True)
    high = (floats >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return first, second, third, low, high


@triton.jit
def _stretch_kernel(staged, grids, stride_sb, width, BLOCK: tl.constexpr):
    """A row of a sum, [h, w], its parts added in order, with its columns upsampled bilinearly, [h, W].

    Grid (the most cells of a grid, grids, B). At SD 1.4: reads 10.6 MB, writes 9.6 MB.
    """
    word = grids + tl.program_id(1) * _GRID_WORDS
    small_height, small_width = tl.load(word + 2).to(tl.int32), tl.load(word + 3).to(tl.int32)
    base = staged + tl.program_id(2).to(tl.int64) * stride_sb
    row = tl.program_id(0).to(tl.int64)
    source = base + tl.load(word) + row * (small_height * small_width)
    target = base + tl.load(word + 1) + row * (small_height * width)
    parts, part = tl.load(word + 4), tl.cast(small_height * small_width, tl.int64) * (small_height * small_width)
    cells = tl.where(row < small_height * small_width, small_height * width, 0)
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        left, right, across = taps(cell % width, small_width, width)
        line = source + cell // width * small_width
        near = tl.zeros([BLOCK], tl.float32)
        far = tl.zeros([BLOCK], tl.float32)
        for _ in range(parts):
            near += tl.load(line + left, mask=cell < cells, other=0.0)
            far += tl.load(line + right, mask=cell < cells, other=0.0)
            line += part
        tl.store(target + cell, (1.0 - across) * near + across * far, mask=cell < cells)


@triton.jit
def _upsampled(
    staged, grids, row, column, cells, height, width, GRIDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of the sum over low-resolution grids: rows repeated, each interpolated between the lines of its map.

    Lines are read as vectors where the width is a multiple of 16. Columns are not clamped, which would hide their order
    from the compiler: past the last one the last line is read.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    row = tl.minimum(row, cells - 1)
    of_line, of_column = row // width, row % width
    line, column = column // width, column % width
    for grid in range(GRIDS):
        word = grids + grid * _GRID_WORDS
        small_height, small_width = tl.load(word + 2).to(tl.int32), tl.load(word + 3).to(tl.int32)
        small_row = of_line * small_height // height * small_width + of_column * small_width // width
        top, bottom, down = taps(line, small_height, height)
        source = staged + tl.multiple_of(tl.load(word + 1), 16)
        source += small_row.to(tl.int64)[:, None] * (small_height * width)
        total += (1.0 - down)[None, :] * tl.load(source + (top * width + column)[None, :])
        total += down[None, :] * tl.load(source + (bottom * width + column)[None, :])
    return total


@triton.jit(do_not_specialize=["batch_size"])
def _logsumexps_kernel(
    table, weights, masses, batch_size, query, row, heads, cells,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_qd, stride_kd,
    stride_rb, stride_rh, stride_rn,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """log sum exp of each row of scores, and, with ``weights``, the weighted sum of its softmax: one online pass.

    Grid (blocks of rows, heads, layers x B). At SD 1.4: 0.67 G exp2 and 54 GFLOP, Q and K from the second-level cache.
    """
    head = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2) // batch_size
    batch = (tl.program_id(2) % batch_size).to(tl.int64)
    q, k, row_address, scale, _ = _layer(table, layer, query, UNIT)
    q += (batch * stride_qb + head * stride_qh) * UNIT
    k += (batch * stride_kb + head * stride_kh) * UNIT
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, cells, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = tile_scores(
            q, k, index, column, cells, cells, stride_qn, stride_qd, stride_kn, stride_kd,
            UNIT, WIDTH, HEAD, TAIL, CHUNK, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        scores = tl.where(column[None, :] < cells, scores * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        rescale = tl.exp2(largest - larger)
        exponentials = tl.exp2(scores - larger[:, None])
        total = total * rescale + tl.sum(exponentials, 1)
        if weights is not None:
            weight = tl.load(weights + column, mask=column < cells, other=0.0)
            mass = mass * rescale + tl.sum(exponentials * weight[None, :], 1)
        largest = larger
    logsumexp = (largest + tl.log2(total)) * 0.6931471805599453
    target = row_address.to(row.dtype) + batch * stride_rb + head * stride_rh
    tl.store(target + index.to(tl.int64) * stride_rn, logsumexp, mask=index < cells)
    if weights is not None:
        line = (tl.program_id(2).to(tl.int64) * heads + head) * cells
        tl.store(masses + line + index, mass / total, mask=index < cells)


@triton.jit(do_not_specialize=["layers", "share"])
def _tiles_kernel(
    table, out, stride_ob, layers, share, staged, grids, stride_sb, height, width, query, row, heads, cells,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_qd, stride_kd,
    stride_rb, stride_rh, stride_rn,
    GRIDS: tl.constexpr, ACCUMULATE: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of sum over layers and heads of 2 ** (q.k scale - logsumexp / ln 2 + offset), plus the upsampled grids.

    Grid (tiles of n x n, parts, B): a part takes ``share`` heads of each layer, or what is left of them; None: all. At
    SD 1.4 and the output grid: 54 GFLOP (64 with the padded width), 0.67 G exp2, 64 MB written; Q and K (26 MB) stay in
    the second-level cache, from which a tile reads 20 KB a head.
    """
    columns = tl.cdiv(cells, BLOCK_N)
    index = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(2).to(tl.int64)
    first, count = 0, heads
    if share is not None:
        first = tl.program_id(1).to(tl.int64) * share
        count = tl.minimum(heads - tl.program_id(1) * share, share)
        out += tl.program_id(1).to(tl.int64) * cells * cells
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GRIDS > 0:
        total = _upsampled(
            staged + batch * stride_sb, grids, index, column, cells, height, width, GRIDS, BLOCK_M, BLOCK_N
        )
    for layer in range(layers):
        q, k, row_address, scale, offset = _layer(table, layer, query, UNIT)
        q += (batch * stride_qb + first * stride_qh) * UNIT
        k += (batch * stride_kb + first * stride_kh) * UNIT
        source = row_address.to(row.dtype) + batch * stride_rb + first * stride_rh + index.to(tl.int64) * stride_rn
        for _ in range(count):
            logsumexp = tl.load(source, mask=index < cells, other=0.0)
            scores = tile_scores(
                q, k, index, column, cells, cells, stride_qn, stride_qd, stride_kn, stride_kd,
                UNIT, WIDTH, HEAD, TAIL, CHUNK, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            total += tl.exp2(scores * scale - (logsumexp * 1.4426950408889634 - offset)[:, None])
            q += stride_qh * UNIT
            k += stride_kh * UNIT
            source += stride_rh
    target = out + batch * stride_ob + index.to(tl.int64)[:, None] * cells + column[None, :]
    inside = (index[:, None] < cells) & (column[None, :] < cells)
    if ACCUMULATE:
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_block(
    base, index, column, cells, heads, stride_mh, stride_mq, stride_mk, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum over heads of one row of maps, [1, BLOCK] float32."""
    total = tl.zeros([1, BLOCK], tl.float32)
    source = base + index * stride_mq * UNIT + column.to(tl.int64)[None, :] * stride_mk
    for _ in range(heads):
        total += tl.load(source, mask=column[None, :] < cells, other=0.0).to(tl.float32)
        source += tl.cast(stride_mh, tl.int64) * UNIT
    return total


@triton.jit
def _mass(total, weights, column, cells):
    """Sum of the row after upsampling."""
    if weights is not None:
        total = total * tl.load(weights + column, mask=column < cells, other=0.0)[None, :]
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit(do_not_specialize=["layers"])
def _rows_kernel(
    table, first, weights, out, stride_ob, layers, heads, cells, stride_mb, stride_mh, stride_mq, stride_mk,
    staged, grids, stride_sb, height, width,
    GRIDS: tl.constexpr, ACCUMULATE: tl.constexpr, UNIT: tl.constexpr, LAYERS: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of sum over layers of ratio normalise(sum over heads of the map), plus the upsampled grids.

    Grid (n, B): a program a row. A row that fits in BLOCK is read once; a longer one is read for its mass and again.
    At SD 1.4 in float32: reads 2.9 GB of maps, writes 64 MB.
    """
    index = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) + tl.zeros([1], tl.int32)
    slot = tl.arange(0, LAYERS)
    masses = tl.full([LAYERS], 1.0, tl.float32)
    if not SINGLE:
        for layer in range(layers):
            base, _, _, _, _ = _layer(table, layer, first, UNIT)
            mass = tl.zeros([], tl.float32)
            for start in range(0, cells, BLOCK):
                column = start + tl.arange(0, BLOCK)
                maps = base + batch * stride_mb * UNIT
                part = _row_block(maps, index, column, cells, heads, stride_mh, stride_mq, stride_mk, UNIT, BLOCK)
                mass += _mass(part, weights, column, cells)
            masses = tl.where(slot == layer, mass, masses)
    for start in range(0, cells, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros([1, BLOCK], tl.float32)
        for layer in range(layers):
            base, _, _, ratio, _ = _layer(table, layer, first, UNIT)
            maps = base + batch * stride_mb * UNIT
            part = _row_block(maps, index, column, cells, heads, stride_mh, stride_mq, stride_mk, UNIT, BLOCK)
            mass = tl.sum(tl.where(slot == layer, masses, 0.0), 0)
            if SINGLE:
                mass = _mass(part, weights, column, cells)
            total += part * (ratio / tl.where(mass < _SMALLEST, _SMALLEST, mass))
        if GRIDS > 0:
            total += _upsampled(staged + batch * stride_sb, grids, row, column, cells, height, width, GRIDS, 1, BLOCK)
        target = out + batch * stride_ob + index * cells + column[None, :]
        inside = column[None, :] < cells
        if ACCUMULATE:
            total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)
