"""Runs every op of one backend on small inputs with odd sizes and checks the results: what a sanitizer looks at.

python -P benchmarks/small_inputs.py BACKEND
"""

from __future__ import annotations

import sys

import torch

import diffseg
from diffseg.bench import cases, gates
from diffseg.bench.cost import Layer

LAYERS = [Layer((14, 18), 3, 40), Layer((7, 9), 3, 80), Layer((5, 6), 2, 20)]
SIZE = (113, 145)


def main() -> None:
    backend = sys.argv[1]
    device = torch.device("cpu" if backend == "cpu" else "cuda")
    for dtype in (torch.float32,) if backend == "cpu" else (torch.float16, torch.float32):
        for given in (False, True):
            case = cases.structured("small", LAYERS, SIZE, 2, device, dtype, given=given)
            attention = diffseg.aggregate(
                case.queries, case.keys, grids=case.grids, logsumexps=case.logsumexps, backend=backend
            )
            gates.attention_gate(case)(attention)
        gates.attention_gate(case, case.maps)(diffseg.aggregate_maps(case.maps, grids=case.grids, backend=backend))
    for side in (3, 8):
        for rule in ("paper", "official"):
            proposals = diffseg.merge(attention, grid=case.grid, anchors=side, rule=rule, backend=backend)
            anchors = diffseg.ops.anchor_indices(case.grid, side)
            gates.merge_gate(attention, case.grid, SIZE, anchors, [1.0] * 3, rule)(proposals)
            gates.label_gate(proposals, SIZE)(diffseg.label(proposals, SIZE, backend=backend))
    print(f"{backend}: every result is right")


if __name__ == "__main__":
    main()
