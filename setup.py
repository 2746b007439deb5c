"""Builds the compiled kernels; everything else about the package stands in pyproject.toml.

The extensions use pybind11 and no torch header, so one build serves every torch version. OpenMP is compiled in but its
runtime is not linked: the symbols resolve to the copy that torch has loaded, so that a process has one thread pool.
"""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

openmp = ["-fopenmp"] if sys.platform == "linux" else []

setup(
    ext_modules=[
        Pybind11Extension(
            "diffseg._cpu",
            ["csrc/cpu/label.cpp", "csrc/cpu/module.cpp"],
            depends=["csrc/cpu/kernels.h"],
            cxx_std=17,
            extra_compile_args=[*openmp, "-O3", "-fno-math-errno"] if sys.platform != "win32" else ["/O2"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
