"""Memory of A_f that is kept between calls: nobody sees another's, and nobody holds more than is said."""

import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from pipelines import picture, quiet

import diffseg
from diffseg import memory, testing
from diffseg.memory import attention_memory
from diffseg.pipeline import DiffSegPipeline


@pytest.fixture(autouse=True)
def nothing_kept():
    memory.release()
    yield
    memory.release()


def kept():
    return [each.data_ptr() for each in memory._kept]


def test_the_next_call_has_the_memory_of_the_last():
    like = torch.zeros(2, 1)
    with attention_memory(like, (3, 4)) as first:
        assert first.shape == (2, 12, 12)
        assert first.dtype == torch.float32
        assert first.is_contiguous()
        assert kept() == []
    assert kept() == [first.data_ptr()]
    with attention_memory(like[:1], (4, 2)) as smaller:
        assert smaller.shape == (1, 8, 8)
        assert smaller.data_ptr() == first.data_ptr()
    with attention_memory(like, (5, 4)) as larger:
        assert larger.data_ptr() != first.data_ptr()
    memory.release()
    assert kept() == []


def test_calls_at_one_time_have_memory_of_their_own():
    like = torch.zeros(1, 1)
    with attention_memory(like, (2, 2)) as outer, attention_memory(like, (2, 2)) as inner:
        assert outer.data_ptr() != inner.data_ptr()
    assert sorted(kept()) == sorted([outer.data_ptr(), inner.data_ptr()])


def test_it_comes_back_after_an_exception():
    with pytest.raises(ZeroDivisionError), attention_memory(torch.zeros(1, 1), (2, 2)):
        raise ZeroDivisionError
    assert len(kept()) == 1


def test_a_destructor_may_release_it_between_any_two_lines():
    """So may a signal handler, in the thread that it interrupts."""
    sizes = []

    def release(frame, event, argument):
        if frame.f_code.co_filename == memory.__file__:
            memory.release()
        return release

    def work():
        sys.settrace(release)
        for side in (3, 3, 2):
            with attention_memory(torch.zeros(1, 1), (side, 1)) as found:
                sizes.append(len(found[0]))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(20)
    assert sizes == [3, 3, 2]


def test_no_more_is_kept_than_is_said(monkeypatch):
    monkeypatch.setattr(memory, "_MOST_KEPT", 4 * 16**2 + 4 * 9**2)
    like = torch.zeros(1, 1)
    with attention_memory(like, (4, 4)) as first, attention_memory(like, (3, 3)) as second:
        pass
    assert kept() == [second.data_ptr(), first.data_ptr()]
    with attention_memory(like, (4, 4)), attention_memory(like, (4, 4)):
        pass
    assert len(kept()) == 1
    few = kept()
    with attention_memory(like, (5, 5)):
        pass
    assert kept() == few


def test_what_pytorch_holds_for_later_is_available(monkeypatch):
    """Else a call's own memory would speak against the next call."""
    for name, value in {"mem_get_info": (2, 80), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.available(torch.device("cuda")) == 42


def test_what_the_system_says_is_available(monkeypatch):
    for text, expected in (("MemFree: 1 kB\nMemAvailable:    3 kB\n", 3 * 1024), ("", 5 * 4096)):
        monkeypatch.setattr(memory.Path, "read_text", lambda path, text=text: text)
        monkeypatch.setattr(memory.os, "sysconf", {"SC_AVPHYS_PAGES": 5, "SC_PAGE_SIZE": 4096}.__getitem__)
        assert memory.available(torch.device("cpu")) == expected


def test_memory_of_inference_mode_serves_outside_of_it():
    with torch.inference_mode(), attention_memory(torch.zeros(1, 1), (2, 2)) as inside:
        inside.fill_(1)
    with attention_memory(torch.zeros(1, 1), (2, 2)) as outside:
        assert outside.data_ptr() == inside.data_ptr()
        outside.fill_(2)


@pytest.mark.parametrize("make", [lambda: torch.zeros(1, 1, device="meta"), lambda: torch.nn.Parameter(torch.zeros(1))])
def test_others_have_none(make):
    with attention_memory(make(), (2, 2)) as found:
        assert found is None
    assert kept() == []


def held_a_pass(monkeypatch, images):
    """Lets a CPU keep A_f of so many images over 16 x 16 cells, and notes the shapes that it is asked for."""
    monkeypatch.setattr(memory, "_MOST_KEPT", images * 4 * 256**2)
    asked = []

    @contextmanager
    def noted(like, grid):
        with attention_memory(like, grid) as found:
            asked.append(list(found.shape))
            yield found

    monkeypatch.setattr(memory, "attention_memory", noted)
    return asked


def test_a_large_batch_is_segmented_in_equal_parts(monkeypatch, layers):
    scene = layers([(16, 16), (8, 8)], batch=5, dtype=torch.float32)
    logsumexps = [
        torch.logsumexp(query @ key.mT * query.shape[3] ** -0.5, -1)
        for query, key in zip(scene.queries, scene.keys, strict=True)
    ]

    def segment(keys=scene.keys):
        return diffseg.segment(scene.queries, keys, (32, 32), logsumexps=logsumexps, anchors=4, threshold=0.4)

    expected = segment()
    asked = held_a_pass(monkeypatch, 4)
    assert torch.equal(segment(), expected)
    assert asked == [[3, 256, 256], [2, 256, 256]]
    asked = held_a_pass(monkeypatch, 0)  # not even one image's
    assert torch.equal(segment(), expected)
    assert asked == [[1, 256, 256]] * 5
    asked.clear()
    with pytest.raises(ValueError, match=r"keys\[1\]: expected the shape of queries\[1\]"):
        segment([scene.keys[0], scene.keys[1][:4]])
    assert asked == []


def test_a_large_batch_of_a_pipeline_is_segmented_in_equal_parts(monkeypatch):
    pipe = quiet(DiffSegPipeline(testing.tiny_unet("sd1", in_channels=3, out_channels=3), threshold=0.01))
    images = [picture(16, 16, seed) for seed in range(3)]
    expected = pipe(images, batch_size=3, refine=True).labels
    asked = held_a_pass(monkeypatch, 2)
    found = pipe(images, batch_size=3, refine=True).labels
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    assert asked == [[2, 256, 256], [1, 256, 256]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("refine", [False, True])
def test_segments_do_not_depend_on_what_was_there(layers, backend, refine):
    if backend not in diffseg.available_backends("cpu"):
        pytest.skip(diffseg.explain_backends()[backend])
    scenes = [layers([(8, 8), (4, 4)], batch=2, seed=seed, dtype=torch.float32) for seed in range(4)]

    def segment(scene):
        return diffseg.segment(
            scene.queries, scene.keys, (16, 16), grids=scene.grids, anchors=4, threshold=0.4, refine=refine,
            backend=backend,
        )  # fmt: skip

    expected = []
    for scene in scenes:
        memory.release()
        expected.append(segment(scene))
    found = [segment(scene) for scene in scenes]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    together = [None] * len(scenes)

    def work(index):
        for _ in range(20):
            together[index] = segment(scenes[index])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(scenes))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(*pair) for pair in zip(together, expected, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_does_not_hold_it(layers):
    scene = layers([(8, 8)], batch=2, dtype=torch.float32)

    def segment(query, key):
        return diffseg.segment([query], [key], (16, 16), anchors=4, threshold=0.4)

    (query,), (key,) = scene.queries, scene.keys
    expected = segment(query, key)
    traced = torch.jit.trace(segment, (query, key))
    assert torch.equal(traced(query, key), expected)
    assert torch.equal(traced(query[:1], key[:1]), expected[:1])
