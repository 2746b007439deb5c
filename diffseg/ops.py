"""The public ops: each validates its input once, picks a backend and calls it. Nothing else chooses a backend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from .reference import Grid

Rule = Literal["paper", "official"]
Weights = str | Sequence[float]

WEIGHT_SCHEMES = ("proportional", "per_layer", "literal")
RULES = ("paper", "official")
_STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Proposals(NamedTuple):
    """Object proposals of a batch, each a map over the grid's cells."""

    maps: Tensor  # [B, P, N], float32 or float64; rows from ``counts`` on are padding
    counts: Tensor  # [B], int32
    grid: Grid  # (h, w), h * w = N


def aggregate(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    grids: Sequence[Grid] | None = None,
    scales: Sequence[float] | None = None,
    logsumexps: Sequence[Tensor] | None = None,
    weights: Weights = "proportional",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Aggregates the self-attention of all layers into one map a cell (the paper's equations 1 to 3).

    ``A_f[(I, J)] = sum_k R_k normalise(upsample(mean_heads softmax(Q_k K_k^T scale_k)))[(I h_k // h, J w_k // w)]``,
    where (h, w), the output grid, is the largest of the grids (h_k, w_k). Rows sum to 1.

    Args:
        queries, keys: one tensor a layer, [B, heads, n, d]; float16, bfloat16, float32 or float64.
        grids: (h_k, w_k) of each layer, h_k * w_k = n; None: square.
        scales: factor of Q K^T of each layer; None: d ** -0.5.
        logsumexps: log-sum-exp of each row of the scaled scores, [B, heads, n]; None: computed.
        weights: ``"proportional"`` (layers of one grid share equally, grids weigh as sqrt(n); the published code),
            ``"per_layer"`` (sqrt(n) over all layers), ``"literal"`` (the paper's text: per_layer times N / n), or a
            float a layer; renormalised to sum 1.
        dtype: in which A_f is stored: float32, float64 or bfloat16.
        backend: ``"auto"`` or one of :func:`available_backends`.

    Returns:
        A_f [B, N, N], N = h * w.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_layers("queries", queries, dimensions=("batch", "heads", "n", "d"))
    _check_layers("keys", keys, dimensions=("batch", "heads", "n", "d"))
    _check_length("keys", keys, len(queries))
    first = queries[0]
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        if key.shape != query.shape:
            raise ValueError(
                f"keys[{layer}]: expected the shape of queries[{layer}], {list(query.shape)}, got {list(key.shape)}"
            )
        _check_like(f"queries[{layer}]", query, first)
        _check_like(f"keys[{layer}]", key, first)
    grids = _check_grids(grids, [query.shape[2] for query in queries])
    if scales is None:
        scales = [query.shape[3] ** -0.5 for query in queries]
    else:
        scales = _check_numbers("scales", scales, len(queries))
    if logsumexps is not None:
        _check_layers("logsumexps", logsumexps, dimensions=("batch", "heads", "n"))
        _check_length("logsumexps", logsumexps, len(queries))
        for layer, (logsumexp, query) in enumerate(zip(logsumexps, queries, strict=True)):
            if logsumexp.shape != query.shape[:3] or logsumexp.device != query.device:
                raise ValueError(
                    f"logsumexps[{layer}]: expected {list(query.shape[:3])} on {query.device}, "
                    f"got {list(logsumexp.shape)} on {logsumexp.device}"
                )
    _check_storage_dtype("dtype", dtype)
    ratios = resolve_weights(weights, grids)
    width = max(query.shape[3] for query in queries)
    run = backends.implementation(backend, "aggregate", first.device, first.dtype, width=width, storage=dtype)
    attention: Tensor = run(list(queries), list(keys), grids, scales, logsumexps, ratios, dtype)
    return attention


def aggregate_maps(
    maps: Sequence[Tensor],
    *,
    grids: Sequence[Grid] | None = None,
    weights: Weights = "proportional",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """:func:`aggregate` from attention maps that exist already: the same sum without the softmax.

    Args:
        maps: one tensor a layer, [B, heads, n, n] or [B, n, n] (averaged over heads); rows need not sum to 1.
        grids, weights, dtype, backend: as in :func:`aggregate`.

    Returns:
        A_f [B, N, N].
    """
    _check_sequence("maps", maps)
    layers = [layer.unsqueeze(1) if isinstance(layer, Tensor) and layer.ndim == 3 else layer for layer in maps]
    _check_layers("maps", layers, dimensions=("batch", "heads", "n", "n"))
    for index, layer in enumerate(layers):
        if layer.shape[2] != layer.shape[3]:
            raise ValueError(f"maps[{index}]: expected the last two sizes to be equal, got {list(layer.shape)}")
        _check_like(f"maps[{index}]", layer, layers[0])
    grids = _check_grids(grids, [layer.shape[2] for layer in layers])
    _check_storage_dtype("dtype", dtype)
    ratios = resolve_weights(weights, grids)
    run = backends.implementation(backend, "aggregate_maps", layers[0].device, layers[0].dtype, storage=dtype)
    attention: Tensor = run(layers, grids, ratios, dtype)
    return attention


def merge(
    attention: Tensor,
    *,
    grid: Grid | None = None,
    anchors: int | Sequence[int] = 16,
    iterations: int = 3,
    threshold: float | Sequence[float] = 1.0,
    rule: Rule = "paper",
    backend: str = "auto",
) -> Proposals:
    """Iterative attention merging by symmetric KL divergence (the paper's equations 4 and 5 and Algorithm 1).

    Round 1 averages, for each anchor, all maps nearer than the threshold. Later rounds walk the list: an element not
    yet taken becomes a head, its group is averaged into the next list and taken.

    Args:
        attention: A_f [B, N, N], rows sum to 1; float32, float64 or bfloat16.
        grid: (h, w), h * w = N; None: square.
        anchors: M, for M x M evenly spaced anchors, 1 <= M <= min(h, w); or flat indices of cells.
        iterations: number of rounds, the first included.
        threshold: tau > 0, or one a round. D < tau matches.
        rule: what a group may hold: ``"paper"``, elements not yet taken (Algorithm 1), or ``"official"``, taken ones
            too (the published code).
        backend: ``"auto"`` or one of :func:`available_backends`.

    Returns:
        :class:`Proposals` with P = the number of anchors. Nothing waits for the device.
    """
    attention = _check_attention(attention)
    cells = attention.shape[1]
    grid = _check_grids(None if grid is None else [grid], [cells], name="grid")[0]
    positions = anchor_indices(grid, anchors)
    thresholds = _check_thresholds(threshold, iterations)
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
    run = backends.implementation(backend, "merge", attention.device, attention.dtype, anchors=len(positions))
    maps, counts = run(attention, grid, positions, thresholds, rule)
    return Proposals(maps, counts, grid)


def refine(attention: Tensor, proposals: Proposals, *, max_iterations: int = 300) -> Proposals:
    """k-means refinement, as in the published demo: Lloyd's iterations on rows of A_f from the proposals as centres.

    Runs until labels are stable or ``max_iterations`` are done; a cluster that ends empty is dropped. This op waits for
    the device and cannot be recorded in a graph.

    Args:
        attention: A_f [B, N, N] from which the proposals were merged.
        proposals: the centres.

    Returns:
        :class:`Proposals` whose maps are the cluster means.
    """
    attention = _check_attention(attention)
    _check_proposals(proposals)
    if proposals.maps.shape[0] != attention.shape[0] or proposals.maps.shape[2] != attention.shape[2]:
        raise ValueError(
            f"proposals: expected maps [{attention.shape[0]}, P, {attention.shape[2]}], "
            f"got {list(proposals.maps.shape)}"
        )
    if proposals.maps.device != attention.device:
        raise ValueError(f"proposals: expected maps on {attention.device}, got {proposals.maps.device}")
    _check_integer("max_iterations", max_iterations, 1)
    maps, counts = reference.refine(attention, proposals.maps, proposals.counts, max_iterations)
    return Proposals(maps, counts, proposals.grid)


_refine = refine  # segment has a parameter of that name


def label(proposals: Proposals, size: Grid, *, backend: str = "auto") -> Tensor:
    """The winning proposal of each pixel: bilinear upsample to ``size``, argmax (the paper's non-maximum suppression).

    Args:
        proposals: from :func:`merge` or :func:`refine`.
        size: (H, W) in pixels.

    Returns:
        int32 [B, H, W], indices of proposals; ties go to the lowest.
    """
    _check_proposals(proposals)
    size = _check_pair("size", size)
    run = backends.implementation(backend, "label", proposals.maps.device, proposals.maps.dtype)
    winner: Tensor = run(proposals.maps, proposals.counts, proposals.grid, size)
    return winner


def segment(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    size: Grid,
    *,
    grids: Sequence[Grid] | None = None,
    scales: Sequence[float] | None = None,
    logsumexps: Sequence[Tensor] | None = None,
    weights: Weights = "proportional",
    anchors: int | Sequence[int] = 16,
    iterations: int = 3,
    threshold: float | Sequence[float] = 1.0,
    rule: Rule = "paper",
    refine: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Segments from queries and keys: :func:`aggregate`, :func:`merge`, :func:`label`, then :func:`renumber`.

    Arguments as in those ops; ``refine=True`` adds :func:`refine` before the labels.

    Returns:
        int32 [B, H, W], labels 0..S-1 without gaps.
    """
    size = _check_pair("size", size)
    _check_thresholds(threshold, iterations)
    attention = aggregate(
        queries, keys, grids=grids, scales=scales, logsumexps=logsumexps, weights=weights, backend=backend
    )
    grid = output_grid(_check_grids(grids, [query.shape[2] for query in queries]))
    proposals = merge(
        attention, grid=grid, anchors=anchors, iterations=iterations, threshold=threshold, rule=rule, backend=backend
    )
    if refine:
        proposals = _refine(attention, proposals)
    return renumber(label(proposals, size, backend=backend), proposals.maps.shape[1])


def renumber(labels: Tensor, length: int) -> Tensor:
    """Numbers the labels of each image 0..S-1 in order of index, without gaps: integers [B, H, W] below ``length``."""
    flat = labels.flatten(1).long()
    present = torch.zeros(len(flat), length, dtype=torch.int32, device=labels.device).scatter_(1, flat, 1)
    numbers = present.cumsum(1, dtype=torch.int32) - 1
    return numbers.gather(1, flat).view(labels.shape)


def output_grid(grids: Sequence[Grid]) -> Grid:
    """The grid of A_f: the largest of the layers' grids."""
    return max(grids, key=lambda grid: grid[0] * grid[1])


def anchor_indices(grid: Grid, anchors: int | Sequence[int]) -> tuple[int, ...]:
    """Flat indices of M x M evenly spaced cells (rows ((2i + 1) h - M) // (2M), columns alike), or those given."""
    height, width = grid
    if isinstance(anchors, Integral) and not isinstance(anchors, bool):
        side = int(anchors)
        if not 1 <= side <= min(grid):
            raise ValueError(f"anchors: expected 1 to {min(grid)} anchors a side on a grid of {grid}, got {side}")
        rows = [((2 * i + 1) * height - side) // (2 * side) for i in range(side)]
        columns = [((2 * i + 1) * width - side) // (2 * side) for i in range(side)]
        return tuple(row * width + column for row in rows for column in columns)
    if isinstance(anchors, (str, bytes, bool)) or not hasattr(anchors, "__iter__"):
        raise TypeError(f"anchors: expected an int or a sequence of flat indices, got {_describe(anchors)}")
    positions = anchors.tolist() if isinstance(anchors, Tensor) else list(anchors)
    if not positions:
        raise ValueError("anchors: expected at least one index, got none")
    for position in positions:
        if isinstance(position, bool) or not isinstance(position, Integral):
            raise TypeError(f"anchors: expected ints, got {_describe(position)}")
        if not 0 <= position < height * width:
            raise ValueError(f"anchors: expected indices from 0 to {height * width - 1}, got {position}")
    return tuple(int(position) for position in positions)


def resolve_weights(weights: Weights, grids: Sequence[Grid]) -> list[float]:
    """The share R_k of each layer, summing to 1; see :func:`aggregate`."""
    cells = [rows * columns for rows, columns in grids]
    if isinstance(weights, str):
        if weights not in WEIGHT_SCHEMES:
            raise ValueError(f"weights: expected one of {WEIGHT_SCHEMES} or a float a layer, got {weights!r}")
        shares = [math.sqrt(n) for n in cells]
        if weights == "proportional":
            layers = Counter(grids)
            shares = [share / layers[grid] for share, grid in zip(shares, grids, strict=True)]
        elif weights == "literal":
            shares = [share / n for share, n in zip(shares, cells, strict=True)]
    else:
        shares = _check_numbers("weights", weights, len(grids))
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"weights: expected no negative share and a positive sum, got {shares}")
    total = sum(shares)
    return [share / total for share in shares]


def _check_sequence(name: str, value: Any) -> None:
    if isinstance(value, (Tensor, str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list, one item a layer, got {_describe(value)}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one layer, got an empty list")


def _check_length(name: str, value: Sequence[Any], length: int) -> None:
    if len(value) != length:
        raise ValueError(f"{name}: expected {length} items, one a layer, got {len(value)}")


def _check_layers(name: str, layers: Any, dimensions: tuple[str, ...]) -> None:
    _check_sequence(name, layers)
    for index, layer in enumerate(layers):
        _check_tensor(f"{name}[{index}]", layer, dimensions)


def _check_tensor(name: str, tensor: Any, dimensions: tuple[str, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_describe(tensor)}")
    if tensor.ndim != len(dimensions):
        raise ValueError(f"{name}: expected [{', '.join(dimensions)}], got a tensor of shape {list(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected no empty dimension, got shape {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating-point values, got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but diffseg is inference only: detach it or use torch.no_grad()")


def _check_like(name: str, tensor: Tensor, first: Tensor) -> None:
    found, expected = (tensor.shape[0], tensor.dtype, tensor.device), (first.shape[0], first.dtype, first.device)
    if found != expected:
        raise ValueError(
            f"{name}: expected batch {expected[0]}, {expected[1]}, {expected[2]} as in the first layer, "
            f"got batch {found[0]}, {found[1]}, {found[2]}"
        )


def _check_grids(grids: Sequence[Grid] | None, cells: Sequence[int], name: str = "grids") -> list[Grid]:
    """One (h, w) a layer, each h * w = n, none taller or wider than the largest."""
    if grids is None:
        checked = [(math.isqrt(n), math.isqrt(n)) for n in cells]
    else:
        if not isinstance(grids, Sequence) or isinstance(grids, str):
            raise TypeError(f"{name}: expected a list of (height, width), got {_describe(grids)}")
        _check_length(name, grids, len(cells))
        checked = [_check_pair(name, grid) for grid in grids]
    for grid, n in zip(checked, cells, strict=True):
        if grid[0] * grid[1] != n:
            hint = f"; {n} is no square: pass {name}=" if grids is None else ""
            raise ValueError(f"{name}: expected height * width = {n}, got {grid[0]} x {grid[1]}{hint}")
    height, width = output_grid(checked)
    for grid in checked:
        if grid[0] > height or grid[1] > width:
            raise ValueError(f"{name}: expected every grid to fit in the largest, {height} x {width}, got {grid}")
    return checked


def _check_pair(name: str, pair: Any) -> Grid:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise TypeError(f"{name}: expected (height, width), got {_describe(pair)}")
    for side in pair:
        _check_integer(name, side, 1)
    return int(pair[0]), int(pair[1])


def _check_integer(name: str, value: Any, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {_describe(value)}")
    if value < smallest:
        raise ValueError(f"{name}: expected at least {smallest}, got {value}")


def _check_numbers(name: str, values: Any, length: int) -> list[float]:
    """Finite floats, ``length`` of them."""
    values = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name}: expected {length} numbers, got {_describe(values)}")
    _check_length(name, values, length)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected numbers, got {_describe(value)}")
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected finite numbers, got {value}")
    return [float(value) for value in values]


def _check_thresholds(threshold: Any, iterations: Any) -> list[float]:
    _check_integer("iterations", iterations, 1)
    given = [threshold] * int(iterations) if isinstance(threshold, Real) else threshold
    if hasattr(given, "__len__") and not isinstance(given, str) and len(given) != iterations:
        raise ValueError(f"threshold: expected one number, or {iterations}, one a round, got {len(given)}")
    thresholds = _check_numbers("threshold", given, int(iterations))
    if min(thresholds) <= 0:
        raise ValueError(f"threshold: expected positive numbers, got {threshold}")
    return thresholds


def _check_storage_dtype(name: str, dtype: Any) -> None:
    if dtype not in _STORAGE_DTYPES:
        reason = " (sharp maps underflow)" if dtype == torch.float16 else ""
        raise ValueError(f"{name}: expected torch.float32, torch.float64 or torch.bfloat16, got {dtype}{reason}")


def _check_attention(attention: Any) -> Tensor:
    _check_tensor("attention", attention, ("batch", "N", "N"))
    if attention.shape[1] != attention.shape[2]:
        raise ValueError(f"attention: expected the last two sizes to be equal, got {list(attention.shape)}")
    _check_storage_dtype("attention", attention.dtype)
    checked: Tensor = attention
    return checked


def _check_proposals(proposals: Any) -> None:
    if not isinstance(proposals, Proposals):
        raise TypeError(f"proposals: expected diffseg.Proposals, got {_describe(proposals)}")
    maps, counts, grid = proposals
    _check_tensor("proposals.maps", maps, ("batch", "P", "N"))
    height, width = _check_pair("proposals.grid", grid)
    if height * width != maps.shape[2]:
        raise ValueError(f"proposals.grid: expected height * width = {maps.shape[2]}, got {height} x {width}")
    if not isinstance(counts, Tensor) or counts.dtype != torch.int32 or counts.shape != maps.shape[:1]:
        raise ValueError(f"proposals.counts: expected an int32 tensor [{maps.shape[0]}], got {_describe(counts)}")
    if counts.device != maps.device:
        raise ValueError(f"proposals.counts: expected a tensor on {maps.device}, got {counts.device}")
    if counts.device.type == "cpu" and not bool(((counts >= 1) & (counts <= maps.shape[1])).all()):
        raise ValueError(f"proposals.counts: expected 1 to {maps.shape[1]}, got {counts.tolist()}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}"
    return f"{type(value).__name__} {value!r}"[:100]
