"""``diffseg bench``: its options, and the run."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

import torch

from ..backends import BACKENDS
from ..loading import UsageError, check_backend, check_output, find_device
from ..reference import Grid
from . import ceilings, compare, plot, report
from .cases import golden_missing
from .networks import ARCHITECTURES
from .report import Record
from .rows import STAGES, Settings
from .run import Journal, run_rows
from .timing import Timer

SECONDS, SUBSET_SECONDS, QUICK_SECONDS = 1.0, 0.9, 0.1
PASSES, GPU_PASSES = 6, 3  # starting a process takes longer on a GPU, and times there scatter less
QUICK_SIZE = "320"
CASES = ("golden", "bundled", "sd14", "thin", "noise")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages = "; ".join(f"{name}: {what}" for name, what in STAGES.items())
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{stages} (default: a subset of two minutes and a quarter)"
    )
    parser.add_argument("--size", nargs="+", metavar="PIXELS", help="of images: 512 or 512x768 (default: 512)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="B", help="images at once (default: 1)")
    parser.add_argument("--case", nargs="+", default=[], choices=CASES, help="(default: those that suit the stage)")
    parser.add_argument("--backend", nargs="+", default=[], choices=tuple(BACKENDS), help="(default: all that can run)")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of queries, keys and networks (default: float16 on cuda)")
    parser.add_argument("--quick", action="store_true", help=f"size {QUICK_SIZE}, fewest samples, one pass")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of sampling a contender in all passes (default: {SECONDS}, in the subset {SUBSET_SECONDS})",
    )
    parser.add_argument(
        "--passes",
        type=int,
        metavar="N",
        help=f"over all rows, each in a fresh process; one gives no bounds (default: {PASSES}, on cuda {GPU_PASSES})",
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="JSON", help="measure nothing: whether two runs agree, else status 1"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was measured, after every row")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw it, as .png or .svg (needs matplotlib)")
    parser.add_argument("--published", type=Path, metavar="PATH", help="a checkout of the published TensorFlow code")
    parser.add_argument("--published-python", metavar="PATH", help="the interpreter that has TensorFlow")
    parser.add_argument(
        "--model", help="a checkpoint on disk for capture, pipeline and folder (default: the bundled one)"
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="its layers with random weights instead")


def settings_of(options: argparse.Namespace) -> Settings:
    """What the options ask for; raises UsageError, naming the option that is wrong."""
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        raise UsageError(f"STAGE: expected some of {', '.join(STAGES)}, got {unknown[0]!r}")
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        raise UsageError(f"--seconds: expected a positive number, got {options.seconds}")
    device = find_device(options.device)
    if options.passes is not None and options.passes < 1:
        raise UsageError(f"--passes: expected at least 1, got {options.passes}")
    if min(options.batch) < 1:
        raise UsageError(f"--batch: expected at least 1, got {min(options.batch)}")
    if options.published is not None and not options.published.is_dir():
        raise UsageError(f"--published: expected a folder, got {options.published}")
    if options.model is not None and not Path(options.model).is_dir():
        raise UsageError(f"--model: expected a folder, got {options.model}")
    for name in options.backend:
        check_backend(name, device)
    sizes = [_size(text) for text in options.size or [QUICK_SIZE if options.quick else "512"]]
    if "golden" in options.case and all(missing := [golden_missing(size) for size in sizes]):
        raise UsageError(f"--case golden: {missing[0]}")
    return Settings(
        stages=tuple(dict.fromkeys(options.stages)),
        cases=tuple(options.case),
        sizes=tuple(sizes),
        batches=tuple(options.batch),
        backends=tuple(options.backend),
        device=device,
        dtype=_DTYPES[options.dtype or ("float16" if device.type == "cuda" else "float32")],
        published=options.published,
        published_python=options.published_python,
        model=options.model,
        architecture=options.architecture,
    )


def _size(text: str) -> Grid:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if min(height, width) < 128 or height % 64 or width % 64:
        raise UsageError(f"--size: expected a multiple of 64 from 128, or two as 512x768, got {text}")
    return height, width


def run(options: argparse.Namespace) -> int:
    """Times every backend against plain PyTorch and other peers, each result checked first (benchmarks/README.md).

    Ends with status 1 if a result is wrong, 2 if nothing can be measured, 130 if interrupted; --json then still holds
    every row that was measured.
    """
    if options.compare is not None:
        if options.stages:
            raise UsageError(f"--compare: expected no STAGE with it, got {options.stages[0]!r}")
        return compare.run(*options.compare)
    settings = settings_of(options)
    if options.plot is not None:
        plot.check(options.plot)
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            _make_place(option, path)
    timer = _timer(options, settings)
    limits = ceilings.measure(settings.device)
    journal = Journal(options.json, command_line(options), settings.device, limits, timer.passes)
    line = ceilings.machine_line(journal.contents["machine"])
    print(report.header(journal.contents, line), flush=True)
    interrupted = False
    try:
        with torch.no_grad():
            run_rows(settings, timer, limits, journal, _show)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\n{_interrupted(journal.contents)}")
    if options.plot is not None and any(row["state"] == "measured" for row in journal.contents["rows"]):
        plot.save(journal.contents["rows"], line, options.plot)
    rows = journal.contents["rows"]
    if not interrupted and all(row["state"] == "skipped" for row in rows):
        raise UsageError(f"nothing was measured: {'; '.join(dict.fromkeys(row['reason'] for row in rows))}")
    if journal.failed:
        print(f"\n{len(journal.failed)} of {len(rows)} rows FAILED")
        return 1
    return 130 if interrupted else 0


def _make_place(option: str, path: Path) -> None:
    """Makes the folder of a file that will be written; UsageError, before anything is measured, where it cannot be."""
    check_output(option, path.parent)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise UsageError(f"{option}: expected a file that can be written, got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: {error}") from error


def _interrupted(contents: Record) -> str:
    passes = [len(row["elapsed_seconds"]) for row in contents["rows"] if row["state"] == "measured"]
    if max(passes, default=0) > 1:
        return f"interrupted after {min(passes)} of {contents['passes']} passes"
    return f"interrupted after {len(contents['rows'])} rows"


def _timer(options: argparse.Namespace, settings: Settings) -> Timer:
    seconds = options.seconds
    if seconds is None:
        seconds = QUICK_SECONDS if options.quick else SUBSET_SECONDS if settings.subset else SECONDS
    passes = options.passes or (1 if options.quick else GPU_PASSES if settings.device.type == "cuda" else PASSES)
    return Timer(settings.device, seconds, passes)


def command_line(options: argparse.Namespace) -> list[str]:
    """The options that were given, without paths to other software."""
    hidden = {"published", "published_python", "json", "plot", "command"}
    words = [*options.stages]
    for name, value in vars(options).items():
        if name != "stages" and name not in hidden and value not in (None, [], False, [1]):
            words += [f"--{name.replace('_', '-')}"]
            words += [] if value is True else [str(each) for each in (value if isinstance(value, list) else [value])]
    return words


def _show(record: Record) -> None:
    print(report.row(record), flush=True)


def parse(text: str) -> Settings:
    """Settings from a text of options, as one would type them after ``diffseg bench``."""
    parser = argparse.ArgumentParser(prog="diffseg bench")
    add_arguments(parser)
    options: Any = parser.parse_args(shlex.split(text))
    return settings_of(options)
