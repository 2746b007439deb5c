# ruff: noqa: N803  (compile-time arguments are in capitals, as is usual in Triton)
"""Cross-attention in Triton: where an image attends to each word of a text, and how well a word fits each mask.

The scores of a block of rows with all tokens of the text stay in registers, and with them the sum over heads; only the
words' sums leave them. Layers of one grid add to one small map a word, launch after launch, and one kernel upsamples
the grids and adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffseg.reference import SMALLEST_NORM, Grid

from .launch import OTHER, Config, choose, dot, exact_precision, integers_on_device, launch
from .products import common_unit, product_constants, tile_scores
from .sampling import taps

_ROWS = {
    "interpreter": Config({"BLOCK_M": 16}, num_warps=1, num_stages=1),
    "sm_80": Config({"BLOCK_M": 64}, num_warps=8, num_stages=2),
    "sm_90": Config({"BLOCK_M": 64}, num_warps=8, num_stages=2),
    "sm_100": Config({"BLOCK_M": 64}, num_warps=8, num_stages=2),
    OTHER: Config({"BLOCK_M": 16}, num_warps=8, num_stages=1),
}
_WIDE_ROWS = {  # float32 operands
    "interpreter": Config({"BLOCK_M": 16}, num_warps=1, num_stages=1),
    "sm_90": Config({"BLOCK_M": 32}, num_warps=16, num_stages=1),
    "sm_100": Config({"BLOCK_M": 16}, num_warps=8, num_stages=1),
    OTHER: Config({"BLOCK_M": 16}, num_warps=8, num_stages=1),
}
_PIXELS = {
    "interpreter": Config({"BLOCK": 64}, num_warps=1, num_stages=1),
    OTHER: Config({"BLOCK": 256}, num_warps=4, num_stages=1),
}
_MASKS = {
    "interpreter": Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=1, num_stages=1),
    OTHER: Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=1),
}
_GRID_WORDS = tl.constexpr(3)  # of a grid in a table: the offset of its sums in their buffer, height and width
_WORDS = 16  # of a tile: the least that a product takes
_MOST_BANDS = 256  # programs that share the pixels of an image; each leaves a partial sum


def aggregate_cross(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    grids: Sequence[Grid],
    scales: Sequence[float],
    shares: Tensor,
    size: Grid,
) -> Tensor:
    """Maps of words [B, W, *size], each of norm 1; as :func:`diffseg.reference.aggregate_cross`."""
    batch_size, words, _ = shares.shape
    shares, device = shares.contiguous(), queries[0].device
    offsets: dict[Grid, int] = {}
    length = 0
    for grid in dict.fromkeys(grids):
        offsets[grid] = length
        length += batch_size * words * grid[0] * grid[1]
    staged = torch.empty(length, dtype=torch.float32, device=device)
    written: set[Grid] = set()
    for query, key, grid, scale in zip(queries, keys, grids, scales, strict=True):
        shape = (batch_size, words, grid[0] * grid[1])
        out = staged[offsets[grid] :][: math.prod(shape)].view(shape)
        _add_words(query, key, scale, shares, out, grid in written)
        written.add(grid)
    return _upsampled(staged, offsets, batch_size, words, size)


def _add_words(query: Tensor, key: Tensor, scale: float, shares: Tensor, out: Tensor, accumulate: bool) -> None:
    """One layer: out [B, W, n] = (or +=) shares times the mean over heads of its softmax."""
    batch_size, words, cells = out.shape
    config = choose(_WIDE_ROWS if query.dtype == torch.float32 else _ROWS, query.device)
    unit = common_unit([query, key])
    q, k = query.stride(), key.stride()
    launch(
        _words_kernel, (triton.cdiv(cells, config.blocks["BLOCK_M"]), batch_size), config, query.device,
        query=query, key=key, shares=shares, out=out, scale=scale * math.log2(math.e),
        heads=query.shape[1], cells=cells, tokens=key.shape[2], words=words,
        stride_qb=q[0] // unit, stride_qh=q[1] // unit, stride_qn=q[2] // unit, stride_qd=q[3],
        stride_kb=k[0] // unit, stride_kh=k[1] // unit, stride_kn=k[2] // unit, stride_kd=k[3],
        ACCUMULATE=accumulate, UNIT=unit, TOKENS=max(16, triton.next_power_of_2(key.shape[2])),
        **product_constants(query),
    )  # fmt: skip


def _upsampled(staged: Tensor, offsets: dict[Grid, int], batch_size: int, words: int, size: Grid) -> Tensor:
    """[B, W, *size] of norm 1, from the sums of each grid, [B, W, n] at its offset."""
    config = choose(_PIXELS, staged.device)
    blocks = triton.cdiv(size[0] * size[1], config.blocks["BLOCK"])
    maps = torch.empty(batch_size, words, *size, dtype=torch.float32, device=staged.device)
    squares = torch.empty(batch_size, words, blocks, dtype=torch.float32, device=staged.device)
    grids = integers_on_device([word for grid, offset in offsets.items() for word in (offset, *grid)], staged.device)
    launch(
        _upsample_words_kernel, (blocks, words, batch_size), config, staged.device,
        staged=staged, grids=grids, maps=maps, squares=squares, words=words, height=size[0], width=size[1],
        GRIDS=len(offsets),
    )  # fmt: skip
    return maps.div_(squares.sum(-1).sqrt_().clamp_min_(SMALLEST_NORM)[:, :, None, None])


def score_masks(maps: Tensor, labels: Tensor, masks: int) -> Tensor:
    """Means [B, masks, W] of the upsampled maps over masks; as :func:`diffseg.reference.score_masks`."""
    maps, labels = maps.contiguous(), labels.contiguous()
    batch_size, words, rows, columns = maps.shape
    _, height, width = labels.shape
    config = choose(_MASKS, maps.device)
    bands = min(triton.cdiv(height * width, config.blocks["BLOCK_N"]), _MOST_BANDS)
    mask_blocks = triton.cdiv(masks, config.blocks["BLOCK_M"])
    sums = torch.empty(batch_size, bands, masks, words, dtype=torch.float32, device=maps.device)
    pixels = torch.empty(batch_size, bands, masks, dtype=torch.int32, device=maps.device)
    launch(
        _mask_sums_kernel, (bands, mask_blocks * triton.cdiv(words, _WORDS), batch_size), config, maps.device,
        maps=maps, labels=labels, sums=sums, pixels=pixels, bands=bands, masks=masks, words=words,
        rows=rows, columns=columns, height=height, width=width, WORDS=_WORDS, PRECISION=exact_precision(),
    )  # fmt: skip
    return sums.sum(1).div_(pixels.sum(1).clamp_min_(1)[..., None])


@triton.jit(do_not_specialize=["words"])
def _words_kernel(
    query, key, shares, out, scale, heads, cells, tokens, words,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_qd, stride_kd,
    ACCUMULATE: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of rows: for each word the sum over tokens of its share times the mean over heads of the softmax.

    Grid (blocks of n rows, B): a program holds the scores of all tokens. At SD 1.4 a layer of the largest grid:
    0.2 GFLOP, 2.5 M exp2, 2.6 MB of queries read, 16 KB a word written.
    """
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = tl.program_id(1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    q = query + batch * stride_qb * UNIT
    k = key + batch * stride_kb * UNIT
    total = tl.zeros([BLOCK_M, TOKENS], tl.float32)
    for _ in range(heads):
        scores = tile_scores(
            q, k, index, token, cells, tokens, stride_qn, stride_qd, stride_kn, stride_kd,
            UNIT, WIDTH, HEAD, TAIL, CHUNK, PRECISION, BLOCK_M, TOKENS,
        )  # fmt: skip
        scores = tl.where(token[None, :] < tokens, scores * scale, float("-inf"))
        exponentials = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total += exponentials * (1.0 / (heads * tl.sum(exponentials, 1)))[:, None]
        q += stride_qh * UNIT
        k += stride_kh * UNIT
    source = shares + batch * words * tokens + token
    target = out + batch * words * cells + index
    for _ in range(words):
        share = tl.load(source, mask=token < tokens, other=0.0)
        value = tl.sum(total * share[None, :], 1)
        if ACCUMULATE:
            value += tl.load(target, mask=index < cells, other=0.0)
        tl.store(target, value, mask=index < cells)
        source += tokens
        target += cells


@triton.jit
def _upsample_words_kernel(
    staged, grids, maps, squares, words, height, width, GRIDS: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of pixels of one word: the sum over grids of the bilinear interpolation, and the sum of its squares.

    Grid (blocks of pixels, W, B). At SD 1.4 and 512 x 512: 1 MB a word written; the grids stay in the cache.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(2).to(tl.int64) * words + tl.program_id(1)
    inside = pixel < height * width
    total = tl.zeros([BLOCK], tl.float32)
    for grid in range(GRIDS):
        entry = grids + grid * _GRID_WORDS
        rows, columns = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
        top, bottom, down = taps(pixel // width, rows, height)
        left, right, across = taps(pixel % width, columns, width)
        source = staged + tl.load(entry) + plane * rows * columns
        upper = (1.0 - across) * tl.load(source + top * columns + left, mask=inside, other=0.0)
        upper += across * tl.load(source + top * columns + right, mask=inside, other=0.0)
        lower = (1.0 - across) * tl.load(source + bottom * columns + left, mask=inside, other=0.0)
        lower += across * tl.load(source + bottom * columns + right, mask=inside, other=0.0)
        total += (1.0 - down) * upper + down * lower
    tl.store(maps + plane * height * width + pixel, total, mask=inside)
    tl.store(squares + plane * tl.num_programs(0) + tl.program_id(0), tl.sum(total * total, 0))


@triton.jit
def _mask_sums_kernel(
    maps, labels, sums, pixels, bands, masks, words, rows, columns, height, width,
    WORDS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of the upsampled maps over the pixels of each mask, as a product: membership [masks, pixels] x values.

    Grid (bands, blocks of masks x blocks of words, B): a band is every bands-th block of pixels; no atomics, so that
    the bits are the same run after run. At SD 1.4, 512 x 512, 256 masks and 16 words: 2.1 GFLOP, labels read 4 times
    (4 MB), 4 MB of partial sums.
    """
    band = tl.program_id(0)
    blocks = tl.cdiv(masks, BLOCK_M)
    mask = tl.program_id(1) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    word = tl.program_id(1) // blocks * WORDS + tl.arange(0, WORDS)
    batch = tl.program_id(2).to(tl.int64)
    count = height * width
    source = maps + (batch * words + tl.minimum(word, words - 1)).to(tl.int64)[None, :] * (rows * columns)
    total = tl.zeros([BLOCK_M, WORDS], tl.float32)
    members = tl.zeros([BLOCK_M], tl.int32)
    for start in range(band * BLOCK_N, count, bands * BLOCK_N):
        pixel = start + tl.arange(0, BLOCK_N)
        label = tl.load(labels + batch * count + pixel, mask=pixel < count, other=-1)
        member = label[None, :] == mask[:, None]
        pixel = tl.minimum(pixel, count - 1)
        top, bottom, down = taps(pixel // width, rows, height)
        left, right, across = taps(pixel % width, columns, width)
        down, across = down[:, None], across[:, None]
        upper = (1.0 - across) * tl.load(source + (top * columns + left)[:, None])
        upper += across * tl.load(source + (top * columns + right)[:, None])
        lower = (1.0 - across) * tl.load(source + (bottom * columns + left)[:, None])
        lower += across * tl.load(source + (bottom * columns + right)[:, None])
        total = dot(member.to(tl.float32), (1.0 - down) * upper + down * lower, total, PRECISION)
        members += tl.sum(member.to(tl.int32), 1)
    line = (batch * bands + band) * masks + mask
    listed = mask < masks
    tl.store(sums + line[:, None] * words + word[None, :], total, mask=listed[:, None] & (word[None, :] < words))
    if tl.program_id(1) < blocks:
        tl.store(pixels + line, members, mask=listed)
