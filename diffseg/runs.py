"""Work on every image of a data set that may be killed and continued, by one process or by several.

A folder holds the results of one set of settings: ``settings.json`` and, from each process, ``images-*.jsonl`` with one
line a finished image. ``accelerate launch`` starts several processes; each takes every n-th image that is not finished.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from .datasets import Dataset, DatasetError, Sample
from .loading import UsageError, check_output

if sys.platform != "win32":
    import fcntl

Result = dict[str, Any]
T = TypeVar("T")

_SETTINGS = "settings.json"
_LOCK = ".lock"
_LONGEST_WAIT = timedelta(days=30)  # of a process for the slowest


def processes(device: str | None) -> Any:
    """accelerate's state of this process and its peers: its index, their number, its device."""
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_LONGEST_WAIT)


def device_of(state: Any, device: str | None) -> str:
    """The device asked for, or this process's own where there are several processes or none was asked for."""
    if device is not None and state.num_processes == 1:
        return device
    return str(state.device) if state.device.type == "cuda" else "cpu"


def on_main(state: Any, plan: Callable[[], T]) -> T:
    """What ``plan`` returns, which runs in the main process alone; its error is every process's."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = plan()
        except (UsageError, DatasetError, OSError) as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UsageError(outcome[1])
    planned: T = outcome[0]
    return planned


@contextmanager
def claimed(state: Any, folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Inside, ``folder`` is the place of results under ``settings``, and no other run can enter."""
    with ExitStack() as held:
        on_main(state, lambda: held.enter_context(_alone_in(folder)))
        on_main(state, lambda: claim(folder, settings))
        yield


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of ``folder``, which is made; UsageError where one is in it.

    The system gives the lock back when the process ends, however it ends. The file stays: of two runs that wait, one
    could lock a file that is removed, the other its successor.
    """
    _make(folder)
    try:
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise UsageError(f"--output: {error}") from error
    with file:
        if not _lock(file.fileno()):
            file.seek(0)
            raise UsageError(
                f"{folder}: another run writes into it ({file.read()}): wait for it, or give another --output"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _lock(file: int) -> bool:
    """Whether nobody else has locked ``file``; True also where files cannot be locked."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems
            pass
    return True


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes ``folder`` the place of results under ``settings``, or checks that it is."""
    path = folder / _SETTINGS
    settings = json.loads(json.dumps(settings))
    if path.exists():
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path}: expected the settings of a run, got {error}; give another --output") from error
        if not (changed := changes(stored, settings)):
            return
        if finished(folder):
            raise UsageError(
                f"{folder} holds results of other settings: {changed}. Give those to go on, or another --output"
            )
    _make(folder)
    try:
        write_text(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--output: {error}") from error


def changes(stored: dict[str, Any], settings: dict[str, Any]) -> str:
    """In which of the settings, values of JSON, two runs differ; nothing where they do not."""
    return "; ".join(
        f"{name} was {json.dumps(stored.get(name))}, is {json.dumps(settings.get(name))}"
        for name in sorted({*stored, *settings})
        if stored.get(name) != settings.get(name)
    )


def _make(folder: Path) -> None:
    check_output("--output", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # there is none, or it cannot be removed for the reason for which writing failed
            temporary.unlink()


def finished(folder: Path) -> dict[str, Result]:
    """The results of the images that any process finished, by name; a line that a kill cut short is left out."""
    results: dict[str, Result] = {}
    for path in sorted(folder.glob("images-*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    results[entry["name"]] = entry["result"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UsageError(f"{path}: line {number}: expected a result, got {line[:60]!r}") from error
    return results


def process_dataset(
    state: Any, dataset: Dataset, folder: Path, work: Callable[[Sample], Result], watch: Callable[[Result], str]
) -> dict[str, Result]:
    """Does ``work`` on the images that are not finished and returns the results of all, by name, in order.

    ``watch`` sees each result once, those that were there first, and gives the text beside the progress bar.

    Raises:
        UsageError: naming the file, when a sample cannot be read; results so far are kept.
    """
    done = finished(folder)
    pending = [index for index, item in enumerate(dataset.items) if item.name not in done]
    state.wait_for_everyone()  # all have read before any writes, so that all divide the same images
    mine = pending[state.process_index :: state.num_processes]
    shown = ""
    for item in dataset.items:
        if item.name in done:
            shown = watch(done[item.name])
    peers = "" if state.num_processes == 1 else f", process 1 of {state.num_processes}"
    with (
        _appending(folder / f"images-{state.process_index:05}.jsonl") as add,
        tqdm(
            total=len(mine) + len(done),
            initial=len(done),
            unit="image",
            desc=dataset.kind + peers,
            postfix=shown,
            disable=not state.is_main_process,
        ) as progress,
    ):
        for index in mine:
            result = work(load(dataset, index))
            add(dataset.items[index].name, result)
            progress.set_postfix_str(watch(result), refresh=False)
            progress.update()
    state.wait_for_everyone()
    done = finished(folder)
    return {item.name: done[item.name] for item in dataset.items}


def load(dataset: Dataset, index: int) -> Sample:
    """One sample; UsageError, naming the file, when it cannot be read."""
    try:
        return dataset.load(index)
    except DatasetError as error:
        raise UsageError(f"{error} (finished images are kept)") from error
    except Exception as error:  # what a damaged file makes a decoder raise can be anything
        item = dataset.items[index]
        raise UsageError(f"{item.image} or {item.truth}: damaged ({error}) (finished images are kept)") from error


@contextmanager
def _appending(path: Path) -> Iterator[Callable[[str, Result], None]]:
    """A function that adds a result to a file, after its last whole line."""
    with path.open("ab") as file:
        whole = path.read_bytes().rfind(b"\n") + 1
        file.truncate(whole)

        def add(name: str, result: Result) -> None:
            file.write(json.dumps({"name": name, "result": result}, separators=(",", ":")).encode() + b"\n")
            file.flush()

        yield add


def watched(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """``items`` with a progress bar that goes when it is full."""
    bar: Iterable[T] = tqdm(items, total=total, desc=what, unit="file", leave=False)
    return bar
