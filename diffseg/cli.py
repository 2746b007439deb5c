"""The command line: ``diffseg segment``, ``evaluate``, ``study``, ``bench`` and ``info``."""

from __future__ import annotations

import argparse
import io
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

import torch

from . import __version__, evaluate, native, segment_command, study
from .backends import BACKENDS, available_backends, explain_backends
from .bench import command as bench
from .loading import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 if work failed, 2 if the request was wrong, 130 if interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what its encoding lacks
    try:
        with _terminable():
            _check_instruction_set()
            return command(options)
    except (UsageError, OSError) as error:
        print(f"diffseg: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("diffseg: interrupted", file=sys.stderr)
        return 130


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM interrupts, so that no temporary file stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffseg", description="Segments images without training, labels or prompts.")
    parser.add_argument("--version", action="version", version=f"diffseg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, module, purpose in (
        ("segment", segment_command, "segment images"),
        ("evaluate", evaluate, "measure DiffSeg and its baselines on a data set"),
        ("study", study, "sweep DiffSeg's parameters over a data set"),
        ("bench", bench, "measure speed, memory and exactness beside plain PyTorch's"),
    ):
        command = commands.add_parser(name, help=purpose, description=module.run.__doc__)
        command.set_defaults(command=module.run)
        module.add_arguments(command)

    info = commands.add_parser("info", help="print versions, devices and backends", description=_info.__doc__)
    info.set_defaults(command=_info)
    return parser


def _check_instruction_set() -> None:
    """Refuses a ``DIFFSEG_CPU_ISA`` that this machine lacks, which would come up wherever a backend is chosen."""
    if os.environ.get("DIFFSEG_CPU_ISA"):
        try:
            native.cpu()
        except ImportError:  # not built: nothing to choose
            return
        except ValueError as error:
            raise UsageError(str(error)) from error


def _info(options: argparse.Namespace) -> int:
    """Prints versions, devices and what each backend can do here."""
    print(f"diffseg {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "diffusers", "transformers", "triton"):
        try:
            print(f"  {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    print(f"devices ({torch.get_num_threads()} CPU threads)")
    for device in devices:
        name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine()
        print(f"  {device}: {name}; backends: {', '.join(available_backends(device))}")
    print("backends")
    for backend, state in explain_backends().items():
        print(f"  {backend}: {state}")
    if BACKENDS["cpu"].unavailable() is None:
        from . import _cpu

        print(f"instruction set of the C++ kernels: {_cpu.isa()} (here: {', '.join(_cpu.available_isas())})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
