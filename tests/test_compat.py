"""The drop-in for the published class: its results on golden data (see data/README.md), the rest computed by hand."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from contract import SIDES, golden
from numpy.typing import NDArray
from torch import Tensor

from diffseg import memory
from diffseg.compat import DiffSeg
from diffseg.metrics import matched_accuracy

Array = NDArray[Any]


@cache
def golden_maps(case: int) -> list[Array]:
    """softmax(Q K^T / sqrt(16)) of each layer, float32 [heads, n, n]."""
    pairs = [[torch.from_numpy(golden(case)[f"{name}{side}"]).float() for name in "qk"] for side in SIDES]
    return [(query @ key.mT / 4).softmax(-1).numpy() for query, key in pairs]


@cache
def quadrant_maps() -> Array:
    """[1, 4096, 4096]: each cell of a 64 x 64 grid attends to its own quadrant and to nothing else."""
    row, column = np.divmod(np.arange(4096), 64)
    quadrant = row // 32 * 2 + column // 32
    return (quadrant[:, None] == quadrant).astype(np.float32)[None] / 1024


def quadrant_layers() -> list[Array]:
    """A batch of one for ``segment`` with ``weight_ratio=[1, 0, 0, 0]``."""
    return [quadrant_maps()[None], *(np.ones((1, 1, side**2, side**2), np.float32) for side in SIDES[1:])]


def halves(share: float) -> Array:
    """A map with this share of its mass in the left half: D(p, q) = (p - q)(logit p - logit q) / 2 of the shares."""
    return np.repeat([[share, 1 - share]], 32, axis=1).repeat(64, axis=0) / 2048


def ramp(size: int) -> Array:
    """How far each of ``size`` pixels has gone from the first to the second of two cells, in bilinear interpolation."""
    return np.clip((np.arange(size) + 0.5) / size * 2 - 0.5, 0, 1)


# The constructor and the sampling grid


@pytest.mark.parametrize(
    ("points", "line"),
    [
        (1, [31]),
        (2, [0, 63]),
        (3, [0, 31, 62]),
        (7, [1, 11, 21, 31, 41, 51, 61]),
        (16, list(range(1, 62, 4))),
        (24, list(range(8, 55, 2))),
        (40, list(range(12, 52))),
        (64, list(range(64))),
    ],
)
def test_sampling_grid(points: int, line: list[int]) -> None:
    grid = DiffSeg([0.5] * 3, False, points).grid
    assert grid.dtype == np.int64
    assert grid.tolist() == [[row, column] for row in line for column in line]


def test_constructor_keeps_the_published_attributes() -> None:
    segmentor = DiffSeg([0.9, 0.8], True, num_points=4)
    assert isinstance(segmentor.kl_threshold, np.ndarray)
    assert segmentor.kl_threshold.tolist() == [0.9, 0.8]
    assert segmentor.refine is True
    assert DiffSeg(0.9, False, 4).kl_threshold.tolist() == [0.9] * 3
    assert not hasattr(segmentor, "upsampled")


# Aggregation


def test_weight_ratio() -> None:
    ratio = DiffSeg(1.0, False, 4).get_weight_rato([np.empty((8, side**2, 77)) for side in SIDES])
    assert ratio.dtype == np.float64
    np.testing.assert_allclose(ratio, np.array(SIDES) / 120, rtol=1e-15)


def test_aggregate_weights_on_golden_data() -> None:
    attention = DiffSeg(1.0, False, 4).aggregate_weights(golden_maps(3))
    assert attention.shape == (64, 64, 64, 64)
    assert attention.dtype == np.float64
    probe = golden(3)["row_probe"].astype(np.float64)
    rows = attention.reshape(4096, 4096)[257 * np.arange(len(probe))]
    assert np.abs(rows - probe).max() < 1e-6 * probe.max()


def test_aggregate_weights_normalises_maps_but_not_ratios() -> None:
    layers = [5 * np.eye(4096, dtype=np.float32)[None], np.full((2, 1, 1), 3, np.float32)]
    attention = DiffSeg(1.0, False, 4).aggregate_weights(layers, [3, 1])
    rows = np.array([0, 77, 4095])
    expected = 3 * (rows[:, None] == np.arange(4096)) + 1 / 4096
    np.testing.assert_allclose(attention.reshape(4096, 4096)[rows], expected, rtol=1e-5)


def test_aggregate_weights_without_a_layer_of_64() -> None:
    maps = np.stack([np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[0, 1, 2, 2]]])
    attention = DiffSeg(1.0, False, 4).aggregate_weights([maps])
    second = ramp(64)
    corners = [np.outer(down, across) / 1024 for down in (1 - second, second) for across in (1 - second, second)]
    np.testing.assert_allclose(attention[31, 31], corners[0], atol=1e-9)
    np.testing.assert_allclose(attention[31, 32], corners[1], atol=1e-9)
    np.testing.assert_allclose(attention[32, 32], (corners[2] + corners[3]) / 2, atol=1e-9)


def test_aggregate_x_weights() -> None:
    tokens = np.array([[8, 1, 1], [1, 1, 2], [1, 1, 2], [1, 1, 2]], np.float32)
    layers = [np.stack([tokens, tokens]), np.array([[[0, 0, 4]], [[2, 2, 0]]], np.float32)]
    aggregated = DiffSeg(1.0, False, 4).aggregate_x_weights(layers, [1, 2])
    assert aggregated.shape == (1, 512, 512, 3)
    assert aggregated.dtype == np.float64
    first = np.outer(1 - ramp(512), 1 - ramp(512))[..., None]
    upsampled = first * tokens[0] + (1 - first) * tokens[1]
    expected = upsampled / upsampled.sum(-1, keepdims=True) + 2 * np.array([0.25, 0.25, 0.5])
    np.testing.assert_allclose(aggregated[0], expected, atol=1e-6)


def test_aggregate_x_weights_shares_by_side() -> None:
    layers = [np.zeros((1, side**2, 2), np.float32) for side in (2, 1)]
    layers[0][..., 0] = layers[1][..., 1] = 1
    aggregated = DiffSeg(1.0, False, 4).aggregate_x_weights(layers)
    np.testing.assert_allclose(aggregated, np.broadcast_to([2 / 3, 1 / 3], aggregated.shape), atol=1e-6)


# Divergence and merging


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_kl_by_hand(dtype: type) -> None:
    x = np.array([[0.5, 0.5], [1.0, 0.0]], dtype).reshape(2, 1, 1, 2)
    y = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]], dtype).reshape(3, 1, 2)
    found = DiffSeg(1.0, False, 4).KL(x, y)
    log_zero = np.log(1e-30)
    to_corner = (0.5 * np.log(2) + 0.5 * (np.log(0.5) - log_zero)) / 2
    assert found.shape == (2, 3)
    assert found.dtype == dtype
    expected = [
        [np.log(3) / 8, 0, to_corner],
        [0.375 * (np.log(4) + np.log(0.75) - log_zero), to_corner, 0],
    ]
    np.testing.assert_allclose(found, expected, rtol=3 * np.finfo(dtype).eps, atol=1e-12)
    assert found.min() >= 0


def test_first_round_averages_the_maps_near_each_anchor() -> None:
    attns = np.empty((64, 64, 64, 64))
    attns[:, 0::2], attns[:, 1::2] = halves(0.4), halves(0.5)  # D = 0.02
    attns[:16] = halves(0.05)  # 0.44 and more from the others
    grid = np.array([[0, 0], [20, 20], [63, 63]])  # three points: no square number
    merged = DiffSeg(1.0, False, 4).mask_merge(0, attns, [0.1], grid=grid)
    assert merged.dtype == np.float64
    np.testing.assert_allclose(merged, [halves(0.05), halves(0.45), halves(0.45)], rtol=1e-4)
    scaled = DiffSeg(1.0, False, 4).mask_merge(0, 1e-28 * attns, [1e-29], grid=grid)
    np.testing.assert_allclose(scaled, 1e-28 * merged, rtol=1e-4)
    alone = DiffSeg(1.0, False, 2).mask_merge(0, 2 * attns, [0.03])  # D is 0.04 now
    np.testing.assert_allclose(alone, 2 * np.stack([halves(share) for share in (0.05, 0.05, 0.4, 0.5)]), rtol=1e-4)


def test_a_map_matches_itself_at_any_threshold() -> None:
    maps = np.random.default_rng(0).dirichlet(np.ones(4096), 32).reshape(-1, 64, 64)
    segmentor = DiffSeg([9, 1e-30], False, 4)
    np.testing.assert_allclose(segmentor.mask_merge(1, maps, segmentor.kl_threshold)[:, 0], maps)
    to_itself = segmentor.KL(maps, maps)
    assert to_itself.min() >= 0
    assert to_itself.max() < 1e-12


@pytest.mark.parametrize(("shape", "dtype"), [((3, 64, 64), np.float64), ((3, 1, 64, 64), np.float32)])
def test_later_rounds_take_elements_again(shape: tuple[int, ...], dtype: type) -> None:
    left, right, middle = halves(0.3), halves(0.7), halves(0.5)  # 0.085 from the middle, 0.34 from each other
    attns = np.stack([left, right, middle]).reshape(shape).astype(dtype)
    merged = DiffSeg(1.0, False, 4).mask_merge(2, attns, [9, 9, 0.2])
    assert merged.dtype == dtype
    np.testing.assert_allclose(merged, np.stack([halves(0.4), halves(0.6)])[:, None], rtol=5 * np.finfo(dtype).eps)


# Masks


@pytest.mark.parametrize(
    ("threshold", "refine", "cases"),
    [(0.3, False, (1, 2, 3)), (0.3, True, (2,)), (0.5, False, (1,)), (0.5, True, (1, 3))],
)
def test_segment_agrees_with_the_published_labels(threshold: float, refine: bool, cases: tuple[int, ...]) -> None:
    layers = [list(images) for images in zip(*map(golden_maps, cases), strict=True)]
    labels = DiffSeg([threshold] * 3, refine, 16).segment(*layers)
    assert labels.dtype == np.int64
    assert labels.shape == (len(cases), 512, 512)
    for case, found in zip(cases, labels, strict=True):
        expected = golden(case)[f"labels_tau{threshold}_{'refined' if refine else 'plain'}"]
        assert matched_accuracy(found, expected) >= 0.999, case


@pytest.mark.parametrize(
    ("thresholds", "refine", "points", "labels"),
    [
        (0.5, True, 4, [[0, 1], [2, 3]]),
        ([0.5], False, 4, [[0, 2], [8, 10]]),  # one round keeps all 16 anchors: the first of a quadrant wins it
        (0.5, False, 1, [[0, 0], [0, 0]]),
    ],
    ids=["refined", "one round", "one anchor"],
)
def test_masks_of_sharp_maps(thresholds: Any, refine: bool, points: int, labels: list[list[int]]) -> None:
    """Zeros in every map: in float16 each divergence would be NaN, and no anchor would be left."""
    found = DiffSeg(thresholds, refine, points).segment(*quadrant_layers(), weight_ratio=[1, 0, 0, 0])
    assert np.array_equal(found[0], np.array(labels).repeat(256, 0).repeat(256, 1))


def test_array_kinds_of_a_batch() -> None:
    """A float16 torch tensor and arrays in one call, on a named backend and device."""
    layers: list[Any] = [torch.from_numpy(layer) for layer in quadrant_layers()]
    layers[1:3] = layers[1].half().requires_grad_(), layers[2].numpy()
    segmentor = DiffSeg(0.5, False, 2, backend="reference", device="cpu")
    labels = segmentor.segment(*layers, weight_ratio=[1, 0, 0, 0])
    assert np.array_equal(labels[0], np.array([[0, 1], [2, 3]]).repeat(256, 0).repeat(256, 1))


def test_images_take_turns_in_the_memory_of_attention() -> None:
    memory.release()
    layers = [np.repeat(layer, 2, 0) for layer in quadrant_layers()]
    labels = DiffSeg(0.5, False, 2).segment(*layers, weight_ratio=[1, 0, 0, 0])
    assert np.array_equal(labels[0], labels[1])
    assert [len(each) for each in memory._kept] == [4096**2]


def test_steps_by_hand_are_segment() -> None:
    """At ratios of sum 4 the divergence is four times as large, by either route."""
    maps, ratio = golden_maps(1), 4 * np.array(SIDES) / 120
    segmentor = DiffSeg([1.2, 1.2, 1.2], False, 16)
    labels = segmentor.segment(*(layer[None] for layer in maps), weight_ratio=ratio)[0]
    assert matched_accuracy(labels, golden(1)["labels_tau0.3_plain"]) >= 0.999
    proposals = segmentor.upsampled
    assert proposals.dtype == np.float32
    assert proposals.shape == (labels.max() + 1, 512, 512, 1)
    np.testing.assert_allclose(proposals.sum((1, 2, 3)), 4 * 64, rtol=1e-4)
    assert np.array_equal(proposals.argmax(0)[..., 0], labels)

    attns = segmentor.aggregate_weights(maps, ratio)
    np.testing.assert_allclose(attns.sum((2, 3)), 4, rtol=1e-5)
    stepped = segmentor.generate_masks(attns, [2.0] * 3, segmentor.grid)
    assert stepped.dtype == np.int64
    assert stepped.shape == (512, 512)
    assert matched_accuracy(stepped, golden(1)["labels_tau0.5_plain"]) >= 0.999
    proposals = segmentor.upsampled
    assert np.array_equal(proposals.argmax(0)[..., 0], stepped)
    np.testing.assert_allclose(proposals.sum((1, 2, 3)), 4 * 64, rtol=1e-4)


@pytest.mark.gpu
def test_segment_on_a_gpu() -> None:
    layers = [layer[None] for layer in golden_maps(2)]
    for segmentor in (DiffSeg(0.5, True, 16), DiffSeg(0.5, True, 16, device="cuda")):
        given = layers if segmentor.device else [torch.from_numpy(layer).cuda() for layer in layers]
        labels = segmentor.segment(*given)
        assert matched_accuracy(labels[0], golden(2)["labels_tau0.5_refined"]) >= 0.999


# Semantics

NOUNS = [(0, "cat"), (2, "sofa"), (3, "lamp")]  # tokens 1, 3 and 4


def votes(*winners: int) -> Array:
    """[1, pixels, 6]: noun w leads at a pixel whose winner is w; each noun's norm is the same."""
    weights = np.zeros((1, len(winners), 6))
    weights[..., [0, 2, 5]] = 9  # tokens of no noun
    weights[0, np.arange(len(winners)), np.array([1, 3, 4])[list(winners)]] = 1
    return weights


def test_majority_is_the_median_of_the_winning_nouns() -> None:
    pred = np.array([[7, 7, 7, 2, 2, 5, 5, 5, 5]])
    words = DiffSeg(1.0, False, 4).get_semantics(pred, votes(0, 2, 2, 0, 2, 0, 0, 1, 1), NOUNS)
    assert isinstance(words, defaultdict)
    assert words == {"lamp": [7], "sofa": [2], "cat": [5]}  # sofa: halfway from cat to lamp; cat: 0.5 rounded down
    assert words["dog"] == []


def test_mean_weighs_nouns_by_their_norm() -> None:
    pred = np.array([[0, 0, 1, 1]])
    weights = np.zeros((1, 4, 6))
    weights[0, :, 1] = 10, 10, 10, 10  # 1/2 each once the norm, 20, is divided out
    weights[0, :, 3] = 0, 3, 0, 4  # 0.6, 0.8
    weights[0, :, 4] = 1, 1, 0, 0  # 0.71 each
    segmentor = DiffSeg(1.0, False, 4)
    assert segmentor.get_semantics(pred, weights, NOUNS, voting="mean") == {"lamp": [0], "cat": [1]}
    assert segmentor.get_semantics(pred[None], weights[None], NOUNS, "mean") == {"lamp": [0], "cat": [1]}
    assert segmentor.get_semantics(pred.ravel(), weights, NOUNS, "mean") == {"lamp": [0], "cat": [1]}
    assert segmentor.get_semantics(torch.tensor(pred), torch.tensor(weights), NOUNS[:2]) == {"cat": [0, 1]}


@pytest.mark.parametrize("voting", ["majority", "mean"])
def test_semantics_where_the_published_code_has_none(voting: str) -> None:
    segmentor = DiffSeg(1.0, False, 4)
    pred, weights = np.array([[3, 4]]), votes(0, 0)
    assert segmentor.get_semantics(pred, weights, NOUNS[::-1], voting) == {"cat": [3, 4]}  # sofa, lamp: 0 everywhere
    assert segmentor.get_semantics(pred, weights, [], voting) == {}


# Input


class Dlpack:
    """An array that has nothing but DLPack."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


class Arrayed:
    """An array that has nothing but ``__array__``."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.array


def read_only(array: Array) -> Array:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "wrap",
    [
        lambda array: torch.from_numpy(array).requires_grad_(),
        lambda array: Dlpack(torch.from_numpy(array)),
        Arrayed,
        read_only,
        lambda array: array.astype(">f4"),
        lambda array: array[..., ::-1].copy()[..., ::-1],
    ],
    ids=["torch", "dlpack", "array", "read-only", "big-endian", "reversed"],
)
def test_array_kinds(wrap: Callable[[Array], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = DiffSeg(1.0, False, 4).KL(wrap(halves(0.3).astype(np.float32)), wrap(halves(0.5).astype(np.float32)))
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.1 * np.log(7 / 3), rtol=1e-5)


def test_bfloat16_comes_back_as_float32() -> None:
    maps = torch.from_numpy(halves(0.5)).bfloat16()
    assert DiffSeg(1.0, False, 4).KL(maps, maps).dtype == np.float32


def ones(*shape: int, dtype: type = np.float32) -> Array:
    """Without memory of its own."""
    return np.broadcast_to(dtype(1), shape)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"kl_threshold: expected one positive number a round, got \[\]", ([], False, 4)),
        (r"kl_threshold: expected one positive number a round, got \[0.5, 0\]", ([0.5, 0], False, 4)),
        (r"kl_threshold: expected one positive number a round, got \[\[0.5\]\]", ([[0.5]], False, 4)),
        (r"kl_threshold: expected finite numbers, got float nan", (float("nan"), False, 4)),
        (r"kl_threshold: expected numbers, got str 'low'", ("low", False, 4)),
        (r"num_of_points: expected 1 to 64, got 0", (0.5, False, 0)),
        (r"num_of_points: expected 1 to 64, got 65", (0.5, False, 65)),
        (r"num_of_points: expected an int, got float 16.0", (0.5, False, 16.0)),
    ],
)
def test_bad_arguments_of_the_constructor(message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DiffSeg(*arguments)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of .*'reference'.*, got 'gpu'"):
        DiffSeg(0.5, False, 4, backend="gpu")


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"weight_32: expected \[batch, heads, 1024, 1024\], got .*\[2, 1024, 1024\]", {32: ones(2, 1024, 1024)}),
        (r"weight_16\[0\]: expected \[heads, 256, 256\], got .*\[2, 64, 64\]", {16: ones(1, 2, 64, 64)}),
        (r"weight_8\[0\]: expected \[heads, 64, 64\], got .*\[2, 64, 65\]", {8: [ones(2, 64, 65)]}),
        (r"weight_8: expected 1 images, as in weight_64, got 3", {8: ones(3, 2, 64, 64)}),
        (r"weight_64: expected at least one image, got none", {64: []}),
        (r"weight_8: expected floating-point values, got torch.int64", {8: ones(1, 2, 64, 64, dtype=np.int64)}),
        (r"weight_64\[0\]: expected an array, got str 'maps'", {64: ["maps"]}),
        (r"weight_8: expected an array of numbers that torch knows, got .*object", {8: np.array([None])}),
        (r"weight_ratio: expected 4 numbers, one a layer, got \[1, 2\]", {"ratio": [1, 2]}),
        (r"weight_ratio: expected no negative number and a positive sum", {"ratio": [0, 0, 0, 0]}),
        (r"layer 3: expected finite attention", {8: np.full((1, 2, 64, 64), np.nan, np.float32)}),
    ],
)
def test_bad_arguments_of_segment(message: str, changed: dict[Any, Any]) -> None:
    given = {f"weight_{side}": ones(1, 2, side**2, side**2) for side in SIDES}
    given |= {f"weight_{name}": value for name, value in changed.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        DiffSeg(0.5, False, 4).segment(**given)


NOUN = [(0, "cat")]


@pytest.mark.parametrize(
    ("message", "method", "arguments"),
    [
        (r"weight_list: expected a list of arrays, got ndarray of shape", "aggregate_weights", [ones(1, 4, 4)]),
        (r"weight_list\[1\]: expected \[heads, n, n\], got", "aggregate_weights", [[ones(1, 4, 4), ones(4, 4)]]),
        (r"weight_list\[0\]: .* divisor of 64, got n = 576", "aggregate_weights", [[ones(1, 576, 576)]]),
        (r"weight_list\[0\]: expected n = side \*\* 2, .*, got n = 5", "aggregate_weights", [[ones(1, 5, 5)]]),
        (r"weight_ratio: expected no negative number", "aggregate_weights", [[ones(1, 4, 4)], [-1]]),
        (r"weight_list\[1\]: expected \[heads, n, 7\]", "aggregate_x_weights", [[ones(1, 4, 7), ones(1, 4, 8)]]),
        (r"weight_list\[0\]: .* divisor of 512, got n = 9", "aggregate_x_weights", [[ones(1, 9, 7)]]),
        (r"weight_list: expected at least one array", "get_weight_rato", [[]]),
        (r"weight_list: expected arrays \[..., n, tokens\], got shapes \[\(3,\)\]", "get_weight_rato", [[ones(3)]]),
        (r"attns: expected \[64, 64, 64, 64\], got .*\[9, 9\]", "generate_masks", [ones(9, 9), 0.5, [[0, 0]]]),
        (r"attns: .* finite and positive sum, got 0", "generate_masks", [0 * ones(64, 64, 64, 64), 0.5, [[0, 0]]]),
        (r"grid: expected rows and columns from 0 to 63", "generate_masks", [ones(64, 64, 64, 64), 0.5, [[0, 64]]]),
        (r"grid: expected ints \[A, 2\]", "mask_merge", [0, ones(64, 64, 64, 64), 0.5, [[0.0, 1.0]]]),
        (r"attns: expected a list of maps \[P, 64, 64\]", "mask_merge", [1, ones(3, 2, 64, 64), 0.5]),
        (r"attns: expected finite values", "mask_merge", [1, np.nan * ones(3, 64, 64), 0.5]),
        (r"iter: expected 0 to 1, one of the rounds, got 2", "mask_merge", [2, ones(3, 64, 64), [0.5, 0.5]]),
        (r"x, Y: expected maps \[..., h, w\] of one size", "KL", [ones(64, 64), ones(32, 32)]),
        (r"voting: expected 'majority' or 'mean'", "get_semantics", [ones(2, 2), ones(2, 2, 5), NOUN, "most"]),
        (r"pred, x_weight: expected .* \[2, 2\] and \[2, 5\]", "get_semantics", [ones(2, 2), ones(2, 5), NOUN]),
        (r"nouns: expected indices from 0 to 3, got 4", "get_semantics", [ones(2, 2), ones(2, 2, 5), [(4, "cat")]]),
        (r"nouns: expected indices from 0 to 3, got -1", "get_semantics", [ones(2, 2), ones(2, 2, 5), [(-1, "cat")]]),
        (r"nouns: expected \(index, word\), got str 'cat'", "get_semantics", [ones(2, 2), ones(2, 2, 5), ["cat"]]),
    ],
)
def test_bad_arguments_of_the_steps(message: str, method: str, arguments: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(DiffSeg(0.5, False, 4), method)(*arguments)
