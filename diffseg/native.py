"""The compiled kernels as functions of tensors: the only caller of the raw-pointer entry points.

Here dtype, strides and device become what a kernel expects, outputs and workspace are allocated with torch, and the
thread count or the stream is passed on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from .reference import Grid, non_finite_attention


@cache
def cpu() -> SimpleNamespace:
    """The ops of ``diffseg._cpu``; ImportError, with what to do, where it was not built.

    The instruction set is the best that the machine has, or the one that ``DIFFSEG_CPU_ISA`` names (avx512, avx2,
    portable); ValueError where there is no such one.
    """
    try:
        from . import _cpu
    except ImportError as error:
        raise ImportError(f"diffseg._cpu is not built ({error}); reinstall with a C++17 compiler at hand") from error
    if forced := os.environ.get("DIFFSEG_CPU_ISA"):
        _cpu.use_isa(forced)
    kernels = _CpuKernels(_cpu)
    return SimpleNamespace(
        aggregate=kernels.aggregate,
        aggregate_maps=kernels.aggregate_maps,
        merge=kernels.merge,
        label=kernels.label,
        aggregate_cross=kernels.aggregate_cross,
        score_masks=kernels.score_masks,
    )


class _CpuKernels:
    """The ops of :mod:`diffseg.reference` on the C++ kernels; arithmetic is in float32."""

    def __init__(self, module: ModuleType) -> None:
        self._module: Any = module

    def aggregate(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        grids: Sequence[Grid],
        scales: Sequence[float],
        logsumexps: Sequence[Tensor] | None,
        ratios: Sequence[float],
        dtype: torch.dtype,
    ) -> Tensor:
        _check_finite(queries, keys)
        if logsumexps is not None:
            logsumexps = [logsumexp.float().contiguous() for logsumexp in logsumexps]
        layers = [
            self._module.Layer(
                queries=self._view(queries[layer]),
                keys=self._view(keys[layer]),
                logsumexps=0 if logsumexps is None else logsumexps[layer].data_ptr(),
                heads=queries[layer].shape[1],
                depth=queries[layer].shape[3],
                grid=grids[layer],
                scale=scales[layer],
                ratio=ratios[layer],
                number=layer,
            )
            for layer in _by_size(grids)
        ]
        return _aggregated(self._module.aggregate, layers, queries[0].shape[0], grids, dtype)

    def aggregate_maps(
        self, maps: Sequence[Tensor], grids: Sequence[Grid], ratios: Sequence[float], dtype: torch.dtype
    ) -> Tensor:
        maps = [layer if layer.stride(3) == 1 else layer.contiguous() for layer in maps]
        layers = [
            self._module.Layer(
                maps=self._view(maps[layer]),
                heads=maps[layer].shape[1],
                grid=grids[layer],
                ratio=ratios[layer],
                number=layer,
            )
            for layer in _by_size(grids)
        ]
        return _aggregated(self._module.aggregate_maps, layers, maps[0].shape[0], grids, dtype)

    def merge(
        self,
        attention: Tensor,
        grid: Grid,
        anchors: Sequence[int],
        thresholds: Sequence[float],
        rule: Literal["paper", "official"],
    ) -> tuple[Tensor, Tensor]:
        attention = attention if attention.stride(2) == 1 else attention.contiguous()
        maps = torch.empty(len(attention), len(anchors), attention.shape[2])
        counts = torch.empty(len(attention), dtype=torch.int32)
        bad = self._module.merge(
            self._view(attention.unsqueeze(1)), grid, len(attention), anchors, thresholds, rule == "paper",
            maps.data_ptr(), counts.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if bad >= 0:
            raise ValueError("attention: expected finite values, found NaN or infinity")
        return maps, counts

    def label(self, maps: Tensor, counts: Tensor, grid: Grid, size: Grid) -> Tensor:
        maps, counts = maps.contiguous(), counts.contiguous()
        batch_size, length, _ = maps.shape
        winner = torch.empty((batch_size, *size), dtype=torch.int32)
        self._module.label(
            maps.data_ptr(), counts.data_ptr(), winner.data_ptr(), batch_size, length, grid, size,
            torch.get_num_threads(),
        )  # fmt: skip
        return winner

    def aggregate_cross(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        grids: Sequence[Grid],
        scales: Sequence[float],
        shares: Tensor,
        size: Grid,
    ) -> Tensor:
        _check_finite(queries, keys)
        shares = shares.contiguous()
        batch_size, words, tokens = shares.shape
        layers = [
            self._module.Layer(
                queries=self._view(queries[layer]),
                keys=self._view(keys[layer]),
                logsumexps=0,
                heads=queries[layer].shape[1],
                depth=queries[layer].shape[3],
                grid=grids[layer],
                scale=scales[layer],
                ratio=1.0,
                number=layer,
            )
            for layer in _by_size(grids)
        ]
        maps = torch.empty(batch_size, words, *size)
        bad = self._module.aggregate_cross(
            layers, batch_size, shares.data_ptr(), words, tokens, size, maps.data_ptr(), torch.get_num_threads()
        )
        if bad >= 0:
            raise ValueError(non_finite_attention(bad))
        return maps

    def score_masks(self, maps: Tensor, labels: Tensor, masks: int) -> Tensor:
        maps, labels = maps.contiguous(), labels.contiguous()
        batch_size, words, *grid = maps.shape
        scores = torch.empty(batch_size, masks, words)
        self._module.score_masks(
            maps.data_ptr(), labels.data_ptr(), scores.data_ptr(), batch_size, words, grid, labels.shape[1:], masks,
            torch.get_num_threads(),
        )  # fmt: skip
        return scores

    def _view(self, tensor: Tensor) -> Any:
        return self._module.View(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tensor.stride())


def _check_finite(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """A score of -inf leaves finite attention behind, which the kernels cannot see."""
    for layer, tensors in enumerate(zip(queries, keys, strict=True)):
        if not all(tensor.sum(dtype=torch.float32).isfinite() for tensor in tensors):
            raise ValueError(non_finite_attention(layer))


def _by_size(grids: Sequence[Grid]) -> list[int]:
    """The layers in order of their grids, as the kernels expect them: those of one grid together, the largest last."""
    return sorted(range(len(grids)), key=lambda layer: (grids[layer][0] * grids[layer][1], grids[layer]))


def _aggregated(run: Any, layers: list[Any], batch_size: int, grids: Sequence[Grid], dtype: torch.dtype) -> Tensor:
    """Calls a kernel for A_f [B, N, N]. For another storage dtype it exists in float32 first."""
    cells = max(height * width for height, width in grids)
    attention = torch.empty(batch_size, cells, cells)
    bad = run(layers, batch_size, attention.data_ptr(), torch.get_num_threads())
    if bad >= 0:
        raise ValueError(non_finite_attention(bad))
    return attention.to(dtype)
