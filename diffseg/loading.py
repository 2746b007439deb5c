"""What the commands share: their arguments, loading a pipeline, and the error of one that cannot be carried out."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .backends import BACKENDS
from .checks import WEIGHT_SCHEMES

if TYPE_CHECKING:
    from .pipeline import DiffSegPipeline

STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"

_Number = TypeVar("_Number", int, float)

OPTIONS = ("threshold", "anchors", "iterations", "rule", "weights", "timestep", "backend")
"""What :meth:`diffseg.DiffSegPipeline.options` takes, and the segments follow from."""


class UsageError(Exception):
    """What was asked for cannot be done; nothing was written."""


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The arguments of :func:`load_pipeline`."""
    parser.add_argument(
        "--model", help=f"a diffusers checkpoint, such as {STABLE_DIFFUSION} (default: the bundled one)"
    )
    parser.add_argument("--variant", help="of the files of --model, such as fp16, of half the size")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the network (default: float16 on cuda; with --model, bfloat16 on a CPU that has it; else float32)",
    )


def add_parameters(parser: argparse._ActionsContainer) -> None:
    """DiffSeg's parameters: those of :data:`OPTIONS` but ``rule``, and how an image is processed."""
    parser.add_argument(
        "--threshold", type=positive_float, help="merge maps nearer than this (default: the model's own)"
    )
    parser.add_argument(
        "--anchors", type=positive_int, default=16,
        help="anchors a side, as many as the grid has at most (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--iterations", type=positive_int, default=3, help="merging rounds (default: %(default)s)")
    parser.add_argument("--weights", choices=WEIGHT_SCHEMES, help="of the layers (default: the model's own)")
    parser.add_argument("--timestep", type=int, help="at which the network is read (default: the model's own)")
    parser.add_argument("--refine", action="store_true", help="add k-means refinement")
    parser.add_argument(
        "--processing-resolution", type=positive_int, metavar="SIDE",
        help="longer side in the network (default: the model's own)",
    )  # fmt: skip
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="(default: %(default)s)")


def load_pipeline(
    model: str | None, device: str | None, dtype: str | None, *, variant: str | None = None, announce: bool = True
) -> DiffSegPipeline:
    """The pipeline of a checkpoint, or of the bundled model, without progress bars of its own."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    from .pipeline import DiffSegPipeline
    from .tiny import MODEL

    check_checkpoint("--model", model)
    if variant is not None and model is None:
        raise UsageError("--variant: expected --model with it")
    place = find_device(device)
    dtype = dtype or _fastest_dtype(place, model)
    if announce:
        print(f"using {_described(model, f'in {dtype} on {place}')}", file=sys.stderr)
    for library in (logging, transformers_logging):  # beside bars of loading the progress over images is not seen
        library.disable_progress_bar()
    try:
        pipe = DiffSegPipeline.from_pretrained(model or MODEL, dtype=getattr(torch, dtype), variant=variant).to(place)
    except Exception as error:  # files that are not as diffusers, transformers or safetensors expect raise anything
        raise UsageError(f"--model {model or MODEL}: {type(error).__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    loaded: DiffSegPipeline = pipe
    return loaded


def _described(model: str | None, where: str) -> str:
    if model is not None:
        return f"{model} {where}"
    return (
        f"the bundled demonstration model, trained on generated scenes, {where}; for photographs, pass "
        f"--model {STABLE_DIFFUSION}"
    )


def _positive(kind: Callable[[str], _Number]) -> Callable[[str], _Number]:
    """Reads an argument's number of that kind, above 0."""

    def read(given: str) -> _Number:
        try:
            number = kind(given)
        except ValueError:
            number = kind("0")
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {given!r}")
        return number

    return read


positive_int, positive_float = _positive(int), _positive(float)


def find_device(name: str | None) -> torch.device:
    """The torch device of that name, or the default for None; UsageError where it can hold no tensor with values."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.zeros(1, device=name)
        found.tolist()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return found.device


def check_checkpoint(option: str, name: str | None) -> None:
    """Raises UsageError where ``name`` is a file's, or can only be a folder's, and there is none."""
    if name is not None and Path(name).is_file():
        raise UsageError(
            f"{option} {name}: expected a folder with a diffusers checkpoint, or the name of one, got a file"
        )
    if name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UsageError(f"{option} {name}: no such folder")


def check_backend(name: str, device: torch.device) -> None:
    """Raises UsageError where a backend that is asked for by name cannot run on ``device``."""
    if name != "auto":
        try:
            BACKENDS[name].can_run("merge", device, torch.float32, raise_error=True)
        except ValueError as error:
            raise UsageError(f"--{error}") from error


def check_options(pipe: DiffSegPipeline, given: Mapping[str, Any], prefix: str = "--") -> None:
    """Raises UsageError, ``prefix`` before the option's name, where a call of ``pipe`` would refuse ``given``.

    Args:
        given: at least ``processing_resolution`` and all of :data:`OPTIONS`.
    """
    try:
        pipe.options(**{name: given[name] for name in OPTIONS})
        pipe.processed_size((1, 1), given["processing_resolution"])
    except (ValueError, TypeError) as error:
        raise UsageError(prefix + str(error).replace("processing_resolution", "processing-resolution", 1)) from error


def check_output(option: str, folder: Path) -> None:
    """Raises UsageError where no file could be written into ``folder``, which need not be there yet."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UsageError(f"{option}: expected a folder, {nearest} is a file")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise UsageError(f"{option}: no file can be written into {nearest} ({error.strerror})") from error


def _fastest_dtype(device: torch.device, model: str | None) -> str:
    """By measurement: on CPUs bfloat16 is faster at Stable Diffusion's shapes, and not in narrow models."""
    if device.type == "cuda":
        return "float16"
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    wide = model is not None and device.type == "cpu"
    return "bfloat16" if wide and any(getattr(torch.cpu, name, bool)() for name in native) else "float32"
