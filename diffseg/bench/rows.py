"""What there is to measure: the stages, what a run is asked for, and the rows that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..backends import OPS
from ..reference import Grid
from . import cases
from .cost import Work
from .timing import Contender

STAGES = {
    "aggregate": "A_f from queries and keys",
    "maps": "A_f from attention maps",
    "round1": "merging, round 1",
    "rounds": "merging, the rounds after the first",
    "merge": "merging, all rounds",
    "label": "upsample and argmax",
    "segment": "queries and keys to labels",
    "published": "maps to labels, by the published code's rule",
    "call": "one call on tiny inputs",
    "capture": "a UNet's forward pass, with and without recording",
    "pipeline": "image to labels",
    "folder": "files to written files, not in the subset",
    "growth": "aggregate and merge as the grid and the anchors grow",
}

NETWORK_STAGES = ("capture", "pipeline", "folder")
ANCHORS = 16  # a side, where a row has no other number

_SUBSET_STAGES = tuple(stage for stage in STAGES if stage != "folder")
_GROWING_SIZES = (192, 256, 384, 512, 768)  # grids of 24, 32, 48, 64 and 96 a side
_GROWING_ANCHORS = (4, 8, 16, 32)
_TINY = (32, 32)  # an image whose grid is 4 x 4


@dataclass(frozen=True)
class Settings:
    """What to measure, and on what."""

    stages: tuple[str, ...] = ()  # none: the subset that takes two minutes and a quarter on two cores
    cases: tuple[str, ...] = ()  # none: those that suit the stage
    sizes: tuple[Grid, ...] = ((512, 512),)  # of images, in pixels
    batches: tuple[int, ...] = (1,)
    backends: tuple[str, ...] = ()  # none: all that can run
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32  # of queries, keys and networks
    published: Path | None = None
    published_python: str | None = None
    model: str | None = None
    architecture: str | None = None

    @property
    def subset(self) -> bool:
        return not self.stages


@dataclass(frozen=True)
class Row:
    """A stage on an input: what one table compares its contenders on."""

    stage: str
    case: str
    size: Grid = (512, 512)
    batch: int = 1
    anchors: int = ANCHORS  # a side
    series: tuple[str, ...] = ()  # of the growth that it is a point of: "cells", "anchors"

    @property
    def grid(self) -> Grid:
        return (self.size[0] // 8, self.size[1] // 8)

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        words = [self.stage, self.case, f"{self.size[0]}x{self.size[1]}", f"B={self.batch}"]
        return " ".join([*words, f"M={self.anchors}"] if self.anchors != ANCHORS else words)


@dataclass
class Plan:
    """A row, ready to run. ``work`` and notes that are functions are called once, when the row is described."""

    inputs: list[Any]
    contenders: list[Contender]
    work: Callable[[], Work] | None = None
    precision: str = "float32"  # in which the floor takes matrix products
    notes: list[str | Callable[[], str]] = field(default_factory=list)


def rows_of(settings: Settings) -> Iterator[Row]:
    """The rows that the settings ask for, in the order in which they are measured."""
    for size in settings.sizes:
        for batch in settings.batches:
            for stage in settings.stages or _SUBSET_STAGES:
                pixels = _TINY if stage == "call" else size
                yield from (Row(stage, case, pixels, batch) for case in _cases_of(stage, size, settings))
    if settings.subset or "growth" in settings.stages:
        yield from _growing(settings.subset)


def _growing(subset: bool) -> Iterator[Row]:
    sizes = _GROWING_SIZES[:3] if subset else _GROWING_SIZES
    anchors = _GROWING_ANCHORS[:3] if subset else _GROWING_ANCHORS
    side = 256 if subset else 512
    yield from (Row("aggregate", "thin", (each, each), series=("cells",)) for each in sizes)
    for each in sizes:
        yield Row("merge", "thin", (each, each), series=("cells", "anchors") if each == side else ("cells",))
    for each in anchors:
        if each != ANCHORS:
            yield Row("merge", "thin", (side, side), anchors=each, series=("anchors",))


def _cases_of(stage: str, size: Grid, settings: Settings) -> list[str]:
    """The inputs on which a stage is measured."""
    if stage == "growth":  # has sizes of its own
        return []
    if stage == "call":
        return list(OPS)
    if stage in NETWORK_STAGES:
        return [settings.architecture or ("bundled" if settings.model is None else "model")]
    if settings.cases:
        return list(settings.cases)
    golden = cases.golden_missing(size) is None
    if stage in ("maps", "published"):
        return ["golden" if golden else "thin"]
    on_gpu = settings.device.type == "cuda"
    if settings.subset and not on_gpu:
        special = {"aggregate": ["sd14"], "rounds": ["noise"], "merge": ["bundled", "noise"]}
        return special.get(stage, ["bundled"])
    wide = ["sd14"] if on_gpu or stage in ("aggregate", "segment") else []
    noise = ["noise"] if stage in ("round1", "rounds", "merge", "label") else []
    return [*wide, *(["golden"] if golden else []), "bundled", *noise]
