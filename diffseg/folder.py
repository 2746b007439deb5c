"""Many files through a pipeline: decoding, the network and writing overlap, and images of one size share a pass."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from . import images, visualize

_READERS = 1
_WRITERS = 1
_PASSES_BEFORE_RECORDING = 3  # of one shape, on a GPU
_RECORDED_SHAPES = 8
_FAILURES = (ValueError, OSError)  # of one image; anything else ends the run


class Job(NamedTuple):
    """One image and where its results go."""

    source: Path
    labels: Path
    overlay: Path


class Outcome(NamedTuple):
    """How a job ended."""

    segments: int = 0
    error: Exception | None = None


class _Item(NamedTuple):
    number: int
    picture: Tensor
    size: tuple[int, int]  # at which it is processed


def segment_files(
    pipe: Any,
    jobs: Sequence[Job],
    options: dict[str, Any],
    *,
    batch_size: int = 1,
    done: Callable[[Job, Outcome], None] = lambda job, outcome: None,
) -> tuple[list[Outcome], dict[str, float]]:
    """Segments files and writes each one's labels and overlay, both or neither.

    An image that fails does not stop the others, nor those of its own batch. At most a few batches are in memory.

    Args:
        pipe: a :class:`diffseg.DiffSegPipeline`.
        jobs: the files.
        options: arguments of the pipeline's call.
        batch_size: images a pass; those of one processed size, as they come.
        done: called in this thread as each job ends, in the order of ending.

    Returns:
        How each job ended, in order, and the seconds of each stage (empty unless ``options`` ask for them).
    """
    passes: Counter[Any] = Counter()
    outcomes: dict[int, Outcome] = {}
    seconds: dict[str, float] = {}
    writing: deque[tuple[int, int, Future[None]]] = deque()

    def end(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        done(jobs[index], outcome)

    def finish_writes(left: int) -> None:
        while len(writing) > left:
            index, segments, future = writing.popleft()
            error = future.exception()
            if error is not None and not isinstance(error, _FAILURES):
                raise error
            end(index, Outcome(segments, error))

    # torch would start a second team of threads in each thread that computes
    threads = torch.get_num_threads()
    single: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(_READERS, **single) as readers, ThreadPoolExecutor(_WRITERS, **single) as writers:
        read = _in_order(readers, lambda job: images.to_tensor(job.source), jobs, ahead=2 * batch_size)
        items = _items(pipe, read, options.get("processing_resolution"), end)
        for batch in _batches(items, batch_size):
            _record_frequent(pipe, batch, options, passes)
            for item, labels, segments in _segmented(pipe, batch, options, seconds, end):
                write = writers.submit(_write_both, jobs[item.number], item.picture, labels)
                writing.append((item.number, segments, write))
            finish_writes(left=2 * batch_size)
        finish_writes(left=0)
    torch.set_num_threads(threads)  # also for threads to come
    return [outcomes[index] for index in range(len(jobs))], seconds


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], arguments: Iterable[Any], ahead: int
) -> Iterator[Future[Any]]:
    """The futures of ``function``, in order; at most ``ahead`` more than are taken are begun."""
    begun: deque[Future[Any]] = deque()
    for argument in arguments:
        begun.append(pool.submit(function, argument))
        if len(begun) > ahead:
            yield begun.popleft()
    yield from begun


def _items(pipe: Any, read: Iterator[Future[Tensor]], resolution: Any, end: Callable[..., None]) -> Iterator[_Item]:
    for index, future in enumerate(read):
        try:
            picture = future.result()
            size = pipe._processed_size(tuple(picture.shape[1:]), resolution)
        except _FAILURES as error:
            end(index, Outcome(error=error))
        else:
            yield _Item(index, picture, size)


def _batches(items: Iterator[_Item], batch_size: int) -> Iterator[list[_Item]]:
    """Items of one processed size, in order; the oldest do not wait while more than three batches of others come."""
    waiting: dict[tuple[int, int], list[_Item]] = {}
    for item in items:
        same = waiting.setdefault(item.size, [])
        same.append(item)
        if len(same) == batch_size:
            yield waiting.pop(item.size)
        elif sum(map(len, waiting.values())) >= 3 * batch_size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def _record_frequent(pipe: Any, batch: list[_Item], options: dict[str, Any], passes: Counter[Any]) -> None:
    """On a GPU, makes the pipeline ready for the first shapes that keep coming."""
    if pipe.device.type != "cuda" or options.get("refine") or options.get("time_stages"):
        return
    shape = (len(batch), batch[0].size)
    passes[shape] += 1
    recorded = sum(number >= _PASSES_BEFORE_RECORDING for number in passes.values())
    if passes[shape] == _PASSES_BEFORE_RECORDING and recorded <= _RECORDED_SHAPES:
        known = {name: value for name, value in options.items() if name not in ("refine", "time_stages")}
        pipe.warmup(len(batch), *batch[0].picture.shape[1:], **known)


def _segmented(
    pipe: Any, batch: list[_Item], options: dict[str, Any], seconds: dict[str, float], end: Callable[..., None]
) -> Iterator[tuple[_Item, Any, int]]:
    """Labels and number of segments of each item; where a batch fails, its items are tried one by one."""
    try:
        output = pipe([item.picture for item in batch], batch_size=len(batch), **options)
    except _FAILURES as error:
        if len(batch) == 1:
            end(batch[0].number, Outcome(error=error))
            return
        for item in batch:
            yield from _segmented(pipe, [item], options, seconds, end)
        return
    for stage, value in output.timings.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    yield from zip(batch, output.labels, output.num_segments, strict=True)


def _write_both(job: Job, picture: Tensor, labels: Any) -> None:
    """Both files appear only once both are whole."""
    job.labels.parent.mkdir(parents=True, exist_ok=True)
    pictures = {
        job.labels: visualize.label_image(labels),
        job.overlay: Image.fromarray(visualize.overlay(images.to_array(picture), labels)),
    }
    whole: dict[Path, Path] = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in pictures}
    try:
        for path, image in pictures.items():
            image.save(whole[path], format="PNG")
        for path, temporary in whole.items():
            os.replace(temporary, path)
    finally:
        for temporary in whole.values():
            temporary.unlink(missing_ok=True)
