"""Runs every op of one backend on small inputs with odd sizes and checks the results: what a sanitizer looks at.

python benchmarks/small_inputs.py BACKEND
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import diffseg
from diffseg.bench import cases, gates
from diffseg.bench.cases import Case
from diffseg.bench.cost import Layer

LAYERS = [Layer((13, 31), 3, 40), Layer((7, 9), 3, 80), Layer((5, 6), 2, 20)]
SIZE = (113, 145)


TEXTS = ((77, 3), (120, 300))  # tokens of a text, masks


def main() -> None:
    backend = sys.argv[1]
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    for dtype in (torch.float32,) if backend == "cpu" else (torch.float16, torch.bfloat16, torch.float32):
        case = check_aggregate(backend, device, dtype)
        for tokens, masks in TEXTS:
            check_words(backend, case, tokens, masks)
    check_merge(backend, case)
    print(f"{backend}: every result is right")


def check_aggregate(backend: str, device: torch.device, dtype: torch.dtype) -> Case:
    for given in (False, True):
        case = cases.structured("small", LAYERS, SIZE, 2, device, dtype, given=given)
        layers = {"grids": case.grids, "logsumexps": case.logsumexps, "backend": backend}
        attention = diffseg.aggregate(case.queries, case.keys, **layers)
        gates.attention_gate(case)(attention)
        stored = diffseg.aggregate(case.queries, case.keys, dtype=torch.bfloat16, **layers)
        torch.testing.assert_close(stored, attention.bfloat16(), rtol=2**-7, atol=1e-30)  # of one unit
    gates.attention_gate(case, case.maps)(diffseg.aggregate_maps(case.maps, grids=case.grids, backend=backend))
    return case


def check_words(backend: str, case: Case, tokens: int, masks: int) -> None:
    """The two ops that name masks, with keys of a text made from those of the image."""
    text = [key[:, :, torch.arange(tokens) % key.shape[2]] for key in case.keys]
    shares = torch.eye(5, tokens, device=text[0].device)[None]
    options = {"grids": case.grids, "tokens": shares, "size": case.size}
    queries, keys = ([each.double() for each in layers] for layers in (case.queries, text))
    expected = diffseg.aggregate_cross(queries, keys, backend="reference", **options)
    maps = diffseg.aggregate_cross(case.queries, text, backend=backend, **options)
    gates.entries_gate(lambda: expected)(maps)
    labels = torch.arange(SIZE[0] * SIZE[1], dtype=torch.int32, device=maps.device).view(1, *SIZE).repeat(2, 1, 1)
    labels = labels // 7 % masks
    scores = diffseg.score_masks(maps, labels, masks=masks, backend=backend)
    gates.entries_gate(lambda: diffseg.score_masks(expected, labels, masks=masks, backend="reference"))(scores)


def check_merge(backend: str, case: Case) -> None:
    """The CUDA kernels cut the cells of short lists in parts of one step each, those of the list of all in several."""
    lists = [list(diffseg.ops.anchor_indices(case.grid, side)) for side in (3, 8)]
    for anchors in (*lists, list(range(case.attention.shape[1]))):
        for rule in ("paper", "official"):
            proposals = diffseg.merge(case.attention, grid=case.grid, anchors=anchors, rule=rule, backend=backend)
            gates.merge_gate(case.attention, case.grid, SIZE, anchors, [1.0] * 3, rule)(proposals)
            labels = diffseg.label(proposals, SIZE, backend=backend)
            gates.label_gate(proposals, SIZE)(labels)
            check_numbers(backend, labels, proposals.maps.shape[1])


def check_numbers(backend: str, labels: Tensor, length: int) -> None:
    expected = labels.clone()
    segments = torch.ops.diffseg.renumber(expected, length, "reference")
    if not torch.equal(torch.ops.diffseg.renumber(labels, length, backend), segments):
        raise gates.GateError("the numbers of segments differ")
    if not torch.equal(labels, expected):
        raise gates.GateError("the numbered labels differ")


if __name__ == "__main__":
    main()
