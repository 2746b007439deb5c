"""Inputs of the rows: golden cases, the bundled model's attention, structured layers of any network, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..loading import load_pipeline
from ..reference import Grid
from .ceilings import last_level_cache
from .cost import SD14, Layer

GOLDEN = Path(__file__).parents[2] / "tests" / "data"
"""Results of the published code on synthetic attention; in a checkout only."""

_GOLDEN_SIZE = (512, 512)
_GOLDEN_SIDES = (64, 32, 16, 8)
_GOLDEN_THRESHOLD = 0.5
_NOISE_THRESHOLD = 0.3  # maps of uniform noise lie at 0.5: nothing merges, no pair can be pruned
_REGIONS = 12
_MOST_COPIES = 16

T = TypeVar("T")


class Unavailable(Exception):  # noqa: N818  (no error: a row that is not for this machine)
    """A row's input cannot be had on this machine; the message says why."""


@dataclass
class Case:
    """Self-attention of one forward pass, of the layers that have a share in A_f, and how A_f is merged."""

    name: str
    queries: list[Tensor]  # [B, heads, n, d] each
    keys: list[Tensor]
    grids: list[Grid]
    size: Grid  # of the labels
    threshold: float = 1.0
    scales: list[float] | None = None
    logsumexps: list[Tensor] | None = None
    weights: ops.Weights = "proportional"
    output: Grid | None = None  # the grid of A_f; None: the largest of ``grids``

    @property
    def batch(self) -> int:
        return len(self.queries[0])

    @property
    def grid(self) -> Grid:
        return self.output or ops.output_grid(self.grids)

    @property
    def layers(self) -> list[Layer]:
        return [
            Layer(grid, query.shape[1], query.shape[3]) for grid, query in zip(self.grids, self.queries, strict=True)
        ]

    @cached_property
    def attention(self) -> Tensor:
        """A_f [B, N, N]."""
        return self.aggregate((self.queries, self.keys, self.logsumexps))

    def aggregate(self, given: Any, **options: Any) -> Tensor:
        """A_f from queries, keys and log-sum-exps, these or copies."""
        queries, keys, logsumexps = given
        return ops.aggregate(
            queries, keys, grids=self.grids, scales=self.scales, logsumexps=logsumexps, weights=self.weights,
            grid=self.grid, **options,
        )  # fmt: skip

    def aggregate_maps(self, maps: Sequence[Tensor], **options: Any) -> Tensor:
        """A_f from maps."""
        return ops.aggregate_maps(maps, grids=self.grids, weights=self.weights, grid=self.grid, **options)

    @cached_property
    def maps(self) -> list[Tensor]:
        """softmax(Q K^T scale) of each layer, [B, heads, n, n]."""
        scales = self.scales or [query.shape[3] ** -0.5 for query in self.queries]
        return [
            (query.float() @ key.float().mT).mul_(scale).softmax(-1)
            for query, key, scale in zip(self.queries, self.keys, scales, strict=True)
        ]


def golden_missing(size: Grid) -> str | None:
    """Why there are no golden cases of images of ``size``."""
    if not GOLDEN.joinpath("case1.npz").exists():
        return "the golden cases are in a checkout only (tests/data)"
    return None if size == _GOLDEN_SIZE else "the golden cases are of images of 512 x 512 (--size 512)"


def golden(size: Grid, batch: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Two heads of 16 channels on grids of 64, 32, 16 and 8; the images of a batch are the cases in turn."""
    if reason := golden_missing(size):
        raise Unavailable(reason)

    def layers(letter: str) -> list[Tensor]:
        images = [_golden(1 + item % 3) for item in range(batch)]
        return [
            torch.stack([torch.from_numpy(image[f"{letter}{side}"]) for image in images]).to(device, dtype)
            for side in _GOLDEN_SIDES
        ]

    grids = [(side, side) for side in _GOLDEN_SIDES]
    return Case("golden", layers("q"), layers("k"), grids, _GOLDEN_SIZE, _GOLDEN_THRESHOLD)


@cache
def _golden(number: int) -> dict[str, Any]:
    with np.load(GOLDEN / f"case{number}.npz") as arrays:
        return dict(arrays)


def bundled(size: Grid, batch: int, device: torch.device) -> Case:
    """The bundled model's attention on the bundled photograph, in a batch on generated scenes too.

    Its grid is that of Stable Diffusion for an image of ``size``: an eighth of it.
    """
    try:
        from ..capture import record_attention
    except ImportError as error:
        raise Unavailable(f"the bundled model needs diffusers ({error})") from error
    pipe = bundled_pipeline()
    grid = (size[0] // 8, size[1] // 8)
    pixels = torch.stack(pictures(batch, grid)) * 2 - 1
    context = torch.zeros(batch, 1, pipe.unet.config.cross_attention_dim)
    with torch.no_grad(), record_attention(pipe.unet) as record:
        pipe.unet(pixels, pipe.config.timestep, encoder_hidden_states=context)
    shares = ops.resolve_weights(pipe.config.weights, record.grids)

    def used(values: Sequence[T]) -> list[T]:
        return [value for value, share in zip(values, shares, strict=True) if share > 0]

    queries, keys = ([each.to(device) for each in used(layers)] for layers in (record.queries, record.keys))
    rows = None if record.logsumexps is None else [each.to(device) for each in used(record.logsumexps)]
    return Case(
        "bundled", queries, keys, used(record.grids), size, pipe.config.threshold, used(record.scales), rows,
        weights=used(shares), output=ops.output_grid(record.grids),
    )  # fmt: skip


def bundled_pipeline() -> Any:
    return load_pipeline(None, "cpu", "float32", announce=False)


def pictures(batch: int, size: Grid) -> list[Tensor]:
    """The bundled photograph and generated scenes, float32 [3, h, w] in [0, 1], resized to ``size``."""
    from .. import images
    from ..tiny.scenes import REPORT_SEEDS, scene

    photograph = images.to_tensor(Path(__file__).parents[1] / "assets" / "photo.jpg")
    scenes = [images.to_tensor(scene(REPORT_SEEDS[item])[0]) for item in range(batch - 1)]
    return [images.resize(image, size) for image in (photograph, *scenes)]


def sd14(size: Grid, batch: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Layers of the shapes of Stable Diffusion 1.4 for images of ``size``."""
    layers = [Layer((side_of(size[0], layer), side_of(size[1], layer)), layer.heads, layer.channels) for layer in SD14]
    return structured("sd14", layers, size, batch, device, dtype)


def side_of(pixels: int, layer: Layer) -> int:
    """The side of the grid of ``layer`` of SD 1.4, where the image's side is ``pixels`` instead of 512."""
    return max(1, math.ceil(pixels * layer.grid[0] / 512))


def structured(
    name: str,
    layers: Sequence[Layer],
    size: Grid,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    given: bool | None = None,
) -> Case:
    """Layers that look at one scene of regions: cells of a region attend to each other, more so where they are near.

    Tensors lie as projections do. ``given``: with log-sum-exps; None: on a GPU, where fused attention leaves them.
    """
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    given = device.type == "cuda" if given is None else given
    centres = torch.rand(batch, _REGIONS, 2, generator=generator, device=device)
    queries, keys, rows = [], [], []
    for (height, width), heads, channels in layers:
        lines = [(torch.arange(side, device=device) + 0.5) / side for side in (height, width)]
        points = torch.cartesian_prod(*lines).expand(batch, -1, -1)
        region = torch.cdist(points, centres).argmin(-1)
        features = 1.2 * randn(batch, _REGIONS, heads, channels)
        shared = features.gather(1, region[:, :, None, None].expand(-1, -1, heads, channels))
        shared = shared + (points @ randn(2, channels))[:, :, None]
        query, key = ((shared + 0.3 * randn(*shared.shape)).to(dtype).transpose(1, 2) for _ in range(2))
        queries.append(query)
        keys.append(key)
        if given:
            rows.append(_logsumexp(query, key))
    return Case(name, queries, keys, [layer.grid for layer in layers], size, logsumexps=rows if given else None)


def _logsumexp(query: Tensor, key: Tensor) -> Tensor:
    """[B, heads, n] float32, a head at a time."""
    scale = query.shape[-1] ** -0.5
    heads = [
        (query[:, head].double() @ key[:, head].double().mT * scale).logsumexp(-1) for head in range(query.shape[1])
    ]
    return torch.stack(heads, 1).float()


def noise(grid: Grid, batch: int, device: torch.device) -> tuple[Tensor, float]:
    """Maps of uniform noise [B, N, N] and a threshold at which none of them merge: the worst case of merging."""
    cells = grid[0] * grid[1]
    generator = torch.Generator(device).manual_seed(0)
    maps = torch.rand(batch, cells, cells, generator=generator, device=device)
    return maps.div_(maps.sum(-1, keepdim=True)), _NOISE_THRESHOLD


def rotated(given: T, device: torch.device) -> list[T]:
    """Copies of ``given``, a nest of tensors: together twice the last-level cache, so that no call finds it cached."""
    size = _bytes(given)
    copies = min(_MOST_COPIES, math.ceil(2 * last_level_cache(device) / max(size, 1)))
    return [given, *(_copied(given) for _ in range(copies - 1))]


def _bytes(nest: Any) -> int:
    if isinstance(nest, Tensor):
        return nest.nbytes
    return sum(_bytes(each) for each in nest) if isinstance(nest, (tuple, list)) else 0


def _copied(nest: Any) -> Any:
    if isinstance(nest, Tensor):
        return nest.clone(memory_format=torch.preserve_format)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*map(_copied, nest))
    return type(nest)(map(_copied, nest)) if isinstance(nest, (tuple, list)) else nest
