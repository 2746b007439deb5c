"""What the tests of the pipeline share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffseg.pipeline import DiffSegPipeline


def quiet(pipe: DiffSegPipeline) -> DiffSegPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(height: int = 128, width: int = 128, seed: int = 0) -> NDArray[np.uint8]:
    """Two halves with noise, so that there is something to find."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    image[:, : width // 2] = rng.random(3)
    image[:, width // 2 :] = rng.random(3)
    return ((image + 0.1 * rng.random(image.shape)).clip(0, 1) * 255).astype(np.uint8)


@contextmanager
def modules_run() -> Iterator[list[torch.nn.Module]]:
    """The modules that run inside, in order; without a hook, for which a UNet's pass would run to its end."""
    ran: list[torch.nn.Module] = []
    call = torch.nn.Module.__call__

    def noting(module: Any, *args: Any, **more: Any) -> Any:
        ran.append(module)
        return call(module, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", noting)
        yield ran
