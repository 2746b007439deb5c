"""How much memory there is, and that of A_f, which a CPU keeps from one call to the next.

PyTorch gives a CPU's memory back at once, and the next call touches as much for the first time: 64 MiB on a grid of
64 x 64, which the kernel has to map and clear first. That can take longer than aggregating.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import Grid

_MOST_KEPT = 256 << 20  # bytes
_kept: list[Tensor] = []  # float32, flat: free buffers, the most recently used last
_lock = threading.RLock()  # a destructor or a signal handler, which may call in between, must not wait for its own


@contextmanager
def attention_memory(like: Tensor, grid: Grid) -> Iterator[Tensor | None]:
    """Memory for A_f over ``grid`` of a batch as large as ``like``'s, float32 [B, N, N]; the caller's alone, inside.

    None where ``like`` is not an ordinary tensor on a CPU, since on a GPU PyTorch itself keeps memory, and under
    ``torch.jit.trace``, which would make this memory a constant.
    """
    if not _is_kept(like):
        yield None
        return
    shape = (len(like), math.prod(grid), math.prod(grid))
    memory = _take(math.prod(shape))
    try:
        yield memory[: math.prod(shape)].view(shape)
    finally:
        _keep(memory)


def in_parts(
    work: Callable[[slice | None, Tensor | None], tuple[Tensor, ...]], like: Tensor, grid: Grid
) -> tuple[Tensor, ...]:
    """What ``work`` makes of a batch as large as ``like``'s; on a CPU of as many images at a time as fit what is kept.

    More would be given new memory in every call, and hold it all at once.

    Args:
        work: from which images (None: all), and memory for their A_f over ``grid`` or None, to tensors [B, ...].
    """
    if torch.compiler.is_compiling():
        return work(None, None)
    images = len(like)
    parts = -(-images // max(1, _MOST_KEPT // (4 * math.prod(grid) ** 2))) if _is_kept(like) else 1
    if parts == 1:
        with attention_memory(like, grid) as memory:
            return work(None, memory)
    size = -(-images // parts)
    found = []
    for start in range(0, images, size):
        part = slice(start, start + size)
        with attention_memory(like[part], grid) as memory:
            found.append(work(part, memory))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def of_images(layers: list[Tensor], images: slice | None) -> list[Tensor]:
    """Of tensors [B, ...], what belongs to some images; None: to all."""
    return layers if images is None else [each[images] for each in layers]


def available(device: torch.device) -> float:
    """Bytes that a process could have on ``device``; infinity where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, which keeps it
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def release() -> None:
    """Frees the buffers that no call is using."""
    with _lock:
        _kept.clear()


def _is_kept(like: Tensor) -> bool:
    jit: Any = torch.jit
    return like.device.type == "cpu" and type(like) is Tensor and not jit.is_tracing()


def _take(length: int) -> Tensor:
    with _lock:
        for memory in reversed(_kept):
            if len(memory) >= length:
                _kept[:] = [each for each in _kept if each is not memory]
                return memory
    with torch.inference_mode(False):  # a tensor of that mode could not be written to outside
        return torch.empty(length, dtype=torch.float32, device="cpu")


def _keep(memory: Tensor) -> None:
    if memory.nbytes > _MOST_KEPT:
        return
    with _lock:
        _kept.append(memory)
        while sum(each.nbytes for each in _kept) > _MOST_KEPT:
            del _kept[:1]
