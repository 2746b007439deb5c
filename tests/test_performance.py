"""Whether a kernel has become slow, asked so that a busy machine does not change the answer.

Times are compared within one run, sample by sample, and generously; instructions are counted exactly where valgrind is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import diffseg
from diffseg.bench import run
from diffseg.bench.cost import Ceilings
from diffseg.bench.rows import Row, Settings
from diffseg.bench.suite import Suite
from diffseg.bench.timing import Timer

LEAST_SPEEDUP = 1.3  # over the reference; the kernels are made for 2 and more
TRIES = 3
NO_CEILINGS = Ceilings(copy=1.0, products={"float32": 1.0})
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "instructions.py"
SPARE = 1.5  # compilers differ

INSTRUCTIONS = {"aggregate": 3660, "aggregate_maps": 580, "merge": 9230, "label": 2190}
"""Thousands, of AVX2 kernels built by GCC 12, on the inputs of the script."""


@pytest.mark.skipif("cpu" not in diffseg.available_backends("cpu"), reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    ("stage", "case"),
    [("aggregate", "thin"), ("maps", "thin"), ("merge", "thin"), ("merge", "noise"), ("label", "noise")],
)
def test_a_kernel_is_faster_than_the_reference(stage: str, case: str) -> None:
    factors = []
    for _ in range(TRIES):
        with Suite(Settings(backends=("cpu",))) as suite:
            record = run.run_row(suite, Row(stage, case, (256, 256)), Timer(suite.device, 0.2), NO_CEILINGS)
        assert record["state"] == "measured", record.get("reason")
        factors.append(record["contenders"][0]["times_faster"]["median"])
        if factors[-1] >= LEAST_SPEEDUP:
            return
    pytest.fail(f"{stage} on {case} is {factors} times as fast as the reference, in {TRIES} tries")


def preloaded_openmp() -> str | None:
    """The OpenMP runtime that torch brings, else the compiler's."""
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    found += sorted(Path(torch.__file__).parents[1].glob("torch.libs/libgomp*.so*"))
    if found:
        return str(found[0])
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    named = subprocess.run([compiler, "-print-file-name=libgomp.so.1"], capture_output=True, text=True).stdout.strip()
    return named if os.path.isabs(named) else None


def count(op: str, repeats: int) -> int:
    """Instructions of a process that calls an op so often."""
    from diffseg import _cpu

    command = [
        "valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null",
        sys.executable, "-I", "-S", str(SCRIPT), _cpu.__file__, "avx2", op, str(repeats),
    ]  # fmt: skip
    environment = {**os.environ, "LD_PRELOAD": preloaded_openmp() or "", "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = re.search(r"I +refs: +([\d,]+)", done.stderr)
    assert found, done.stderr
    return int(found[1].replace(",", ""))


def obstacle() -> str | None:
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if "cpu" not in diffseg.available_backends("cpu"):
        return "the C++ kernels are not built"
    from diffseg import _cpu

    if "avx2" not in _cpu.available_isas():
        return "valgrind knows no AVX-512, and this machine has no AVX2"
    return None if preloaded_openmp() else "no OpenMP runtime to preload was found"


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_instructions() -> None:
    with ThreadPoolExecutor(2) as pool:  # each waits for a process, which has one thread
        idle, *found = pool.map(count, ["label", *INSTRUCTIONS], [0, *[2] * len(INSTRUCTIONS)])
    thousands = {op: (each - idle) / 2000 for op, each in zip(INSTRUCTIONS, found, strict=True)}
    assert all(INSTRUCTIONS[op] / 4 < each < SPARE * INSTRUCTIONS[op] for op, each in thousands.items()), thousands
