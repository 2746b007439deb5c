"""Bad input is refused before any work, by an error that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

import diffseg
from diffseg import Proposals, backends, reference
from diffseg.backends import Backend
from diffseg.checks import describe

NAN, INF = float("nan"), float("inf")


def queries(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One tensor a shape, [batch, heads, n, d]; without shapes, layers on 4 x 4 and 2 x 2."""
    return [torch.ones(shape, dtype=dtype) for shape in shapes or ((1, 2, 16, 4), (1, 2, 4, 8))]


def maps(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(shape, dtype=dtype) for shape in shapes or ((1, 2, 16, 16), (1, 4, 4))]


def attention(n: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((1, n, n), 1 / n).to(dtype)


def proposals(**replace: Any) -> Proposals:
    fields = {"maps": torch.rand(2, 3, 16), "counts": torch.tensor([3, 1], dtype=torch.int32), "grid": (4, 4)}
    return Proposals(**{**fields, **replace})


def aggregate(first: Any = None, second: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: diffseg.aggregate(
        queries() if first is None else first, queries() if second is None else second, **options
    )


def aggregate_maps(layers: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: diffseg.aggregate_maps(maps() if layers is None else layers, **options)


def merge(values: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: diffseg.merge(attention() if values is None else values, **{"anchors": 4, **options})


def refine(values: Any = None, given: Any = None, **options: Any) -> Callable[[], Any]:
    values = torch.full((2, 16, 16), 1 / 16) if values is None else values
    return lambda: diffseg.refine(values, proposals() if given is None else given, **options)


def label(given: Any = None, size: Any = (8, 8), **options: Any) -> Callable[[], Any]:
    return lambda: diffseg.label(proposals() if given is None else given, size, **options)


def segment(first: Any = None, second: Any = None, size: Any = (8, 8), **options: Any) -> Callable[[], Any]:
    return lambda: diffseg.segment(
        queries() if first is None else first,
        queries() if second is None else second,
        size,
        **{"anchors": 4, **options},
    )


def requiring_grad(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


COUNTS = {
    "floats": torch.tensor([3.0, 1.0]),
    "int64": torch.tensor([3, 1]),
    "too few": torch.tensor([3], dtype=torch.int32),
    "elsewhere": torch.tensor([3, 1], dtype=torch.int32, device="meta"),
    "above P": torch.tensor([3, 4], dtype=torch.int32),
    "zero": torch.tensor([0, 1], dtype=torch.int32),
}

# name: (call, exception, what the message says)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # aggregate: the lists
    "queries: a tensor": (
        aggregate(torch.ones(1, 2, 16, 4)), TypeError,
        r"queries: expected a list, one item a layer, got a tensor .*16, 4"),
    "queries: a number": (aggregate(3), TypeError, "queries: expected a list, one item a layer, got int 3"),
    "queries: none": (aggregate([], []), ValueError, "queries: expected at least one layer, got an empty list"),
    "keys: none": (aggregate(None, []), ValueError, "keys: expected at least one layer, got an empty list"),
    "keys: a string": (aggregate(None, "ab"), TypeError, "keys: expected a list, one item a layer, got str 'ab'"),
    "keys: too few": (aggregate(None, queries()[:1]), ValueError, "keys: expected 2 items, one a layer, got 1"),
    "queries: an array": (
        aggregate([np.ones((1, 2, 16, 4))]), TypeError, r"queries\[0\]: expected a torch.Tensor, got ndarray"),
    "keys: an array": (
        aggregate(None, [queries()[0], np.ones(3)]), TypeError, r"keys\[1\]: expected a torch.Tensor, got ndarray"),
    "queries: no heads": (
        aggregate(queries((1, 16, 4))), ValueError,
        r"queries\[0\]: expected \[batch, heads, n, d\], got a tensor of shape \[1, 16, 4\]"),
    "keys: too many dimensions": (
        aggregate(None, queries((1, 1, 2, 16, 4))), ValueError,
        r"keys\[0\]: expected \[batch, heads, n, d\], got .*1, 1, 2"),
    "queries: an empty dimension": (
        aggregate(queries((1, 2, 0, 4))), ValueError,
        r"queries\[0\]: expected no empty dimension, got shape \[1, 2, 0, 4\]"),
    "queries: integers": (
        aggregate(queries(dtype=torch.int64)), TypeError,
        r"queries\[0\]: expected floating-point values, got torch.int64"),
    "keys: complex": (
        aggregate(None, queries(dtype=torch.complex64)), TypeError,
        r"keys\[0\]: expected floating-point values, got torch.complex64"),
    "queries: float8": (
        aggregate(*[queries(dtype=torch.float8_e4m3fn)] * 2), ValueError,
        "aggregate .*expected .*torch.float32.*, got torch.float8_e4m3fn"),
    "keys: another n": (
        aggregate(queries((1, 2, 16, 4)), queries((1, 2, 77, 4))), ValueError,
        r"keys\[0\]: expected the shape of queries\[0\], \[1, 2, 16, 4\], got \[1, 2, 77, 4\]"),
    "keys: other heads in the second layer": (
        aggregate(queries(), queries((1, 2, 16, 4), (1, 1, 4, 8))), ValueError,
        r"keys\[1\]: expected the shape of queries\[1\], \[1, 2, 4, 8\], got \[1, 1, 4, 8\]"),
    "keys: another dtype": (
        aggregate(None, queries(dtype=torch.float16)), ValueError,
        r"keys\[0\]: expected batch 1, torch.float32, cpu as in the first layer, got batch 1, torch.float16, cpu"),
    "queries: mixed dtypes": (
        aggregate([a.to(d) for a, d in zip(queries(), (torch.float32, torch.bfloat16), strict=True)]), ValueError,
        r"queries\[1\]: expected batch 1, torch.float32, cpu .*, got batch 1, torch.bfloat16"),
    "queries: mixed batches": (
        aggregate(*[queries((2, 2, 16, 4), (1, 2, 4, 8))] * 2), ValueError,
        r"queries\[1\]: expected batch 2, .* got batch 1"),
    "keys: another device": (
        aggregate(None, [meta(key) for key in queries()]), ValueError, r"keys\[0\]: expected .* cpu .*, got .* meta"),
    "queries: mixed devices": (
        aggregate(*[[queries()[0], meta(queries()[1])]] * 2), ValueError,
        r"queries\[1\]: expected .* cpu .*, got .* meta"),
    "queries: require grad": (
        aggregate([requiring_grad(query) for query in queries()]), ValueError,
        r"queries\[0\]: requires grad, .* inference only: detach it or use torch.no_grad\(\)"),
    "keys: require grad": (
        aggregate(None, [queries()[0], requiring_grad(queries()[1])]), ValueError, r"keys\[1\]: requires grad"),
    # aggregate: the options
    "grids: not square, not given": (
        aggregate(*[queries((1, 2, 12, 4))] * 2), ValueError,
        r"grids: expected height \* width = 12, got 3 x 3; 12 is no square: pass grids="),
    "grids: other cells": (
        aggregate(grids=[(4, 4), (2, 3)]), ValueError, r"grids: expected height \* width = 4, got 2 x 3$"),
    "grids: too few": (aggregate(grids=[(4, 4)]), ValueError, "grids: expected 2 items, one a layer, got 1"),
    "grids: one pair": (aggregate(grids=(4, 4)), TypeError, r"grids: expected \(height, width\), got int 4"),
    "grids: a number": (aggregate(grids=4), TypeError, r"grids: expected a list of \(height, width\), got int 4"),
    "grids: zero": (aggregate(grids=[(4, 4), (0, 4)]), ValueError, "grids: expected at least 1, got 0"),
    "grids: floats": (aggregate(grids=[(4, 4), (2.0, 2)]), TypeError, "grids: expected an int, got float 2.0"),
    "grids: one does not fit": (
        aggregate(*[queries((1, 2, 16, 4), (1, 2, 5, 4))] * 2, grids=[(4, 4), (1, 5)]), ValueError,
        r"grids: expected every grid to fit in the largest, 4 x 4, got 1 x 5"),
    "scales: too many": (aggregate(scales=[1.0] * 3), ValueError, "scales: expected 2 items, one a layer, got 3"),
    "scales: a number": (aggregate(scales=0.5), TypeError, "scales: expected a list of 2 numbers, got float 0.5"),
    "scales: beyond float32": (aggregate(scales=[1e39, 1.0]), ValueError, "scales: expected numbers within float32's"),
    "scales: beyond floats": (
        aggregate(scales=[10**400, 1.0]), ValueError, "scales: expected finite numbers, got 1000000"),
    "backend: a list": (aggregate(backend=["cpu"]), ValueError, r"backend: expected one of .*, got \['cpu'\]"),
    "scales: NaN": (aggregate(scales=[1.0, NAN]), ValueError, "scales: expected finite numbers, got nan"),
    "scales: strings": (aggregate(scales=["a", "b"]), TypeError, "scales: expected numbers, got str 'a'"),
    "logsumexps: too few": (
        aggregate(logsumexps=[torch.ones(1, 2, 16)]), ValueError, "logsumexps: expected 2 items, one a layer, got 1"),
    "logsumexps: with d": (
        aggregate(logsumexps=queries()), ValueError,
        r"logsumexps\[0\]: expected \[batch, heads, n\], got .*\[1, 2, 16, 4\]"),
    "logsumexps: another n": (
        aggregate(logsumexps=[torch.ones(1, 2, 16), torch.ones(1, 2, 5)]), ValueError,
        r"logsumexps\[1\]: expected \[1, 2, 4\] on cpu, got \[1, 2, 5\] on cpu"),
    "logsumexps: another device": (
        aggregate(logsumexps=[torch.ones(1, 2, 16), torch.ones(1, 2, 4, device="meta")]), ValueError,
        r"logsumexps\[1\]: expected \[1, 2, 4\] on cpu, got \[1, 2, 4\] on meta"),
    "logsumexps: integers": (
        aggregate(logsumexps=[torch.ones(1, 2, 16, dtype=torch.int32)] * 2), TypeError,
        r"logsumexps\[0\]: expected floating-point values, got torch.int32"),
    "weights: unknown": (
        aggregate(weights="uniform"), ValueError,
        r"weights: expected one of .*'literal'\) or a float a layer, got 'uniform'"),
    "weights: too few": (aggregate(weights=[1.0]), ValueError, "weights: expected 2 items, one a layer, got 1"),
    "weights: a number": (aggregate(weights=1.0), TypeError, "weights: expected a list of 2 numbers, got float 1.0"),
    "weights: None": (aggregate(weights=None), TypeError, "weights: expected a list of 2 numbers, got NoneType None"),
    "weights: negative": (
        aggregate(weights=[2.0, -1.0]), ValueError, r"weights: expected no negative share .*, got \[2.0, -1.0\]"),
    "weights: all zero": (
        aggregate(weights=[0.0, 0.0]), ValueError, r"weights: expected .* a positive sum, got \[0.0, 0.0\]"),
    "weights: infinite": (aggregate(weights=[1.0, INF]), ValueError, "weights: expected finite numbers, got inf"),
    "weights: booleans": (aggregate(weights=[True, False]), TypeError, "weights: expected numbers, got bool True"),
    "dtype: float16": (
        aggregate(dtype=torch.float16), ValueError,
        r"dtype: expected torch.float32, torch.float64 or torch.bfloat16, got torch.float16 \(sharp maps underflow\)"),
    "dtype: integers": (aggregate(dtype=torch.int32), ValueError, "dtype: expected torch.float32, .* got torch.int32"),
    "dtype: a string": (aggregate(dtype="float32"), ValueError, "dtype: expected torch.float32, .* got float32"),
    "backend: unknown": (
        aggregate(backend="tpu"), ValueError, "backend: expected one of 'auto', .*'reference', got 'tpu'"),
    "backend: None": (aggregate(backend=None), ValueError, "backend: expected one of 'auto', .* got None"),
    "out: an array": (aggregate(out=np.ones((1, 16, 16))), TypeError, "out: expected a torch.Tensor, got ndarray"),
    "out: another shape": (
        aggregate(out=torch.ones(1, 16, 16, 1)), ValueError,
        r"out: expected \[1, 16, 16\], torch.float32, on cpu, got \[1, 16, 16, 1\], torch.float32, on cpu"),
    "out: another dtype": (
        aggregate(out=torch.ones(1, 16, 16).double()), ValueError, r"out: expected .*float32.* got .*float64"),
    "out: transposed": (
        aggregate(out=torch.ones(1, 16, 16).mT), ValueError, r"out: expected a contiguous .* strides \[256, 1, 16\]"),
    "out: requires grad": (
        aggregate(out=requiring_grad(torch.ones(1, 16, 16))), ValueError, "out: .* without gradient"),
    # aggregate_maps
    "maps: a tensor": (
        aggregate_maps(torch.ones(1, 16, 16)), TypeError, "maps: expected a list, one item a layer, got a t"),
    "maps: none": (aggregate_maps([]), ValueError, "maps: expected at least one layer, got an empty list"),
    "maps: an array": (
        aggregate_maps([np.ones((1, 4, 4))]), TypeError, r"maps\[0\]: expected a torch.Tensor, got ndarray"),
    "maps: two dimensions": (
        aggregate_maps(maps((16, 16))), ValueError, r"maps\[0\]: expected \[batch, heads, n, n\], got .*\[16, 16\]"),
    "maps: not square": (
        aggregate_maps(maps((1, 2, 16, 16), (1, 2, 16, 4))), ValueError,
        r"maps\[1\]: expected the last two sizes to be equal, got \[1, 2, 16, 4\]"),
    "maps: mixed batches": (
        aggregate_maps(maps((2, 16, 16), (1, 4, 4))), ValueError, r"maps\[1\]: expected batch 2, .* got batch 1"),
    "maps: mixed dtypes": (
        aggregate_maps([maps()[0], maps()[1].double()]), ValueError, r"maps\[1\]: expected .*float32.* got .*float64"),
    "maps: integers": (
        aggregate_maps(maps(dtype=torch.uint8)), TypeError,
        r"maps\[0\]: expected floating-point values, got torch.uint8"),
    "maps: require grad": (aggregate_maps([requiring_grad(maps()[0])]), ValueError, r"maps\[0\]: requires grad"),
    "maps: grids": (
        aggregate_maps(grids=[(4, 1), (4, 4)]), ValueError, r"grids: expected height \* width = 16, got 4 x 1"),
    "maps: weights": (aggregate_maps(weights=[1.0] * 3), ValueError, "weights: expected 2 items, one a layer, got 3"),
    "maps: dtype": (
        aggregate_maps(dtype=torch.float16), ValueError, "dtype: expected torch.float32, .* got torch.float16"),
    "maps: backend": (aggregate_maps(backend="gpu"), ValueError, "backend: expected one of 'auto', .* got 'gpu'"),
    "maps: out": (aggregate_maps(out=torch.ones(1, 4, 4)), ValueError, r"out: expected \[1, 16, 16\], .* got"),
    "maps: grid": (
        aggregate_maps(grid=(4, 2)), ValueError, r"grid: expected room for all, 4 x 2, got 4 x 4"),
    # merge
    "attention: an array": (merge(np.ones((1, 4, 4))), TypeError, "attention: expected a torch.Tensor, got ndarray"),
    "attention: no batch": (
        merge(torch.ones(16, 16)), ValueError,
        r"attention: expected \[batch, N, N\], got a tensor of shape \[16, 16\]"),
    "attention: not square": (
        merge(torch.ones(1, 16, 4)), ValueError,
        r"attention: expected the last two sizes to be equal, got \[1, 16, 4\]"),
    "attention: float16": (
        merge(attention(dtype=torch.float16)), ValueError, "attention: expected torch.float32, .* got torch.float16"),
    "attention: integers": (
        merge(torch.ones(1, 16, 16, dtype=torch.int64)), TypeError,
        "attention: expected floating-point values, got torch.int64"),
    "attention: requires grad": (merge(requiring_grad(attention())), ValueError, "attention: requires grad"),
    "attention: an empty batch": (
        merge(torch.ones(0, 16, 16)), ValueError, r"attention: expected no empty dimension, got shape \[0, 16, 16\]"),
    "grid: not square, not given": (
        merge(attention(12)), ValueError,
        r"grid: expected height \* width = 12, got 3 x 3; 12 is no square: pass grid="),
    "grid: other cells": (merge(grid=(4, 5)), ValueError, r"grid: expected height \* width = 16, got 4 x 5"),
    "grid: one number": (merge(grid=4), TypeError, r"grid: expected \(height, width\), got int 4"),
    "anchors: above the grid": (
        merge(anchors=5), ValueError, r"anchors: expected 1 to 4 anchors a side on a grid of \(4, 4\), got 5"),
    "anchors: above the shorter side": (
        merge(grid=(2, 8), anchors=3), ValueError,
        r"anchors: expected 1 to 2 anchors a side on a grid of \(2, 8\), got 3"),
    "anchors: zero": (merge(anchors=0), ValueError, "anchors: expected 1 to 4 anchors .* got 0"),
    "anchors: negative": (merge(anchors=-1), ValueError, "anchors: expected 1 to 4 anchors .* got -1"),
    "anchors: a boolean": (merge(anchors=True), TypeError, "anchors: expected an int or a sequence .* got bool True"),
    "anchors: a float": (merge(anchors=4.0), TypeError, "anchors: expected an int or a sequence .* got float 4.0"),
    "anchors: a string": (merge(anchors="16"), TypeError, "anchors: expected an int or a sequence .* got str '16'"),
    "anchors: a float in a tensor": (
        merge(anchors=torch.tensor(4.0)), TypeError,
        r"anchors: expected an int or a sequence .* got a tensor of shape \[\]"),
    "anchors: no index": (merge(anchors=[]), ValueError, "anchors: expected at least one index, got none"),
    "anchors: an index too large": (
        merge(anchors=[0, 16]), ValueError, "anchors: expected indices from 0 to 15, got 16"),
    "anchors: a negative index": (merge(anchors=[-1]), ValueError, "anchors: expected indices from 0 to 15, got -1"),
    "anchors: float indices": (merge(anchors=[1.0]), TypeError, "anchors: expected ints, got float 1.0"),
    "anchors: a mask": (merge(anchors=[True, False]), TypeError, "anchors: expected ints, got bool True"),
    "anchors: pairs": (merge(anchors=[(0, 1)]), TypeError, r"anchors: expected ints, got tuple \(0, 1\)"),
    "iterations: zero": (merge(iterations=0), ValueError, "iterations: expected at least 1, got 0"),
    "iterations: a float": (merge(iterations=3.0), TypeError, "iterations: expected an int, got float 3.0"),
    "iterations: a boolean": (merge(iterations=True), TypeError, "iterations: expected an int, got bool True"),
    "threshold: zero": (merge(threshold=0.0), ValueError, "threshold: expected positive numbers, got 0.0"),
    "threshold: negative in one round": (
        merge(threshold=[1.0, 1.0, -0.5]), ValueError, r"threshold: expected positive numbers, got \[1.0, 1.0, -0.5\]"),
    "threshold: NaN": (merge(threshold=NAN), ValueError, "threshold: expected finite numbers, got nan"),
    "threshold: infinite": (merge(threshold=INF), ValueError, "threshold: expected finite numbers, got inf"),
    "threshold: too few": (
        merge(threshold=[1.0, 1.0]), ValueError, "threshold: expected one number, or 3, one a round, got 2"),
    "threshold: none": (merge(threshold=[]), ValueError, "threshold: expected one number, or 3, one a round, got 0"),
    "threshold: None": (
        merge(threshold=None), TypeError, "threshold: expected one number, or 3, one a round, got NoneType None"),
    "threshold: a string": (
        merge(threshold="1.0"), TypeError, "threshold: expected one number, or 3, one a round, got str '1.0'"),
    "threshold: a boolean": (merge(threshold=True), TypeError, "threshold: expected numbers, got bool True"),
    "threshold: a negative tensor": (
        merge(threshold=torch.tensor(-1.0)), ValueError, "threshold: expected positive numbers, got -1.0"),
    "rule: unknown": (merge(rule="greedy"), ValueError, r"rule: expected one of \('paper', 'official'\), got 'greedy'"),
    "rule: None": (merge(rule=None), ValueError, "rule: expected one of .* got None"),
    "merge: backend": (merge(backend="CPU"), ValueError, "backend: expected one of 'auto', .* got 'CPU'"),
    # refine
    "refine: a tuple": (
        refine(given=tuple(proposals())), TypeError, "proposals: expected diffseg.Proposals, got tuple"),
    "refine: attention of other cells": (
        refine(torch.ones(2, 9, 9)), ValueError, r"proposals: expected maps \[2, P, 9\], got \[2, 3, 16\]"),
    "refine: another batch": (
        refine(torch.ones(1, 16, 16)), ValueError, r"proposals: expected maps \[1, P, 16\], got \[2, 3, 16\]"),
    "refine: another device": (
        refine(torch.ones(2, 16, 16, device="meta")), ValueError, "proposals: expected maps on meta, got cpu"),
    "refine: attention is no tensor": (refine([[1.0]]), TypeError, "attention: expected a torch.Tensor, got list"),
    "refine: float16": (
        refine(torch.ones(2, 16, 16).half()), ValueError, "attention: expected torch.float32, .* got torch.float16"),
    "refine: iterations": (refine(max_iterations=0), ValueError, "max_iterations: expected at least 1, got 0"),
    "refine: iterations, a float": (
        refine(max_iterations=3.5), TypeError, "max_iterations: expected an int, got float 3.5"),
    # label
    "label: a tensor": (
        label(torch.ones(1, 3, 16)), TypeError,
        r"proposals: expected diffseg.Proposals, got a tensor of shape \[1, 3, 16\]"),
    "size: a number": (label(size=8), TypeError, r"size: expected \(height, width\), got int 8"),
    "size: three": (label(size=(8, 8, 3)), TypeError, r"size: expected \(height, width\), got tuple \(8, 8, 3\)"),
    "size: zero": (label(size=(8, 0)), ValueError, "size: expected at least 1, got 0"),
    "size: negative": (label(size=(-8, 8)), ValueError, "size: expected at least 1, got -8"),
    "size: floats": (label(size=(8.0, 8)), TypeError, "size: expected an int, got float 8.0"),
    "size: a string": (label(size="88"), TypeError, r"size: expected \(height, width\), got str '88'"),
    "proposals.maps: an array": (
        label(proposals(maps=np.ones((2, 3, 16)))), TypeError, "proposals.maps: expected a torch.Tensor, got ndarray"),
    "proposals.maps: images": (
        label(proposals(maps=torch.ones(2, 3, 4, 4))), ValueError,
        r"proposals.maps: expected \[batch, P, N\], got .*3, 4, 4\]"),
    "proposals.maps: float16": (
        label(proposals(maps=torch.ones(2, 3, 16).half())), ValueError,
        "proposals.maps: expected torch.float32 or torch.float64, got torch.float16"),
    "proposals.maps: integers": (
        label(proposals(maps=torch.ones(2, 3, 16).int())), TypeError,
        "proposals.maps: expected floating-point values, got torch.int32"),
    "proposals.maps: no proposal": (
        label(proposals(maps=torch.ones(2, 0, 16))), ValueError,
        r"proposals.maps: expected no empty dimension, got .*2, 0, 16"),
    "proposals.maps: require grad": (
        label(proposals(maps=requiring_grad(torch.ones(2, 3, 16)))), ValueError, "proposals.maps: requires grad"),
    "proposals.grid: other cells": (
        label(proposals(grid=(4, 5))), ValueError, r"proposals.grid: expected height \* width = 16, got 4 x 5"),
    "proposals.grid: None": (
        label(proposals(grid=None)), TypeError, r"proposals.grid: expected \(height, width\), got None"),
    "proposals.counts: a list": (
        label(proposals(counts=[3, 1])), ValueError,
        r"proposals.counts: expected an int32 tensor \[2\], got list \[3, 1\]"),
    "proposals.counts: floats": (
        label(proposals(counts=COUNTS["floats"])), ValueError,
        r"proposals.counts: expected an int32 tensor .* torch.float32"),
    "proposals.counts: int64": (
        label(proposals(counts=COUNTS["int64"])), ValueError,
        r"proposals.counts: expected an int32 tensor .* torch.int64"),
    "proposals.counts: too few": (
        label(proposals(counts=COUNTS["too few"])), ValueError,
        r"proposals.counts: expected an int32 tensor \[2\], got a tensor of shape \[1\]"),
    "proposals.counts: elsewhere": (
        label(proposals(counts=COUNTS["elsewhere"])), ValueError,
        "proposals.counts: expected a tensor on cpu, got meta"),
    "proposals.counts: above P": (
        label(proposals(counts=COUNTS["above P"])), ValueError, r"proposals.counts: expected 1 to 3, got \[3, 4\]"),
    "proposals.counts: zero": (
        refine(given=proposals(counts=COUNTS["zero"])), ValueError, r"proposals.counts: expected 1 to 3, got \[0, 1\]"),
    "label: float64 on the kernel": (
        label(proposals(maps=torch.ones(2, 3, 16).double()), backend="cpu"), ValueError,
        "backend='cpu' cannot run label here: expected torch.float32, got torch.float64"),
    # segment: all of it before the first op
    "segment: queries": (segment(torch.ones(1, 2, 16, 4)), TypeError, "queries: expected a list, one item a layer"),
    "segment: keys": (segment(None, queries()[:1]), ValueError, "keys: expected 2 items, one a layer, got 1"),
    "segment: size": (segment(size=(8, 0)), ValueError, "size: expected at least 1, got 0"),
    "segment: grids": (segment(grids=[(4, 4), (2, 3)]), ValueError, r"grids: expected height \* width = 4, got 2 x 3"),
    "segment: scales": (segment(scales=[1.0]), ValueError, "scales: expected 2 items, one a layer, got 1"),
    "segment: refine": (segment(refine="no"), TypeError, "refine: expected a bool, got str 'no'"),
    "segment: weights": (segment(weights="even"), ValueError, "weights: expected one of .* got 'even'"),
    "segment: anchors": (
        segment(anchors=16), ValueError, r"anchors: expected 1 to 4 anchors a side on a grid of \(4, 4\)"),
    "segment: anchor indices": (segment(anchors=[99]), ValueError, "anchors: expected indices from 0 to 15, got 99"),
    "segment: iterations": (segment(iterations=0), ValueError, "iterations: expected at least 1, got 0"),
    "segment: threshold": (segment(threshold=-1.0), ValueError, "threshold: expected positive numbers, got -1.0"),
    "segment: rule": (segment(rule="best"), ValueError, r"rule: expected one of \('paper', 'official'\), got 'best'"),
    "segment: backend": (segment(backend="fast"), ValueError, "backend: expected one of 'auto', .* got 'fast'"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "exception", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], exception: type[Exception], message: str
) -> None:
    choose = backends.implementation

    def work(*arguments: Any) -> NoReturn:
        raise AssertionError("work began before all was checked")

    def idle(*arguments: Any, **request: Any) -> Callable[..., NoReturn]:
        choose(*arguments, **request)
        return work

    monkeypatch.setattr(backends, "implementation", idle)
    monkeypatch.setattr(reference, "refine", work)
    with pytest.raises(exception, match=message) as caught:
        call()
    assert caught.type is exception


def test_the_calls_that_the_table_spoils_are_good() -> None:
    for op in (aggregate, aggregate_maps, merge, refine, label, segment):
        op()()
    assert len(REFUSED) >= 60


def spoiled(tensors: list[Tensor], layer: int, value: float) -> list[Tensor]:
    tensors[layer].view(-1)[-1] = value
    return tensors


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("layer", [0, 1])
class TestNonFinite:
    def message(self, layer: int) -> str:
        return f"layer {layer}: expected finite attention, found NaN or infinity .*use bfloat16 or float32"

    def test_queries(self, layer: int, value: float) -> None:
        with pytest.raises(ValueError, match=self.message(layer)):
            aggregate(spoiled(queries(), layer, value), queries())()

    def test_keys_in_half_precision(self, layer: int, value: float) -> None:
        half = [query.half() for query in queries()]
        with pytest.raises(ValueError, match=self.message(layer)):
            aggregate(half, spoiled([key.half() for key in queries()], layer, value))()

    def test_logsumexps(self, layer: int, value: float) -> None:
        logsumexps = [torch.ones(query.shape[:3]) for query in queries()]
        with pytest.raises(ValueError, match=self.message(layer)):
            aggregate(logsumexps=spoiled(logsumexps, layer, value))()

    def test_maps(self, layer: int, value: float) -> None:
        with pytest.raises(ValueError, match=self.message(layer)):
            aggregate_maps(spoiled(maps(), layer, value))()

    def test_segment(self, layer: int, value: float) -> None:
        with pytest.raises(ValueError, match=self.message(layer)):
            segment(spoiled(queries(), layer, value))()

    def test_attention(self, layer: int, value: float) -> None:
        two = spoiled([attention(), attention()], layer, value)
        with pytest.raises(ValueError, match="attention: expected finite values, found NaN or infinity"):
            merge(torch.cat(two))()

    def test_attention_of_refine(self, layer: int, value: float) -> None:
        two = torch.cat(spoiled([attention(), attention()], layer, value))
        with pytest.raises(ValueError, match=f"attention: expected finite values, found NaN or .* in image {layer}"):
            refine(two)()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("weights", [[0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
def test_what_is_not_finite_is_reported_by_its_number_beside_layers_that_are_not_read(
    backend: str, weights: list[float]
) -> None:
    last = len(weights) - 1
    bad = f"layer {last}: expected finite attention"
    good = queries(*((1, 2, 16, 4),) * len(weights))
    with pytest.raises(ValueError, match=bad):
        diffseg.aggregate_maps(
            spoiled(maps(*((1, 2, 16, 16),) * len(weights)), last, NAN), weights=weights, backend=backend
        )
    with pytest.raises(ValueError, match=bad):
        diffseg.aggregate(
            good,
            good,
            logsumexps=spoiled([torch.ones(query.shape[:3]) for query in good], last, NAN),
            weights=weights,
            backend=backend,
        )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_finite_queries_whose_sum_overflows_are_taken(backend: str) -> None:
    large = [torch.full((1, 2, 16, 4), 1e37)]
    found = diffseg.aggregate(large, [torch.zeros_like(large[0])], backend=backend)
    torch.testing.assert_close(found, torch.full((1, 16, 16), 1 / 16))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_that_overflow_are_reported(backend: str) -> None:
    large = [query * 1e25 for query in queries()]
    with pytest.raises(ValueError, match="layer 0: expected finite attention"):
        diffseg.aggregate(large, large, backend=backend)


def test_inputs_that_require_grad_pass_where_grad_is_off() -> None:
    given = [requiring_grad(query) for query in queries()]
    with torch.no_grad():
        assert not diffseg.segment(given, given, (8, 8), anchors=4).requires_grad
    with torch.inference_mode():
        diffseg.segment(given, given, (8, 8), anchors=4)


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"weights": [1.0, 2.0]}, {"scales": [NAN]}], ids=str)
def test_inputs_that_no_memory_could_hold_are_refused_at_once(options: dict[str, Any]) -> None:
    huge = torch.zeros(1).expand(1, 8, 2**40, 40)
    with pytest.raises(ValueError, match=next(iter(options))):
        diffseg.aggregate([huge], [huge], **options)
    with pytest.raises(ValueError, match="anchors: expected 1 to 1048576"):
        diffseg.segment([huge], [huge], (8, 8), anchors=2**21)


def test_numbers_of_other_libraries_pass() -> None:
    expected = diffseg.merge(attention(), anchors=[0, 5], iterations=2, threshold=[0.5, 0.7])
    for anchors in (np.array([0, 5]), torch.tensor([0, 5]), (0, 5)):
        for threshold in (np.array([0.5, 0.7]), torch.tensor([0.5, 0.7], dtype=torch.float64), (0.5, 0.7)):
            found = diffseg.merge(attention(), anchors=anchors, iterations=np.int64(2), threshold=threshold)
            assert torch.equal(found.maps, expected.maps)
    for one in (np.float32(1), np.array(1.0), torch.tensor(1.0)):
        diffseg.merge(attention(), anchors=np.int64(4), threshold=one)
    diffseg.merge(attention(), anchors=torch.tensor(4))
    assert diffseg.label(proposals(), torch.Size([8, 8])).shape == (2, 8, 8)
    for size in ([np.int64(8), 8], np.array([8, 8]), torch.tensor([8, 8])):
        assert diffseg.label(proposals(), size).shape == (2, 8, 8)
    square = aggregate()()
    for grids in (np.array([[4, 4], [2, 2]]), torch.tensor([[4, 4], [2, 2]]), [np.array([4, 4]), torch.tensor([2, 2])]):
        assert torch.equal(aggregate(grids=grids)(), square)


class Table:
    """As a data frame: of two dimensions, without one dtype, and several lines long."""

    ndim = 2

    def __repr__(self) -> str:
        return "a b\n1 2"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((3, 4, 5)), "ndarray of shape [3, 4, 5], float64"),
        ([np.zeros((2, 2))], "list [array([[0., 0.], [0., 0.]])]"),
        (np.float32(2.5), f"float32 {np.float32(2.5)!r}"),
        ("a  b", "str 'a  b'"),
        (Table(), "Table a b 1 2"),
    ],
)
def test_what_came_is_said_in_one_line(value: Any, said: str) -> None:
    assert describe(value) == said


class TestBackend:
    """The predicate that chooses and explains, on a backend made up for it."""

    def backend(self, error: str | None = None) -> Backend:
        def load() -> Any:
            if error:
                raise ImportError(error)
            return reference

        return Backend("toy", "a toy", ("cuda",), {"label": (torch.float32, torch.float16)}, load)

    @pytest.mark.parametrize(
        ("op", "device", "dtype", "error", "message"),
        [
            ("merge", "cuda", torch.float32, None, "it serves label only"),
            ("label", "cpu", torch.float32, None, "expected tensors on cuda, got cpu"),
            ("label", "cuda:1", torch.float64, None, "expected torch.float32 or torch.float16, got torch.float64"),
            ("label", "cuda:1", torch.float32, "toys are not built", "toys are not built"),
        ],
    )
    def test_what_stands_in_the_way(
        self, op: str, device: str, dtype: torch.dtype, error: str | None, message: str
    ) -> None:
        backend = self.backend(error)
        assert not backend.can_run(op, torch.device(device), dtype)
        with pytest.raises(ValueError, match=f"backend='toy' cannot run {op} here: {message}"):
            backend.can_run(op, torch.device(device), dtype, raise_error=True)

    def test_nothing_does(self) -> None:
        assert self.backend().can_run("label", torch.device("cuda"), torch.float16, raise_error=True)

    def test_one_asked_for_by_name_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(backends.BACKENDS, "toy", self.backend())
        with pytest.raises(ValueError, match="backend='toy' cannot run aggregate here: it serves label only"):
            diffseg.aggregate(queries(), queries(), backend="toy")
        with pytest.raises(ValueError, match="backend='toy' cannot run label here: expected tensors on cuda, got cpu"):
            diffseg.label(proposals(), (8, 8), backend="toy")

    def test_one_that_cannot_load_is_passed_over_and_explained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = Backend("cpu", "broken", ("cpu",), {"label": (torch.float32,)}, self.backend("no compiler").load)
        monkeypatch.setitem(backends.BACKENDS, "cpu", broken)
        assert diffseg.available_backends() == ["reference"]
        assert diffseg.explain_backends()["cpu"] == "broken; cannot run: no compiler"
        assert diffseg.label(proposals(), (8, 8)).shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "device: expected one that torch can use, got cuda:99"),
        ({"device": "cpu", "batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"device": "cpu", "dtype": torch.float32, "anchors": 5}, r"anchors: expected 1 to 4 anchors a side"),
    ],
)
def test_warmup_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffseg.warmup([((4, 4), 2, 8)], (8, 8), **options)
