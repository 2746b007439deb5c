"""What the tests of the pipeline share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffseg.pipeline import DiffSegPipeline
from diffseg.testing import tiny_unet

THRESHOLD = 0.01  # the maps of random weights differ little


def quiet(pipe: DiffSegPipeline) -> DiffSegPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(checkpoint: Path, **options: Any) -> DiffSegPipeline:
    return quiet(DiffSegPipeline.from_pretrained(checkpoint, threshold=THRESHOLD, **options))


def pixel_pipeline(**unet: Any) -> DiffSegPipeline:
    """A pipeline without a VAE whose UNet has two levels: fast."""
    levels = {
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    config = {**levels, "in_channels": 3, "out_channels": 3, "sample_size": 16, "layers_per_block": 1, **unet}
    return quiet(DiffSegPipeline(tiny_unet("sd1", **config), threshold=THRESHOLD))


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
