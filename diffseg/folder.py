"""Many files through a pipeline: decoding, the network and writing overlap, and images of one size share a pass.

On a CPU two passes run at a time, each with half the threads: what one does on a single thread costs the other nothing,
and a thread that decodes or writes holds up one of them, not a whole team. The network's sums are then rounded as on so
many threads: labels are those of one image at a time but for pixels at a tie.
"""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from . import images, visualize

logger = logging.getLogger(__name__)

_PASSES_BEFORE_RECORDING = 3  # of one shape, on a GPU
_RECORDED_SHAPES = 8
_MOST_FILES = 8  # that are decoded, and that are written, at a time
OVERLAY_COMPRESSION = 1  # of overlays as PNG: takes a third of the default's time and a quarter more space
_NOTE = "diffseg"  # key of the settings in a PNG file of labels
_FAILURES = (ValueError, OSError, torch.OutOfMemoryError)  # of one image; anything else ends the run
_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, which no later image could be written to either


class Job(NamedTuple):
    """One image and where its results go."""

    source: Path
    labels: Path
    overlay: Path
    listing: Path | None = None  # of the segments, where they are named
    stale: Path | None = None  # what an earlier run said of the labels that these replace
    settings: str = ""  # JSON, kept in the labels' file

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.labels, self.overlay, self.listing) if path is not None]


class Outcome(NamedTuple):
    """How a job ended."""

    segments: int = 0
    error: Exception | None = None


class _Item(NamedTuple):
    number: int
    picture: Tensor
    size: tuple[int, int]  # at which it is processed


class _Result(NamedTuple):
    """Of one image."""

    item: _Item
    labels: Any = None  # [H, W]
    caption: str | None = None
    named: list[dict[str, Any]] | None = None  # the segments, where names were asked for
    error: Exception | None = None


class _Pass(NamedTuple):
    results: list[_Result]
    seconds: Mapping[str, float]


def settings_of(labels: Path) -> dict[str, Any] | None:
    """What :func:`segment_files` noted in a file of labels; None where there is no such note."""
    try:
        with Image.open(labels) as image:
            found = json.loads(image.info[_NOTE])
    except (OSError, SyntaxError, KeyError, TypeError, ValueError, Image.DecompressionBombError):
        return None
    return found if isinstance(found, dict) else None


def segment_files(
    pipe: Any,
    jobs: Sequence[Job],
    options: dict[str, Any],
    *,
    batch_size: int = 1,
    done: Callable[[Job, Outcome], None] = lambda job, outcome: None,
) -> tuple[list[Outcome], dict[str, float]]:
    """Segments files and writes each one's labels and overlay: whole files, and both unless the process is killed
    between their renames.

    An image that fails does not stop the others, nor those of its own batch; a full disk ends the run. Up to some ten
    batches and 16 more images are in memory at one time.

    Args:
        pipe: a :class:`diffseg.DiffSegPipeline`.
        jobs: the files.
        options: arguments of the pipeline's call.
        batch_size: images a pass; those of one processed size, as they come.
        done: called in this thread as each job ends, in the order of ending.

    Returns:
        How each job ended, in order, and the seconds of each stage (empty unless ``options`` ask for them).
    """
    if options.get("semantic"):  # a batch's names share their numbers
        batch_size = 1
    pipes = _replicas(pipe, _passes_at_a_time(pipe, len(jobs), batch_size, options))
    idle: SimpleQueue[Any] = SimpleQueue()
    for each in pipes:
        idle.put(each)
    shapes: Counter[Any] = Counter()
    files = min(torch.get_num_threads(), _MOST_FILES)
    with _pools(len(pipes), files) as (readers, networks, writers):
        work = _Work(jobs, writers, 2 * batch_size + files, done)
        read = _in_order(readers, lambda job: images.to_picture(job.source), jobs, ahead=2 * batch_size + files)
        items = _items(pipe, read, options.get("processing_resolution"), work.end)
        for batch in _batches(items, batch_size):
            _record_frequent(pipe, batch, options, shapes)
            work.passes.append(networks.submit(_pass, idle, batch, options))
            work.finish_passes(left=len(pipes))
        work.finish_passes(left=0)
        work.finish_writes(left=0)
    return [work.outcomes[number] for number in range(len(jobs))], dict(work.seconds)


class _Work:
    """What is under way after decoding, in order, and how the jobs ended; one thread calls it."""

    def __init__(
        self, jobs: Sequence[Job], writers: ThreadPoolExecutor, most_writes: int, done: Callable[[Job, Outcome], None]
    ) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.seconds: Counter[str] = Counter()
        self.passes: deque[Future[_Pass]] = deque()
        self._writes: deque[tuple[int, int, Future[None]]] = deque()  # number, segments
        self._jobs, self._writers, self._most_writes, self._done = jobs, writers, most_writes, done

    def end(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        self._done(self._jobs[number], outcome)

    def finish_passes(self, left: int) -> None:
        """Waits until no more than ``left`` passes are under way, and begins to write what they found."""
        while len(self.passes) > left:
            results, timings = self.passes.popleft().result()
            self.seconds.update(timings)
            for result in results:
                number = result.item.number
                if result.error is not None:
                    self.end(number, Outcome(error=result.error))
                else:
                    write = self._writers.submit(_write, self._jobs[number], result)
                    self._writes.append((number, int(result.labels.max()) + 1, write))
            self.finish_writes(self._most_writes)

    def finish_writes(self, left: int) -> None:
        while len(self._writes) > left:
            number, segments, future = self._writes.popleft()
            error = future.exception()
            if error is not None and (not isinstance(error, _FAILURES) or getattr(error, "errno", None) in _FULL):
                raise error
            self.end(number, Outcome(segments, error))


def _passes_at_a_time(pipe: Any, jobs: int, batch_size: int, options: dict[str, Any]) -> int:
    """Two on a CPU, but where they would share one thread or one batch, or each load a captioner."""
    alone = torch.get_num_threads() == 1 or jobs <= batch_size or options.get("semantic")
    return 1 if alone or pipe._execution_device.type != "cpu" else 2


@contextmanager
def _pools(passes: int, files: int) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor, ThreadPoolExecutor]]:
    """Threads that read ``files`` at a time, threads for ``passes`` at a time, which share torch's, and that write."""
    threads, beginning = torch.get_num_threads(), Lock()
    Image.init()  # not safe where several threads open their first image

    def begin(torch_threads: int) -> None:
        """A thread takes the number that was set last, by any thread, when it first asks for it."""
        with beginning:
            torch.set_num_threads(torch_threads)
            torch.get_num_threads()

    def pool(workers: int, torch_threads: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers, initializer=begin, initargs=(torch_threads,))

    try:
        with pool(files, 1) as readers, pool(files, 1) as writers, pool(passes, threads // passes) as networks:
            try:
                yield readers, networks, writers
            except BaseException:
                for each in (readers, networks):  # what has not begun
                    each.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # also for threads to come


def _replicas(pipe: Any, number: int) -> list[Any]:
    """The pipeline and others on the same weights, each with its own modules of the UNet, which recording changes."""
    pipes = [pipe]
    while len(pipes) < number:
        shared = {id(tensor): tensor for tensor in (*pipe.unet.parameters(), *pipe.unet.buffers())}
        pipes.append(pipe.like(unet=copy.deepcopy(pipe.unet, shared)))
    return pipes


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
            size = pipe.processed_size(tuple(picture.shape[1:]), resolution)
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


def _record_frequent(pipe: Any, batch: list[_Item], options: dict[str, Any], shapes: Counter[Any]) -> None:
    """On a GPU, makes the pipeline ready for the first shapes that keep coming."""
    if pipe.device.type != "cuda" or options.get("refine") or options.get("time_stages"):
        return
    shape = (len(batch), batch[0].size)
    shapes[shape] += 1
    recorded = sum(number >= _PASSES_BEFORE_RECORDING for number in shapes.values())
    if shapes[shape] == _PASSES_BEFORE_RECORDING and recorded <= _RECORDED_SHAPES:
        taken = signature(pipe.warmup).parameters
        known = {name: value for name, value in options.items() if name in taken}
        try:
            pipe.warmup(len(batch), *batch[0].picture.shape[1:], **known)
        except _FAILURES as error:  # such as memory that does not suffice
            logger.debug("%s is not recorded: %s", shape, error)


def _pass(idle: SimpleQueue[Any], batch: list[_Item], options: dict[str, Any]) -> _Pass:
    pipe = idle.get()
    try:
        return _segmented(pipe, batch, options)
    finally:
        idle.put(pipe)


def _segmented(pipe: Any, batch: list[_Item], options: dict[str, Any]) -> _Pass:
    """Where a batch fails, its items are tried one by one."""
    try:
        output = pipe([item.picture for item in batch], batch_size=len(batch), **options)
    except _FAILURES as error:
        if len(batch) == 1:
            return _Pass([_Result(batch[0], error=error)], {})
        alone = [_segmented(pipe, [item], options) for item in batch]
        seconds: Counter[str] = Counter()
        for each in alone:
            seconds.update(each.seconds)
        return _Pass([result for each in alone for result in each.results], seconds)
    if output.semantics is None:
        results = [_Result(item, labels) for item, labels in zip(batch, output.labels, strict=True)]
    else:
        results = [
            _Result(item, found["segmentation"], caption, found["segments_info"])
            for item, found, caption in zip(batch, output.semantics, output.captions, strict=True)
        ]
    return _Pass(results, output.timings)


def _note(settings: str) -> PngInfo | None:
    if not settings:
        return None
    note = PngInfo()
    note.add_itxt(_NOTE, settings)
    return note


def _write(job: Job, result: _Result) -> None:
    """The files appear, one after the other, only once all are whole."""
    overlay = visualize.overlay(images.to_array(result.item.picture), result.labels)
    if result.named is not None:
        names = {segment["id"]: segment["label"] for segment in result.named if segment["label"] is not None}
        overlay = visualize.write_names(overlay, result.labels, names)
    job.labels.parent.mkdir(parents=True, exist_ok=True)
    whole = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in job.outputs}
    try:
        visualize.label_image(result.labels).save(whole[job.labels], format="PNG", pnginfo=_note(job.settings))
        Image.fromarray(overlay).save(whole[job.overlay], format="PNG", compress_level=OVERLAY_COMPRESSION)
        if job.listing is not None:
            listing = json.dumps(
                {"caption": result.caption, "segments_info": result.named}, indent=1, ensure_ascii=False
            )
            whole[job.listing].write_text(listing + "\n", encoding="utf-8")
        if job.stale is not None:
            job.stale.unlink(missing_ok=True)
        for path, temporary in whole.items():
            os.replace(temporary, path)
    finally:
        for temporary in whole.values():
            temporary.unlink(missing_ok=True)
