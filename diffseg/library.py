"""The ops as ``torch.library`` operators, ``torch.ops.diffseg.*``, so that ``torch.compile`` sees opaque ops.

Each runs the backend that :mod:`diffseg.backends` chooses, on the layers that have a share in A_f; grids are flat, h_0,
w_0, h_1, w_1, ... Fakes give shapes only. The functions of :mod:`diffseg.ops` check the arguments and call these;
nothing else should.

Grids and sizes are constants of a compiled graph: others compile another one, up to torch's recompilation limit, by
default eight a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends, reference
from .reference import Grid

T = TypeVar("T")

_LIBRARY = torch.library.Library("diffseg", "DEF")


def _operator(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, partial(_without_autocast, run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"diffseg::{name}", fake, lib=_LIBRARY)


def _without_autocast(run: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """Runs an op in the precision of its own: autocast would round the products of those that call torch's."""
    device = (first[0] if isinstance(first, (list, tuple)) else first).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return run(first, *rest)
    with torch.autocast(device, enabled=False):
        return run(first, *rest)


def _pairs(flat: Sequence[int]) -> list[Grid]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _attention(layer: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for A_f [B, N, N] of a batch like ``layer``'s, N the cells of ``grid``."""
    cells = grid[0] * grid[1]
    return torch.empty(layer.shape[0], cells, cells, dtype=dtype, device=layer.device)


def _with_a_share(ratios: Sequence[float]) -> list[int]:
    """The layers that a backend is given: those of weight 0 are not read."""
    return [layer for layer, ratio in enumerate(ratios) if ratio > 0]


def _select(values: Sequence[T], layers: Sequence[int]) -> list[T]:
    return [values[layer] for layer in layers]


def _lower_grids(grids: Sequence[Grid], output: Sequence[int]) -> list[Grid]:
    """The distinct grids below the output's."""
    return [grid for grid in dict.fromkeys(grids) if grid != tuple(output)]


@contextmanager
def _numbered_by_caller(layers: Sequence[int]) -> Iterator[None]:
    """Translates a layer's number to the caller's, in the error about its attention; ``layers``: what a backend got."""
    try:
        yield
    except reference.NonFiniteAttentionError as error:
        raise ValueError(
            f"layer {layers[error.layer]}: expected finite attention, found NaN or infinity (in float16 the network "
            "may have overflowed: use bfloat16 or float32)"
        ) from None


def _aggregate_into(
    queries: list[Tensor],
    keys: list[Tensor],
    grids: list[int],
    scales: list[float],
    logsumexps: list[Tensor] | None,
    ratios: list[float],
    grid: list[int],
    out: Tensor,
    backend: str,
) -> None:
    used = _with_a_share(ratios)
    queries, pairs = _select(queries, used), _select(_pairs(grids), used)
    lower = _lower_grids(pairs, grid)
    run = backends.implementation(
        backend, "aggregate", queries[0].device, queries[0].dtype, width=max(query.shape[3] for query in queries),
        storage=out.dtype, lower_grids=lower, summed_grids=lower, images=len(queries[0]) * len(used),
    )  # fmt: skip
    with _numbered_by_caller(used):
        run(
            queries, _select(keys, used), pairs, _select(scales, used), logsumexps and _select(logsumexps, used),
            _select(ratios, used), tuple(grid), out,
        )  # fmt: skip


def _aggregate(
    queries: list[Tensor],
    keys: list[Tensor],
    grids: list[int],
    scales: list[float],
    logsumexps: list[Tensor] | None,
    ratios: list[float],
    grid: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    attention = _attention(queries[0], grid, dtype)
    _aggregate_into(queries, keys, grids, scales, logsumexps, ratios, grid, attention, backend)
    return attention


def _aggregate_fake(queries: list[Tensor], *rest: Any) -> Tensor:
    *_, grid, dtype, _ = rest
    return _attention(queries[0], grid, dtype)


def _aggregate_maps_into(
    maps: list[Tensor], grids: list[int], ratios: list[float], grid: list[int], out: Tensor, backend: str
) -> None:
    used = _with_a_share(ratios)
    pairs = _select(_pairs(grids), used)
    run = backends.implementation(
        backend, "aggregate_maps", maps[0].device, maps[0].dtype, storage=out.dtype,
        lower_grids=_lower_grids(pairs, grid), summed_grids=pairs, images=len(maps[0]),
    )  # fmt: skip
    with _numbered_by_caller(used):
        run(_select(maps, used), pairs, _select(ratios, used), tuple(grid), out)


def _aggregate_maps(
    maps: list[Tensor], grids: list[int], ratios: list[float], grid: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    attention = _attention(maps[0], grid, dtype)
    _aggregate_maps_into(maps, grids, ratios, grid, attention, backend)
    return attention


def _no_result(*_: Any) -> None:
    """The fake of an operator that only writes into an argument."""


def _merge(
    attention: Tensor, grid: list[int], anchors: list[int], thresholds: list[float], rule: str, backend: str
) -> tuple[Tensor, Tensor]:
    run = backends.implementation(
        backend, "merge", attention.device, attention.dtype, anchors=len(anchors), images=len(attention)
    )
    return run(attention, tuple(grid), anchors, thresholds, rule)


def _merge_fake(attention: Tensor, grid: list[int], anchors: list[int], *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(attention.dtype, torch.float32)
    maps = attention.new_empty(attention.shape[0], len(anchors), attention.shape[2], dtype=dtype)
    return maps, attention.new_empty(attention.shape[0], dtype=torch.int32)


def _check_counts(maps: Tensor, counts: Tensor) -> None:
    """On a CPU, where the values are at hand; here and not in the ops, which compilers trace without values."""
    if counts.device.type == "cpu" and not bool(((counts >= 1) & (counts <= maps.shape[1])).all()):
        raise ValueError(f"proposals.counts: expected 1 to {maps.shape[1]}, got {counts.tolist()}")


def _label(maps: Tensor, counts: Tensor, grid: list[int], size: list[int], backend: str) -> Tensor:
    _check_counts(maps, counts)
    run = backends.implementation(backend, "label", maps.device, maps.dtype, images=len(maps))
    return run(maps, counts, tuple(grid), tuple(size))


def _label_fake(maps: Tensor, counts: Tensor, grid: list[int], size: list[int], _backend: str) -> Tensor:
    return maps.new_empty((maps.shape[0], *size), dtype=torch.int32)


def _renumber(labels: Tensor, length: int, backend: str) -> Tensor:
    run = backends.implementation(backend, "renumber", labels.device, labels.dtype, anchors=length, images=len(labels))
    return run(labels, length)


def _renumber_fake(labels: Tensor, _length: int, _backend: str) -> Tensor:
    return labels.new_empty(labels.shape[0])


def _refine(attention: Tensor, maps: Tensor, counts: Tensor, max_iterations: int) -> tuple[Tensor, Tensor]:
    _check_counts(maps, counts)
    return reference.refine(attention, maps, counts, max_iterations)


def _refine_fake(_attention: Tensor, maps: Tensor, counts: Tensor, _iterations: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(maps), torch.empty_like(counts)


def _aggregate_cross(
    queries: list[Tensor],
    keys: list[Tensor],
    grids: list[int],
    scales: list[float],
    shares: Tensor,
    size: list[int],
    backend: str,
) -> Tensor:
    first, width = queries[0], max(query.shape[3] for query in queries)
    run = backends.implementation(
        backend, "aggregate_cross", first.device, first.dtype, width=width, tokens=shares.shape[2], images=len(first)
    )
    with _numbered_by_caller(range(len(queries))):
        return run(queries, keys, _pairs(grids), scales, shares, tuple(size))


def _aggregate_cross_fake(queries: list[Tensor], *rest: Any) -> Tensor:
    *_, shares, size, _ = rest
    return shares.new_empty((*shares.shape[:2], *size), dtype=torch.promote_types(queries[0].dtype, torch.float32))


def _score_masks(maps: Tensor, labels: Tensor, masks: int, backend: str) -> Tensor:
    run = backends.implementation(backend, "score_masks", maps.device, maps.dtype, images=len(maps))
    return run(maps, labels, masks)


def _score_masks_fake(maps: Tensor, _labels: Tensor, masks: int, _backend: str) -> Tensor:
    return maps.new_empty(maps.shape[0], masks, maps.shape[1])


_operator(
    "aggregate(Tensor[] queries, Tensor[] keys, int[] grids, float[] scales, Tensor[]? logsumexps, float[] ratios, "
    "int[] grid, ScalarType dtype, str backend) -> Tensor",
    _aggregate,
    _aggregate_fake,
)
_operator(
    "aggregate_maps(Tensor[] maps, int[] grids, float[] ratios, int[] grid, ScalarType dtype, str backend) -> Tensor",
    _aggregate_maps,
    _aggregate_fake,
)
_operator(
    "aggregate_into(Tensor[] queries, Tensor[] keys, int[] grids, float[] scales, Tensor[]? logsumexps, "
    "float[] ratios, int[] grid, Tensor(a!) out, str backend) -> ()",
    _aggregate_into,
    _no_result,
)
_operator(
    "aggregate_maps_into(Tensor[] maps, int[] grids, float[] ratios, int[] grid, Tensor(a!) out, str backend) -> ()",
    _aggregate_maps_into,
    _no_result,
)
_operator(
    "merge(Tensor attention, int[] grid, int[] anchors, float[] thresholds, str rule, str backend) -> (Tensor, Tensor)",
    _merge,
    _merge_fake,
)
_operator("label(Tensor maps, Tensor counts, int[] grid, int[] size, str backend) -> Tensor", _label, _label_fake)
_operator("renumber(Tensor(a!) labels, int length, str backend) -> Tensor", _renumber, _renumber_fake)
_operator(
    "refine(Tensor attention, Tensor maps, Tensor counts, int max_iterations) -> (Tensor, Tensor)",
    _refine,
    _refine_fake,
)
_operator(
    "aggregate_cross(Tensor[] queries, Tensor[] keys, int[] grids, float[] scales, Tensor shares, int[] size, "
    "str backend) -> Tensor",
    _aggregate_cross,
    _aggregate_cross_fake,
)
_operator("score_masks(Tensor maps, Tensor labels, int masks, str backend) -> Tensor", _score_masks, _score_masks_fake)

ops: Any = torch.ops.diffseg
