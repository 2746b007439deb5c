"""What each stage must do, from its shapes: the one cost model, from which floors are computed.

Bytes are those of the inputs, each read once, and of the outputs, each written once. Operations are those of the
mathematics, not of an implementation: padding, recomputation and split operands are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..reference import Grid

SPLIT_PRODUCTS = 3
"""Products of 16-bit operands that one product at the contract's precision takes on tensor cores."""


class Layer(NamedTuple):
    """Shapes of a self-attention layer, as :func:`diffseg.warmup` takes them."""

    grid: Grid
    heads: int
    channels: int  # of a head

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]


def unet_layers(levels: Iterable[tuple[int, int, int, int]]) -> list[Layer]:
    """The layers of a UNet from its levels, each (number of layers, side of the grid, heads, channels a head)."""
    return [Layer((side, side), heads, channels) for count, side, heads, channels in levels for _ in range(count)]


SD14 = unet_layers([(5, 64, 8, 40), (5, 32, 8, 80), (5, 16, 8, 160), (1, 8, 8, 160)])
"""Stable Diffusion 1.4 at 512 x 512."""


@dataclass(frozen=True)
class Work:
    """What a stage must at least do."""

    bytes: float = 0.0
    flops: float = 0.0  # two a multiply-add
    exponentials: float = 0.0  # or logarithms

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.exponentials + other.exponentials)

    def __mul__(self, factor: float) -> Work:
        return Work(self.bytes * factor, self.flops * factor, self.exponentials * factor)


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most, a second; measured by :func:`diffseg.bench.ceilings.measure`."""

    copy: float  # bytes, read and written
    products: Mapping[str, float] = field(default_factory=dict)  # flop, by precision
    exponentials: float = float("inf")
    overlap: bool = False  # whether products and exponentials run side by side, as on a GPU

    def floor(self, work: Work, precision: str) -> float:
        """Seconds below which no version of ``work`` runs, if its products run in ``precision``."""
        product = work.flops / self.products[precision] if work.flops else 0.0
        exponential = work.exponentials / self.exponentials
        compute = max(product, exponential) if self.overlap else product + exponential
        return max(work.bytes / self.copy, compute)


def aggregate(
    layers: Sequence[Layer],
    *,
    element: int = 4,
    logsumexps: bool = False,
    passes: int | None = None,
    batch: int = 1,
    grid: Grid | None = None,
) -> Work:
    """A_f from queries and keys of ``element`` bytes.

    Without log-sum-exps every exponential is taken twice, unless ``passes`` says once: where a row's exponentials can
    be kept until their sum is known, as in a CPU's cache. ``grid``: of A_f; None: the largest of the layers'.
    """
    pairs = sum(layer.heads * layer.cells**2 for layer in layers)
    passes = passes or (1 if logsumexps else 2)
    read = sum(2 * layer.heads * layer.cells * layer.channels * element for layer in layers)
    read += sum(4 * layer.heads * layer.cells for layer in layers) if logsumexps else 0
    return (
        Work(
            bytes=read + attention_bytes(layers, grid),
            flops=sum(2 * layer.heads * layer.cells**2 * layer.channels for layer in layers),
            exponentials=passes * pairs,
        )
        * batch
    )


def aggregate_maps(layers: Sequence[Layer], *, batch: int = 1, grid: Grid | None = None) -> Work:
    """A_f from maps [heads, n, n], float32: only the memory limits it."""
    read = sum(4 * layer.heads * layer.cells**2 for layer in layers)
    return Work(bytes=read + attention_bytes(layers, grid)) * batch


def attention_bytes(layers: Sequence[Layer], grid: Grid | None = None) -> int:
    """Bytes of A_f of one image, float32."""
    cells = max(layer.cells for layer in layers) if grid is None else grid[0] * grid[1]
    return 4 * cells**2


def first_round(cells: int, anchors: int, *, density: float = 1.0, products: int = 1, batch: int = 1) -> Work:
    """Round 1: two products of all pairs, one of the share ``density`` of pairs that match; a logarithm an entry."""
    pairs = 2 * anchors * cells * cells
    return (
        Work(
            bytes=4 * cells * cells + 4 * anchors * cells,
            flops=2 * pairs * products + pairs * density,
            exponentials=cells * cells,
        )
        * batch
    )


def later_rounds(cells: int, length: int, rounds: int, *, products: int = 1, batch: int = 1) -> Work:
    """Rounds 2 to N on lists of at most ``length``: one product a round (its transpose is the other), and the means."""
    each = Work(bytes=8 * length * cells, flops=2 * length * length * cells * products, exponentials=length * cells)
    return each * (rounds * batch)


def label(cells: int, length: float, size: Grid, *, batch: int = 1) -> Work:
    """Three operations a pixel and proposal: a lerp along the row, whose ends pixels share, and a comparison."""
    pixels = size[0] * size[1]
    return Work(bytes=4 * length * cells + 4 * pixels, flops=3 * pixels * length) * batch
