"""How well a label map agrees with the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Labels = NDArray[np.integer[Any]]


def confusion(predicted: Labels, truth: Labels) -> NDArray[np.int64]:
    """Pixels by predicted and true label, [labels predicted, labels true], for two label maps of one shape."""
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted: expected the truth's shape {truth.shape}, got {predicted.shape}")
    rows, columns = int(predicted.max()) + 1, int(truth.max()) + 1
    pairs = predicted.astype(np.int64).ravel() * columns + truth.ravel()
    return np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)


def matched_accuracy(predicted: Labels, truth: Labels) -> float:
    """Share of pixels that are right under the best one-to-one matching of labels (Hungarian method).

    Pixels of predicted labels left without a match count as wrong.
    """
    table = confusion(predicted, truth)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / truth.size)


def matched_iou(predicted: Labels, truth: Labels) -> float:
    """Mean intersection over union over the true labels, under the matching of :func:`matched_accuracy`.

    A true label left without a match counts as 0.
    """
    table = confusion(predicted, truth)
    rows, columns = linear_sum_assignment(table, maximize=True)
    intersections = table[rows, columns]
    unions = table.sum(1)[rows] + table.sum(0)[columns] - intersections
    return float((intersections / unions).sum() / np.count_nonzero(table.sum(0)))
