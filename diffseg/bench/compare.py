"""Whether two runs on one machine agree: each ratio of both, with the bounds that each run printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..loading import UsageError
from .report import Record, aligned, bounds, factor
from .run import FORMAT

Key = tuple[str, str]

_SAME = ("processor", "isa", "threads", "gpu")  # what makes a machine
_COLUMNS = ("", "", "first run", "bounds", "second run", "bounds", "agree")


class Pair(NamedTuple):
    """A ratio in two runs; None where a run could not measure it."""

    row: str
    what: str
    first: Record | None
    second: Record | None

    @property
    def agree(self) -> bool:
        """Whether the bounds of the two runs overlap. What was lost in noise may be anything."""
        if self.first is None or self.second is None:
            return True
        return bool(max(self.first["low"], self.second["low"]) <= min(self.first["high"], self.second["high"]))

    @property
    def within(self) -> bool:
        """Whether each run's ratio lies within the other's bounds."""
        if self.first is None or self.second is None:
            return False
        pairs = ((self.first, self.second), (self.second, self.first))
        return all(one["low"] <= other["median"] <= one["high"] for one, other in pairs)


def run(first: Path, second: Path) -> int:
    """Prints both runs' ratios side by side. Returns 0 if all agree, else 1.

    Raises:
        UsageError: a file that is no run, or of another format; runs on two machines; runs that share no ratio.
    """
    runs = [_read(path) for path in (first, second)]
    _check_machines(first, second, *runs)
    one, other = (dict(_ratios(each)) for each in runs)
    pairs = [Pair(*key, one[key], other[key]) for key in one if key in other]
    if not pairs:
        raise UsageError(f"--compare: {first} and {second} have no ratio in common")
    print(f"first run: {first}, {runs[0]['date']}\nsecond run: {second}, {runs[1]['date']}")
    print("\n".join(aligned([_COLUMNS, *map(_cells, pairs)])))
    for path, alone in ((first, one.keys() - other.keys()), (second, other.keys() - one.keys())):
        if alone:
            print(f"only in {path}: {'; '.join(sorted(': '.join(key) for key in alone))}")
    agreeing = sum(pair.agree for pair in pairs)
    within = sum(pair.within for pair in pairs)
    print(f"{agreeing} of {len(pairs)} ratios agree (their bounds overlap)")
    print(f"{within} of {len(pairs)} lie within each other's bounds")
    return 0 if agreeing == len(pairs) else 1


def _read(path: Path) -> Record:
    try:
        contents = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--compare: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--compare: {path}: expected JSON: {error}") from error
    if not isinstance(contents, dict) or not {"format", "rows", "machine", "device"} <= contents.keys():
        raise UsageError(f"--compare: {path}: expected what diffseg bench --json writes")
    if contents["format"] != FORMAT:
        raise UsageError(
            f"--compare: {path}: expected a run of format {FORMAT}, got {contents['format']}: measure it again"
        )
    if contents["passes"] < 2:
        raise UsageError(f"--compare: {path}: expected a run of two passes or more, got one: it has no bounds")
    return contents


def _check_machines(first: Path, second: Path, one: Record, other: Record) -> None:
    machines: list[dict[str, Any]] = [
        {"device": each["device"], **{name: each["machine"].get(name) for name in _SAME}} for each in (one, other)
    ]
    for name, value in machines[0].items():
        if value != machines[1][name]:
            raise UsageError(
                f"--compare: {first} and {second} were measured on two machines: {name} {value} and {machines[1][name]}"
            )
    for name in ("diffseg", "torch", "python"):
        versions = [each["machine"].get(name, each.get(name)) for each in (one, other)]
        if versions[0] != versions[1]:
            print(f"note: {name} {versions[0]} and {versions[1]}")


def _ratios(contents: Record) -> Iterator[tuple[Key, Record | None]]:
    """Each ratio by its row and contender, or peer, but those without bounds: of rows that had only one pass."""
    for record in contents["rows"]:
        if record["state"] != "measured":
            continue
        found = [(each["name"], each["times_faster"]) for each in record["contenders"] if each["role"] != "baseline"]
        found += [(f"{each['subject']} / {each['peer']}", each["times_faster"]) for each in record["against_peers"]]
        for what, ratio in found:
            if ratio is None or ratio["low"] is not None:
                yield (record["name"], what), ratio


def _cells(pair: Pair) -> tuple[str, ...]:
    found = [
        cell
        for ratio in (pair.first, pair.second)
        for cell in ("lost in noise" if ratio is None else factor(ratio["median"]), bounds(ratio))
    ]
    return (pair.row, pair.what, *found, "yes" if pair.agree else "NO")
