"""Builds the compiled kernels; everything else about the package stands in pyproject.toml.

The extensions use pybind11 and no torch header, so one build serves every torch version. OpenMP is compiled in but its
runtime is not linked: the symbols resolve to the copy that torch has loaded, so that a process has one thread pool.
Torch's wheels for Linux bring GCC's; what Clang compiles there loads only beside a torch that brings LLVM's.

``MAX_JOBS`` is the number of files that are compiled at a time, 1 unless it is set.

``DIFFSEG_SANITIZE=1`` builds with the address and undefined-behaviour sanitizers.

``DIFFSEG_CUDA=1`` builds the CUDA kernels wherever nvcc is, for ``DIFFSEG_CUDA_ARCHS`` (default ``80;90+PTX``: machine
code for capabilities 8.0 and 9.0, and PTX, which later GPUs compile when they load it); ``0`` never does. Unset, they
are built where nvcc and a GPU are, for that GPU. The runtime is linked statically, so the result imports without a GPU.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext, has_flag
from setuptools import setup
from setuptools.command.sdist import sdist

X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "-Wno-maybe-uninitialized",  # GCC 12 warns of its own header
]
INSTRUCTION_SETS = {
    "avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
    "avx512.cpp": AVX512,
    "avx2.cpp": ["-mavx2", "-mfma"],
}


class BuildExtension(build_ext):
    """Compiles each file with its flags, which setuptools knows for whole extensions only, and CUDA files with nvcc."""

    def build_extension(self, extension):
        compile_file = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            if ext == ".cu":
                self.spawn([find_nvcc(), *extension.nvcc_flags, *pp_opts, "-c", src, "-o", obj])
                return
            flags = INSTRUCTION_SETS.get(Path(src).name, [])
            compile_file(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        newest = "csrc/cpu/avx512bf16.cpp"
        if newest in extension.sources:
            if has_flag(self.compiler, "-mavx512bf16"):
                extension.define_macros.append(("DIFFSEG_AVX512BF16", "1"))
            else:  # GCC before 10
                extension.sources.remove(newest)
        self.compiler._compile = compile_with_flags
        if ".cu" not in self.compiler.src_extensions:
            self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        try:
            super().build_extension(extension)
        finally:
            self.compiler._compile = compile_file


class SourceDistribution(sdist):
    """Holds what builds and tests a checkout: CUDA files too where no nvcc names them, and what tests read."""

    def make_distribution(self):
        for folder in ("benchmarks", "csrc", "kernels", "tests"):
            self.filelist.graft(folder)
        self.filelist.append("Makefile")
        self.filelist.prune("benchmarks/results/device")
        for leftover in ("*.py[cod]", "*.so", "latest.*"):
            self.filelist.global_exclude(leftover)
        super().make_distribution()


def cpu_extension():
    """diffseg._cpu. Its kernels are written in the vector extensions of GCC and Clang."""
    sources = ["module.cpp", "dispatch.cpp", "portable.cpp", *(INSTRUCTION_SETS if X86 else ())]
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
    if sys.platform == "linux":
        flags.append("-fopenmp")
    sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if os.getenv("DIFFSEG_SANITIZE") else []
    return Pybind11Extension(
        "diffseg._cpu",
        [f"csrc/cpu/{source}" for source in sources],
        depends=sorted(glob("csrc/cpu/*")),
        define_macros=[("DIFFSEG_X86", "1")] if X86 else [],
        cxx_std=17,
        extra_compile_args=[*flags, *(["-O1", "-g", *sanitizers] if sanitizers else [])],
        extra_link_args=sanitizers,
    )


def cuda_extension(nvcc, targets):
    """diffseg._cuda, for ``targets`` as DIFFSEG_CUDA_ARCHS lists them."""
    flags = ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    for target in targets.split(";"):
        number = target.removesuffix("+PTX")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if target.endswith("+PTX") else [])
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
    home = toolkit_of(nvcc)
    folders = [home / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    extension = Pybind11Extension(
        "diffseg._cuda",
        ["csrc/cuda/module.cpp", *sorted(glob("csrc/cuda/*.cu"))],
        depends=sorted(glob("csrc/cuda/*")),
        define_macros=[("DIFFSEG_CUDA_TARGETS", f'"{targets}"')],
        cxx_std=17,
        library_dirs=[str(folder) for folder in folders if (folder / "libcudart_static.a").exists()],
        libraries=["cudart_static", "rt", "dl", "pthread"],
    )
    extension.nvcc_flags = flags
    return extension


def find_nvcc():
    """Path of nvcc: on PATH, or below CUDA_HOME or its usual place; None where there is none."""
    home = os.getenv("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def toolkit_of(nvcc):
    """The folder of the toolkit, which nvcc knows: what is on PATH may be a script or a link that calls it."""
    steps = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True, check=True).stderr
    return Path(re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)[1])


def visible_capabilities():
    """Compute capabilities of the GPUs that the driver shows, as in "90"; none without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for device in range(count.value):  # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append(f"{major.value}{minor.value}")
    return found


def targets_of_visible_gpus(nvcc):
    """What to build for the GPUs of this machine: machine code where nvcc knows them, else PTX; None without one."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    capable = [number for number in visible_capabilities() if int(number) >= 80]
    return ";".join(sorted({number if f"sm_{number}" in known else "90+PTX" for number in capable})) or None


def cuda_extensions():
    """diffseg._cuda in a list, if DIFFSEG_CUDA and this machine say that it is to be built."""
    choice, nvcc = os.getenv("DIFFSEG_CUDA", ""), find_nvcc()
    if choice not in ("", "0", "1"):
        raise SystemExit(f"DIFFSEG_CUDA: expected 0, 1 or nothing, got {choice!r}")
    if choice == "1" and nvcc is None:
        raise SystemExit("DIFFSEG_CUDA=1: nvcc is neither on PATH nor below CUDA_HOME")
    if choice == "0" or nvcc is None or sys.platform != "linux":
        return []
    usual = "80;90+PTX" if choice == "1" else targets_of_visible_gpus(nvcc)
    return [cuda_extension(nvcc, os.getenv("DIFFSEG_CUDA_ARCHS") or usual)] if usual else []


ParallelCompile("MAX_JOBS", default=1).install()
setup(
    ext_modules=[cpu_extension(), *cuda_extensions()] if sys.platform != "win32" else [],
    cmdclass={"build_ext": BuildExtension, "sdist": SourceDistribution},
)
