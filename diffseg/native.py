"""The compiled kernels as functions of tensors: the only caller of the raw-pointer entry points.

Here dtype, strides and device become what a kernel expects, outputs and workspace are allocated with torch, and the
thread count or the stream is passed on.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor


@cache
def cpu() -> SimpleNamespace:
    """The ops of ``diffseg._cpu``; ImportError, with what to do, where it was not built."""
    try:
        from . import _cpu
    except ImportError as error:
        raise ImportError(f"diffseg._cpu is not built ({error}); reinstall with a C++17 compiler at hand") from error

    def label(maps: Tensor, counts: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        maps, counts = maps.contiguous(), counts.contiguous()
        batch_size, length, _ = maps.shape
        winner = torch.empty((batch_size, *size), dtype=torch.int32)
        _cpu.label(
            maps.data_ptr(), counts.data_ptr(), winner.data_ptr(), batch_size, length, *grid, *size,
            torch.get_num_threads(),
        )  # fmt: skip
        return winner

    return SimpleNamespace(label=label)
