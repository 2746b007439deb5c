"""What DiffSeg is compared with: the paper's k-means on attention (appendix 8.4) and k-means on colour.

k-means is scikit-learn's, with k-means++ and one start; a seed gives the same labels again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .metrics import Labels
from .ops import Proposals, numbered_labels
from .reference import Grid

SEED = 0


def kmeans_attention(attention: Tensor, grid: Grid, clusters: int, size: Grid, *, seed: int = SEED) -> Labels:
    """K-Means-C and K-Means-S: k-means on the rows of A_f; the clusters' means become labels as proposals do.

    With ``clusters`` a constant this is the paper's K-Means-C, with the truth's number of segments its K-Means-S.

    Args:
        attention: A_f [1, N, N] of one image, on any device.
        grid: (h, w), h * w = N.
        clusters: at least 1; on fewer cells, that many.
        size: (H, W) of the labels.

    Returns:
        int32 [H, W], labels 0..S-1 without gaps, S <= ``clusters``.
    """
    rows = attention[0].float()
    found, cells = np.unique(_kmeans(rows.cpu().numpy(), clusters, seed), return_inverse=True)
    members = torch.from_numpy(cells).to(rows.device)
    means = torch.stack([rows[members == cluster].mean(0) for cluster in range(len(found))])
    counts = torch.tensor([len(found)], dtype=torch.int32, device=rows.device)
    labels: Labels = numbered_labels(Proposals(means[None], counts, grid), size)[0][0].cpu().numpy()
    return labels


def kmeans_colour(image: NDArray[np.uint8], clusters: int, *, seed: int = SEED) -> Labels:
    """k-means on colour and position; labels int32 [H, W] of an RGB image [H, W, 3].

    Colours and coordinates lie in [0, 1]; coordinates weigh half as much.
    """
    height, width, _ = image.shape
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    features = np.dstack([image / 255, y / 2, x / 2]).reshape(-1, 5)
    return _kmeans(features, clusters, seed).reshape(height, width)


def _kmeans(points: NDArray[np.floating[Any]], clusters: int, seed: int) -> Labels:
    from sklearn.cluster import KMeans

    clusters = min(clusters, len(points))
    labels: Labels = KMeans(clusters, init="k-means++", n_init=1, random_state=seed).fit_predict(points)
    return labels
