import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from diffseg import metrics


def test_hand_computed():
    truth = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    predicted = np.array([[5, 5, 0, 0, 0, 0, 0, 3, 3, 0]])
    # 5 -> 0 (2 pixels), 0 -> 1 (4), 3 -> 2 (2)
    assert metrics.matched_accuracy(predicted, truth) == pytest.approx(0.8)
    assert metrics.matched_iou(predicted, truth) == pytest.approx((2 / 3 + 4 / 6 + 2 / 3) / 3)


def test_one_segment_gets_the_largest_region():
    truth = np.array([[0, 1, 1, 2]])
    assert metrics.matched_accuracy(np.zeros_like(truth), truth) == 0.5
    assert metrics.matched_iou(np.zeros_like(truth), truth) == pytest.approx(0.5 / 3)


def test_a_permutation_is_perfect():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 7, (20, 30))
    predicted = rng.permutation(7)[truth]
    assert metrics.matched_accuracy(predicted, truth) == 1
    assert metrics.matched_iou(predicted, truth) == 1


def test_confusion_against_scikit_learn():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, (2, 500))
    assert np.array_equal(metrics.confusion(a, b), confusion_matrix(a, b, labels=range(6)))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"predicted: expected the truth's shape \(2, 2\), got \(2, 3\)"):
        metrics.matched_accuracy(np.zeros((2, 3), int), np.zeros((2, 2), int))
