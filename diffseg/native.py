"""The compiled kernels as functions of tensors: the only caller of the raw-pointer entry points.

Here dtype, strides and device become what a kernel expects, outputs and workspace are allocated with torch, and the
thread count or the stream is passed on.

In a forked process the C++ kernels run on one thread by themselves. Torch's operators, which some ops call too, hang
there, as anywhere else after a fork, until the process has called ``torch.set_num_threads(1)``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from .reference import Grid, NonFiniteAttentionError


@cache
def cpu() -> CpuKernels:
    """The ops of ``diffseg._cpu``; ImportError, with what to do, where it was not built or needs another OpenMP.

    The instruction set is the best that the machine has, or the one that ``DIFFSEG_CPU_ISA`` names
    (avx512bf16, avx512, avx2, portable); ValueError where there is no such one.
    """
    try:
        _cpu = import_module("diffseg._cpu")
    except ImportError as error:
        raise ImportError(
            f"diffseg._cpu cannot be loaded ({error}); reinstall with a C++17 compiler at hand, on Linux GCC"
        ) from error
    if forced := os.environ.get("DIFFSEG_CPU_ISA"):
        _cpu.use_isa(forced)
    return CpuKernels(_cpu)


@cache
def cuda() -> CudaKernels:
    """The ops of ``diffseg._cuda``; ImportError, with what to do, where it was not built or the driver is too old."""
    try:
        _cuda = import_module("diffseg._cuda")
    except ImportError as error:
        raise ImportError(
            f"diffseg._cuda is not built ({error}); reinstall with nvcc at hand: DIFFSEG_CUDA=1 pip install ."
        ) from error
    driver, runtime = _cuda.driver_version(), _cuda.runtime_version()
    if driver == 0:
        raise ImportError("no NVIDIA driver is installed")
    if driver // 1000 < runtime // 1000:  # within a major version any driver serves
        raise ImportError(
            f"the driver serves CUDA {_version(driver)}, the kernels were built with CUDA {_version(runtime)}: install "
            f"a newer driver or build them with CUDA {driver // 1000}"
        )
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise ImportError("no CUDA GPU is visible to torch")
    return CudaKernels(_cuda)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class CpuKernels:
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
        grid: Grid,
        out: Tensor,
    ) -> None:
        _check_finite(queries, keys)
        if logsumexps is not None:
            logsumexps = [logsumexp.float().contiguous() for logsumexp in logsumexps]
        layers = self._layers(queries, keys, grids, scales, logsumexps, ratios)
        _aggregate_into(self._module.aggregate, layers, grid, out)

    def aggregate_maps(
        self,
        maps: Sequence[Tensor],
        grids: Sequence[Grid],
        ratios: Sequence[float],
        grid: Grid,
        out: Tensor,
    ) -> None:
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
        _aggregate_into(self._module.aggregate_maps, layers, grid, out)

    def merge(
        self,
        attention: Tensor,
        grid: Grid,
        anchors: Sequence[int],
        thresholds: Sequence[float],
        rule: Literal["paper", "official"],
    ) -> tuple[Tensor, Tensor]:
        attention = attention if attention.stride(2) == 1 else attention.contiguous()
        maps = torch.empty(len(attention), len(anchors), attention.shape[2], dtype=torch.float32)
        counts = torch.empty(len(attention), dtype=torch.int32)
        bad = self._module.merge(
            self._view(attention.unsqueeze(1)), grid, len(attention), anchors, thresholds, rule == "paper",
            maps.data_ptr(), counts.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if bad is not None:
            raise ValueError(f"attention: expected finite values, found NaN or infinity in image {bad}")
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

    def renumber(self, labels: Tensor, length: int) -> Tensor:
        numbered = labels.contiguous()
        segments = torch.empty(len(labels), dtype=torch.int32)
        self._module.renumber(
            numbered.data_ptr(), segments.data_ptr(), len(labels), labels[0].numel(), length, torch.get_num_threads()
        )
        _copy_into(numbered, labels)
        return segments

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
        layers = self._layers(queries, keys, grids, scales, None, [1.0] * len(grids))
        maps = torch.empty(batch_size, words, *size, dtype=torch.float32)
        bad = self._module.aggregate_cross(
            layers, batch_size, shares.data_ptr(), words, tokens, size, maps.data_ptr(), torch.get_num_threads()
        )
        if bad is not None:
            raise NonFiniteAttentionError(bad)
        return maps

    def score_masks(self, maps: Tensor, labels: Tensor, masks: int) -> Tensor:
        maps, labels = maps.contiguous(), labels.contiguous()
        batch_size, words, *grid = maps.shape
        scores = torch.empty(batch_size, masks, words, dtype=torch.float32)
        self._module.score_masks(
            maps.data_ptr(), labels.data_ptr(), scores.data_ptr(), batch_size, words, grid, labels.shape[1:], masks,
            torch.get_num_threads(),
        )  # fmt: skip
        return scores

    def multiply_adds(self, rounds: int) -> float:
        """For benchmarks: takes rounds of multiply-adds in one thread's registers, and returns how many those were."""
        count: float = self._module.multiply_adds(rounds)
        return count

    def exponentials(self, rounds: int) -> float:
        """The same of exponentials."""
        count: float = self._module.exponentials(rounds)
        return count

    def _layers(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        grids: Sequence[Grid],
        scales: Sequence[float],
        logsumexps: Sequence[Tensor] | None,
        ratios: Sequence[float],
    ) -> list[Any]:
        """What the kernels call the layers; they point into the tensors and do not keep them."""
        return [
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

    def _view(self, tensor: Tensor) -> Any:
        return self._module.View(tensor.data_ptr(), _dtype_name(tensor.dtype), tensor.stride())


class CudaKernels:
    """The ops of :mod:`diffseg.reference` on the CUDA kernels; they wait for nothing and allocate with torch.

    Arguments, shapes and results are those of :mod:`diffseg.reference`.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module: Any = module
        self._probed = cache(self._probe)

    def obstacle(self, device: torch.device) -> str | None:
        """Why the kernels cannot run on ``device``; without an index, on torch's current one."""
        return self._probed(_device_index(device))

    def _probe(self, index: int) -> str | None:
        with torch.cuda.device(index):
            reason = self._module.obstacle(index)
        return f"built for {self._module.targets}, which cuda:{index} cannot run: {reason}" if reason else None

    def row_obstacle(self, device: torch.device, grids: Sequence[Grid]) -> str | None:
        """Why maps over ``grids`` cannot be summed on ``device``, of which a block holds a row."""
        if not grids:
            return None
        needed, grid = max((self._module.row_bytes(grid), grid) for grid in grids)
        there = self._module.shared_memory_of(_device_index(device))
        if needed <= there:
            return None
        return f"a row of maps on a grid of {grid} takes {needed} bytes of shared memory, of which a block has {there}"

    def aggregate(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        grids: Sequence[Grid],
        scales: Sequence[float],
        logsumexps: Sequence[Tensor] | None,
        ratios: Sequence[float],
        grid: Grid,
        out: Tensor,
    ) -> None:
        with self._on(queries[0].device) as queue:
            queries, keys = ([_rows_of_16_bytes(layer) for layer in layers] for layers in (queries, keys))
            if logsumexps is not None:
                logsumexps = [logsumexp.float().contiguous() for logsumexp in logsumexps]
            layers = self._layers(queries, keys, grids, scales, logsumexps, ratios)
            attention, output = self._output(grid, out)
            name = _dtype_name(queries[0].dtype)
            workspace = self._workspace(self._module.aggregate_workspace(layers, name, output), attention)
            self._module.aggregate(layers, name, output, workspace.data_ptr(), queue)
            _copy_into(attention, out)

    def aggregate_maps(
        self,
        maps: Sequence[Tensor],
        grids: Sequence[Grid],
        ratios: Sequence[float],
        grid: Grid,
        out: Tensor,
    ) -> None:
        with self._on(maps[0].device) as queue:
            maps = [layer if layer.stride(3) == 1 else layer.contiguous() for layer in maps]
            layers = [
                self._module.MapLayer(maps=self._view(layer), heads=layer.shape[1], grid=layer_grid, ratio=ratio)
                for layer, layer_grid, ratio in zip(maps, grids, ratios, strict=True)
            ]
            attention, output = self._output(grid, out)
            workspace = self._workspace(self._module.aggregate_maps_workspace(layers, output), attention)
            self._module.aggregate_maps(layers, _dtype_name(maps[0].dtype), output, workspace.data_ptr(), queue)
            _copy_into(attention, out)

    def merge(
        self,
        attention: Tensor,
        grid: Grid,
        anchors: Sequence[int],
        thresholds: Sequence[float],
        rule: Literal["paper", "official"],
    ) -> tuple[Tensor, Tensor]:
        with self._on(attention.device) as queue:
            attention = attention if attention.stride(2) == 1 else attention.contiguous()
            batch_size, _, cells = attention.shape
            maps = torch.empty(batch_size, len(anchors), cells, dtype=torch.float32, device=attention.device)
            counts = torch.empty(batch_size, dtype=torch.int32, device=attention.device)
            options = self._module.MergeOptions(anchors=anchors, thresholds=thresholds, exclusive=rule == "paper")
            workspace = self._workspace(self._module.merge_workspace(batch_size, cells, options), attention)
            self._module.merge(
                self._view(attention.unsqueeze(1)), _dtype_name(attention.dtype), batch_size, cells, options,
                maps.data_ptr(), counts.data_ptr(), workspace.data_ptr(), queue,
            )  # fmt: skip
            return maps, counts

    def label(self, maps: Tensor, counts: Tensor, grid: Grid, size: Grid) -> Tensor:
        with self._on(maps.device) as queue:
            maps, counts = maps if maps.stride(2) == 1 else maps.contiguous(), counts.contiguous()
            winner = torch.empty((len(maps), *size), dtype=torch.int32, device=maps.device)
            self._module.label(
                self._view(maps.unsqueeze(2)), counts.data_ptr(), winner.data_ptr(), len(maps), grid, size, queue
            )
            return winner

    def renumber(self, labels: Tensor, length: int) -> Tensor:
        with self._on(labels.device) as queue:
            numbered = labels.contiguous()
            segments = torch.empty(len(labels), dtype=torch.int32, device=labels.device)
            present = torch.zeros(len(labels), length, dtype=torch.int32, device=labels.device)
            self._module.renumber(
                numbered.data_ptr(), present.data_ptr(), segments.data_ptr(), len(labels), labels[0].numel(), length,
                queue,
            )  # fmt: skip
            _copy_into(numbered, labels)
            return segments

    def aggregate_cross(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        grids: Sequence[Grid],
        scales: Sequence[float],
        shares: Tensor,
        size: Grid,
    ) -> Tensor:
        with self._on(shares.device) as queue:
            queries, keys = ([_rows_of_16_bytes(layer) for layer in layers] for layers in (queries, keys))
            shares = shares.contiguous()
            batch_size, count, tokens = shares.shape
            layers = self._layers(queries, keys, grids, scales, None, [1.0] * len(grids))
            words = self._module.Words(shares=shares.data_ptr(), count=count, tokens=tokens)
            maps = torch.empty(batch_size, count, *size, dtype=torch.float32, device=shares.device)
            workspace = self._workspace(self._module.aggregate_cross_workspace(layers, words, batch_size, size), maps)
            self._module.aggregate_cross(
                layers,
                _dtype_name(queries[0].dtype),
                words,
                batch_size,
                size,
                maps.data_ptr(),
                workspace.data_ptr(),
                queue,
            )
            return maps

    def score_masks(self, maps: Tensor, labels: Tensor, masks: int) -> Tensor:
        with self._on(maps.device) as queue:
            maps, labels = maps.contiguous(), labels.contiguous()
            batch_size, words, *grid = maps.shape
            size = labels.shape[1:]
            scores = torch.empty(batch_size, masks, words, dtype=torch.float32, device=maps.device)
            workspace = self._workspace(self._module.score_masks_workspace(batch_size, words, size, masks), maps)
            self._module.score_masks(
                maps.data_ptr(), labels.data_ptr(), scores.data_ptr(), batch_size, words, grid, size, masks,
                workspace.data_ptr(), queue,
            )  # fmt: skip
            return scores

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[Any]:
        """Makes ``device`` torch's current one, and gives its current stream to the kernels."""
        with torch.cuda.device(device):
            yield self._module.Queue(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)

    def _layers(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        grids: Sequence[Grid],
        scales: Sequence[float],
        logsumexps: Sequence[Tensor] | None,
        ratios: Sequence[float],
    ) -> list[Any]:
        """What the kernels call the layers; they point into the tensors and do not keep them."""
        return [
            self._module.Layer(
                queries=self._view(queries[layer]),
                keys=self._view(keys[layer]),
                logsumexps=0 if logsumexps is None else logsumexps[layer].data_ptr(),
                heads=queries[layer].shape[1],
                depth=queries[layer].shape[3],
                grid=grids[layer],
                scale=scales[layer],
                ratio=ratios[layer],
            )
            for layer in range(len(grids))
        ]

    def _view(self, tensor: Tensor) -> Any:
        return self._module.View(tensor.data_ptr(), tensor.stride()[:3])

    def _output(self, grid: Grid, out: Tensor) -> tuple[Tensor, Any]:
        """``out``, or new memory if the kernels cannot store vectors into it; and what they call it."""
        attention = out if out.data_ptr() % 16 == 0 else torch.empty_like(out)
        return attention, self._module.Attention(
            data=attention.data_ptr(), dtype=_dtype_name(out.dtype), grid=grid, batch=len(out)
        )

    def _workspace(self, size: int, like: Tensor) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=like.device)


def _device_index(device: torch.device) -> int:
    """Of a GPU; without one of its own, torch's current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows_of_16_bytes(tensor: Tensor) -> Tensor:
    """``tensor`` [B, heads, n, d] where all its rows lie at multiples of 16 bytes, else a copy, padded with zeros."""
    unit = 16 // tensor.element_size()
    aligned = (
        tensor.stride(3) == 1
        and tensor.shape[3] % unit == 0
        and tensor.data_ptr() % 16 == 0
        and not any(stride % unit for stride in tensor.stride()[:3])
    )
    if aligned:
        return tensor
    copy = tensor.new_zeros(*tensor.shape[:3], tensor.shape[3] + -tensor.shape[3] % unit)
    copy[..., : tensor.shape[3]] = tensor
    return copy


def _check_finite(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
    """A score of -inf leaves finite attention behind, which the kernels cannot see."""
    for layer, tensors in enumerate(zip(queries, keys, strict=True)):
        for tensor in tensors:  # a sum is quick, but may overflow
            if not (tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all()):
                raise NonFiniteAttentionError(layer)


def _by_size(grids: Sequence[Grid]) -> list[int]:
    """The layers in order of their grids, as the kernels expect them: those of one grid together, the largest last."""
    return sorted(range(len(grids)), key=lambda layer: (grids[layer][0] * grids[layer][1], grids[layer]))


def _aggregate_into(run: Any, layers: list[Any], grid: Grid, out: Tensor) -> None:
    """Calls a C++ kernel for A_f [B, N, N]. For another storage dtype it exists in float32 first."""
    attention = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    bad = run(layers, grid, len(out), attention.data_ptr(), torch.get_num_threads())
    if bad is not None:
        raise NonFiniteAttentionError(bad)
    _copy_into(attention, out)


def _copy_into(result: Tensor, out: Tensor) -> None:
    """Copies ``result`` into ``out`` unless it lies there."""
    if result is not out:
        out.copy_(result)
