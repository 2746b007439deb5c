"""The paper's equations and Algorithm 1 for one image, written out as they read: loops, lists and sets, in float64.

Nothing is shared with the package and nothing is fast: this is what the vectorised reference is checked against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Grid = tuple[int, int]


def softmax_maps(queries: Array, keys: Array, scale: float) -> Array:
    """[heads, n, d], [heads, n, d] -> [heads, n, n]."""
    heads, n, _ = queries.shape
    maps = np.zeros((heads, n, n))
    for head in range(heads):
        for i in range(n):
            scores = np.array([scale * float(queries[head, i] @ keys[head, j]) for j in range(n)])
            exponentials = np.exp(scores - scores.max())
            maps[head, i] = exponentials / exponentials.sum()
    return maps


def bilinear(image: Array, size: Grid) -> Array:
    """[h, w] -> [H, W] by four taps a pixel; the centre of pixel y is at (y + 1/2) h / H - 1/2, edges are repeated."""
    h, w = image.shape
    height, width = size
    result = np.zeros(size)
    for y in range(height):
        for x in range(width):
            row, column = (y + 0.5) * h / height - 0.5, (x + 0.5) * w / width - 0.5
            top, left = math.floor(row), math.floor(column)
            for i, down in ((top, 1 - (row - top)), (top + 1, row - top)):
                for j, across in ((left, 1 - (column - left)), (left + 1, column - left)):
                    result[y, x] += down * across * image[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
    return result


def layer_weights(scheme: str | Sequence[float], grids: Sequence[Grid]) -> list[float]:
    """R_k, summing to 1."""
    cells = max(h * w for h, w in grids)
    shares = []
    for k, (h, w) in enumerate(grids):
        side = math.sqrt(h * w)
        if scheme == "proportional":
            shares.append(side / sum(grid == (h, w) for grid in grids))
        elif scheme == "per_layer":
            shares.append(side)
        elif scheme == "literal":
            shares.append(side * cells / (h * w))
        else:
            shares.append(float(scheme[k]))
    return [share / sum(shares) for share in shares]


def aggregate(
    maps: Sequence[Array], grids: Sequence[Grid], scheme: str | Sequence[float], output: Grid | None = None
) -> Array:
    """Equations 1 to 3: [heads, n_k, n_k] of each layer -> A_f [N, N], each upsampled map normalised by itself."""
    h, w = output or max(grids, key=lambda grid: grid[0] * grid[1])
    result = np.zeros((h * w, h * w))
    for layer, (rows, columns), weight in zip(maps, grids, layer_weights(scheme, grids), strict=True):
        mean = sum(layer) / len(layer)
        upsampled = []
        for row in mean:
            image = bilinear(row.reshape(rows, columns), (h, w))
            upsampled.append((image / image.sum()).ravel())
        for i in range(h):
            for j in range(w):
                source = (i * rows // h) * columns + (j * columns // w)
                result[i * w + j] += weight * upsampled[source]
    return result


def aggregate_by_the_text(maps: Sequence[Array], grids: Sequence[Grid]) -> Array:
    """The paper's text taken literally: R_k proportional to the side, normalisation once, after the weighted sum."""
    h, w = max(grids, key=lambda grid: grid[0] * grid[1])
    result = np.zeros((h * w, h * w))
    for layer, (rows, columns), weight in zip(maps, grids, layer_weights("per_layer", grids), strict=True):
        upsampled = [bilinear(row.reshape(rows, columns), (h, w)).ravel() for row in layer.mean(0)]
        for i in range(h):
            for j in range(w):
                result[i * w + j] += weight * upsampled[(i * rows // h) * columns + (j * columns // w)]
    return result / result.sum(1, keepdims=True)


def anchors(grid: Grid, side: int) -> list[int]:
    """side x side cells, each the one at (or just above and left of) the middle of an equal share of the grid."""
    h, w = grid
    rows = [math.floor((i + 0.5) * h / side - 0.5) for i in range(side)]
    columns = [math.floor((j + 0.5) * w / side - 0.5) for j in range(side)]
    return [row * w + column for row in rows for column in columns]


def divergence(p: Array, q: Array) -> float:
    """Symmetric KL: (KL(p, q) + KL(q, p)) / 2, probabilities clamped to 1e-30."""
    p, q = np.maximum(p, 1e-30), np.maximum(q, 1e-30)
    return float(np.sum((p - q) * (np.log(p) - np.log(q))) / 2)


def merge(attention: Array, anchors: Sequence[int], thresholds: Sequence[float], rule: str) -> list[Array]:
    """Algorithm 1: the list of proposals."""
    maps = list(attention)
    proposals = []
    for anchor in anchors:
        near = [f for f in maps if divergence(maps[anchor], f) < thresholds[0]]
        proposals.append(sum(near) / len(near))
    for threshold in thresholds[1:]:
        proposals = merge_list(proposals, threshold, rule)
    return proposals


def merge_list(proposals: list[Array], threshold: float, rule: str) -> list[Array]:
    """One later round: each element not yet taken, in order, heads a group, which becomes one proposal."""
    near = [
        {j for j, other in enumerate(proposals) if divergence(proposal, other) < threshold} for proposal in proposals
    ]
    return [sum(proposals[j] for j in group) / len(group) for group in greedy_groups(near, rule).values()]


def greedy_groups(near: Sequence[set[int]], rule: str) -> dict[int, set[int]]:
    """head -> its group, given for each listed element those that it matches."""
    groups: dict[int, set[int]] = {}
    taken: set[int] = set()
    for head, matches in enumerate(near):
        if head in taken or head not in matches:
            continue
        groups[head] = matches - taken if rule == "paper" else set(matches)
        taken |= matches
    return groups


def label(proposals: Sequence[Array], grid: Grid, size: Grid) -> tuple[NDArray[np.int64], Array]:
    """The winner [H, W], ties to the lowest index, and the upsampled proposals [P, H, W]."""
    upsampled = np.stack([bilinear(proposal.reshape(grid), size) for proposal in proposals])
    winner = np.zeros(size, dtype=np.int64)
    for y in range(size[0]):
        for x in range(size[1]):
            values = upsampled[:, y, x].tolist()
            winner[y, x] = values.index(max(values))
    return winner, upsampled


def lloyd(points: Array, centres: Array, iterations: int) -> list[Array]:
    """k-means from ``centres``: at most ``iterations`` updates; an empty cluster keeps its centre, then is dropped."""
    centres = [centre.copy() for centre in centres]
    labels = [nearest(point, centres) for point in points]
    for _ in range(iterations):
        for cluster in range(len(centres)):
            members = [point for point, owner in zip(points, labels, strict=True) if owner == cluster]
            if members:
                centres[cluster] = sum(members) / len(members)
        previous, labels = labels, [nearest(point, centres) for point in points]
        if labels == previous:
            break
    clusters = [
        [point for point, owner in zip(points, labels, strict=True) if owner == cluster]
        for cluster in range(len(centres))
    ]
    return [sum(members) / len(members) for members in clusters if members]


def nearest(point: Array, centres: Sequence[Array]) -> int:
    distances = [float(np.sum((point - centre) ** 2)) for centre in centres]
    return distances.index(min(distances))
