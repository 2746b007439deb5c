"""Later passes over the rows, each in a fresh process: layout, memory and threads fall anew, as between two runs."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch

from .cases import Unavailable
from .rows import Row, Settings
from .suite import Suite
from .timing import Timed, Timer


@dataclass(frozen=True)
class Task:
    """A row to measure again."""

    index: int  # among the rows of the run
    row: Row
    seconds: dict[str, float]  # of a call of each contender, about


@dataclass(frozen=True)
class Outcome:
    """What a pass found of a row: samples by contender, or why there are none."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None  # the row is wrong
    obstacle: str | None = None  # the pass is missing
    elapsed: float = 0.0


def repeat(settings: Settings, timer: Timer, tasks: Sequence[Task], number: int) -> Generator[tuple[int, Outcome]]:
    """Measures each row once more, in the process of pass ``number``; yields its index and what was found.

    Results are those that the first pass has checked. If the process dies, the row that it was measuring has failed,
    and another process does the rest.
    """
    left = list(tasks)
    while left:
        process, results = _start(settings, timer, left, number)
        try:
            while left:
                outcome = results.recv()
                yield left.pop(0).index, outcome
        except EOFError:
            process.join()
            yield left.pop(0).index, Outcome(failure=f"its process ended with status {process.exitcode}")
        finally:
            if left:  # else it is only ending, and need not be waited for
                process.terminate()
                process.join(10)  # a call that takes longer is not waited for either
                process.kill()
                process.join()


def _start(
    settings: Settings, timer: Timer, tasks: Sequence[Task], number: int
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    given = (sender, settings, timer, tasks, number, torch.get_num_threads())
    process = context.Process(target=_measure, args=given, daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: an interrupt is this process's to handle
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()
    return process, results


def _measure(
    results: Connection, settings: Settings, timer: Timer, tasks: Sequence[Task], number: int, threads: int
) -> None:
    """What the process of a pass does: measures the tasks and sends each outcome."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves contexts: they hold folders and processes
    with Suite(settings) as suite, torch.no_grad():
        for task in tasks:
            results.send(measure(suite, timer, task, number))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def measure(suite: Suite, timer: Timer, task: Task, number: int) -> Outcome:
    """Measures one row in one pass."""
    start = time.perf_counter()
    try:
        plan = suite.plan(task.row)
        timed = [Timed(each, seconds=task.seconds[each.name]) for each in plan.contenders if each.name in task.seconds]
        timer.warm_up(timed, plan.inputs)
        timed = timer.race(timed, plan.inputs, number)
    except Unavailable as reason:
        return Outcome(obstacle=str(reason))
    except Exception as error:  # a compiler's or a driver's own: it ends the row, not the run
        return Outcome(failure=f"{type(error).__name__}: {error}")
    samples = {each.contender.name: each.samples for each in timed}
    return Outcome(samples, elapsed=time.perf_counter() - start)
