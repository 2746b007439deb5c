"""The figures, by hand and against scikit-learn and scikit-image."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from skimage.metrics import variation_of_information as skimage_variation
from sklearn.metrics import confusion_matrix, rand_score

from diffseg import metrics


def maps(seed, predicted=9, true=6, shape=(40, 50), unlabelled=0.0):
    """Two random maps that have to do with each other."""
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, true, (shape[0] // 10, shape[1] // 10)), np.ones((10, 10), int))
    found = np.where(
        rng.random(shape) < 0.6, rng.integers(0, predicted, true)[truth], rng.integers(0, predicted, shape)
    )
    truth[rng.random(shape) < unlabelled] = -1
    return found, truth


def test_hand_computed():
    truth = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    predicted = np.array([[5, 5, 0, 0, 0, 0, 0, 3, 3, 0]])
    # 5 -> 0 (2 pixels), 0 -> 1 (4), 3 -> 2 (2)
    assert metrics.matched_accuracy(predicted, truth) == pytest.approx(0.8)
    assert metrics.table_iou(metrics.confusion(predicted, truth)) == pytest.approx((2 / 3 + 4 / 6 + 2 / 3) / 3)
    # the best overlap of each region: 2/3 of 3 pixels, 4/6 of 4, 2/3 of 3
    assert metrics.covering(metrics.confusion(predicted, truth)) == pytest.approx(
        (3 * 2 / 3 + 4 * 4 / 6 + 3 * 2 / 3) / 10
    )


def test_one_segment_gets_the_largest_region():
    truth = np.array([[0, 1, 1, 2]])
    assert metrics.matched_accuracy(np.zeros_like(truth), truth) == 0.5
    assert metrics.table_iou(metrics.confusion(np.zeros_like(truth), truth)) == pytest.approx(0.5 / 3)
    table = metrics.confusion(np.zeros_like(truth), truth)
    assert metrics.covering(table) == pytest.approx((0.25 + 2 * 0.5 + 0.25) / 4)
    assert metrics.variation_of_information(table) == pytest.approx(1.5)  # H(truth) = 1/4 * 2 + 1/2 * 1 + 1/4 * 2
    assert metrics.rand_index(table) == pytest.approx(1 / 6)


def test_a_permutation_is_perfect():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 7, (20, 30))
    predicted = rng.permutation(7)[truth]
    assert metrics.matched_accuracy(predicted, truth) == 1
    assert metrics.table_iou(metrics.confusion(predicted, truth)) == 1
    table = metrics.confusion(predicted, truth)
    assert (metrics.covering(table), metrics.rand_index(table)) == (1, 1)
    assert metrics.variation_of_information(table) == pytest.approx(0, abs=1e-12)
    rounded = np.array([[0, 0, 5], [0, 4, 0], [3, 0, 0]])  # its entropies come out a bit apart
    assert 0 <= metrics.variation_of_information(rounded) < 1e-12


def test_unlabelled_pixels_count_nowhere():
    predicted, truth = maps(3, unlabelled=0.3)
    kept = truth >= 0
    whole, part = metrics.confusion(predicted, truth), metrics.confusion(predicted[kept], truth[kept])
    assert np.array_equal(whole, part)
    assert whole.sum() == kept.sum() < truth.size
    nothing = np.full((4, 4), -1)
    assert metrics.confusion(np.zeros((4, 4), int), nothing).shape == (1, 0)
    assert np.isnan(metrics.matched_accuracy(np.zeros((4, 4), int), nothing))
    assert np.isnan(metrics.table_iou(metrics.confusion(np.zeros((4, 4), int), nothing)))


@pytest.mark.parametrize("seed", range(4))
def test_against_independent_libraries(seed):
    predicted, truth = maps(seed, predicted=3 + 3 * seed)
    table = metrics.confusion(predicted, truth)
    length = max(table.shape)
    expected = confusion_matrix(predicted.ravel(), truth.ravel(), labels=range(length))
    assert np.array_equal(table, expected[: table.shape[0], : table.shape[1]])
    assert metrics.variation_of_information(table) == pytest.approx(sum(skimage_variation(truth, predicted)), abs=1e-9)
    assert metrics.rand_index(table) == pytest.approx(rand_score(truth.ravel(), predicted.ravel()), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_covering_pixel_by_pixel(seed):
    predicted, truth = maps(seed)
    total = 0.0
    for region in np.unique(truth):
        inside = truth == region
        overlaps = [
            (inside & (predicted == other)).sum() / (inside | (predicted == other)).sum()
            for other in np.unique(predicted)
        ]
        total += inside.sum() * max(overlaps)
    assert metrics.covering(metrics.confusion(predicted, truth)) == pytest.approx(total / truth.size)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"predicted: expected the truth's shape \(2, 2\), got \(2, 3\)"):
        metrics.matched_accuracy(np.zeros((2, 3), int), np.zeros((2, 2), int))


def test_predictions_have_no_unlabelled_pixels():
    with pytest.raises(ValueError, match="predicted: expected labels from 0, got -1"):
        metrics.confusion(np.full((2, 2), -1), np.zeros((2, 2), int))


def test_entries_hold_the_whole_table():
    predicted, truth = maps(1, unlabelled=0.1)
    table = metrics.confusion(predicted, truth)
    assert np.array_equal(metrics.from_entries(metrics.entries(table)), table)
    assert metrics.from_entries([]).sum() == 0


def test_class_scores_by_hand():
    """Two images of three classes. The second has class 0 alone and two segments."""
    first = np.array([[4, 0, 0], [1, 3, 0]])  # segments 0, 1 by classes 0, 1, 2
    second = np.array([[6], [2]])
    scores = metrics.ClassScores(3)
    scores.add([first])
    scores.add([second])
    figures = scores.figures()
    # Image by image: class 0 takes 4 and 6 pixels, class 1 takes 3. Image 2's second segment is unmatched: its pixels
    # are false negatives of class 0, and false positives of class 1 or of class 2, which that image lacks.
    assert figures["accuracy_per_image"] == pytest.approx(13 / 16)
    to_class_1, to_class_2 = (10 / 13 + 3 / 6) / 2, (10 / 13 + 3 / 4 + 0) / 3
    assert min(abs(figures["miou_per_image"] - each) for each in (to_class_1, to_class_2)) < 1e-12
    # Pooled, the segments are [[10, 0, 0], [3, 3, 0]]: 0 -> 0 and 1 -> 1.
    assert figures["accuracy_pooled"] == pytest.approx(13 / 16)
    assert figures["miou_pooled"] == pytest.approx((10 / 13 + 3 / 6) / 2)


def test_pooled_needs_numbers_that_mean_the_same():
    scores = metrics.ClassScores(2)
    scores.add([np.array([[5, 0], [0, 5]])])
    scores.add([np.array([[0, 5], [5, 0]])])
    figures = scores.figures()
    assert (figures["accuracy_per_image"], figures["miou_per_image"]) == (1, 1)
    assert (figures["accuracy_pooled"], figures["miou_pooled"]) == (0.5, pytest.approx(1 / 3))


@pytest.mark.parametrize("classes", [6, 9])
@pytest.mark.parametrize("segments", [2, 6, 20])
def test_class_counts_as_published(classes, segments):
    """Against the protocol written over one-hot masks: true positives and so on, of each class, over the images."""
    counts = metrics.ClassCounts(classes)
    positives, false_positives, negatives = np.zeros((3, classes))
    for seed in range(3):
        predicted, truth = maps(seed, predicted=segments, unlabelled=0.1)
        counts.add(metrics.confusion(predicted, truth))
        labelled = truth >= 0
        columns = max(classes, predicted.max() + 1)
        overlap = np.array(
            [[(labelled & (truth == c) & (predicted == s)).sum() for s in range(columns)] for c in range(classes)]
        )
        _, given = linear_sum_assignment(-overlap)
        for c, s in enumerate(given):
            positives[c] += (labelled & (truth == c) & (predicted == s)).sum()
            false_positives[c] += (labelled & (truth != c) & (predicted == s)).sum()
            negatives[c] += (labelled & (truth == c) & (predicted != s)).sum()
    assert counts.accuracy == pytest.approx(positives.sum() / (positives + negatives).sum())
    with np.errstate(invalid="ignore"):
        assert counts.mean_iou == pytest.approx(np.nanmean(positives / (positives + false_positives + negatives)))


def test_region_scores_over_several_truths():
    predicted = np.array([[0, 0, 1, 1]])
    truths = [np.array([[1, 1, 2, 2]]), np.array([[1, 1, 1, 1]])]
    scores = metrics.RegionScores()
    scores.add([metrics.confusion(predicted, truth) for truth in truths])
    figures = scores.figures()
    assert figures == pytest.approx(
        {
            "accuracy": (1 + 0.5) / 2,
            "miou": (1 + 0.5) / 2,
            "covering": (1 + 0.5) / 2,
            "covering_best": 1,
            "variation_of_information": (0 + 1) / 2,
            "rand_index": (1 + 2 / 6) / 2,
        }
    )
    scores.add([metrics.confusion(np.array([[0, 0]]), np.array([[3, 3]]))])
    after = scores.figures()
    assert after["accuracy"] == pytest.approx((0.75 + 1) / 2)  # a mean over images
    assert after["covering"] == pytest.approx((4 * 1 + 4 * 0.5 + 2) / 10)  # over all regions of all truths
    scores.add([metrics.confusion(np.array([[0, 0]]), np.array([[-1, -1]]))])
    assert scores.figures() == after  # nothing labelled, nothing counted
    scores.add([metrics.confusion(np.array([[0, 0]]), np.array([[-1, 1]]))])
    assert scores.figures()["rand_index"] == after["rand_index"]  # one labelled pixel makes no pair
    assert scores.figures()["accuracy"] == pytest.approx((0.75 + 1 + 1) / 3)
    alone = metrics.RegionScores()
    alone.add([metrics.confusion(predicted, truth) for truth in (truths[0], np.full((1, 4), -1))])
    assert "covering_best" not in alone.figures()  # of a truth without labels there is nothing to be best of
    assert all(np.isnan(value) for value in metrics.RegionScores().figures().values())
