"""Checks of arguments: each raises an error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .reference import Grid

RULES = ("paper", "official")
WEIGHT_SCHEMES = ("proportional", "per_layer", "literal")
_LARGEST: Any = sys.float_info.max  # Any: to mypy a Real cannot be compared
_STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_sequence(name: str, value: Any, item: str = "layer") -> None:
    if isinstance(value, (Tensor, str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list, one item a {item}, got {describe(value)}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one {item}, got an empty list")


def check_length(name: str, value: Sequence[Any], length: int) -> None:
    if len(value) != length:
        raise ValueError(f"{name}: expected {length} items, one a layer, got {len(value)}")


def check_layers(name: str, layers: Any, dimensions: tuple[str, ...]) -> None:
    check_sequence(name, layers)
    for index, layer in enumerate(layers):
        check_tensor(f"{name}[{index}]", layer, dimensions)


def check_tensor(name: str, tensor: Any, dimensions: tuple[str, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(tensor)}")
    if tensor.ndim != len(dimensions):
        raise ValueError(f"{name}: expected [{', '.join(dimensions)}], got a tensor of shape {list(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected no empty dimension, got shape {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating-point values, got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but diffseg is inference only: detach it or use torch.no_grad()")


def check_alike(name: str, tensor: Tensor, first: Tensor) -> None:
    found, expected = (tensor.shape[0], tensor.dtype, tensor.device), (first.shape[0], first.dtype, first.device)
    if found != expected:
        raise ValueError(
            f"{name}: expected batch {expected[0]}, {expected[1]}, {expected[2]} as in the first layer, "
            f"got batch {found[0]}, {found[1]}, {found[2]}"
        )


def check_grids(grids: Sequence[Grid] | None, cells: Sequence[int], name: str = "grids") -> list[Grid]:
    """One (h, w) a layer, each h * w = n."""
    cells = [operator.index(n) for n in cells]
    if grids is None:
        checked = [(math.isqrt(n), math.isqrt(n)) for n in cells]
    else:
        pairs = plain(grids)
        if not isinstance(pairs, Sequence) or isinstance(pairs, str):
            raise TypeError(f"{name}: expected a list of (height, width), got {describe(grids)}")
        check_length(name, pairs, len(cells))
        checked = [check_pair(name, grid) for grid in pairs]
    for grid, n in zip(checked, cells, strict=True):
        if grid[0] * grid[1] != n:
            hint = f"; {n} is no square: pass {name}=" if grids is None else ""
            raise ValueError(f"{name}: expected height * width = {n}, got {grid[0]} x {grid[1]}{hint}")
    return checked


def check_output_grid(grid: Any, grids: Sequence[Grid]) -> Grid:
    """The (h, w) asked for, or, for None, the largest of ``grids``; none of which may be taller or wider."""
    height, width = largest = max(grids, key=math.prod) if grid is None else check_pair("grid", grid)
    for rows, columns in grids:
        if rows > height or columns > width:
            where = (
                "grids: expected every grid to fit in the largest" if grid is None else "grid: expected room for all"
            )
            raise ValueError(f"{where}, {height} x {width}, got {rows} x {columns}")
    return largest


def check_pair(name: str, pair: Any) -> Grid:
    sides = plain(pair)
    if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
        raise TypeError(f"{name}: expected (height, width), got {describe(pair)}")
    for side in sides:
        check_integer(name, side, 1)
    return operator.index(sides[0]), operator.index(sides[1])


def check_integer(name: str, value: Any, smallest: int, largest: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if int(value) < smallest or (largest is not None and int(value) > largest):
        expected = f"at least {smallest}" if largest is None else f"{smallest} to {largest}"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(plain(value), bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")


def check_numbers(name: str, values: Any, length: int) -> list[float]:
    """Finite floats, ``length`` of them."""
    values = plain(values)
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name}: expected a list of {length} numbers, got {describe(values)}")
    check_length(name, values, length)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected numbers, got {describe(value)}")
        if not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"{name}: expected finite numbers, got {str(value)[:40]}")
    return [float(value) for value in values]


def check_thresholds(threshold: Any, iterations: Any) -> list[float]:
    check_integer("iterations", iterations, 1)
    threshold = plain(threshold)
    given = [threshold] * int(iterations) if isinstance(threshold, Real) else threshold
    if isinstance(given, (str, bytes)) or not hasattr(given, "__len__"):
        raise TypeError(f"threshold: expected one number, or {iterations}, one a round, got {describe(threshold)}")
    if len(given) != iterations:
        raise ValueError(f"threshold: expected one number, or {iterations}, one a round, got {len(given)}")
    thresholds = check_numbers("threshold", given, int(iterations))
    if min(thresholds) <= 0:
        raise ValueError(f"threshold: expected positive numbers, got {threshold}")
    return thresholds


def check_rule(rule: Any) -> None:
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")


def check_weight_scheme(weights: Any) -> None:
    if isinstance(weights, str) and weights not in WEIGHT_SCHEMES:
        raise ValueError(f"weights: expected one of {WEIGHT_SCHEMES} or a float a layer, got {weights!r}")


def check_storage_dtype(name: str, dtype: Any) -> None:
    if dtype not in _STORAGE_DTYPES:
        reason = " (sharp maps underflow)" if dtype == torch.float16 else ""
        raise ValueError(f"{name}: expected torch.float32, torch.float64 or torch.bfloat16, got {dtype}{reason}")


def check_out(out: Any, batch_size: int, grid: Grid, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {describe(out)}")
    cells = grid[0] * grid[1]
    expected = [batch_size, cells, cells]
    if list(out.shape) != expected or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out: expected {expected}, {dtype}, on {device}, got {list(out.shape)}, {out.dtype}, on {out.device}"
        )
    if not out.is_contiguous() or out.requires_grad:
        reason = f"strides {list(out.stride())}" if not out.is_contiguous() else "one that requires a gradient"
        raise ValueError(f"out: expected a contiguous tensor without gradient, got {reason}")


def check_attention(attention: Any) -> Tensor:
    check_tensor("attention", attention, ("batch", "N", "N"))
    if attention.shape[1] != attention.shape[2]:
        raise ValueError(f"attention: expected the last two sizes to be equal, got {list(attention.shape)}")
    check_storage_dtype("attention", attention.dtype)
    checked: Tensor = attention
    return checked


def plain(value: Any) -> Any:
    """Numbers of torch and numpy as Python's own: a number or nested lists; anything else as it came."""
    if isinstance(value, (int, float)):  # torch.compile has values of these types that it cannot ask for attributes
        return value
    return value.tolist() if hasattr(value, "tolist") else value


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}"
    if getattr(value, "ndim", 0) and hasattr(value, "dtype"):  # an array, whose values would take several lines
        return f"{type(value).__name__} of shape {list(value.shape)}, {value.dtype}"
    return re.sub(r"\s*\n\s*", " ", f"{type(value).__name__} {value!r}")[:100]
