"""Times contenders against each other: one sample of each in every round, so that what disturbs one disturbs all."""

from __future__ import annotations

import ctypes
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from .. import memory as kept_memory

Role = Literal["subject", "baseline", "peer"]

SHORTEST_SAMPLE = 10e-3  # seconds: shorter calls are repeated within a sample
SHORTEST_SHARE = 1 / 16  # of the row's longest call: likewise, so that its fastest contender is not one short glance
_MOST_ROUNDS = 24
_WARMED = 1.5  # seconds: longer calls take as long in a process that has made none of them
_LONG, _VERY_LONG = 1.0, 5.0  # seconds: of such calls two samples must do, or one
_FEWEST_ROUNDS, _FEWEST_LONG, _FEWEST_VERY_LONG = 3, 2, 1


@dataclass
class Contender:
    """One way to do the work of a row."""

    name: str
    role: Role
    run: Callable[[Any], Any]  # of one of the row's inputs
    check: Callable[[Any], None] | None = None  # of its result; raises GateError. None: it does other work
    recordable: bool = False  # in a CUDA graph
    minus: Callable[[Any], Any] | None = None  # its time is taken off, round by round
    compiles: bool = False  # in its first call in a process
    elsewhere: bool = False  # runs in another process: ``run`` returns the seconds and bytes measured there
    unavailable: str | None = None  # why it cannot run here
    note: str = ""


@dataclass
class Timed:
    """What was measured of a contender; seconds and bytes."""

    contender: Contender
    mode: str = "wall"  # or "events", "graph": replays of a recorded graph, "elsewhere": another process's clock
    cold: float = math.nan  # the first call on these shapes in this process
    memory: int | None = None  # the most it held beyond its inputs at one time; None: unknown
    seconds: float = math.nan  # of a call, about: what the rounds are planned with
    samples: list[float] = field(default_factory=list)  # of one pass


class Timer:
    """Measures calls on one device: the first of a contender, its memory, and the samples of a pass."""

    def __init__(self, device: torch.device, seconds: float, passes: int = 1) -> None:
        self.device, self.passes = device, passes
        self.seconds = seconds  # of all samples of a contender, in all passes, about

    def first(self, contender: Contender, given: Any) -> tuple[Timed, Any]:
        """The first call, timed, and its result."""
        result: Any = None
        seconds = math.nan

        def call() -> None:
            nonlocal result, seconds
            start = time.perf_counter()
            result = contender.run(given)
            self._wait()
            seconds = time.perf_counter() - start

        if contender.elsewhere:
            call()
            return Timed(contender, "elsewhere", result.seconds, result.memory), result
        memory = self._memory(call)
        return Timed(contender, "events" if self.device.type == "cuda" else "wall", seconds, memory), result

    def size_up(self, timed: Sequence[Timed], inputs: Sequence[Any]) -> None:
        """Fills in memory and seconds of a call, from a second call unless the first was long and tells as much."""
        for each in timed:
            if each.contender.elsewhere or (each.cold > _LONG and not self._compiles(each.contender)):
                each.seconds = each.cold
                continue
            begin = time.perf_counter()
            each.memory = self._memory(partial(each.contender.run, inputs[0]))  # the first call loads and compiles
            spent = time.perf_counter() - begin
            each.seconds = spent if spent > 10 * SHORTEST_SAMPLE else self._call_seconds(each.contender, inputs)

    def warm_up(self, timed: Sequence[Timed], inputs: Sequence[Any]) -> None:
        """Calls once, in a fresh process, each contender whose samples would else hold its first call's costs."""
        for each in timed:
            if each.seconds < _WARMED or self._compiles(each.contender):
                each.contender.run(inputs[0])
        self._wait()

    def _compiles(self, contender: Contender) -> bool:
        return contender.compiles or (self.device.type == "cuda" and not contender.elsewhere)

    def race(self, timed: Sequence[Timed], inputs: Sequence[Any], number: int = 0) -> list[Timed]:
        """Fills in the samples of pass ``number`` of contenders whose calls' seconds are known.

        On a GPU a twin of each recordable contender, timed as a recorded graph, races too.
        """
        entrants = [(each, self._sampler(each.contender, inputs)) for each in timed]
        for each in timed:
            if self.device.type == "cuda" and each.contender.recordable:
                try:
                    entrants.append(self._recorded(each, inputs))
                except RuntimeError as error:
                    self._wait()
                    each.contender.note += f" (not recorded: {str(error).splitlines()[0]})"
        shortest = max(SHORTEST_SAMPLE, SHORTEST_SHARE * max(each.seconds for each in timed))
        plans = [(each, sample, max(1, math.ceil(shortest / max(each.seconds, 1e-7)))) for each, sample in entrants]
        for turn in range(self._rounds(plans)):
            for each, sample, repeats in plans if (number + turn) % 2 == 0 else plans[::-1]:
                if repeats > 1:
                    sample(turn, repeats // 2)  # not kept: threads sleep and caches forget while others have their turn
                each.samples.append(sample(turn, repeats))
        return [each for each, *_ in plans]

    def _rounds(self, plans: Sequence[tuple[Timed, Any, int]]) -> int:
        """How many rounds one pass takes."""
        longest = max(each.seconds * repeats for each, _, repeats in plans)
        fewest = _FEWEST_ROUNDS if longest <= _LONG else _FEWEST_LONG if longest <= _VERY_LONG else _FEWEST_VERY_LONG
        wanted = min(_MOST_ROUNDS, max(fewest, int(self.seconds / longest)))
        return math.ceil(wanted / self.passes)

    def _call_seconds(self, contender: Contender, inputs: Sequence[Any]) -> float:
        """The seconds of a call, from calls in a row, more and more until they take half as long as a sample."""
        repeats = 1
        while True:
            seconds = elapsed(contender.run, [inputs[i % len(inputs)] for i in range(repeats)], self.device)
            if seconds >= SHORTEST_SAMPLE / 2:
                return seconds / repeats
            repeats *= 4

    def _sampler(self, contender: Contender, inputs: Sequence[Any]) -> Callable[[int, int], float]:
        def sample(number: int, repeats: int) -> float:
            if contender.elsewhere:
                seconds: float = contender.run(inputs[0]).seconds
                return seconds
            chosen = [inputs[(number * repeats + i) % len(inputs)] for i in range(repeats)]
            total = elapsed(contender.run, chosen, self.device)
            if contender.minus is not None:
                total -= elapsed(contender.minus, chosen, self.device)
            return total / repeats

        return sample

    def _recorded(self, timed: Timed, inputs: Sequence[Any]) -> tuple[Timed, Callable[[int, int], float]]:
        """A twin that replays recorded graphs, one an input. Raises RuntimeError where it cannot be recorded."""
        contender = timed.contender
        graphs, pool = [], torch.cuda.graph_pool_handle()
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            for given in inputs:  # a capture that fails leaves its stream current
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    contender.run(given)
                graphs.append(graph)

        def sample(number: int, repeats: int) -> float:
            chosen = [graphs[(number * repeats + i) % len(graphs)] for i in range(repeats)]
            return elapsed(lambda graph: graph.replay(), chosen, self.device) / repeats

        twin = replace(contender, name=f"{contender.name}, recorded", recordable=False)
        return Timed(twin, "graph", memory=timed.memory, seconds=timed.seconds), sample

    def _memory(self, run: Callable[[], Any]) -> int | None:
        if self.device.type == "cuda":
            self._wait()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            run()
            self._wait()
            return torch.cuda.max_memory_allocated(self.device) - before
        return peak_resident(run)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def elapsed(run: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device) -> float:
    """The seconds of a call on each of the inputs in turn; on a GPU, of what the calls queue there."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for given in inputs:
                run(given)
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1000
    begin = time.perf_counter()
    for given in inputs:
        run(given)
    return time.perf_counter() - begin


def peak_resident(run: Callable[[], Any]) -> int | None:
    """The most resident memory that ``run`` adds at one time, in bytes, as the Linux kernel counts it; else None."""
    kept_memory.release()
    if not _reset_peak():
        run()
        return None
    before = _status("VmRSS")
    run()
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _reset_peak() -> bool:
    """Gives freed memory back and starts a new peak of this process."""
    if sys.platform != "linux":
        return False
    try:
        trim = ctypes.CDLL(None).malloc_trim
        trim(0)
    except (AttributeError, OSError):  # another C library
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
