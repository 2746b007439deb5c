"""The public ops: each checks its input once and calls the operator, which runs on the backend asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backends import check_name
from .checks import (
    check_alike,
    check_attention,
    check_bool,
    check_grids,
    check_integer,
    check_layers,
    check_length,
    check_numbers,
    check_out,
    check_output_grid,
    check_pair,
    check_rule,
    check_sequence,
    check_storage_dtype,
    check_tensor,
    check_thresholds,
    check_weight_scheme,
    describe,
    plain,
)
from .library import ops as operators
from .memory import in_parts, of_images
from .reference import Grid, evenly_spaced

Rule = Literal["paper", "official"]
Weights = str | Sequence[float]

_MOST_REFINEMENTS = 300  # iterations of k-means


class _Layers(NamedTuple):
    """What the operators take of the layers of a UNet."""

    queries: list[Tensor]
    keys: list[Tensor]
    grids: list[int]  # flat
    scales: list[float]
    logsumexps: list[Tensor] | None
    ratios: list[float]
    grid: Grid  # of A_f

    def of(self, images: slice | None) -> _Layers:
        """Those of some images of the batch; None: of all."""
        logsumexps = self.logsumexps and of_images(self.logsumexps, images)
        queries, keys = of_images(self.queries, images), of_images(self.keys, images)
        return _Layers(queries, keys, self.grids, self.scales, logsumexps, self.ratios, self.grid)


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
    out: Tensor | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """Aggregates the self-attention of all layers into one map a cell (the paper's equations 1 to 3).

    ``A_f[(I, J)] = sum_k R_k normalise(upsample(mean_heads softmax(Q_k K_k^T scale_k)))[(I h_k // h, J w_k // w)]``,
    where (h, w) is the output grid. Rows sum to 1.

    Args:
        queries, keys: one tensor a layer, [B, heads, n, d]; float16, bfloat16, float32 or float64.
        grids: (h_k, w_k) of each layer, h_k * w_k = n; None: square.
        scales: factor of Q K^T of each layer; None: d ** -0.5.
        logsumexps: log-sum-exp of each row of the scaled scores, [B, heads, n]; None: computed.
        weights: ``"proportional"`` (layers of one grid share equally, grids weigh as sqrt(n); the published code),
            ``"per_layer"`` (sqrt(n) over all layers), ``"literal"`` (the paper's text: per_layer times N / n), or a
            float a layer; renormalised to sum 1. A layer of weight 0 is not read.
        dtype: in which A_f is stored: float32, float64 or bfloat16. bfloat16 halves A_f and gives up the exactness of
            D; in three held-out scenes of the bundled model it changes less than 0.1 % of the labels.
        backend: ``"auto"`` or one of :func:`available_backends`.
        out: where A_f is stored, a contiguous [B, N, N] of ``dtype`` apart from the input; None: new memory, which a
            CPU must first be given, 64 MiB of it on a grid of 64 x 64. After an error it holds anything.
        grid: (h, w), at least as high and as wide as every layer's; None: the largest of ``grids``.

    Returns:
        A_f [B, N, N], N = h * w; ``out`` if it was given.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; ValueError on a CPU if the
            attention of a layer is not finite, naming the layer.
    """
    check_storage_dtype("dtype", dtype)
    layers = _checked_layers(queries, keys, grids, scales, logsumexps, weights, grid)
    check_name(backend)
    if out is not None:
        check_out(out, len(queries[0]), layers.grid, dtype, queries[0].device)
    return _aggregated(layers, dtype, backend, out)


def aggregate_maps(
    maps: Sequence[Tensor],
    *,
    grids: Sequence[Grid] | None = None,
    weights: Weights = "proportional",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    out: Tensor | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """:func:`aggregate` from attention maps that exist already: the same sum without the softmax.

    Args:
        maps: one tensor a layer, [B, heads, n, n] or [B, n, n] (averaged over heads); rows need not sum to 1.
        grids, weights, dtype, backend, out, grid: as in :func:`aggregate`.

    Returns:
        A_f [B, N, N].
    """
    check_sequence("maps", maps)
    layers = [layer.unsqueeze(1) if isinstance(layer, Tensor) and layer.ndim == 3 else layer for layer in maps]
    check_layers("maps", layers, dimensions=("batch", "heads", "n", "n"))
    for index, layer in enumerate(layers):
        if layer.shape[2] != layer.shape[3]:
            raise ValueError(f"maps[{index}]: expected the last two sizes to be equal, got {list(layer.shape)}")
        check_alike(f"maps[{index}]", layer, layers[0])
    grids = check_grids(grids, [layer.shape[2] for layer in layers])
    check_storage_dtype("dtype", dtype)
    ratios = resolve_weights(weights, grids)
    grid = check_output_grid(grid, grids)
    check_name(backend)
    if out is None:
        return operators.aggregate_maps(layers, _flat(grids), ratios, grid, dtype, backend)
    check_out(out, len(layers[0]), grid, dtype, layers[0].device)
    operators.aggregate_maps_into(layers, _flat(grids), ratios, grid, out, backend)
    return out


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

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; ValueError on a CPU if the
            attention is not finite.
    """
    attention = check_attention(attention)
    cells = attention.shape[1]
    grid = check_grids(None if grid is None else [grid], [cells], name="grid")[0]
    positions = anchor_indices(grid, anchors)
    thresholds = check_thresholds(threshold, iterations)
    check_rule(rule)
    check_name(backend)
    maps, counts = operators.merge(attention, grid, positions, thresholds, rule, backend)
    return Proposals(maps, counts, grid)


def refine(attention: Tensor, proposals: Proposals, *, max_iterations: int = _MOST_REFINEMENTS) -> Proposals:
    """k-means refinement, as in the published demo: Lloyd's iterations on rows of A_f from the proposals as centres.

    Runs until labels are stable or ``max_iterations`` are done; a cluster that ends empty is dropped. This op waits for
    the device and cannot be recorded in a graph; it is plain torch on every device.

    Args:
        attention: A_f [B, N, N] from which the proposals were merged.
        proposals: the centres.
        max_iterations: at least 1.

    Returns:
        :class:`Proposals` whose maps are the cluster means.

    Raises:
        ValueError, TypeError: on bad input; ValueError on a CPU if the attention is not finite.
    """
    attention = check_attention(attention)
    _check_proposals(proposals)
    if proposals.maps.shape[0] != attention.shape[0] or proposals.maps.shape[2] != attention.shape[2]:
        raise ValueError(
            f"proposals: expected maps [{attention.shape[0]}, P, {attention.shape[2]}], "
            f"got {list(proposals.maps.shape)}"
        )
    if proposals.maps.device != attention.device:
        raise ValueError(f"proposals: expected maps on {attention.device}, got {proposals.maps.device}")
    check_integer("max_iterations", max_iterations, 1)
    maps, counts = operators.refine(attention, proposals.maps, proposals.counts, max_iterations)
    return Proposals(maps, counts, proposals.grid)


def label(proposals: Proposals, size: Grid, *, backend: str = "auto") -> Tensor:
    """The winning proposal of each pixel: bilinear upsample to ``size``, argmax (the paper's non-maximum suppression).

    Args:
        proposals: from :func:`merge` or :func:`refine`.
        size: (H, W) in pixels.

    Returns:
        int32 [B, H, W], indices of proposals; ties go to the lowest.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_proposals(proposals)
    size = check_pair("size", size)
    check_name(backend)
    return operators.label(proposals.maps, proposals.counts, proposals.grid, size, backend)


def aggregate_cross(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    tokens: Sequence[Sequence[int]] | Tensor,
    grids: Sequence[Grid] | None = None,
    scales: Sequence[float] | None = None,
    size: Grid | None = None,
    backend: str = "auto",
) -> Tensor:
    """Aggregates the cross-attention of all layers into one map a word (the paper's equations 7 to 10).

    ``A_c[word] = sum_k upsample(mean_heads softmax(Q_k K_k^T scale_k) shares[word])``, the softmax over all tokens of
    the text, then divided by its L2 norm over the pixels, as in the published code: words differ by where the
    image attends to them, not by how much. Each layer counts once; the published demo averages those of a grid first.

    Args:
        queries: of the image, one tensor a layer, [B, heads, n, d]; float16, bfloat16, float32 or float64.
        keys: of the text, [B, heads, tokens, d] each.
        tokens: for each word the indices of its tokens, whose attention is averaged, the same for all images; or the
            share of each token in each word, a tensor [B or 1, words, tokens] (a row of zeros: an empty map). Indices
            are copied to the device, for which the host waits; a tensor lets the op be recorded in a graph.
        grids: (h_k, w_k) of each layer, h_k * w_k = n; None: square.
        scales: factor of Q K^T of each layer; None: d ** -0.5.
        size: (H, W) to which the layers are upsampled bilinearly; None: the largest grid.
        backend: ``"auto"`` or one of :func:`available_backends`.

    Returns:
        Maps [B, words, H, W], float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_layers("queries", queries, dimensions=("batch", "heads", "n", "d"))
    check_layers("keys", keys, dimensions=("batch", "heads", "tokens", "d"))
    check_length("keys", keys, len(queries))
    length = keys[0].shape[2]
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        expected = [query.shape[0], query.shape[1], length, query.shape[3]]
        if list(key.shape) != expected:
            raise ValueError(f"keys[{layer}]: expected {expected}, got {list(key.shape)}")
        check_alike(f"queries[{layer}]", query, queries[0])
        check_alike(f"keys[{layer}]", key, queries[0])
    grids = check_grids(grids, [query.shape[2] for query in queries])
    scales = _check_scales(scales, queries)
    shares = _checked_shares(tokens, len(queries[0]), length, queries[0].device)
    size = check_output_grid(None, grids) if size is None else check_pair("size", size)
    check_name(backend)
    return operators.aggregate_cross(list(queries), list(keys), _flat(grids), scales, shares, size, backend)


def score_masks(maps: Tensor, labels: Tensor, *, masks: int | None = None, backend: str = "auto") -> Tensor:
    """How well each word fits each mask: the mean of its map over the mask's pixels (the paper's equation 11).

    Args:
        maps: [B, words, h, w] from :func:`aggregate_cross`, float32 or float64; upsampled bilinearly to the labels.
        labels: int32 [B, H, W], masks 0..S-1, as from :func:`segment`; pixels beyond belong to no mask.
        masks: S; None: the largest label + 1, for which the host waits for the device.
        backend: ``"auto"`` or one of :func:`available_backends`.

    Returns:
        [B, S, words] in the dtype of the maps; a mask without pixels scores 0. The argmax over words is its label.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("maps", maps, ("batch", "words", "h", "w"))
    if maps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"maps: expected torch.float32 or torch.float64, got {maps.dtype}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int32 or labels.ndim != 3 or 0 in labels.shape:
        raise ValueError(f"labels: expected an int32 tensor [batch, H, W], got {describe(labels)}")
    if len(labels) != len(maps) or labels.device != maps.device:
        raise ValueError(
            f"labels: expected batch {len(maps)} on {maps.device}, as in maps, "
            f"got batch {len(labels)} on {labels.device}"
        )
    if masks is None:
        masks = int(labels.max()) + 1
        if masks < 1:
            raise ValueError("labels: expected at least one mask, got negative labels only")
    check_integer("masks", masks, 1)
    check_name(backend)
    return operators.score_masks(maps, labels, masks, backend)


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
    grid: Grid | None = None,
) -> Tensor:
    """Segments from queries and keys: :func:`aggregate`, :func:`merge` and :func:`label`, numbered without gaps.

    Arguments as in those ops; ``refine=True`` adds :func:`refine` before the labels. On a CPU the memory of A_f is kept
    for the next call, at most 256 MiB of it, and batches that need more are segmented in parts.

    Returns:
        int32 [B, H, W], labels 0..S-1 without gaps.

    Raises:
        ValueError, TypeError: as those ops.
    """
    size = check_pair("size", size)
    thresholds = check_thresholds(threshold, iterations)
    check_rule(rule)
    check_bool("refine", refine)
    layers = _checked_layers(queries, keys, grids, scales, logsumexps, weights, grid)
    positions = anchor_indices(layers.grid, anchors)
    check_name(backend)

    def proposed(images: slice | None, out: Tensor | None) -> tuple[Tensor, Tensor]:
        attention = _aggregated(layers.of(images), torch.float32, backend, out)
        found: tuple[Tensor, Tensor] = operators.merge(attention, layers.grid, positions, thresholds, rule, backend)
        return operators.refine(attention, *found, _MOST_REFINEMENTS) if refine else found

    maps, counts = in_parts(proposed, queries[0], layers.grid)
    return numbered_labels(Proposals(maps, counts, layers.grid), size, backend=backend)[0]


def numbered_labels(proposals: Proposals, size: Grid, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """:func:`label`, numbered 0..S-1 in order of index, without gaps: int32 [B, H, W], and S, int32 [B]."""
    labels = label(proposals, size, backend=backend)
    return labels, operators.renumber(labels, proposals.maps.shape[1], backend)


def output_grid(grids: Sequence[Grid]) -> Grid:
    """The grid of A_f unless another is asked for: the largest of the layers' grids."""
    return max(grids, key=math.prod)


def anchor_indices(grid: Grid, anchors: int | Sequence[int]) -> tuple[int, ...]:
    """Flat indices of M x M evenly spaced cells, or those given."""
    given: Any = plain(anchors)
    if isinstance(given, Integral) and not isinstance(given, bool):
        side = int(given)
        if not 1 <= side <= min(grid):
            raise ValueError(f"anchors: expected 1 to {min(grid)} anchors a side on a grid of {grid}, got {side}")
        return evenly_spaced(grid, side)
    if isinstance(given, (str, bytes, bool)) or not hasattr(given, "__iter__"):
        raise TypeError(f"anchors: expected an int or a sequence of flat indices, got {describe(anchors)}")
    positions = list(given)
    if not positions:
        raise ValueError("anchors: expected at least one index, got none")
    if {*map(type, positions)} != {int}:  # else they need not be looked at one by one, which a GPU would wait for
        for position in positions:
            if isinstance(position, bool) or not isinstance(position, Integral):
                raise TypeError(f"anchors: expected ints, got {describe(position)}")
        positions = [int(position) for position in positions]
    for position in (min(positions), max(positions)):
        if not 0 <= position < math.prod(grid):
            raise ValueError(f"anchors: expected indices from 0 to {math.prod(grid) - 1}, got {position}")
    return tuple(positions)


def resolve_weights(weights: Weights, grids: Sequence[Grid]) -> list[float]:
    """The share R_k of each layer, summing to 1; see :func:`aggregate`."""
    cells = [rows * columns for rows, columns in grids]
    check_weight_scheme(weights)
    if isinstance(weights, str):
        shares = [math.sqrt(n) for n in cells]
        if weights == "proportional":
            alike: dict[Grid, int] = {}  # not a Counter, which torch 2.6 cannot trace
            for each in grids:
                alike[each] = alike.get(each, 0) + 1
            shares = [share / alike[each] for share, each in zip(shares, grids, strict=True)]
        elif weights == "literal":
            shares = [share / n for share, n in zip(shares, cells, strict=True)]
    else:
        shares = check_numbers("weights", weights, len(grids))
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"weights: expected no negative share and a positive sum, got {shares}")
    largest = max(shares)  # by which the sum stays finite
    total = sum(share / largest for share in shares)
    return [share / largest / total for share in shares]


def _checked_layers(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    grids: Sequence[Grid] | None,
    scales: Sequence[float] | None,
    logsumexps: Sequence[Tensor] | None,
    weights: Weights,
    grid: Grid | None,
) -> _Layers:
    """The arguments of :func:`aggregate`, checked."""
    check_layers("queries", queries, dimensions=("batch", "heads", "n", "d"))
    check_layers("keys", keys, dimensions=("batch", "heads", "n", "d"))
    check_length("keys", keys, len(queries))
    first = queries[0]
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        if key.shape != query.shape:
            raise ValueError(
                f"keys[{layer}]: expected the shape of queries[{layer}], {list(query.shape)}, got {list(key.shape)}"
            )
        check_alike(f"queries[{layer}]", query, first)
        check_alike(f"keys[{layer}]", key, first)
    grids = check_grids(grids, [query.shape[2] for query in queries])
    scales = _check_scales(scales, queries)
    if logsumexps is not None:
        check_layers("logsumexps", logsumexps, dimensions=("batch", "heads", "n"))
        check_length("logsumexps", logsumexps, len(queries))
        for layer, (logsumexp, query) in enumerate(zip(logsumexps, queries, strict=True)):
            if logsumexp.shape != query.shape[:3] or logsumexp.device != query.device:
                raise ValueError(
                    f"logsumexps[{layer}]: expected {list(query.shape[:3])} on {query.device}, "
                    f"got {list(logsumexp.shape)} on {logsumexp.device}"
                )
    ratios = resolve_weights(weights, grids)
    grid = check_output_grid(grid, grids)
    logsumexps = None if logsumexps is None else list(logsumexps)
    return _Layers(list(queries), list(keys), _flat(grids), scales, logsumexps, ratios, grid)


def _aggregated(layers: _Layers, dtype: torch.dtype, backend: str, out: Tensor | None) -> Tensor:
    if out is None:
        attention: Tensor = operators.aggregate(*layers, dtype, backend)
        return attention
    operators.aggregate_into(*layers, out, backend)
    return out


def _checked_shares(tokens: Any, batch_size: int, length: int, device: torch.device) -> Tensor:
    """``tokens`` of :func:`aggregate_cross`, checked, as shares: float32 [B, words, tokens]."""
    if isinstance(tokens, Tensor):
        check_tensor("tokens", tokens, ("batch", "words", "tokens"))
        if tokens.shape[0] not in (1, batch_size) or tokens.shape[2] != length:
            raise ValueError(f"tokens: expected [{batch_size}, words, {length}], as in keys, got {list(tokens.shape)}")
        if tokens.device != device:
            raise ValueError(f"tokens: expected a tensor on {device}, got {tokens.device}")
        return tokens.float().expand(batch_size, -1, -1)
    check_sequence("tokens", tokens, "word")
    for word, indices in enumerate(tokens):
        check_sequence(f"tokens[{word}]", indices, "token")
        for index in indices:
            check_integer(f"tokens[{word}]", index, 0)
            if index >= length:
                raise ValueError(f"tokens[{word}]: expected indices from 0 to {length - 1}, got {index}")
    return token_shares(tokens, length).to(device).expand(batch_size, -1, -1)


def token_shares(words: Collection[Sequence[int]], length: int) -> Tensor:
    """The share of each of ``length`` tokens in each word, float32 [words, tokens], on the host."""
    shares = torch.zeros(len(words), length, dtype=torch.float32, device="cpu")
    for word, indices in enumerate(words):
        for index in indices:
            shares[word, int(index)] += 1 / len(indices)
    return shares


def _check_scales(scales: Sequence[float] | None, queries: Sequence[Tensor]) -> list[float]:
    if scales is None:
        return [query.shape[3] ** -0.5 for query in queries]
    checked = check_numbers("scales", scales, len(queries))
    if max(abs(scale) for scale in checked) > torch.finfo(torch.float32).max:
        raise ValueError(f"scales: expected numbers within float32's range, got {scales}")
    return checked


def _flat(grids: Sequence[Grid]) -> list[int]:
    return [side for grid in grids for side in grid]


def _check_proposals(proposals: Any) -> None:
    if not isinstance(proposals, Proposals):
        raise TypeError(f"proposals: expected diffseg.Proposals, got {describe(proposals)}")
    maps, counts, grid = proposals
    check_tensor("proposals.maps", maps, ("batch", "P", "N"))
    if maps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"proposals.maps: expected torch.float32 or torch.float64, got {maps.dtype}")
    height, width = check_pair("proposals.grid", grid)
    if height * width != maps.shape[2]:
        raise ValueError(f"proposals.grid: expected height * width = {maps.shape[2]}, got {height} x {width}")
    if not isinstance(counts, Tensor) or counts.dtype != torch.int32 or counts.shape != maps.shape[:1]:
        raise ValueError(f"proposals.counts: expected an int32 tensor [{maps.shape[0]}], got {describe(counts)}")
    if counts.device != maps.device:
        raise ValueError(f"proposals.counts: expected a tensor on {maps.device}, got {counts.device}")
