"""Which instruction set runs, what automatic choice takes, and threads after a fork."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

import diffseg
from diffseg.backends import BACKENDS, implementation

_cpu = pytest.importorskip("diffseg._cpu")

SCRIPT = """
import torch, diffseg
from diffseg import _cpu
maps = torch.rand(1, 1, 16, 16)
diffseg.aggregate_maps([maps])
print(_cpu.isa())
"""


def run(isa: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DIFFSEG_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", [*_cpu.available_isas(), ""])
def test_environment_forces_an_instruction_set(isa):
    result = run(isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (isa or _cpu.available_isas()[0])


def test_unknown_instruction_set_is_an_error():
    result = run("sse9")
    assert result.returncode != 0
    assert "ValueError: DIFFSEG_CPU_ISA: expected one of" in result.stderr
    assert "got 'sse9'" in result.stderr


@pytest.mark.parametrize("op", ["aggregate", "aggregate_maps", "merge", "label"])
def test_automatic_choice(op):
    device = torch.device("cpu")
    cpu = BACKENDS["cpu"]
    assert implementation("auto", op, device, torch.float32) == implementation("cpu", op, device, torch.float32)
    assert not cpu.can_run(op, device, torch.float64)
    assert not cpu.can_run(op, torch.device("meta"), torch.float32)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        cpu.can_run(op, device, torch.float64, raise_error=True)


def test_a_float64_result_is_computed_in_float64():
    maps = torch.rand(1, 1, 16, 16)
    found = diffseg.aggregate_maps([maps], dtype=torch.float64)
    assert torch.equal(found, diffseg.aggregate_maps([maps], dtype=torch.float64, backend="reference"))


def _merge_in_child(connection, attention):
    connection.send(diffseg.merge(attention, anchors=4, threshold=0.5, backend="cpu").maps.sum().item())


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_it_lacks():
    attention = torch.rand(1, 144, 144)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = diffseg.merge(attention, anchors=4, threshold=0.5, backend="cpu").maps.sum().item()
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_merge_in_child, args=(sender, attention))
        child.start()
        try:
            assert receiver.poll(30), "the child hangs"
            assert receiver.recv() == pytest.approx(expected)
        finally:
            child.kill()
            child.join()
    finally:
        torch.set_num_threads(threads)
