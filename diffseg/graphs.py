"""Shapes that a pipeline holds ready: buffers that stay and, on a GPU, one CUDA graph from pixels to labels.

Elsewhere the same calls are made without a graph. A batch waits for the device once, when its labels are downloaded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from . import ops
from .capture import is_altered
from .images import resize
from .ops import Proposals, Rule
from .reference import Grid

logger = logging.getLogger(__name__)

_RUNS_AHEAD = 3  # of a capture: kernels are compiled and loaded, libraries allocate their workspaces

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


_CAPTURING = threading.Lock()  # PyTorch allows one capture at a time in a process


def lock_of(unet: nn.Module) -> threading.RLock:
    """The lock under which a UNet runs, compiled or not: pipelines may share it, and recording swaps its processors."""
    return _LOCKS.setdefault(getattr(unet, "_orig_mod", unet), threading.RLock())


class Options(NamedTuple):
    """What decides the labels, beside image and size; as in ``DiffSegPipeline.__call__``."""

    timestep: int
    threshold: tuple[float, ...]
    anchors: int
    rule: Rule
    weights: str | tuple[float, ...]
    backend: str


class Shape(NamedTuple):
    """Of a batch that shares a pass."""

    batch_size: int
    size: Grid  # at which the images are processed


class Segmented(NamedTuple):
    """What a batch leaves on the device."""

    labels: list[Tensor]  # int32 [H, W] each, 0..S-1
    segments: Tensor  # int32 [B], S, or 0 where the attention is not finite
    proposals: Proposals
    finite: Tensor  # bool [B]

    @classmethod
    def at(cls, sizes: Sequence[Grid], proposals: Proposals, finite: Tensor, backend: str) -> Segmented:
        """Labels of each image at its own size; one call where all sizes are equal."""
        maps, counts, grid = proposals
        if len(set(sizes)) == 1:
            parts = [proposals]
        else:
            parts = [Proposals(maps[i : i + 1], counts[i : i + 1], grid) for i in range(len(sizes))]
        found = [ops.numbered_labels(part, size, backend=backend) for part, size in zip(parts, sizes, strict=False)]
        segments = torch.cat([count for _, count in found]) * finite
        return cls([label for labels, _ in found for label in labels], segments, proposals, finite)


class Recording:
    """``run`` on batches of one shape; as a CUDA graph where ``device`` is a GPU.

    Args:
        run: from pixels, float32 [B, 3, h, w] in [0, 1] on ``device``; must not wait for it.
        weights: tensors that the graph reads.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Segmented],
        shape: Shape,
        device: torch.device,
        weights: Sequence[Tensor] = (),
    ) -> None:
        self._run = run
        self._staging, self._pixels = staging(shape, device)
        self._pixels.zero_()
        self._weights = weights
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._result: Segmented | None = None
        if device.type == "cuda":
            with torch.cuda.device(device), _CAPTURING:
                self._capture()
        else:
            run(self._pixels)

    def __call__(self, pictures: Sequence[Tensor]) -> Segmented:
        """Labels of pictures [3, H, W]. On a GPU they lie in buffers that the next call overwrites."""
        upload(pictures, self._staging, self._pixels)
        if self._graph is None or self._result is None:
            return self._run(self._pixels)
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        stream = self._stream = _stream_of_no_graph()
        _CAPTURED.add(self)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # also around the capture, which leaves its stream current if it fails
            for _ in range(_RUNS_AHEAD):
                self._run(self._pixels)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._result = self._run(self._pixels)


_CAPTURED: WeakSet[Recording] = WeakSet()


def _stream_of_no_graph() -> torch.cuda.Stream:
    """A stream on which no living graph was captured, if there is one.

    A graph's end may free what its stream's cuBLAS calls work in, and PyTorch hands out some 32 streams in turn. Graphs
    of different streams share no memory: each holds its own intermediates.
    """
    taken = {each._stream.cuda_stream for each in _CAPTURED if each._stream is not None}
    streams = [torch.cuda.Stream() for _ in range(len(taken) + 1)]
    return next((each for each in streams if each.cuda_stream not in taken), streams[0])


class Recordings:
    """A pipeline's recordings, by shape and options. They end when a network is moved, cast or replaced."""

    def __init__(self) -> None:
        self._held: dict[tuple[Shape, Options], Recording] = {}
        self._missed: set[tuple[Shape, Options]] = set()
        self._marks: tuple[Any, ...] = ()

    def add(
        self,
        run: Callable[[Tensor], Segmented],
        shape: Shape,
        options: Options,
        device: torch.device,
        networks: Sequence[nn.Module],
    ) -> None:
        """Records ``run``, in place of a recording of the same shape and options."""
        self.drop_stale(networks)
        self._held.pop((shape, options), None)
        weights = [tensor.data for network in networks for tensor in (*network.parameters(), *network.buffers())]
        self._held[shape, options] = Recording(run, shape, device, weights)
        self._marks = _marks(networks)

    def find(self, shape: Shape, options: Options, networks: Sequence[nn.Module]) -> Recording | None:
        """The recording for a batch; None, said once a shape at debug level, where there are only others."""
        self.drop_stale(networks)
        found = self._held.get((shape, options))
        if found is None and self._held and (shape, options) not in self._missed:
            self._missed.add((shape, options))
            logger.debug("%s, %s is not recorded: it runs eagerly", shape, options)
        return found

    def clear(self) -> None:
        self._held.clear()
        self._missed.clear()

    def drop_stale(self, networks: Sequence[nn.Module]) -> None:
        """Ends the recordings unless the weights of ``networks`` lie where they did."""
        if self._held and self._marks != _marks(networks):
            logger.debug("the networks were moved, cast or replaced: %d recordings dropped", len(self._held))
            self.clear()


def fuse_projections(unet: Any) -> bool:
    """Makes one product of each layer's Q, K and V; whether it did.

    Not where processors were chosen, or where a projection is more than a matrix: adapted, quantised or hooked.
    """
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    projections = [each for layer in layers for each in (layer.to_q, layer.to_k, layer.to_v)]
    usual = all(type(processor) is AttnProcessor2_0 for processor in unet.attn_processors.values()) and all(
        type(each) is nn.Linear and type(each.weight) is nn.Parameter and not is_altered(each) for each in projections
    )
    if usual:
        unet.fuse_qkv_projections()
    return usual


def split_projections(unet: Any) -> None:
    """Undoes :func:`fuse_projections`; diffusers' own method leaves the fused weights behind."""
    unet.unfuse_qkv_projections()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fused_projections = False
            for name in ("to_qkv", "to_kv"):
                if hasattr(module, name):
                    delattr(module, name)


def _marks(networks: Sequence[nn.Module]) -> tuple[Any, ...]:
    """Changes with the networks and where their weights lie."""
    return tuple((id(network), next(network.parameters()).data_ptr()) for network in networks)


def staging(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two buffers for pixels [B, 3, h, w]: on the host, pinned, and on ``device``; one and the same on a CPU."""
    on_gpu = device.type == "cuda"
    host = torch.empty(shape.batch_size, 3, *shape.size, dtype=torch.float32, device="cpu", pin_memory=on_gpu)
    return host, host if device.type == "cpu" else torch.empty_like(host, device=device)


def upload(pictures: Sequence[Tensor], host: Tensor, pixels: Tensor) -> None:
    """Resizes pictures [3, H, W] into ``pixels``, by way of ``host`` where they are on the host; waits for nothing."""
    for picture, staged, slot in zip(pictures, host, pixels, strict=True):
        resized = resize(picture, slot.shape[1:])
        if resized.device.type == "cpu":
            resized = staged.copy_(resized)
        slot.copy_(resized, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, after one wait for all of them."""
    if not any(tensor.is_cuda for tensor in tensors):
        return [tensor.cpu() for tensor in tensors]
    pinned = [
        torch.empty(each.shape, dtype=each.dtype, device="cpu", pin_memory=True).copy_(each, non_blocking=True)
        for each in tensors
    ]
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))
    arrived.synchronize()
    return [each.clone() for each in pinned]
