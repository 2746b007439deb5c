"""Launching: fixed configurations, the device guard, and a recorder from which kernels are compiled ahead of time.

A configuration is a line in a table a GPU generation, never the result of a search at the first call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GENERATIONS = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
OTHER = "other"  # GPUs with less shared memory: consumer cards (99 KB) and AMD (64 KB)
INTERPRETER = "interpreter"  # small tiles, so that small tests have many

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # as Triton reads it, at import


class Config(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Launch options; fusion of a product and a sum is asked for, since its default differs between versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class Launch(NamedTuple):
    """A launch as recorded: the kernel, its arguments by name, and its configuration."""

    kernel: Any
    arguments: dict[str, Any]
    config: Config


class _Recording(NamedTuple):
    generation: str
    hip: bool
    launches: list[Launch]


_recording: _Recording | None = None


@contextmanager
def recording(generation: str, *, hip: bool = False) -> Iterator[list[Launch]]:
    """Launches inside are listed instead of run, with the configurations of ``generation``; tensors may be meta."""
    global _recording
    previous, _recording = _recording, _Recording(generation, hip, [])
    try:
        yield _recording.launches
    finally:
        _recording = previous


def generation(device: torch.device) -> str:
    """The table of configurations that serves ``device``."""
    if _recording is not None:
        return _recording.generation
    if device.type == "cpu":
        return INTERPRETER
    if torch.version.hip is not None:
        return OTHER
    return GENERATIONS.get(torch.cuda.get_device_capability(device), OTHER)


def exact_precision() -> str:
    """How the tensor cores multiply float32: in three tf32 products, or, where there are none, in float32."""
    hip = torch.version.hip is not None if _recording is None else _recording.hip
    return "ieee" if hip else "tf32x3"


def has_fast_log(device: torch.device) -> bool:
    """Whether a logarithm can be one approximate instruction: AMD's library and the interpreter have none."""
    hip = torch.version.hip is not None if _recording is None else _recording.hip
    return not hip and generation(device) != INTERPRETER


def choose(table: Mapping[str, Config], device: torch.device) -> Config:
    """The line of ``table`` for ``device``; a generation without a line of its own takes that of "other"."""
    return table.get(generation(device), table[OTHER])


def launch(kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, **arguments: Any) -> None:
    """Runs ``kernel`` over ``grid`` on the current stream of ``device``."""
    arguments |= config.blocks
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, config))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **config.options())


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):  # noqa: N803
    """accumulator + a b, float32. The interpreter multiplies the bits of bfloat16 as integers: there operands widen."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


_SLOTS = 16
_WRITE = Config({}, num_warps=1, num_stages=1)


@triton.jit(do_not_specialize=[f"v{slot}" for slot in range(_SLOTS)])
def _write_integers(
    out, v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64, v6: tl.int64,
    v7: tl.int64, v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64, v12: tl.int64, v13: tl.int64,
    v14: tl.int64, v15: tl.int64,
):  # fmt: skip
    """Stores its arguments at ``out``: one program, 128 bytes.

    The interpreter keeps four bytes of an integer from 2**31 to 2**32, of which it would store eight: adding 0 makes
    them eight. Compiled, it is nothing.
    """
    tl.store(out + 0, v0 + 0)
    tl.store(out + 1, v1 + 0)
    tl.store(out + 2, v2 + 0)
    tl.store(out + 3, v3 + 0)
    tl.store(out + 4, v4 + 0)
    tl.store(out + 5, v5 + 0)
    tl.store(out + 6, v6 + 0)
    tl.store(out + 7, v7 + 0)
    tl.store(out + 8, v8 + 0)
    tl.store(out + 9, v9 + 0)
    tl.store(out + 10, v10 + 0)
    tl.store(out + 11, v11 + 0)
    tl.store(out + 12, v12 + 0)
    tl.store(out + 13, v13 + 0)
    tl.store(out + 14, v14 + 0)
    tl.store(out + 15, v15 + 0)


def integers_on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 tensor of ``values``, which travel as arguments of a kernel: no copy from the host, so nothing waits.

    In a graph the values are part of the recording, as the addresses of its tensors are.
    """
    padded = [*values, *[0] * (-len(values) % _SLOTS)]
    out = torch.empty(len(padded), dtype=torch.int64, device=device)
    for start in range(0, len(padded), _SLOTS):
        slots = {f"v{slot}": value for slot, value in enumerate(padded[start : start + _SLOTS])}
        launch(_write_integers, (1,), _WRITE, device, out=out[start:], **slots)
    return out[: len(values)]
