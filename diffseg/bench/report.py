"""Tables that a person can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]

_COLUMNS = ("", "first call", "median", "p20 to p80", "times faster", "another run", "of floor", "memory")


def seconds(value: float | None) -> str:
    """A time in three digits and a unit; nothing for None."""
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= 0.9995 * size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value / 1e-6)} us"


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def amount(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.0f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"


def factor(value: float | None) -> str:
    return "" if value is None else _digits(value)


def bounds(found: Record | None) -> str:
    """The bounds between which another run finds a ratio; nothing after one pass, which gives none."""
    if found is None or found["low"] is None:
        return ""
    return f"{factor(found['low'])} to {factor(found['high'])}"


def _comparison(found: Record) -> str:
    value, low, high = found["median"], found["low"], found["high"]
    word = "faster"
    if value < 1:
        word, value = "slower", 1 / value
        low, high = (None, None) if low is None else (1 / high, 1 / low)
    return f"{factor(value)} times {word}" + ("" if low is None else f" ({factor(low)} to {factor(high)})")


def header(contents: Record, line: str) -> str:
    limits = contents["ceilings"]
    products = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in limits["products"].items() if value)
    exponentials = limits["exponentials"]
    passes = contents["passes"]
    lines = [
        line,
        f"ceilings: copy {limits['copy'] / 1e9:.1f} GB/s (read + written); products {products} GFLOP/s; "
        + (f"exp {exponentials / 1e9:.2f} G/s" if exponentials else "exp not measured"),
        *(f"backend {name}: {state}" for name, state in contents["backends"].items()),
        *([f"{passes} passes, each in a process of its own; tables come in the last one"] if passes > 1 else []),
    ]
    return "\n".join(lines)


def row(record: Record) -> str:
    """The table of one row of the suite."""
    title = record["name"]
    if record["state"] != "measured":
        return f"\n{title}: {record['state'].upper()}: {record['reason']}"
    floor = f", floor {seconds(record['floor_seconds'])}" if record["floor_seconds"] else ""
    lines = [f"\n{title} (grid {record['grid'][0]} x {record['grid'][1]}){floor}"]
    lines += aligned([_COLUMNS, *(_cells(each, record) for each in record["contenders"])])
    lines += [f"  {name}: FAILED: {reason}" for name, reason in record["failures"].items()]
    lines += [f"  {note}" for note in record["notes"]]
    lines += [f"  {'*' if not each['same_work'] else each['name']}: {each['note']}" for each in record["contenders"]
              if each["note"]]  # fmt: skip
    lines += [
        f"  {each['subject']}: {_comparison(each['times_faster'])} than {each['peer']}"
        for each in record["against_peers"]
        if each["times_faster"] is not None
    ]
    if record["stage"] == "pipeline":
        lines += [
            f"  {each['name']}: p50 {seconds(each['seconds']['median'])}, p99 {seconds(each['p99_seconds'])}, "
            f"{each['images_per_second']:.3g} images/s"
            for each in record["contenders"]
        ]
    return "\n".join(lines)


def _cells(entry: Record, record: Record) -> tuple[str, ...]:
    spread, faster = entry["seconds"], entry["times_faster"]
    is_baseline = entry["name"] == record["baseline"]
    return (
        entry["name"] + ("" if entry["same_work"] else " *"),
        seconds(entry["cold_seconds"]),
        seconds(spread["median"]),
        f"{seconds(spread['p20'])} to {seconds(spread['p80'])}",
        "baseline" if is_baseline else "lost in noise" if faster is None else factor(faster["median"]),
        "" if is_baseline else bounds(faster),
        "" if entry["floor_share"] is None else f"{entry['floor_share']:.0%}",
        amount(entry["memory_bytes"]),
    )


def aligned(table: Iterable[tuple[str, ...]]) -> list[str]:
    """The lines of a table: its first column is aligned to the left, the others to the right."""
    rows = list(table)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
