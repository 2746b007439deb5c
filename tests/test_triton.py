"""The Triton backend where there is no GPU: its kernels interpreted, and life without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffseg import backends

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> str:
    """Output of a Python process in the checkout; fails with it where the process does."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    return result.stdout


def test_kernels_under_the_interpreter() -> None:
    """A process of its own: TRITON_INTERPRET holds for a whole process, and the ahead-of-time tests need a compiler."""
    pytest.importorskip("triton")
    state = run("-c", "import diffseg; print(diffseg.explain_backends()['triton'])", TRITON_INTERPRET="1")
    if "the interpreter of Triton before 3.7 needs NumPy before 2.4" in state:
        pytest.skip(state)
    output = run("-m", "pytest", "-q", "tests/triton_interpreted.py", TRITON_INTERPRET="1")
    assert " passed" in output
    assert "skipped" not in output


def test_an_older_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert backends.BACKENDS["triton"].unavailable() == "expected Triton 3.2 or later, found 3.1.0"
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert backends.BACKENDS["triton"].unavailable() in (None, "no CUDA or ROCm GPU is visible")


@pytest.mark.parametrize(("name", "most"), [("anchors", 1024), ("tokens", 128), ("width", 256)])
def test_limits_are_the_most_that_is_served(name: str, most: int) -> None:
    assert backends._triton_limit(torch.device("cpu"), **{name: most}) is None
    assert f"got {most + 1}" in str(backends._triton_limit(torch.device("cpu"), **{name: most + 1}))


def test_without_triton_all_else_works() -> None:
    output = run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, diffseg\n"
        "assert 'triton' not in diffseg.available_backends()\n"
        "proposals = diffseg.merge(torch.rand(1, 16, 16).softmax(-1), anchors=2)\n"
        "print(diffseg.explain_backends()['triton'])\n"
        "try: diffseg.label(proposals, (8, 8), backend='triton')\n"
        "except ValueError as error: print(error)\n",
    )
    assert "cannot run: Triton is not installed" in output
    assert "backend='triton' cannot run label here" in output
