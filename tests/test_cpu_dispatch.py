"""Which instruction set runs, what automatic choice takes, and what works after a fork."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import diffseg
from diffseg import backends, native
from diffseg.backends import BACKENDS, implementation

_cpu = pytest.importorskip("diffseg._cpu")


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    """The instruction set that was in use comes back."""
    before = _cpu.isa()
    yield
    native.cpu.cache_clear()
    _cpu.use_isa(before)


def test_the_environment_forces_an_instruction_set(chosen_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in _cpu.available_isas():
        monkeypatch.setenv("DIFFSEG_CPU_ISA", isa)
        native.cpu.cache_clear()
        diffseg.aggregate_maps([torch.rand(1, 1, 16, 16)])
        assert _cpu.isa() == isa
    monkeypatch.setenv("DIFFSEG_CPU_ISA", "sse9")
    native.cpu.cache_clear()
    with pytest.raises(ValueError, match=r"DIFFSEG_CPU_ISA: expected one of .*, got 'sse9'"):
        diffseg.aggregate_maps([torch.rand(1, 1, 16, 16)])


def test_the_preferred_instruction_set_is_in_use_by_itself() -> None:
    script = "from diffseg import _cpu, native; native.cpu(); print(_cpu.isa())"
    environment = {**os.environ, "DIFFSEG_CPU_ISA": ""}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == _cpu.available_isas()[0]


@pytest.mark.parametrize("op", ["aggregate", "aggregate_maps", "merge", "label"])
def test_automatic_choice(op):
    device = torch.device("cpu")
    cpu = BACKENDS["cpu"]
    assert implementation("auto", op, device, torch.float32) == implementation("cpu", op, device, torch.float32)
    assert not cpu.can_run(op, device, torch.float64)
    assert not cpu.can_run(op, torch.device("meta"), torch.float32)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        cpu.can_run(op, device, torch.float64, raise_error=True)


def test_missing_kernels_are_said_once(monkeypatch):
    def missing(name):
        raise ImportError("undefined symbol: __kmpc_fork_call")

    monkeypatch.setattr(native, "import_module", missing)
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], load=native.cpu.__wrapped__))
    backends._warn_of.cache_clear()
    maps = torch.rand(1, 1, 16, 16)
    with pytest.warns(RuntimeWarning, match=r"many times slower: diffseg\._cpu cannot be loaded \(undefined symbol"):
        diffseg.aggregate_maps([maps])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffseg.aggregate_maps([maps])  # again
        backends._warn_of.cache_clear()
        diffseg.aggregate_maps([maps.double()])  # which the kernels would not serve either


def test_a_float64_result_is_computed_in_float64():
    maps = torch.rand(1, 1, 16, 16)
    found = diffseg.aggregate_maps([maps], dtype=torch.float64)
    assert torch.equal(found, diffseg.aggregate_maps([maps], dtype=torch.float64, backend="reference"))


def answer_of_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` gives in a process forked from this one, whose pool of threads has run."""
    torch.ones(1 << 20).sum()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*arguments)))
    child.start()
    try:
        assert receiver.poll(30), "the child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestForkedProcess:
    """The parent runs on two threads, as all tests do."""

    def test_kernels_do_not_wait_for_threads_that_it_lacks(self, attention: Callable[..., torch.Tensor]) -> None:
        """What they allocate is small enough here for torch to poison it without threads."""
        maps = attention((32, 32), dtype=torch.float32)

        def merged_and_labelled() -> list[int]:
            proposals = diffseg.merge(maps, anchors=4, threshold=0.5, backend="cpu")
            return diffseg.label(proposals, (128, 128), backend="cpu")[0, ::16, ::16].flatten().tolist()

        expected = merged_and_labelled()
        assert max(expected) > 0
        assert answer_of_child(merged_and_labelled) == expected

    def test_segment_works_once_torch_has_one_thread(self, layers: Callable[..., Any]) -> None:
        """Torch's own operators, which segment calls too, hang in a forked process on more threads than one."""
        scene = layers([(64, 64), (32, 32)], dtype=torch.float32)

        def segments(threads: int) -> list[int]:
            torch.set_num_threads(threads)
            labels = diffseg.segment(scene.queries, scene.keys, (512, 512), anchors=4, threshold=0.5, backend="cpu")
            return labels[0, ::64, ::64].flatten().tolist()

        expected = segments(2)
        assert max(expected) > 0
        assert answer_of_child(segments, 1) == expected
