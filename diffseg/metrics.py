"""How well label maps agree with the truth.

Every figure follows from tables: of pixels by predicted and true label, one a truth. Negative true labels are
unlabelled pixels, which count nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer[Any]]
Table = NDArray[np.int64]


def confusion(predicted: Labels, truth: Labels) -> Table:
    """Pixels by predicted and true label, [labels predicted, labels true], for two label maps of one shape."""
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted: expected the truth's shape {truth.shape}, got {predicted.shape}")
    if predicted.min() < 0:
        raise ValueError(f"predicted: expected labels from 0, got {predicted.min()}")
    rows, columns = int(predicted.max()) + 1, max(int(truth.max()) + 1, 0)
    labelled = truth >= 0
    pairs = predicted[labelled].astype(np.int64) * columns + truth[labelled]
    return np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)


def matching(table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(predicted labels, true labels) of the one-to-one matching that agrees on most pixels (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table, maximize=True)
    return rows, columns


def matched_accuracy(predicted: Labels, truth: Labels) -> float:
    """Share of pixels that are right under :func:`matching`; pixels of labels left without a match are wrong."""
    return table_accuracy(confusion(predicted, truth))


def table_accuracy(table: Table) -> float:
    """:func:`matched_accuracy` of a table; NaN without a labelled pixel, as in the functions below."""
    return float(table[matching(table)].sum() / table.sum()) if table.any() else float("nan")


def table_iou(table: Table) -> float:
    """Mean intersection over union over the true labels under :func:`matching`; one left without a match has 0."""
    if not table.any():
        return float("nan")
    rows, columns = matching(table)
    intersections = table[rows, columns]
    unions = table.sum(1)[rows] + table.sum(0)[columns] - intersections
    shares = np.divide(intersections, unions, out=np.zeros(len(rows)), where=unions > 0)
    return float(shares.sum() / np.count_nonzero(table.sum(0)))


def covering(table: Table) -> float:
    """Segmentation covering of the truth by the prediction (Arbelaez et al., TPAMI 2011, equation 8).

    Each true region counts by its size and scores its largest intersection over union with a predicted one.
    """
    if not table.any():
        return float("nan")
    sizes = table.sum(0)
    unions = table.sum(1)[:, None] + sizes - table
    overlaps = np.divide(table, unions, out=np.zeros(table.shape), where=unions > 0)
    return float((sizes * overlaps.max(0)).sum() / sizes.sum())


def variation_of_information(table: Table) -> float:
    """H(predicted | true) + H(true | predicted), in bits (Meila 2005); 0 for equal partitions."""
    if not table.any():
        return float("nan")
    joint = table / table.sum()
    return max(0.0, 2 * _entropy(joint) - _entropy(joint.sum(0)) - _entropy(joint.sum(1)))


def rand_index(table: Table) -> float:
    """Share of the pairs of pixels that both maps join or both part (its mean over truths: the probabilistic one)."""
    pixels = int(table.sum())
    if pixels < 2:
        return float("nan")
    joined_by_both = _pairs(table)
    joined_by_one = _pairs(table.sum(0)) + _pairs(table.sum(1)) - 2 * joined_by_both
    return 1 - joined_by_one / (pixels * (pixels - 1) / 2)


def _entropy(probabilities: NDArray[np.float64]) -> float:
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log2(positive)).sum())


def _pairs(sizes: Table) -> float:
    return float((sizes * (sizes - 1)).sum() / 2)


def entries(table: Table) -> list[list[int]]:
    """The cells of a table that are not 0, [predicted label, true label, pixels] each: all it holds, fit for JSON."""
    return [[int(row), int(column), int(table[row, column])] for row, column in np.argwhere(table)]


def from_entries(entries: Sequence[Sequence[int]]) -> Table:
    """The table that :func:`entries` listed, without rows and columns of zeros at its end."""
    rows, columns, pixels = np.array(entries, np.int64).reshape(-1, 3).T
    table = np.zeros((rows.max(initial=-1) + 1, columns.max(initial=-1) + 1), np.int64)
    table[rows, columns] = pixels
    return table


class ClassCounts:
    """True and false positives and false negatives of each class, as the published code counts them.

    Each table added is matched on its own. Pixels of segments left without a class are false negatives of their true
    class. As there, a segment may be given a class that the image lacks: it then counts as false positives of that
    class, and which segment goes to which such class is up to the solver.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.true_positives = np.zeros(classes, np.int64)
        self.false_positives = np.zeros(classes, np.int64)
        self.false_negatives = np.zeros(classes, np.int64)

    def add(self, table: Table) -> None:
        """Matches one table [labels predicted, up to ``classes`` true labels] and counts it."""
        counts = _grown(table.T, (self.classes, max(self.classes, len(table))))
        classes, segments = matching(counts)
        matched = counts[classes, segments]
        self.true_positives += matched
        self.false_positives += counts.sum(0)[segments] - matched
        self.false_negatives += counts.sum(1) - matched

    @property
    def accuracy(self) -> float:
        labelled = int((self.true_positives + self.false_negatives).sum())
        return float(self.true_positives.sum() / labelled) if labelled else float("nan")

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class; NaN where it was neither there nor predicted."""
        unions = self.true_positives + self.false_positives + self.false_negatives
        return np.divide(self.true_positives, unions, out=np.full(self.classes, np.nan), where=unions > 0)

    @property
    def mean_iou(self) -> float:
        return _mean(self.iou)


class ClassScores:
    """Streaming figures of a data set whose labels are classes: matched image by image, and pooled.

    Pooled (the protocol of PiCIE and STEGO): the tables of all images are summed and matched once, so that a segment's
    number must mean the same in every image. DiffSeg's numbers do not; the figure is there to compare.
    """

    def __init__(self, classes: int) -> None:
        self._per_image = ClassCounts(classes)
        self._pooled = np.zeros((0, classes), np.int64)

    def add(self, tables: Sequence[Table]) -> None:
        """Counts one image, given its one table."""
        (table,) = tables
        self._per_image.add(table)
        self._pooled = _grown(self._pooled, (max(len(table), len(self._pooled)), self._per_image.classes))
        self._pooled[: table.shape[0], : table.shape[1]] += table

    def figures(self) -> dict[str, float]:
        pooled = ClassCounts(self._per_image.classes)
        pooled.add(self._pooled)
        return {
            "accuracy_per_image": self._per_image.accuracy,
            "miou_per_image": self._per_image.mean_iou,
            "accuracy_pooled": pooled.accuracy,
            "miou_pooled": pooled.mean_iou,
        }


class RegionScores:
    """Streaming figures of a data set whose labels are regions, with one or several truths an image.

    Covering sums over all regions of all truths, as the BSDS benchmark does; the others are means over the images of
    the mean over an image's truths. ``covering_best``, present if any image has several truths, is the mean over the
    images of the covering of the truth that agrees best. One labelled pixel has no Rand index, and counts in none.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(len(_REGION_MEASURES) + 1)
        self._images = np.zeros(len(_REGION_MEASURES) + 1, np.int64)
        self._covered = self._pixels = 0.0
        self._several = False

    def add(self, tables: Sequence[Table]) -> None:
        """Counts one image, given a table for each of its truths."""
        labelled = [table for table in tables if table.any()]
        if not labelled:
            return
        self._several |= len(labelled) > 1
        coverings = [covering(table) for table in labelled]
        self._covered += sum(share * float(table.sum()) for share, table in zip(coverings, labelled, strict=True))
        self._pixels += sum(float(table.sum()) for table in labelled)
        means = [_mean([measure(table) for table in labelled]) for measure in _REGION_MEASURES.values()]
        means.append(max(coverings))
        self._sums += np.nan_to_num(means)
        self._images += ~np.isnan(means)

    def figures(self) -> dict[str, float]:
        names = [*_REGION_MEASURES, "covering_best"]
        means = np.divide(self._sums, self._images, out=np.full(len(names), np.nan), where=self._images > 0)
        figures = dict(zip(names, means.tolist(), strict=True))
        figures["covering"] = self._covered / self._pixels if self._pixels else float("nan")
        return {name: figures[name] for name in _REGION_FIGURES if self._several or name != "covering_best"}


_REGION_MEASURES = {
    "accuracy": table_accuracy,
    "miou": table_iou,
    "variation_of_information": variation_of_information,
    "rand_index": rand_index,
}

_REGION_FIGURES = ("accuracy", "miou", "covering", "covering_best", "variation_of_information", "rand_index")

Scores = ClassScores | RegionScores


def _grown(table: Table, shape: tuple[int, int]) -> Table:
    """The table with rows and columns of zeros after its own."""
    return np.pad(table, [(0, new - old) for old, new in zip(table.shape, shape, strict=True)])


def _mean(values: Iterable[float]) -> float:
    """The mean of those values that are not NaN; NaN if there is none."""
    numbers = [value for value in values if not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else float("nan")
