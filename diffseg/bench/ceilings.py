"""The machine and what it can do at most: copy bandwidth, matrix products, exponentials."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from .cost import Ceilings
from .timing import elapsed

_SECONDS = 0.3  # of measuring each ceiling
_CPUINFO = Path("/proc/cpuinfo")
_IDENTITY = ("model name", "cpu family", "model")


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: processor, instruction set, threads, versions, GPU, load."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "isa": _isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["cuda"] = torch.version.cuda or torch.version.hip
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**found, "load": load}


def machine_line(found: dict[str, Any]) -> str:
    parts = [f"{found['processor']} ({found['isa']}, {found['threads']} threads)"]
    parts += [found["gpu"]] if "gpu" in found else []
    parts += [f"torch {found['torch']}", f"Python {found['python']}"]
    if found["load"] is not None:
        parts.append(f"load {found['load']:.1f}")
    return ", ".join(parts)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache, the last before the memory."""
    if device.type == "cuda":
        size: int = torch.cuda.get_device_properties(device).L2_cache_size
        return size
    found = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(found, default=32 << 20)


def measure(device: torch.device) -> Ceilings:
    """Measures the ceilings of ``device``; takes a few seconds."""
    products = {"float32": _product(device, torch.float32), "bfloat16": _product(device, torch.bfloat16)}
    if device.type == "cuda":
        with _tf32():
            products["tf32"] = _product(device, torch.float32)
        return Ceilings(_copy(device), products, _exponentials_of_registers(device), overlap=True)
    exponentials = _exponentials()
    try:
        kernels = native.cpu()
    except ImportError:  # there is nothing to hold against them
        return Ceilings(_copy(device), products, exponentials)
    products["float32"] = max(products["float32"], 2 * _most(kernels.multiply_adds))
    return Ceilings(_copy(device), products, max(exponentials, _most(kernels.exponentials)))


def _copy(device: torch.device) -> float:
    source = torch.rand(64 << 20, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _product(device: torch.device, dtype: torch.dtype) -> float:
    side = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _fastest(lambda: torch.mm(left, right, out=out), device)


def _most(steps: Callable[[int], float]) -> float:
    """Steps a second of all threads if each were as fast as one alone, from the fastest of calls of about 1 ms."""
    rounds, best, end = 1024, 0.0, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        count = steps(rounds)
        seconds = time.perf_counter() - begin
        best = max(best, count / seconds)
        rounds *= 2 if seconds < 1e-3 else 1
    return torch.get_num_threads() * best


def _exponentials() -> float:
    values = torch.rand(1 << 16)  # within a second-level cache
    out = torch.zeros_like(values)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread that waits for the other would be measured with it
    try:
        return threads * values.numel() / _fastest(lambda: torch.exp(values, out=out), values.device)
    finally:
        torch.set_num_threads(threads)


def _exponentials_of_registers(device: torch.device) -> float:
    """Exponentials a second of values in registers, since torch's exp would measure the memory; inf without Triton."""
    try:
        from ..kernels.exponentials import count, run
    except ImportError:
        return float("inf")
    out = torch.zeros(1 << 20, device=device)
    return count(out) / _fastest(lambda: run(out), device)


def _fastest(run: Callable[[], Tensor | None], device: torch.device) -> float:
    """Seconds of the fastest call: what was reached once is possible."""
    run()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        best = min(best, elapsed(lambda _: run(), [None], device))
    return best


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@functools.cache
def _processor() -> str:
    """Its name and, on x86, family and model: on virtual machines several generations have one name."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    parts = (f"{each} {said[each]}".removeprefix("model name ") for each in _IDENTITY if said.get(each))
    return ", ".join(parts) or platform.machine()


def _isa() -> str:
    try:
        from .. import _cpu
    except ImportError:
        return f"torch: {torch.backends.cpu.get_cpu_capability()}"
    return str(_cpu.isa())


def _bytes(text: str) -> int:
    """The bytes of a size as Linux writes it: ``"32768K"``."""
    text = text.strip()
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * factor
