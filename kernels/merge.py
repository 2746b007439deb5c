# ruff: noqa: N803  (compile-time arguments are in capitals, as is usual in Triton)
"""Merging in Triton: symmetric KL of all pairs as split products, bits, the greedy walk and the means.

D(p, q) = (H_p + H_q - p.log q - log p.q) / 2 over p' = max(p, 1e-30) and log(p' N). Each of 4096 p' and log(p' N) is
split in two float16 terms (high + low, 22 bits; what falls below 7e-12 of p' is lost, which D does not feel; entries up
to 15 are in range) and three of the four products are summed in float32. The entropies H are sums of the same three
products of the same terms, so that errors largely cancel between similar maps, and a map is at distance 0 of itself.
Tensor cores truncate when they accumulate: partial products are summed over one block of cells only, and the blocks by
float32 additions. Means keep the range of float32: their operands are split in two bfloat16 terms.

A round is five launches: terms of the list, products, bits, (from round 2) the walk, means. Nothing waits for the
device, no sum is atomic, and of size [anchors, N] there are the terms, the products and the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from diffseg.reference import SMALLEST_PROBABILITY, Grid, evenly_spaced

from .launch import OTHER, Config, choose, dot, has_fast_log, integers_on_device, launch

_TERMS = {
    "interpreter": Config({"BLOCK": 64}, num_warps=1, num_stages=1),
    OTHER: Config({"BLOCK": 1024}, num_warps=4, num_stages=1),
}
_PRODUCTS = {
    "interpreter": Config({"BLOCK_P": 16, "BLOCK_F": 16, "BLOCK_N": 32}, num_warps=1, num_stages=1),
    "sm_80": Config({"BLOCK_P": 128, "BLOCK_F": 64, "BLOCK_N": 16}, num_warps=8, num_stages=3),
    "sm_90": Config({"BLOCK_P": 128, "BLOCK_F": 128, "BLOCK_N": 32}, num_warps=8, num_stages=3),
    "sm_100": Config({"BLOCK_P": 128, "BLOCK_F": 64, "BLOCK_N": 32}, num_warps=8, num_stages=3),
    OTHER: Config({"BLOCK_P": 64, "BLOCK_F": 64, "BLOCK_N": 16}, num_warps=4, num_stages=2),
}
_BITS = {
    "interpreter": Config({"BLOCK": 64}, num_warps=1, num_stages=1),
    OTHER: Config({"BLOCK": 1024}, num_warps=4, num_stages=1),
}
_MEANS = {
    "interpreter": Config({"BLOCK_P": 16, "BLOCK_N": 16, "BLOCK_F": 32}, num_warps=1, num_stages=1),
    "sm_80": Config({"BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_F": 32}, num_warps=8, num_stages=3),
    "sm_90": Config({"BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_F": 64}, num_warps=8, num_stages=3),
    "sm_100": Config({"BLOCK_P": 128, "BLOCK_N": 64, "BLOCK_F": 64}, num_warps=8, num_stages=3),
    OTHER: Config({"BLOCK_P": 64, "BLOCK_N": 64, "BLOCK_F": 32}, num_warps=8, num_stages=2),
}
_SMALLEST = tl.constexpr(SMALLEST_PROBABILITY)
_PROGRAMS = 128  # tiles times parts of the sum over cells: the products of a short list are split to fill the GPU


def merge(
    attention: Tensor, grid: Grid, anchors: Sequence[int], thresholds: Sequence[float], rule: str
) -> tuple[Tensor, Tensor]:
    """Proposals ``(maps [B, P, N] float32, counts [B] int32)``; as :func:`diffseg.reference.merge`."""
    batch_size, _, _ = attention.shape
    length, device = len(anchors), attention.device
    maps = _first_round(attention, grid, tuple(anchors), thresholds[0])
    counts = torch.full((batch_size,), length, dtype=torch.int32, device=device)
    for threshold in thresholds[1:]:
        maps, counts = _later_round(maps, counts, threshold, rule)
    return maps, counts


def _first_round(attention: Tensor, grid: Grid, anchors: tuple[int, ...], threshold: float) -> Tensor:
    positions = _positions(grid, anchors, attention.device)
    near = _near(attention, attention, positions, None, threshold)
    return _means(attention, near, None, None, None)


def _later_round(maps: Tensor, counts: Tensor, threshold: float, rule: str) -> tuple[Tensor, Tensor]:
    near = _near(maps, maps, None, counts, threshold)
    heads, owners, merged = _walk(near, counts)
    return _means(maps, near, heads, owners if rule == "paper" else None, merged), merged


def _positions(grid: Grid, anchors: tuple[int, ...], device: torch.device) -> Tensor:
    """Flat cells of the anchors, int64 [P]; evenly spaced ones are computed on the device."""
    side = isqrt(len(anchors))
    if anchors != evenly_spaced(grid, side):
        return integers_on_device(anchors, device)
    positions = torch.empty(len(anchors), dtype=torch.int64, device=device)
    launch(
        _even_positions_kernel, (1,), Config({}, num_warps=4, num_stages=1), device,
        positions=positions, side=side, height=grid[0], width=grid[1], BLOCK=triton.next_power_of_2(len(anchors)),
    )  # fmt: skip
    return positions


class _Products(NamedTuple):
    """What D is made of: 8192 D = entropies + sum of map_entropies - sum of products, the sums over parts."""

    entropies: Tensor  # [B, P]
    map_entropies: Tensor  # [parts, B, F]
    products: Tensor  # [parts, B, P, F], p.log f + log p.f


def _near(elements: Tensor, maps: Tensor, positions: Tensor | None, counts: Tensor | None, threshold: float) -> Tensor:
    """bfloat16 [B, P, F]: 1 where element p (row positions[p] of ``elements``) is nearer than ``threshold`` to map f.

    Elsewhere 0; with ``counts`` both lists end there, and it is 0 past the end. The means multiply by it as it is.
    """
    pairs = _all_pairs(elements, maps, positions)
    parts, batch_size, length, rows = pairs.products.shape
    near = torch.empty(batch_size, length, rows, dtype=torch.bfloat16, device=maps.device)
    config = choose(_BITS, maps.device)
    launch(
        _bits_kernel, (triton.cdiv(rows, config.blocks["BLOCK"]), length, batch_size), config, maps.device,
        **pairs._asdict(), positions=positions, counts=counts, near=near,
        length=length, rows=rows, parts=parts, threshold=threshold,
    )  # fmt: skip
    return near


def _all_pairs(elements: Tensor, maps: Tensor, positions: Tensor | None) -> _Products:
    batch_size, rows, cells = maps.shape
    length = elements.shape[1] if positions is None else len(positions)
    device = maps.device
    terms = torch.empty(4, batch_size, length, cells, dtype=torch.float16, device=device)
    entropies = torch.empty(batch_size, length, dtype=torch.float32, device=device)
    launch(
        _terms_kernel, (length, batch_size), choose(_TERMS, device), device,
        elements=elements, positions=positions, terms=terms, entropies=entropies, length=length, cells=cells,
        stride_b=elements.stride(0), stride_r=elements.stride(1), stride_c=elements.stride(2),
        FAST_LOG=has_fast_log(device),
    )  # fmt: skip

    config = choose(_PRODUCTS, device)
    tiles = triton.cdiv(length, config.blocks["BLOCK_P"]) * triton.cdiv(rows, config.blocks["BLOCK_F"])
    part = triton.cdiv(cells, max(1, _PROGRAMS // tiles))
    part = triton.cdiv(part, config.blocks["BLOCK_N"]) * config.blocks["BLOCK_N"]
    parts = triton.cdiv(cells, part)
    products = torch.empty(parts, batch_size, length, rows, dtype=torch.float32, device=device)
    map_entropies = torch.empty(parts, batch_size, rows, dtype=torch.float32, device=device)
    launch(
        _products_kernel, (tiles, parts, batch_size), config, device,
        terms=terms, maps=maps, products=products, map_entropies=map_entropies,
        length=length, rows=rows, cells=cells, part=part,
        stride_b=maps.stride(0), stride_r=maps.stride(1), stride_c=maps.stride(2),
        FAST_LOG=has_fast_log(device),
    )  # fmt: skip
    return _Products(entropies, map_entropies, products)


def _walk(near: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads in order and the first head near each element, int32 [B, P] both, and the number of heads, int32 [B]."""
    batch_size, length, _ = near.shape
    heads = torch.empty(batch_size, length, dtype=torch.int32, device=near.device)
    owners = torch.empty_like(heads)
    merged = torch.empty_like(counts)
    padded = max(32, triton.next_power_of_2(length))
    config = Config({"LENGTH": padded}, num_warps=max(1, padded // 256), num_stages=1)  # in one warp no step waits
    launch(
        _walk_kernel, (batch_size,), config, near.device,
        near=near, counts=counts, heads=heads, owners=owners, merged=merged, length=length,
    )  # fmt: skip
    return heads, owners, merged


def _means(maps: Tensor, near: Tensor, heads: Tensor | None, owners: Tensor | None, counts: Tensor | None) -> Tensor:
    """Mean of the maps near each element, or, with ``heads``, of each head's group; [B, P, N], zeros past ``counts``.

    With ``owners`` a group holds only what no earlier head has taken.
    """
    batch_size, rows, cells = maps.shape
    length, device = near.shape[1], maps.device
    means = torch.empty(batch_size, length, cells, dtype=torch.float32, device=device)
    config = choose(_MEANS, device)
    tiles = triton.cdiv(length, config.blocks["BLOCK_P"]) * triton.cdiv(cells, config.blocks["BLOCK_N"])
    launch(
        _means_kernel, (tiles, batch_size), config, device,
        maps=maps, near=near, heads=heads, owners=owners, counts=counts, means=means,
        length=length, rows=rows, cells=cells,
        stride_b=maps.stride(0), stride_r=maps.stride(1), stride_c=maps.stride(2),
    )  # fmt: skip
    return means


@triton.jit
def _even_positions_kernel(positions, side, height, width, BLOCK: tl.constexpr):
    """The cells of side x side evenly spaced anchors: one program."""
    anchor = tl.arange(0, BLOCK)
    row = ((2 * (anchor // side) + 1) * height - side) // (2 * side)
    column = ((2 * (anchor % side) + 1) * width - side) // (2 * side)
    tl.store(positions + anchor, (row * width + column).to(tl.int64), mask=anchor < side * side)


@triton.jit
def _clamp(p):
    """p' = max(p, 1e-30); NaN stays NaN."""
    return tl.where(p < _SMALLEST, _SMALLEST, p)


@triton.jit
def _split(x, TERM: tl.constexpr):
    """x in two terms of dtype ``TERM``."""
    high = x.to(TERM)
    return high, (x - high.to(tl.float32)).to(TERM)


@triton.jit
def _product_terms(value, cells, FAST_LOG: tl.constexpr):
    """4096 p' and log(p' N), each in two float16 terms.

    The fast logarithm is within 2 ** -22 of log2(p' N), or of 1 where that is less than 1, which D does not feel.
    """
    p = _clamp(value.to(tl.float32))
    p_high, p_low = _split(p * 4096.0, tl.float16)
    log = libdevice.fast_logf(p * cells) if FAST_LOG else tl.log(p * cells)
    log_high, log_low = _split(log, tl.float16)
    return p_high, p_low, log_high, log_low


@triton.jit
def _pointwise(p_high, p_low, log_high, log_low):
    """The float32 products whose sum is the entropy: the same three that the tensor cores form for a pair."""
    p, log = p_high.to(tl.float32), log_high.to(tl.float32)
    return p * log + (p * log_low.to(tl.float32) + p_low.to(tl.float32) * log)


@triton.jit
def _terms_kernel(
    elements, positions, terms, entropies, length, cells, stride_b, stride_r, stride_c, FAST_LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms of 4096 p' and log(p' N), float16 [4, B, P, N], and entropies [B, P] of rows ``positions``.

    Grid (P, B): a program an element. Bytes: 4 N read and 8 N written; logarithms: N, each an element.
    """
    element = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = element.to(tl.int64)
    if positions is not None:
        row = tl.load(positions + element)
    plane = tl.num_programs(1).to(tl.int64) * length * cells
    source = elements + batch * stride_b + row * stride_r
    target = terms + (batch * length + element) * cells
    entropy = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        inside = cell < cells
        value = tl.load(source + cell.to(tl.int64) * stride_c, mask=inside, other=1.0)
        p_high, p_low, log_high, log_low = _product_terms(value, cells, FAST_LOG)
        tl.store(target + cell, p_high, mask=inside)
        tl.store(target + plane + cell, p_low, mask=inside)
        tl.store(target + 2 * plane + cell, log_high, mask=inside)
        tl.store(target + 3 * plane + cell, log_low, mask=inside)
        entropy += tl.where(inside, _pointwise(p_high, p_low, log_high, log_low), 0.0)
    tl.store(entropies + batch * length + element, tl.sum(entropy, 0))


@triton.jit
def _products_kernel(
    terms, maps, products, map_entropies, length, rows, cells, part, stride_b, stride_r, stride_c,
    FAST_LOG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """p.log f + log p.f of every element p and map f, and H_f, each as ``parts`` sums over ``part`` cells.

    Grid (tiles of P x F, parts, B); the tiles of one block of maps are neighbours, so that it is read from memory once.
    At SD 1.4 (P = 256, F = N = 4096): reads A_f (64 MB) and the terms, writes 2 x 4 MB; 6 products of 8.6 GFLOP in
    float16; 34 M logarithms (17 M distinct ones).
    """
    tiles = tl.cdiv(length, BLOCK_P)
    tile_p = tl.program_id(0) % tiles
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    f = tl.program_id(0) // tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    part_index = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    batches = tl.num_programs(2).to(tl.int64)
    plane = batches * length * cells
    term = terms + (batch * length + p.to(tl.int64)[:, None]) * cells
    source = maps + batch * stride_b + f.to(tl.int64)[:, None] * stride_r
    listed, mapped = p[:, None] < length, f[:, None] < rows
    total = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
    entropy = tl.zeros([BLOCK_F], tl.float32)
    first = part_index * part
    for start in range(first, tl.minimum(first + part, cells), BLOCK_N):
        cell = (start + tl.arange(0, BLOCK_N))[None, :]
        inside = cell < cells
        value = tl.load(source + cell.to(tl.int64) * stride_c, mask=mapped & inside, other=1.0)
        f_high, f_low, log_high, log_low = _product_terms(value, cells, FAST_LOG)
        entropy += tl.sum(tl.where(inside, _pointwise(f_high, f_low, log_high, log_low), 0.0), 1)
        p_high = tl.load(term + cell, mask=listed & inside, other=0.0)
        p_low = tl.load(term + plane + cell, mask=listed & inside, other=0.0)
        p_log_high = tl.load(term + 2 * plane + cell, mask=listed & inside, other=0.0)
        p_log_low = tl.load(term + 3 * plane + cell, mask=listed & inside, other=0.0)
        block = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
        block = dot(p_low, log_high.T, block, None)
        block = dot(p_high, log_low.T, block, None)
        block = dot(p_log_low, f_high.T, block, None)
        block = dot(p_log_high, f_low.T, block, None)
        block = dot(p_high, log_high.T, block, None)
        total += dot(p_log_high, f_high.T, block, None)
    out = (part_index * batches + batch) * length
    target = products + (out + p.to(tl.int64)[:, None]) * rows + f[None, :]
    tl.store(target, total, mask=listed & (f[None, :] < rows))
    if tile_p == 0:
        tl.store(map_entropies + (part_index * batches + batch) * rows + f, entropy, mask=f < rows)


@triton.jit(do_not_specialize=["parts"])
def _bits_kernel(
    products, entropies, map_entropies, positions, counts, near, length, rows, parts, threshold,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """D < threshold, from the parts of the products, added in order; an element is near itself.

    Grid (blocks of F, P, B). Bytes: 4 parts P F read, 2 P F written.
    """
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    inside = f < rows
    cross = tl.zeros([BLOCK], tl.float32)
    entropy = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        slab = part * tl.num_programs(2).to(tl.int64) + batch
        cross += tl.load(products + (slab * length + element) * rows + f, mask=inside, other=0.0)
        entropy += tl.load(map_entropies + slab * rows + f, mask=inside, other=0.0)
    own = element.to(tl.int64)
    if positions is not None:
        own = tl.load(positions + element)
    bit = (tl.load(entropies + batch * length + element) + entropy - cross) * (0.5 / 4096) < threshold
    bit = bit | (f == own)
    if counts is not None:
        count = tl.load(counts + batch)
        bit = bit & (f < count) & (element < count)
    tl.store(near + (batch * length + element) * rows + f, bit.to(tl.float32).to(tl.bfloat16), mask=inside)


@triton.jit
def _walk_kernel(near, counts, heads, owners, merged, length, LENGTH: tl.constexpr):
    """The greedy walk: an element that no earlier head is near becomes a head.

    Grid (B,): one program an image. The list is walked in blocks of 32: the bits among a block's elements are packed
    into 32 words, which one after the other decide the heads in scalar arithmetic; then the rows of the block's heads
    are taken at once. Bytes: 2 P^2 read; about 32 dependent scalar steps a block.
    """
    batch = tl.program_id(0).to(tl.int64)
    near += batch * length * length
    count = tl.load(counts + batch)
    element = tl.arange(0, LENGTH)
    local = tl.arange(0, 32)
    owner = tl.full([LENGTH], LENGTH, tl.int32)
    found = tl.zeros([], tl.int32)
    for start in range(0, count, 32):
        row = start + local
        square = tl.load(
            near + row[:, None] * length + row[None, :], mask=(row[:, None] < count) & (row[None, :] < count), other=0
        )
        words = tl.sum((square != 0).to(tl.int32) << local[None, :], 1)
        taken_here = (element >= start) & (element < start + 32) & (owner < LENGTH)
        taken = tl.sum(tl.where(taken_here, 1 << (element - start), 0), 0)
        chosen = tl.zeros([], tl.int32)
        for step in tl.static_range(32):
            word = tl.sum(tl.where(local == step, words, 0), 0)
            bit = (((taken >> step) & 1) ^ 1) & ((word >> step) & 1)
            taken = taken | (word * bit)
            chosen = chosen | (bit << step)
        is_head = ((chosen >> local) & 1) != 0
        rank = found + tl.cumsum(is_head.to(tl.int32), 0) - 1
        tl.store(heads + batch * length + rank, row, mask=is_head)
        found += tl.sum(is_head.to(tl.int32), 0)
        for step in tl.static_range(32):
            read = length * ((chosen >> step) & 1)  # not count: past it there are zeros, and vectors are whole
            bits = tl.load(near + (start + step) * length + element, mask=element < read, other=0.0)
            owner = tl.where(bits != 0, tl.minimum(owner, start + step), owner)
    tl.store(owners + batch * length + element, owner, mask=element < length)
    tl.store(merged + batch, found)


@triton.jit
def _means_kernel(
    maps, near, heads, owners, counts, means, length, rows, cells, stride_b, stride_r, stride_c,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Means over groups: bits [P, F] times maps [F, N], the maps in two bfloat16 terms, over the number of bits.

    Grid (tiles of P x N, B); the tiles of one block of cells are neighbours. At SD 1.4, round 1: reads A_f (64 MB) and
    the bits (2 MB a block of cells, from the second-level cache), writes 4 MB; 2 products of 8.6 GFLOP in bfloat16.
    """
    tiles = tl.cdiv(length, BLOCK_P)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    cell = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    listed = p < length
    row = p
    if heads is not None:
        listed = p < tl.load(counts + batch)
        row = tl.load(heads + batch * length + p, mask=listed, other=0)
    source = maps + batch * stride_b + cell.to(tl.int64)[None, :] * stride_c
    group = near + (batch * length + row.to(tl.int64)[:, None]) * rows
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, rows, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        member = tl.load(group + f[None, :], mask=listed[:, None] & (f[None, :] < rows), other=0.0)
        if owners is not None:
            owner = tl.load(owners + batch * rows + f, mask=f < rows, other=-1)
            member = tl.where(owner[None, :] == row[:, None], member, 0.0)
        value = tl.load(
            source + f.to(tl.int64)[:, None] * stride_r, mask=(f[:, None] < rows) & (cell[None, :] < cells), other=0.0
        )
        high, low = _split(value.to(tl.float32), tl.bfloat16)
        size += tl.sum(member.to(tl.float32), 1)
        block = dot(member, low, tl.zeros([BLOCK_P, BLOCK_N], tl.float32), None)
        total += dot(member, high, block, None)
    total = total / tl.maximum(size, 1.0)[:, None]
    target = means + (batch * length + p.to(tl.int64)[:, None]) * cells + cell[None, :]
    tl.store(target, total, mask=(p[:, None] < length) & (cell[None, :] < cells))
