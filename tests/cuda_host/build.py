"""Builds the CUDA kernels for the host, on the emulation in host_device.h."""

from __future__ import annotations

import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"
SOURCES = [
    *(path for path in sorted(KERNELS.glob("*.cu")) if path.name != "device.cu"),
    KERNELS / "module.cpp",
    HERE / "device.cpp",
    HERE / "host_device.cpp",
]
SLOW_TO_OPTIMISE = "module.cpp"  # and of no use


def build(folder: Path, *flags: str, sources: list[Path] = SOURCES) -> Path:
    """Compiles ``sources`` in ``folder``, two at a time, and links them: ``_cuda.so``, to be imported as ``_cuda``."""
    folders = [pybind11.get_include(), sysconfig.get_path("include"), KERNELS, HERE]
    common = ["g++", "-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", *flags]
    common += ['-DDIFFSEG_CUDA_TARGETS="the host"', *(f"-I{path}" for path in folders)]

    def compile_file(source: Path) -> Path:
        target = folder / f"{source.stem}_{source.suffix[1:]}.o"
        level = "-O0" if source.name == SLOW_TO_OPTIMISE else "-O2"
        _run([*common, level, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(target) for target in pool.map(compile_file, sources)]
    library = folder / "_cuda.so"
    _run(["g++", "-shared", *flags, *objects, "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-8000:]
