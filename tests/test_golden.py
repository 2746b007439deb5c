"""The published code's results on synthetic attention (see data/README.md)."""

from __future__ import annotations

import pytest
import torch
from contract import SIDES, golden
from torch import Tensor

import diffseg
from diffseg.metrics import matched_accuracy

PRECISIONS = [(1, torch.float32), (2, torch.float32), (3, torch.float32), (3, torch.float64)]


def tensors(case: int, name: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.from_numpy(golden(case)[f"{name}{side}"])[None].to(dtype) for side in SIDES]


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
            assert matched_accuracy(labels, expected) >= 0.999, (threshold, name)


def test_from_maps() -> None:
    queries, keys = tensors(1, "q", torch.float32), tensors(1, "k", torch.float32)
    maps = [(query @ key.mT / 4).softmax(-1) for query, key in zip(queries, keys, strict=True)]
    assert distance_from_probe(diffseg.aggregate_maps(maps), 1) < 1e-6
