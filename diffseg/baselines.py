"""k-means baselines (the paper's appendix 8.4), with scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

Labels = NDArray[np.integer[Any]]


def kmeans_attention(attention: NDArray[np.floating[Any]], clusters: int, *, seed: int = 0) -> Labels:
    """K-Means-C and K-Means-S: k-means++ on the rows of one image's A_f [N, N]; labels int32 [N].

    With ``clusters`` a constant this is the paper's K-Means-C, with the truth's number of segments its K-Means-S.
    """
    return _kmeans(attention, clusters, seed)


def kmeans_colour(image: NDArray[np.uint8], clusters: int, *, position: float = 0.5, seed: int = 0) -> Labels:
    """k-means++ on colour and position; labels int32 [H, W] of an RGB image [H, W, 3].

    Colours lie in [0, 1]; ``position`` is the weight of the coordinates, which lie in [0, 1] too.
    """
    height, width, _ = image.shape
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    features = np.dstack([image / 255, position * y, position * x]).reshape(-1, 5)
    return _kmeans(features, clusters, seed).reshape(height, width)


def _kmeans(points: NDArray[np.floating[Any]], clusters: int, seed: int) -> Labels:
    labels: Labels = KMeans(clusters, init="k-means++", n_init=1, random_state=seed).fit_predict(points)
    return labels
