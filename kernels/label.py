# ruff: noqa: N803  (compile-time arguments are in capitals, as is usual in Triton)
"""Labels in Triton: bilinear upsample of the proposals and argmax in one pass; [P, H, W] never exists.

And their numbering without gaps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffseg.reference import Grid

from .launch import OTHER, Config, choose, launch
from .sampling import taps

_PIXELS = {
    "interpreter": Config({"BLOCK": 64}, num_warps=1, num_stages=1),
    OTHER: Config({"BLOCK": 256}, num_warps=4, num_stages=1),
}
_STRIPS = {
    "interpreter": Config({"BLOCK": 64}, num_warps=1, num_stages=1),
    OTHER: Config({"BLOCK": 1024}, num_warps=4, num_stages=1),
}
_WHOLE = Config({}, num_warps=4, num_stages=1)


def label(maps: Tensor, counts: Tensor, grid: Grid, size: Grid) -> Tensor:
    """The winning proposal of each pixel, int32 [B, H, W]; as :func:`diffseg.reference.label`."""
    batch_size, counts = maps.shape[0], counts.contiguous()
    winner = torch.empty(batch_size, *size, dtype=torch.int32, device=maps.device)
    config = choose(_PIXELS, maps.device)
    launch(
        _label_kernel, (triton.cdiv(size[0] * size[1], config.blocks["BLOCK"]), batch_size), config, maps.device,
        maps=maps, counts=counts, winner=winner, stride_b=maps.stride(0), stride_p=maps.stride(1),
        stride_n=maps.stride(2), rows=grid[0], columns=grid[1], height=size[0], width=size[1],
    )  # fmt: skip
    return winner


def renumber(labels: Tensor, length: int) -> Tensor:
    """Numbers the labels [B, H, W] 0..S-1 in place, and returns S; as :func:`diffseg.reference.renumber`."""
    batch_size, numbered = len(labels), labels.contiguous()
    pixels = labels[0].numel()
    numbers = torch.zeros(batch_size, length, dtype=torch.int32, device=labels.device)
    segments = torch.empty(batch_size, dtype=torch.int32, device=labels.device)
    config = choose(_STRIPS, labels.device)
    strips = (triton.cdiv(pixels, config.blocks["BLOCK"]), batch_size)
    most = triton.next_power_of_2(length + 1)
    common = {"labels": numbered, "numbers": numbers, "pixels": pixels, "length": length}
    launch(_present_kernel, strips, config, labels.device, **common, LENGTH=most)
    launch(
        _numbers_kernel, (batch_size,), _WHOLE, labels.device,
        numbers=numbers, segments=segments, length=length, LENGTH=most,
    )  # fmt: skip
    launch(_renumber_kernel, strips, config, labels.device, **common)
    if numbered is not labels:
        labels.copy_(numbered)
    return segments


@triton.jit
def _label_kernel(
    maps, counts, winner, stride_b, stride_p, stride_n, rows, columns, height, width, BLOCK: tl.constexpr
):
    """argmax over p < count of the bilinear interpolation of map p at each pixel; ties go to the lowest p.

    Grid (blocks of pixels, B): the four cells and weights of a pixel are found once, the count is read on the device.
    At SD 1.4: 4 H W count reads from the first-level cache (a map is 16 KB), H W x 4 bytes written.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = pixel < height * width
    top, bottom, down = taps(pixel // width, rows, height)
    left, right, across = taps(pixel % width, columns, width)
    source = maps + batch * stride_b
    top_left = (top * columns + left).to(tl.int64) * stride_n
    top_right = (top * columns + right).to(tl.int64) * stride_n
    bottom_left = (bottom * columns + left).to(tl.int64) * stride_n
    bottom_right = (bottom * columns + right).to(tl.int64) * stride_n
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for proposal in range(tl.load(counts + batch)):
        upper = (1.0 - across) * tl.load(source + top_left, mask=inside, other=0.0).to(tl.float32)
        upper += across * tl.load(source + top_right, mask=inside, other=0.0).to(tl.float32)
        lower = (1.0 - across) * tl.load(source + bottom_left, mask=inside, other=0.0).to(tl.float32)
        lower += across * tl.load(source + bottom_right, mask=inside, other=0.0).to(tl.float32)
        value = (1.0 - down) * upper + down * lower
        better = value > best
        best = tl.where(better, value, best)
        index = tl.where(better, proposal, index)
        source += stride_p
    tl.store(winner + batch * height * width + pixel, index, mask=inside)


@triton.jit
def _present_kernel(labels, numbers, pixels, length, BLOCK: tl.constexpr, LENGTH: tl.constexpr):
    """Marks the labels that occur in ``numbers`` [B, length], which holds zeros.

    Grid (strips of pixels, B). Bytes: 4 a pixel read. Pixels past the end count as label ``length`` < LENGTH.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    label = tl.load(labels + batch * pixels + pixel, mask=pixel < pixels, other=length)
    occurs = tl.histogram(label, LENGTH) > 0
    bins = tl.arange(0, LENGTH)
    tl.store(numbers + batch * length + bins, 1, mask=occurs & (bins < length))


@triton.jit
def _numbers_kernel(numbers, segments, length, LENGTH: tl.constexpr):
    """From which labels occur, 1 or 0, to how many smaller ones do; and how many in all.

    Grid (B,): one program an image. Bytes: 8 length.
    """
    batch = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, LENGTH)
    occurs = tl.load(numbers + batch * length + bins, mask=bins < length, other=0)
    occurs = occurs.to(tl.int64)  # as the interpreter of Triton 3.2 adds them
    smaller = tl.cumsum(occurs, 0) - occurs
    tl.store(numbers + batch * length + bins, smaller.to(tl.int32), mask=bins < length)
    tl.store(segments + batch, tl.sum(occurs, 0).to(tl.int32))


@triton.jit
def _renumber_kernel(labels, numbers, pixels, length, BLOCK: tl.constexpr):
    """The number of each label, in its place.

    Grid (strips of pixels, B). Bytes: 4 a pixel read and written; ``numbers`` from the first-level cache.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    target = labels + batch * pixels + pixel
    label = tl.load(target, mask=pixel < pixels, other=0)
    tl.store(target, tl.load(numbers + batch * length + label, mask=pixel < pixels, other=0), mask=pixel < pixels)
