"""Pictures of a run: times faster as bars, growth curves, shares of the floor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..loading import UsageError
from .report import Record


def check(path: Path) -> None:
    """Raises UsageError where :func:`save` could not write ``path``: before an hour of measuring, not after."""
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot: expected a name that ends in .png or .svg, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install -e '.[evaluate]' in a checkout") from error


def save(rows: list[Record], title: str, path: Path) -> None:
    """Draws the measured rows, of which there must be one; parts without a row are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row["state"] == "measured"]
    plain = [row for row in measured if not row["series"]]
    parts = [
        (draw, chosen)
        for draw, chosen in (
            (_bars, plain),
            (_shares, [row for row in plain if row["floor_seconds"]]),
            (partial(_growth, series="cells"), [row for row in measured if "cells" in row["series"]]),
            (partial(_growth, series="anchors"), [row for row in measured if "anchors" in row["series"]]),
        )
        if chosen
    ]
    figure, axes = pyplot.subplots(len(parts), 1, figsize=(9, 4.2 * len(parts)), squeeze=False, layout="constrained")
    for axis, (draw, chosen) in zip(axes[:, 0], parts, strict=True):
        draw(axis, chosen)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axis: Any, rows: list[Record]) -> None:
    names, values, low, high = [], [], [], []
    for row in rows:
        for entry in row["contenders"]:
            faster = entry["times_faster"]
            if entry["role"] == "subject" and faster is not None:
                names.append(f"{row['name']}: {entry['name']}")
                values.append(faster["median"])
                low.append(faster["median"] - (faster["low"] or faster["median"]))
                high.append((faster["high"] or faster["median"]) - faster["median"])
    axis.barh(names, values, xerr=[low, high], color="tab:blue", ecolor="0.3", capsize=2)
    axis.axvline(1, color="0.5", linewidth=1)
    axis.set_xlabel("times faster than the row's baseline (lines: where another run finds it)")
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()


def _shares(axis: Any, rows: list[Record]) -> None:
    names, values = [], []
    for row in rows:
        for entry in row["contenders"]:
            if entry["floor_share"] is not None and entry["role"] != "peer":
                names.append(f"{row['name']}: {entry['name']}")
                values.append(100 * entry["floor_share"])
    axis.barh(names, values, color="tab:green")
    axis.set_xlabel("floor over measured time, % (more than 100: work that pruning saved)")
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()


def _growth(axis: Any, rows: list[Record], series: str) -> None:
    cells = series == "cells"
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        x = row["grid"][0] if cells else row["anchors"]
        for entry in row["contenders"]:
            if entry["role"] != "peer":
                lines.setdefault(f"{row['stage']}: {entry['name']}", []).append((x, 1000 * entry["seconds"]["median"]))
    for name, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axis.set_yscale("log")
    axis.set_xlabel("side of the grid" if cells else "anchors a side")
    axis.set_ylabel("ms")
    axis.legend(fontsize=7)
