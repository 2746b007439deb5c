"""Many files: as one by one, in order, whatever fails."""

import errno
import logging
import signal
import threading
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import pixel_pipeline

from diffseg import folder, images
from diffseg.pipeline import DiffSegPipeline


@pytest.fixture
def pipe():
    return pixel_pipeline()


def save(path, height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(path)


@pytest.fixture
def jobs(tmp_path):
    sizes = [(16, 16), (16, 40), (30, 30), (16, 40), (16, 16), (40, 16), (24, 24), (16, 16), (20, 50)]
    for number, size in enumerate(sizes):
        save(tmp_path / f"{number}.png", *size, seed=number)
    return jobs_in(tmp_path, range(len(sizes)))


def jobs_in(path, names):
    out = path / "out"
    return [folder.Job(path / f"{name}.png", out / f"{name}_labels.png", out / f"{name}_overlay.png") for name in names]


def labels(job):
    return np.asarray(Image.open(job.labels))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_as_one_by_one(pipe, jobs, batch_size):
    ended = []
    outcomes, seconds = folder.segment_files(
        pipe, jobs, {}, batch_size=batch_size, done=lambda job, outcome: ended.append((job, outcome))
    )
    assert seconds == {}
    assert sorted(ended) == sorted(zip(jobs, outcomes, strict=True))
    for job, outcome in zip(jobs, outcomes, strict=True):
        alone = pipe(job.source)
        assert outcome.error is None
        assert (labels(job) == alone.labels[0]).mean() >= 0.999
        assert Image.open(job.overlay).size == Image.open(job.source).size
        assert outcome.segments == labels(job).max() + 1
    assert not [path.name for path in jobs[0].labels.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("step", ["read", "write"])
def test_files_are_read_and_written_on_as_many_threads_as_torch_has(pipe, jobs, monkeypatch, step):
    together = threading.Barrier(torch.get_num_threads())
    module, name = (images, "to_picture") if step == "read" else (folder, "_write")
    run = getattr(module, name)

    def wait_for_another(*arguments):
        if not isinstance(arguments[0], torch.Tensor):  # the pipeline takes pictures that have been read
            together.wait(timeout=30)
        return run(*arguments)

    monkeypatch.setattr(module, name, wait_for_another)
    outcomes, _ = folder.segment_files(pipe, jobs[:8], {})
    assert [outcome.error for outcome in outcomes] == [None] * 8


def test_images_of_one_processed_size_share_a_pass(pipe, jobs, monkeypatch):
    passes = []
    call = DiffSegPipeline.__call__

    def spy(self, pictures, **options):
        passes.append((self.processed_size(tuple(pictures[0].shape[1:]), None), len(pictures)))
        return call(self, pictures, **options)

    monkeypatch.setattr(DiffSegPipeline, "__call__", spy)
    folder.segment_files(pipe, jobs, {}, batch_size=2)
    assert Counter(passes) == {((16, 16), 2): 2, ((16, 16), 1): 1, ((6, 16), 2): 1, ((6, 16), 1): 1, ((16, 6), 1): 1}


def test_rare_sizes_do_not_wait_for_ever():
    items = [folder._Item(0, torch.empty(0), (1, 1))]
    items += [folder._Item(number, torch.empty(0), (2, number)) for number in range(1, 20)]
    drawn = 0

    def drawing():
        nonlocal drawn
        for item in items:
            drawn += 1
            yield item

    batches = folder._batches(drawing(), 2)
    assert [item.number for item in next(batches)] == [0]
    assert drawn == 6
    assert sorted(item.number for batch in batches for item in batch) == list(range(1, 20))


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
def test_a_failure_takes_no_other_image_with_it(pipe, jobs, monkeypatch, error):
    alone = [pipe(job.source).labels[0] for job in jobs]
    jobs[1].source.write_text("no image")
    jobs[5].labels.mkdir(parents=True)  # cannot be replaced by a file
    call = DiffSegPipeline.__call__

    def fails(self, pictures, **options):
        if any(picture.shape == (3, 24, 24) for picture in pictures):
            raise error("overflow")
        return call(self, pictures, **options)

    monkeypatch.setattr(DiffSegPipeline, "__call__", fails)
    outcomes, _ = folder.segment_files(pipe, jobs, {}, batch_size=4)
    failed = {number: str(outcome.error) for number, outcome in enumerate(outcomes) if outcome.error is not None}
    assert sorted(failed) == [1, 5, 6]
    assert "expected a readable image" in failed[1]
    assert failed[6] == "overflow"
    for number in {*range(len(jobs))} - {1, 5, 6}:
        assert (labels(jobs[number]) == alone[number]).mean() >= 0.999


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.ENOSPC, "No space left on device")])
def test_other_errors_end_the_run(pipe, jobs, monkeypatch, error):
    monkeypatch.setattr(folder, "_write", create_autospec(folder._write, side_effect=error))
    with pytest.raises(type(error)):
        folder.segment_files(pipe, jobs, {})


def test_what_has_not_begun_is_left_when_a_run_is_interrupted(pipe, jobs, monkeypatch):
    """In the first pass, while the thread that called waits for it and one more pass is queued."""
    reads, passes, interrupted = [], [], threading.Event()
    at_a_time = min(torch.get_num_threads(), 2)

    def reading(source):
        reads.append(source)
        if len(reads) > at_a_time + 1:
            interrupted.wait(timeout=20)
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    def passing(*arguments):
        passes.append(arguments)
        if len(passes) == 1:
            time.sleep(0.5)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)
            interrupted.set()
        interrupted.wait(timeout=20)
        return folder._Pass([], {})

    monkeypatch.setattr(folder, "_MOST_FILES", 2)
    monkeypatch.setattr(images, "to_picture", reading)
    monkeypatch.setattr(folder, "_pass", passing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            folder.segment_files(pipe, jobs, {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(passes) == at_a_time
    assert len(reads) <= 2 * at_a_time + 1


def test_decoding_and_writing_run_beside_the_network(pipe, jobs, monkeypatch):
    """The network's first pass ends only when the second image is decoded, its third only when one is written."""
    decoded, written = threading.Semaphore(0), threading.Semaphore(0)
    read, write, call = images.to_picture, folder._write, DiffSegPipeline.__call__
    passes, waits = [], []

    def reading(*arguments):
        found = read(*arguments)
        if threading.current_thread() is not threading.main_thread():
            decoded.release()
        return found

    def writing(*arguments):
        write(*arguments)
        written.release()

    def passing(self, pictures, **options):
        passes.append(len(pictures))
        if len(passes) == 1:
            waits.append(decoded.acquire(timeout=20) and decoded.acquire(timeout=20))
        if len(passes) == 3:
            waits.append(written.acquire(timeout=20))
        return call(self, pictures, **options)

    monkeypatch.setattr(images, "to_picture", reading)
    monkeypatch.setattr(folder, "_write", writing)
    monkeypatch.setattr(DiffSegPipeline, "__call__", passing)
    folder.segment_files(pipe, jobs, {})
    assert waits == [True, True]


def test_the_number_of_threads_stays(pipe, jobs):
    before = torch.get_num_threads()
    folder.segment_files(pipe, jobs[:2], {})
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *later] == [before, before]


def test_weights_that_wait_on_the_host_for_a_gpu_are_not_shared_by_two_passes(pipe, monkeypatch):
    assert folder._passes_at_a_time(pipe, 9, 1, {}) == 2
    monkeypatch.setattr(DiffSegPipeline, "_execution_device", torch.device("cuda"))
    assert folder._passes_at_a_time(pipe, 9, 1, {}) == 1


@pytest.mark.gpu
def test_shapes_that_keep_coming_are_recorded(pipe, jobs):
    pipe.to("cuda")
    pipe._lay_out()  # as recordings have it: convolutions of another layout may round otherwise
    expected = [pipe(job.source).labels[0] for job in jobs]
    folder.segment_files(pipe, jobs, {"threshold": 0.01})
    assert [shape.size for shape, _ in pipe._recordings._held] == [(16, 16), (6, 16)]
    for job, other in zip(jobs, expected, strict=True):
        assert (labels(job) == other).mean() >= 0.999


def test_what_is_recorded_is_what_will_be_called() -> None:
    """On a GPU; every option of the call that decides the labels reaches the warm-up, and no other does."""
    warmup = create_autospec(DiffSegPipeline.warmup)
    pipe = SimpleNamespace(device=torch.device("cuda"), warmup=partial(warmup, None))
    item = folder._Item(0, torch.zeros(3, 40, 60), (64, 96))
    options = {
        "threshold": 0.5, "anchors": 8, "iterations": 2, "rule": "official", "weights": "literal", "timestep": 100,
        "processing_resolution": 96, "match_input_resolution": False, "backend": "cuda",
    }  # fmt: skip
    shapes: Counter[Any] = Counter()
    for _ in range(5):
        folder._record_frequent(pipe, [item, item], {**options, "semantic": False, "output_type": "np"}, shapes)
    warmup.assert_called_once_with(None, 2, 40, 60, **options)


def test_a_shape_that_cannot_be_recorded_runs_eagerly(caplog) -> None:
    def warmup(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no memory for a graph")

    pipe = SimpleNamespace(device=torch.device("cuda"), warmup=warmup)
    item = folder._Item(0, torch.zeros(3, 40, 60), (64, 96))
    shapes: Counter[Any] = Counter()
    with caplog.at_level(logging.DEBUG, logger="diffseg.folder"):
        for _ in range(4):
            folder._record_frequent(pipe, [item], {}, shapes)
    assert caplog.messages == ["(1, (64, 96)) is not recorded: no memory for a graph"]
