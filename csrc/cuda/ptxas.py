"""Prints what each CUDA kernel takes of a GPU, for each target, and fails where one spills: ``make ptxas``.

Needs nvcc and no GPU. Shared memory here is what a kernel declares; the tiles of most are sized at the launch, and
tests/test_cuda_host.py asserts that they fit. "PTX on" is what a later GPU's driver makes of the PTX for 9.0.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90": "arch=compute_90,code=sm_90",
    "PTX on sm_100": "arch=compute_90,code=sm_100",
    "PTX on sm_120": "arch=compute_90,code=sm_120",
}
TYPES = ("float32", "float16", "bfloat16")  # as kernels.h numbers them
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_file(source: Path, target: str) -> str:
    """What ptxas says."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas=-v", f"-gencode={target}", "-cubin", str(source)]
        result = subprocess.run([*command, "-o", f"{folder}/kernels.cubin"], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    return result.stderr


def readable(name: str) -> str:
    """The kernel's own name and what it is instantiated for, of a mangled name."""
    kernel, arguments = re.search(r"\d((?:[a-z]+_)+kernel)(I.*?EEv)?", name).groups()
    found = [TYPES[int(number)] for number in re.findall(r"TypeE(\d)E", arguments or "")]
    found += re.findall(r"Li(\d+)E", arguments or "")
    return f"{kernel}<{', '.join(found)}>" if found else kernel


def main() -> int:
    sources = sorted(Path(__file__).parent.glob("*.cu"))
    print(f"{'kernel':34} {'target':14} {'registers':>9} {'shared':>6} {'stack':>5} {'spilled':>7}")
    kernels = spills = 0
    for source in sources:
        for target, flags in TARGETS.items():
            for entry in ENTRY.finditer(compile_file(source, flags)):
                shared = re.search(r"(\d+) bytes smem", entry["rest"])
                spilled = int(entry["stores"]) + int(entry["loads"])
                print(
                    f"{readable(entry['name']):34} {target:14} {entry['registers']:>9} {shared[1] if shared else 0:>6} "
                    f"{entry['stack']:>5} {spilled:>7}"
                )
                kernels += 1
                spills += spilled > 0 or int(entry["stack"]) > 0
    print(f"{kernels} kernels, {spills} of them spill or need a stack")
    return 1 if spills or kernels == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
