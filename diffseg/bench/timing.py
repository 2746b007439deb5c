"""Times contenders against each other: one sample of each in every round, so that what disturbs one disturbs all."""

from __future__ import annotations

import ctypes
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

Role = Literal["subject", "baseline", "peer"]

SHORTEST_SAMPLE = 2e-3  # seconds: shorter calls are repeated within a sample
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 40
_LONG, _VERY_LONG = 2.0, 5.0  # seconds: of such calls two samples must do, or one


@dataclass
class Contender:
    """One way to do the work of a row."""

    name: str
    role: Role
    run: Callable[[Any], Any]  # of one of the row's inputs
    check: Callable[[Any], None] | None = None  # of its result; raises GateError. None: it does other work
    recordable: bool = False  # in a CUDA graph
    minus: Callable[[Any], Any] | None = None  # its time is taken off, round by round
    elsewhere: bool = False  # runs in another process: ``run`` returns the seconds and bytes measured there
    unavailable: str | None = None  # why it cannot run here
    note: str = ""


class Spread(NamedTuple):
    """Median and the 20th and 80th percentiles of samples."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), percentile(samples, 20), percentile(samples, 80))


@dataclass
class Timed:
    """What was measured of a contender; seconds and bytes."""

    contender: Contender
    mode: str = "wall"  # or "events", "graph": replays of a recorded graph, "elsewhere": another process's clock
    cold: float = math.nan  # the first call on these shapes in this process
    memory: int | None = None  # the most it held beyond its inputs at one time; None: unknown
    samples: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        return Spread.of(self.samples)


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear between samples."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * share / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(subject: Timed, baseline: Timed) -> Spread | None:
    """How many times faster ``subject`` is: quotients of the samples of one round.

    None if half of them or more mean nothing: a difference of two times can come out below 0 on a busy machine.
    """
    pairs = list(zip(baseline.samples, subject.samples, strict=False))
    quotients = [slow / fast for slow, fast in pairs if slow > 0 and fast > 0]
    return Spread.of(quotients) if 2 * len(quotients) > len(pairs) else None


class Timer:
    """Calls on one device: first calls, memory, samples."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds  # of all samples of a contender, about

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

    def race(self, timed: Sequence[Timed], inputs: Sequence[Any]) -> list[Timed]:
        """Fills in memory and samples; on a GPU adds a twin of each recordable contender, timed as a recorded graph."""
        for each in timed:
            if not each.contender.elsewhere and each.cold < _LONG:  # the first call loads and compiles
                each.memory = self._memory(partial(each.contender.run, inputs[0]))
        entrants = [(each, self._sampler(each.contender, inputs)) for each in timed]
        for each in timed:
            if self.device.type == "cuda" and each.contender.recordable:
                try:
                    entrants.append(self._recorded(each, inputs))
                except RuntimeError as error:
                    self._wait()
                    each.contender.note += f" (not recorded: {str(error).splitlines()[0]})"
        plans = [(each, sample, *self._rounds(each, sample)) for each, sample in entrants]
        for number in range(max(rounds for *_, rounds in plans)):
            order = plans if number % 2 == 0 else plans[::-1]
            for each, sample, repeats, rounds in order:
                if number < rounds:
                    each.samples.append(sample(number, repeats))
        return [each for each, *_ in plans]

    def _rounds(self, timed: Timed, sample: Callable[[int, int], float]) -> tuple[int, int]:
        """Calls a sample, and samples, from a trial that counts as a warm-up; a long first call has warmed up."""
        seconds = timed.cold if timed.cold > _LONG else sample(0, 1)
        if timed.contender.minus is not None:  # differences scatter more than what they are taken of
            return 1, max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(self.seconds / max(seconds, 1e-7))))
        if seconds > max(_LONG, self.seconds):
            return 1, 1 if seconds > _VERY_LONG else 2
        repeats = max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-7)))
        fewest = _FEWEST_ROUNDS if self.seconds >= 0.5 else 3
        return repeats, min(_MOST_ROUNDS, max(fewest, int(self.seconds / (seconds * repeats))))

    def _sampler(self, contender: Contender, inputs: Sequence[Any]) -> Callable[[int, int], float]:
        def sample(number: int, repeats: int) -> float:
            if contender.elsewhere:
                seconds: float = contender.run(inputs[0]).seconds
                return seconds
            chosen = [inputs[(number * repeats + i) % len(inputs)] for i in range(repeats)]
            total = self._seconds(contender.run, chosen)
            if contender.minus is not None:
                total -= self._seconds(contender.minus, chosen)
            return total / repeats

        return sample

    def _recorded(self, timed: Timed, inputs: Sequence[Any]) -> tuple[Timed, Callable[[int, int], float]]:
        """A twin whose samples are replays of graphs, one an input. Raises RuntimeError where it cannot be recorded."""
        contender = timed.contender
        graphs, pool = [], torch.cuda.graph_pool_handle()
        for given in inputs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                contender.run(given)
            graphs.append(graph)

        def sample(number: int, repeats: int) -> float:
            chosen = [graphs[(number * repeats + i) % len(graphs)] for i in range(repeats)]
            return self._seconds(lambda graph: graph.replay(), chosen) / repeats

        twin = replace(contender, name=f"{contender.name}, recorded", recordable=False)
        return Timed(twin, "graph", memory=timed.memory), sample

    def _seconds(self, run: Callable[[Any], Any], chosen: Sequence[Any]) -> float:
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._wait()
            start.record()
            for given in chosen:
                run(given)
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1000
        begin = time.perf_counter()
        for given in chosen:
            run(given)
        return time.perf_counter() - begin

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


def peak_resident(run: Callable[[], Any]) -> int | None:
    """The most resident memory that ``run`` adds at one time, in bytes, as the Linux kernel counts it; else None."""
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
