"""Calls one C++ kernel on small fixed inputs, to be counted under valgrind; needs no package but the extension itself.

    python -I -S instructions.py EXTENSION ISA OP REPEATS

The difference of two runs that differ in REPEATS is the kernel's own count: exact, however busy the machine is. The
runtime of OpenMP must be preloaded, since the extension takes the copy that the process has.
"""

import importlib.util
import math
import random
import sys
from array import array

SIDE, SMALL_SIDE = 16, 8
CELLS = SIDE * SIDE
HEADS, CHANNELS = 2, 40
ANCHORS = 64
LABELS = (128, 128)
PROPOSALS = 16
THRESHOLD = 0.3


generator = random.Random(0)


def uniform(count):
    return array("f", (generator.random() for _ in range(count)))


def address(values):
    return values.buffer_info()[0]


def rows(count):
    """Maps of noise, each of sum 1."""
    values = array("f")
    for _ in range(count):
        row = uniform(CELLS)
        total = math.fsum(row)
        values.extend(value / total for value in row)
    return values


def calls(module):
    """For each op, a call with its inputs bound."""
    sides = (SMALL_SIDE, SIDE)
    queries, keys = ([uniform(HEADS * side**2 * CHANNELS) for side in sides] for _ in range(2))
    maps = [uniform(HEADS * side**4) for side in sides]
    attention, proposals = rows(CELLS), rows(PROPOSALS)
    out = array("f", bytes(4 * CELLS * CELLS))
    counts = array("i", [PROPOSALS])

    def view(values, heads, row_count, columns):
        block = row_count * columns
        return module.View(address(values), "float32", (heads * block, block, columns, 1))

    layers = [
        module.Layer(
            queries=view(q, HEADS, side**2, CHANNELS), keys=view(k, HEADS, side**2, CHANNELS), logsumexps=0,
            heads=HEADS, depth=CHANNELS, grid=(side, side), scale=CHANNELS**-0.5, ratio=0.5, number=number,
        )
        for number, (side, q, k) in enumerate(zip(sides, queries, keys, strict=True))
    ]  # fmt: skip
    map_layers = [
        module.Layer(
            maps=view(values, HEADS, side**2, side**2), heads=HEADS, grid=(side, side), ratio=0.5, number=number
        )
        for number, (side, values) in enumerate(zip(sides, maps, strict=True))
    ]
    anchors = list(range(0, CELLS, CELLS // ANCHORS))
    merged, found = array("f", bytes(4 * ANCHORS * CELLS)), array("i", [0])
    winner = array("i", bytes(4 * LABELS[0] * LABELS[1]))
    held = (queries, keys, maps, attention, proposals, out, counts, merged, found, winner)
    return held, {
        "aggregate": lambda: module.aggregate(layers, (SIDE, SIDE), 1, address(out), 1),
        "aggregate_maps": lambda: module.aggregate_maps(map_layers, (SIDE, SIDE), 1, address(out), 1),
        "merge": lambda: module.merge(
            view(attention, 1, CELLS, CELLS), (SIDE, SIDE), 1, anchors, [THRESHOLD] * 3, True,
            address(merged), address(found), 1,
        ),
        "label": lambda: module.label(
            address(proposals), address(counts), address(winner), 1, PROPOSALS, (SIDE, SIDE), LABELS, 1
        ),
    }  # fmt: skip


def main():
    path, isa, op, repeats = sys.argv[1:]
    specification = importlib.util.spec_from_file_location("diffseg._cpu", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.use_isa(isa)
    _held, ops = calls(module)
    for _ in range(int(repeats)):
        ops[op]()


if __name__ == "__main__":
    main()
