"""The README's code means what it says: each "Equivalent to" is run against its op."""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import diffseg

README = (Path(__file__).parents[1] / "README.md").read_text()


def equivalent(op: str) -> str:
    """The code that stands after "Equivalent to" in the section of an op: a fenced block, or inline."""
    section = re.search(rf"^### {op}$(.*?)(?=^##|\Z)", README, re.M | re.S)[1]
    given = section.partition("Equivalent to")[2]
    fenced = re.match(r"[^\n]*\n\n```python\n(.*?)```", given, re.S)
    return fenced[1] if fenced else re.search(r"`(.*?)`", given, re.S)[1]


def smooth_attention() -> torch.Tensor:
    """Rows that come in a few kinds, [64, 64]."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 64, generator=generator) * 2
    noise = torch.randn(64, 64, generator=generator) * 0.3
    return torch.softmax(kinds.repeat_interleave(16, 0) + noise, -1)


def test_aggregate():
    generator = torch.Generator().manual_seed(0)
    queries, keys = ([torch.randn(2, n, 6, generator=generator) for n in (64, 16, 16)] for _ in range(2))
    names = {"queries": queries, "keys": keys, "ratios": [8 / 12, 2 / 12, 2 / 12], "h": 8, "w": 8}
    exec(equivalent("aggregate"), {"torch": torch, "F": F, "math": math, **names}, names)
    found = diffseg.aggregate([query[None] for query in queries], [key[None] for key in keys])[0]
    torch.testing.assert_close(found, names["total"].view(64, 64), rtol=1e-4, atol=1e-7)


def test_merge():
    attention = smooth_attention()
    cells = [0, 9, 20, 33, 40, 63]
    names = {"torch": torch, "attention": attention, "anchor_cells": cells, "threshold": 0.3, "iterations": 3}
    exec(equivalent("merge"), names)
    found = diffseg.merge(attention[None], anchors=cells, threshold=0.3)
    expected = torch.stack(names["proposals"])
    assert 1 < len(expected) < len(cells)
    assert found.counts.tolist() == [len(expected)]
    torch.testing.assert_close(found.maps[0, : len(expected)], expected, rtol=1e-4, atol=1e-7)


def test_label():
    proposals = diffseg.merge(smooth_attention()[None], anchors=4, threshold=0.3)
    names = {
        "F": F, "maps": proposals.maps[0], "count": int(proposals.counts), "grid": proposals.grid, "size": (24, 20),
    }  # fmt: skip
    assert torch.equal(eval(equivalent("label"), names).int(), diffseg.label(proposals, (24, 20)))
