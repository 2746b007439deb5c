"""The published TensorFlow code as a contender: a checkout and an interpreter with TensorFlow, given by path."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cases import Case

SIDES = (64, 32, 16, 8)
_WORKER = Path(__file__).with_name("published_worker.py")


class Measured(NamedTuple):
    """What one run of the published code took and gave."""

    seconds: float
    memory: int
    labels: Tensor  # int32 [B, 512, 512]


class Published:
    """A process that holds the published code and the maps of ``case``. Close it after use.

    Raises:
        RuntimeError: the checkout holds no ``segmentor.py``, or the process did not start; with its last words.
        ValueError: the case is not of the shapes that the published code is written for.
    """

    def __init__(self, checkout: Path, python: str | None, case: Case, *, rounds: int, points: int) -> None:
        segmentor = next(iter(sorted(checkout.rglob("segmentor.py"))), None)
        if segmentor is None:
            raise RuntimeError(f"expected a checkout of the published code, found no segmentor.py in {checkout}")
        if [grid for grid in case.grids if grid[0] == grid[1]] != [(side, side) for side in SIDES]:
            raise ValueError(f"the published code takes one map each of 64, 32, 16 and 8 a side, got {case.grids}")
        self._folder = tempfile.TemporaryDirectory()
        for side, maps in zip(SIDES, case.maps, strict=True):
            np.save(Path(self._folder.name, f"{side}.npy"), maps.cpu().numpy())
        words = [segmentor, self._folder.name, case.threshold, rounds, points, torch.get_num_threads()]
        self._errors = Path(self._folder.name, "errors").open("w+")  # noqa: SIM115  (closed in close)
        self._process = subprocess.Popen(
            [python or sys.executable, str(_WORKER), *map(str, words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1,
        )  # fmt: skip
        if self._line() != "ready":
            raise RuntimeError(self._last_words())

    def __call__(self, _: Any = None) -> Measured:
        """Runs the published code once on the maps of the case."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        line = self._line()
        if not line:
            raise RuntimeError(self._last_words())
        seconds, memory = line.split()
        labels = torch.from_numpy(np.load(Path(self._folder.name, "labels.npy")))
        return Measured(float(seconds), int(memory), labels)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
        self._folder.cleanup()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _last_words(self) -> str:
        self._process.kill()
        self._process.wait()
        self._errors.flush()
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines()[-1:] or ["it said nothing"]
        self.close()
        return f"the published code did not run: {words[0]}"
