"""What the tests of the pipeline share."""

from __future__ import annotations

import numpy as np
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
