# ruff: noqa: N803  (compile-time arguments are in capitals, as is usual in Triton)
"""A tile of Q K^T: how its operands are read, and in what pieces they are multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dot, exact_precision, generation


def common_unit(tensors: Sequence[Tensor]) -> int:
    """Elements of which all addresses and outer strides are multiples: 16 bytes of them, as one load takes, or 1."""
    unit = 16 // tensors[0].element_size()
    aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(-1) == 1 and not any(s % unit for s in tensor.stride()[:-1])
        for tensor in tensors
    )
    return unit if aligned else 1


def product_constants(query: Tensor) -> dict[str, Any]:
    """How :func:`tile_scores` cuts heads like those of ``query`` into pieces, and how exactly it multiplies."""
    width = query.shape[3]
    head = 1 << (width.bit_length() - 1)  # the largest power of two within the width; the rest is the tail
    tail = 0 if head == width else max(16, triton.next_power_of_2(width - head))
    if head < 16 or tail == head:
        head, tail = max(16, triton.next_power_of_2(width)), 0
    single = query.dtype == torch.float32
    chunk = 32 if generation(query.device) == "sm_100" else 16  # there each product of a tile takes tensor memory
    return {
        "WIDTH": width, "HEAD": head, "TAIL": tail, "CHUNK": chunk if single else 128,
        "PRECISION": exact_precision() if single else None,
    }  # fmt: skip


@triton.jit
def operand(
    base,
    index,
    limit,
    stride_n,
    stride_d,
    UNIT: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Channels START to START + SIZE of rows ``index``, zeros outside."""
    channel = START + tl.arange(0, SIZE)
    return tl.load(
        base + index.to(tl.int64)[:, None] * stride_n * UNIT + channel[None, :] * stride_d,
        mask=(index[:, None] < limit) & (channel[None, :] < WIDTH),
        other=0.0,
    )


@triton.jit
def tile_scores(
    query, key, row, column, rows, columns, stride_qn, stride_qd, stride_kn, stride_kd,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Q K^T of a tile. The width is cut in two powers of two, so that 40 channels cost 48 and not 64."""
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    size: tl.constexpr = HEAD if HEAD < CHUNK else CHUNK  # Triton 3.2 has no min of constants
    for start in tl.static_range(0, HEAD, size):
        q = operand(query, row, rows, stride_qn, stride_qd, UNIT, start, size, WIDTH)
        k = operand(key, column, columns, stride_kn, stride_kd, UNIT, start, size, WIDTH)
        scores = dot(q, k.T, scores, PRECISION)
    if TAIL > 0:
        rest: tl.constexpr = TAIL if TAIL < CHUNK else CHUNK
        for start in tl.static_range(HEAD, HEAD + TAIL, rest):
            q = operand(query, row, rows, stride_qn, stride_qd, UNIT, start, rest, WIDTH)
            k = operand(key, column, columns, stride_kn, stride_kd, UNIT, start, rest, WIDTH)
            scores = dot(q, k.T, scores, PRECISION)
    return scores
