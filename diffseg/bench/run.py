"""Runs rows and keeps what was measured: the file is whole after every row of every pass."""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import explain_backends
from ..runs import write_text
from . import ceilings, passes
from .cases import Unavailable
from .cost import Ceilings
from .gates import GateError
from .report import Record
from .rows import Plan, Row, Settings, rows_of
from .spread import Spread, percentile, ratio
from .suite import Suite
from .timing import Contender, Timed, Timer

FORMAT = 2
"""Of the file: 1 held one pass, and spreads of its rounds."""


class Journal:
    """What a run measured, as JSON on disk after every row of every pass where a path is given."""

    def __init__(
        self, path: Path | None, command: Sequence[str], device: torch.device, limits: Ceilings, passes: int = 1
    ) -> None:
        self.path = path
        self.contents: Record = {
            "format": FORMAT,
            "diffseg": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": ["diffseg", "bench", *command],
            "passes": passes,
            "device": str(device),
            "machine": ceilings.machine(device),
            "ceilings": _finite({**asdict(limits), "products": dict(limits.products)}),
            "backends": explain_backends(),
            "rows": [],
        }
        self.write()

    def add(self, record: Record) -> None:
        self.contents["rows"].append(record)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        write_text(self.path, json.dumps(self.contents, indent=1) + "\n")

    @property
    def failed(self) -> list[Record]:
        """Rows that failed, or a contender of which did."""
        return [record for record in self.contents["rows"] if record["state"] == "failed" or record.get("failures")]


def run_rows(
    settings: Settings, timer: Timer, limits: Ceilings, journal: Journal, show: Callable[[Record], None]
) -> None:
    """Measures every row, pass after pass. A contender that fails leaves its row; a row that cannot run says so.

    A row is shown after its last pass; if the run is interrupted, with what there is.
    """
    records: list[Record] = journal.contents["rows"]
    shown: set[int] = set()

    def finish(index: int) -> None:
        shown.add(index)
        _progress("")
        show(records[index])

    try:
        todo = _first_pass(settings, timer, limits, journal, finish)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()  # for the other processes
        for number in range(1, timer.passes):
            todo = [task for task in todo if records[task.index]["state"] == "measured"]
            with closing(passes.repeat(settings, timer, todo, number)) as found:
                for index, outcome in found:
                    add_pass(records[index], outcome, number)
                    journal.write()
                    _progress(f"pass {number + 1} of {timer.passes}: {records[index]['name']} is done")
                    if records[index]["state"] == "failed" or number == timer.passes - 1:
                        finish(index)
    finally:
        for index in range(len(records)):
            if index not in shown:
                finish(index)


def _first_pass(
    settings: Settings, timer: Timer, limits: Ceilings, journal: Journal, finish: Callable[[int], None]
) -> list[passes.Task]:
    """The first pass, which checks the results, in this process; returns what later passes repeat."""
    todo = []
    with Suite(settings) as suite:
        for index, row in enumerate(rows_of(settings)):
            _progress(f"pass 1 of {timer.passes}: {row}" if timer.passes > 1 else str(row))
            record = run_row(suite, row, timer, limits)
            journal.add(record)
            if record["state"] == "measured" and timer.passes > 1:
                seconds = {each["name"]: each["call_seconds"] for each in record["contenders"]}
                todo.append(passes.Task(index, row, seconds))
            else:
                finish(index)
    return todo


def run_row(suite: Suite, row: Row, timer: Timer, limits: Ceilings) -> Record:
    """Checks the contenders of a row, then times them: its first pass."""
    start = time.perf_counter()
    record: Record = {
        "name": str(row), "stage": row.stage, "case": row.case, "size": list(row.size), "grid": list(row.grid),
        "batch": row.batch, "anchors": row.anchors, "series": list(row.series), "contenders": [],
    }  # fmt: skip
    try:
        plan = suite.plan(row)
        timed, failures = gated(plan.contenders, plan.inputs, timer)
        timer.size_up(timed, plan.inputs)
        timed = timer.race(timed, plan.inputs)
        described = _described(plan, limits)
    except Unavailable as reason:
        return {**record, "state": "skipped", "reason": str(reason)}
    except GateError as error:
        return {**record, "state": "failed", "reason": str(error)}
    except Exception as error:  # a compiler's or a driver's own: it ends the row, not the run
        return {**record, "state": "failed", "reason": f"{type(error).__name__}: {error}"}
    record |= {"state": "measured", **described, "contenders": [_entry(each) for each in timed], "failures": failures}
    record["elapsed_seconds"] = [time.perf_counter() - start]
    summarise(record)
    return record


def gated(contenders: Sequence[Contender], inputs: Sequence[Any], timer: Timer) -> tuple[list[Timed], dict[str, str]]:
    """The contenders whose first call is right, and why the others are out; GateError where nothing can be compared."""
    found, failures = [], {}
    for contender in contenders:
        try:
            found.append(checked(contender, inputs[0], timer))
        except GateError as error:
            failures[contender.name] = str(error)
        except Exception as error:  # a compiler's or a driver's own
            failures[contender.name] = f"{type(error).__name__}: {error}"
    if failures and not {"subject", "baseline"} <= {each.contender.role for each in found}:
        raise GateError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    return found, failures


def checked(contender: Contender, given: Any, timer: Timer) -> Timed:
    """The first call of a contender, timed; GateError where its result is wrong."""
    timed, result = timer.first(contender, given)
    if contender.check is not None:
        contender.check(result)
    return timed


def _described(plan: Plan, limits: Ceilings) -> Record:
    work = plan.work() if plan.work is not None else None
    return _finite({
        "notes": [note if isinstance(note, str) else note() for note in plan.notes],
        "work": asdict(work) if work is not None else None,
        "precision": plan.precision,
        "floor_seconds": limits.floor(work, plan.precision) if work is not None else None,
    })  # fmt: skip


def _entry(timed: Timed) -> Record:
    contender = timed.contender
    return _finite({
        "name": contender.name,
        "role": contender.role,
        "mode": timed.mode,
        "checked": contender.check is not None,
        "same_work": not contender.note.startswith("other work"),
        "note": contender.note,
        "cold_seconds": timed.cold,
        "memory_bytes": timed.memory,
        "call_seconds": timed.seconds,
        "samples": [timed.samples],
    })  # fmt: skip


def add_pass(record: Record, outcome: passes.Outcome, number: int) -> None:
    """Adds to a row what another pass found: its samples, or why there are none."""
    if outcome.failure is not None:
        record |= {"state": "failed", "reason": f"pass {number + 1}: {outcome.failure}"}
    elif outcome.obstacle is not None:
        record["notes"].append(f"pass {number + 1} is missing: {outcome.obstacle}")
    else:
        for entry in record["contenders"]:
            entry["samples"].append(outcome.samples.get(entry["name"], []))
        record["elapsed_seconds"].append(outcome.elapsed)
        summarise(record)


def summarise(record: Record) -> None:
    """Fills in the figures that follow from the samples of a measured row."""
    entries = record["contenders"]
    for entry in entries:
        samples = [each for one_pass in entry["samples"] for each in one_pass]
        entry["seconds"] = Spread.of(samples)._asdict()
        entry["p99_seconds"] = percentile(samples, 99)
        median = entry["seconds"]["median"]
        entry["images_per_second"] = record["batch"] / median if median > 0 else None
        floor = record["floor_seconds"]
        entry["floor_share"] = floor / median if floor and entry["same_work"] and median > 0 else None
    baseline = min((each for each in entries if each["role"] == "baseline"), key=_order)
    record["baseline"] = baseline["name"]
    for entry in entries:
        entry["times_faster"] = _ratio(entry, baseline)
    subjects = [each for each in entries if each["role"] == "subject"]
    best = min(subjects, key=_order) if subjects else None
    record["against_peers"] = [
        {"subject": best["name"], "peer": each["name"], "times_faster": _ratio(best, each)}
        for each in entries
        if best is not None and each["role"] == "peer"
    ]


def _order(entry: Record) -> tuple[bool, float]:
    """Sorts entries, the fastest first; differences that came out below 0 last."""
    median = entry["seconds"]["median"]
    return median <= 0, median


def _ratio(fast: Record, slow: Record) -> Record | None:
    found = ratio(slow["samples"], fast["samples"])
    return found._asdict() if found is not None else None


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinity, which JSON lacks, replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress(text: str) -> None:
    """Shows what is being measured, on a terminal, as a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
