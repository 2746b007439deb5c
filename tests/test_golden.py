"""The published code's results on synthetic attention (see data/README.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import diffseg

DATA = Path(__file__).parent / "data"
SIDES = (64, 32, 16, 8)
CASES = (1, 2, 3)
PRECISIONS = [(case, torch.float32) for case in CASES] + [(3, torch.float64)]


@cache
def golden(case: int) -> dict[str, NDArray[np.generic]]:
    with np.load(DATA / f"case{case}.npz") as arrays:
        return dict(arrays)


def tensors(case: int, name: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.from_numpy(golden(case)[f"{name}{side}"])[None].to(dtype) for side in SIDES]


def agreement(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    """Share of equal pixels under the best one-to-one renaming of labels."""
    pixels = np.zeros((found.max() + 1, expected.max() + 1), dtype=np.int64)
    np.add.at(pixels, (found.ravel(), expected.ravel()), 1)
    return float(pixels[linear_sum_assignment(pixels, maximize=True)].sum() / found.size)


def distance_from_probe(attention: Tensor, case: int) -> float:
    probe = torch.from_numpy(golden(case)["row_probe"]).double()
    rows = attention[0, [257 * row for row in range(len(probe))]].double()
    return float((rows - probe).abs().max() / probe.max())


@pytest.mark.parametrize(("case", "dtype"), PRECISIONS, ids=str)
def test_from_queries_and_keys(case: int, dtype: torch.dtype) -> None:
    attention = diffseg.aggregate(tensors(case, "q", dtype), tensors(case, "k", dtype), dtype=dtype)
    assert distance_from_probe(attention, case) < 1e-6
    for threshold in (0.3, 0.5) if dtype == torch.float32 else (0.3,):
        proposals = diffseg.merge(attention, threshold=threshold, rule="official")
        refined = diffseg.refine(attention, proposals)
        for name, result in (("plain", proposals), ("refined", refined)):
            labels = diffseg.label(result, (512, 512))[0].numpy()
            expected = golden(case)[f"labels_tau{threshold}_{name}"]
            assert agreement(labels, expected) >= 0.999, (threshold, name)


@pytest.mark.parametrize("case", [1])
def test_from_maps(case: int) -> None:
    queries, keys = tensors(case, "q", torch.float32), tensors(case, "k", torch.float32)
    maps = [(query @ key.mT / 4).softmax(-1) for query, key in zip(queries, keys, strict=True)]
    assert distance_from_probe(diffseg.aggregate_maps(maps), case) < 1e-6


def test_agreement_counts_each_label_once() -> None:
    expected = np.array([[0, 0, 1, 1, 2, 2, 2, 2]])
    assert agreement(np.array([[5, 5, 3, 3, 0, 0, 0, 0]]), expected) == 1
    assert agreement(np.array([[0, 0, 0, 0, 1, 1, 1, 2]]), expected) == 5 / 8
