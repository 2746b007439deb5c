"""Builds the compiled kernels; everything else about the package stands in pyproject.toml.

The extensions use pybind11 and no torch header, so one build serves every torch version. OpenMP is compiled in but its
runtime is not linked: the symbols resolve to the copy that torch has loaded, so that a process has one thread pool.

``DIFFSEG_SANITIZE=1`` builds with the address and undefined-behaviour sanitizers.
"""

import os
import platform
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
INSTRUCTION_SETS = {
    "avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
        "-Wno-maybe-uninitialized",  # GCC 12 warns of its own header
    ],
    "avx2.cpp": ["-mavx2", "-mfma"],
}


class BuildExtension(build_ext):
    """Compiles the files of one instruction set with its flags, which setuptools knows for whole extensions only."""

    def build_extension(self, extension):
        compile_file = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = INSTRUCTION_SETS.get(Path(src).name, [])
            compile_file(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(extension)
        finally:
            self.compiler._compile = compile_file


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


setup(
    ext_modules=[cpu_extension()] if sys.platform != "win32" else [],
    cmdclass={"build_ext": BuildExtension},
)
