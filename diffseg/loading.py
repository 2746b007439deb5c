"""Loading a pipeline for a command, and the error of a command that cannot be carried out."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import DiffSegPipeline

STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"


class UsageError(Exception):
    """What was asked for cannot be done; nothing was written."""


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The arguments of :func:`load_pipeline`."""
    parser.add_argument(
        "--model", help=f"a diffusers checkpoint, such as {STABLE_DIFFUSION} (default: the bundled one)"
    )
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the network (default: float16 on cuda; with --model, bfloat16 on a CPU that has it; float32)",
    )


def load_pipeline(
    model: str | None, device: str | None, dtype: str | None, *, announce: bool = True
) -> DiffSegPipeline:
    """The pipeline of a checkpoint, or of the bundled model, without progress bars of its own."""
    import torch
    from diffusers.utils import logging

    from .pipeline import DiffSegPipeline
    from .tiny import MODEL

    logging.disable_progress_bar()  # of loading, beside which the progress over images would not be seen
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or _fastest_dtype(device, model)
    if model is None and announce:
        print(
            "using the bundled demonstration model, trained on generated scenes; for photographs, pass "
            f"--model {STABLE_DIFFUSION}",
            file=sys.stderr,
        )
    try:
        pipe = DiffSegPipeline.from_pretrained(model or MODEL, dtype=getattr(torch, dtype)).to(device)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"--model {model}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    loaded: DiffSegPipeline = pipe
    return loaded


def _fastest_dtype(device: str, model: str | None) -> str:
    """By measurement: on CPUs bfloat16 halves the time of Stable Diffusion's shapes, and not that of narrow models."""
    import torch

    if device.startswith("cuda"):
        return "float16"
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    wide = model is not None and device == "cpu"
    return "bfloat16" if wide and any(getattr(torch.cpu, name, bool)() for name in native) else "float32"
