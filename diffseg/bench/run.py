"""Runs rows and keeps what was measured: the file is whole after every row."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import BACKENDS, explain_backends
from . import ceilings
from .cases import Unavailable
from .cost import Ceilings
from .gates import GateError
from .suite import Plan, Row, Suite
from .timing import Contender, Spread, Timed, Timer, percentile, ratio

Record = dict[str, Any]


class Journal:
    """What a run measured, as JSON on disk after every row where a path is given."""

    def __init__(self, path: Path | None, command: Sequence[str], device: torch.device, limits: Ceilings) -> None:
        self.path = path
        self.contents: Record = {
            "format": 1,
            "diffseg": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": ["diffseg", "bench", *command],
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
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.contents, indent=1) + "\n")
        os.replace(temporary, self.path)

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.contents["rows"] if record["state"] == "failed"]


def run_rows(suite: Suite, timer: Timer, limits: Ceilings, journal: Journal, show: Callable[[Record], None]) -> None:
    """Measures every row of the suite; a row whose gate fails, or that cannot run, says so and the next one follows."""
    for row in suite.rows():
        _progress(str(row))
        record = run_row(suite, row, timer, limits)
        journal.add(record)
        _progress("")
        show(record)


def run_row(suite: Suite, row: Row, timer: Timer, limits: Ceilings) -> Record:
    """Gates, then times, the contenders of a row."""
    start = time.perf_counter()
    record: Record = {
        "name": str(row), "stage": row.stage, "case": row.case, "size": list(row.size), "grid": list(row.grid),
        "batch": row.batch, "anchors": row.anchors, "series": row.series, "contenders": [],
    }  # fmt: skip
    try:
        plan = suite.plan(row)
        record["notes"] = plan.notes
        timed = gated(plan.contenders, plan.inputs, timer)
        timed = timer.race(timed, plan.inputs)
    except Unavailable as reason:
        return {**record, "state": "skipped", "reason": str(reason)}
    except GateError as error:
        return {**record, "state": "failed", "reason": str(error)}
    except (RuntimeError, ValueError, MemoryError) as error:
        return {**record, "state": "failed", "reason": f"{type(error).__name__}: {error}"}
    record["elapsed_seconds"] = time.perf_counter() - start
    return {**record, "state": "measured", **_figures(row, plan, timed, limits)}


def gated(contenders: Sequence[Contender], inputs: Sequence[Any], timer: Timer) -> list[Timed]:
    """The first call of each contender, timed, its result checked; GateError stops the row."""
    found = []
    for contender in contenders:
        timed, result = timer.first(contender, inputs[0])
        if contender.check is not None:
            try:
                contender.check(result)
            except GateError as error:
                raise GateError(f"{contender.name}: {error}") from error
        found.append(timed)
    return found


def _figures(row: Row, plan: Plan, timed: Sequence[Timed], limits: Ceilings) -> Record:
    floor = limits.floor(plan.work, plan.precision) if plan.work is not None else None
    baselines = [each for each in timed if each.contender.role == "baseline"]
    baseline = min(baselines, key=lambda each: (each.spread.median <= 0, each.spread.median))
    return _finite({
        "baseline": baseline.contender.name,
        "work": asdict(plan.work) if plan.work is not None else None,
        "precision": plan.precision,
        "floor_seconds": floor,
        "contenders": [_entry(each, baseline, row, floor) for each in timed],
        "against_peers": _against_peers(timed),
    })  # fmt: skip


def _against_peers(timed: Sequence[Timed]) -> list[Record]:
    """How many times faster the fastest subject is than each peer."""
    subjects = [each for each in timed if each.contender.role == "subject"]
    if not subjects:
        return []
    best = min(subjects, key=lambda each: each.spread.median)
    return [
        {"subject": best.contender.name, "peer": each.contender.name, "times_faster": _ratio(best, each)}
        for each in timed
        if each.contender.role == "peer"
    ]


def _ratio(subject: Timed, baseline: Timed) -> Record:
    found = ratio(subject, baseline)
    return found._asdict() if found else dict.fromkeys(Spread._fields)


def _entry(timed: Timed, baseline: Timed, row: Row, floor: float | None) -> Record:
    contender, spread = timed.contender, timed.spread
    same_work = not contender.note.startswith("other work")
    return {
        "name": contender.name,
        "role": contender.role,
        "mode": timed.mode,
        "checked": contender.check is not None,
        "same_work": same_work,
        "cold_seconds": timed.cold,
        "seconds": spread._asdict(),
        "p99_seconds": percentile(timed.samples, 99),
        "images_per_second": row.batch / spread.median if spread.median > 0 else None,
        "times_faster": _ratio(timed, baseline),
        "floor_share": floor / spread.median if floor and same_work and spread.median > 0 else None,
        "memory_bytes": timed.memory,
        "samples": timed.samples,
        "note": contender.note,
    }


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_backends(names: Sequence[str], device: torch.device) -> None:
    """Raises ValueError where a backend that was named cannot run here, with its reason."""
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"--backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
        BACKENDS[name].can_run("merge", device, torch.float32, raise_error=True)


def _progress(text: str) -> None:
    """What is being measured, on a terminal: a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
