"""The baselines: k-means on attention and on colour."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from diffseg import baselines, reference


def test_clusters_of_attention(attention):
    maps = attention((8, 12), regions=3, dtype=torch.float32)
    labels = baselines.kmeans_attention(maps, (8, 12), 3, (16, 24))
    assert labels.shape == (16, 24)
    assert labels.dtype == np.int32
    assert set(np.unique(labels)) == {0, 1, 2}
    rows = maps[0].numpy()
    cells = KMeans(3, init="k-means++", n_init=1, random_state=0).fit_predict(rows)
    means = torch.from_numpy(np.stack([rows[cells == cluster].mean(0) for cluster in range(3)]))[None]
    expected = reference.label(means, torch.tensor([3], dtype=torch.int32), (8, 12), (16, 24))
    assert np.array_equal(labels, expected[0].numpy())


def test_a_seed_gives_the_same_labels_again(attention):
    maps = attention((8, 8), regions=5, dtype=torch.float32)
    first, again, other = (baselines.kmeans_attention(maps, (8, 8), 6, (32, 32), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_fewer_different_rows_than_clusters():
    maps = torch.eye(16)[[0] * 8 + [15] * 8][None]
    labels = baselines.kmeans_attention(maps, (4, 4), 5, (8, 8))
    assert set(np.unique(labels)) == {0, 1}
    assert baselines.kmeans_attention(torch.eye(4)[None], (2, 2), 9, (4, 4)).max() <= 3


def test_clusters_of_colour():
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, 15:] = (200, 40, 40)
    labels = baselines.kmeans_colour(image, 2)
    assert labels.shape == (20, 30)
    assert len(np.unique(labels[:, :15])) == len(np.unique(labels[:, 15:])) == 1
    assert labels[0, 0] != labels[0, -1]
    grey = baselines.kmeans_colour(np.full((20, 40, 3), 128, np.uint8), 2)
    assert np.array_equal(grey == grey[0, 0], np.arange(40)[None].repeat(20, 0) < 20)  # position alone


@pytest.mark.parametrize(("step", "by_colour"), [(51, True), (26, False)])
def test_coordinates_weigh_half_as_much_as_colour(step, by_colour):
    """Halves lie 1/4 apart in position; stripes, in three channels, 0.35 or 0.18."""
    image = np.zeros((1, 4, 3), np.uint8)
    image[0, 1::2] = step
    labels = baselines.kmeans_colour(image, 2)[0]
    assert np.array_equal(labels == labels[0], [True, False, True, False] if by_colour else [True, True, False, False])
