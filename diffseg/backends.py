"""Which implementation serves an op here, and why the others do not.

Each backend has one predicate, :meth:`Backend.can_run`; it serves the automatic choice and the error text alike. A
backend that is asked for by name never falls back to another.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from . import native, reference
from .reference import Grid

OPS = ("aggregate", "aggregate_maps", "merge", "label", "renumber", "aggregate_cross", "score_masks")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: where it runs, in which dtypes, and what it needs."""

    name: str
    summary: str
    device_types: tuple[str, ...]  # empty: any
    dtypes: dict[str, tuple[torch.dtype, ...]]  # op -> dtypes of its tensors; an op that is absent is not served
    load: Callable[[], Any]  # the functions, one an op; raises ImportError with the reason where it cannot
    automatic: bool = True
    limit: Callable[..., str | None] | None = None  # (device, **request) -> what is beyond its range; asked last

    def can_run(
        self, op: str, device: torch.device, dtype: torch.dtype, *, raise_error: bool = False, **request: Any
    ) -> bool:
        """Whether ``op`` runs here on tensors of ``dtype`` on ``device``; or raises a ValueError that says why not.

        ``request`` is what else an implementation may limit: ``anchors``, their number; ``width``, the channels of a
        head; ``storage``, the dtype of A_f; ``lower_grids``, those below that of A_f; ``summed_grids``, those whose
        maps are summed; ``images``, those of a batch, times the layers where these are summed; ``tokens``, those of a
        text. What is left out is within the limits.
        """
        reason = self._obstacle(op, device, dtype, request)
        if reason is not None and raise_error:
            raise ValueError(f"backend={self.name!r} cannot run {op} here: {reason}")
        return reason is None

    def _obstacle(self, op: str, device: torch.device, dtype: torch.dtype, request: dict[str, Any]) -> str | None:
        if op not in self.dtypes:
            return f"it serves {', '.join(self.dtypes)} only"
        if self.device_types and device.type not in self.device_types:
            return f"expected tensors on {' or '.join(self.device_types)}, got {device}"
        if dtype not in self.dtypes[op]:
            return f"expected {' or '.join(str(known) for known in self.dtypes[op])}, got {dtype}"
        return self.unavailable() or (self.limit(device, **request) if self.limit else None)

    def unavailable(self) -> str | None:
        """Why this backend cannot be loaded on this machine; None where it can."""
        try:
            self.load()
        except ImportError as error:
            return str(error)
        return None


def _kernel_limit(
    _device: torch.device, *, anchors: int = 1, storage: torch.dtype = torch.float32, **_: Any
) -> str | None:
    """What every kernel leaves to the reference."""
    if storage == torch.float64:
        return "it stores torch.float32 or torch.bfloat16, got dtype=torch.float64"
    if anchors > _MOST_ANCHORS:
        return f"expected at most {_MOST_ANCHORS} anchors (32 a side), got {anchors}"
    return None


def _gpu_limit(device: torch.device, *, images: int = 1, **request: Any) -> str | None:
    """What both backends of a GPU leave to the reference."""
    if images > _MOST_BLOCKS:
        return f"expected at most {_MOST_BLOCKS} images, times layers where these are summed, got {images}"
    return _kernel_limit(device, **request)


def _cuda_limit(
    device: torch.device, *, lower_grids: Sequence[Grid] = (), summed_grids: Sequence[Grid] = (), **request: Any
) -> str | None:
    kernels = native.cuda()
    reason = kernels.obstacle(device)
    if reason is None and len(lower_grids) > _CUDA_LOWER_GRIDS:
        return f"expected at most {_CUDA_LOWER_GRIDS} grids below the output's, got {len(lower_grids)}"
    return reason or kernels.row_obstacle(device, summed_grids) or _gpu_limit(device, **request)


def _load_triton() -> SimpleNamespace:
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"Triton is not installed ({error}): pip install -e '.[triton]' in a checkout") from error
    if version_of(triton.__version__) < (3, 2):
        raise ImportError(f"expected Triton 3.2 or later, found {triton.__version__}")
    if _TRITON_INTERPRETED and version_of(triton.__version__) < (3, 7):
        numpy = importlib.import_module("numpy")  # from 2.4 on it takes no array of one element for a number
        if version_of(numpy.__version__) >= (2, 4):
            raise ImportError(f"the interpreter of Triton before 3.7 needs NumPy before 2.4, found {numpy.__version__}")
    if not torch.cuda.is_available() and not _TRITON_INTERPRETED:
        raise ImportError("no CUDA or ROCm GPU is visible")
    modules = [importlib.import_module(f"diffseg.kernels.{name}") for name in ("aggregate", "merge", "label", "cross")]
    return SimpleNamespace(**{op: getattr(module, op) for module in modules for op in OPS if hasattr(module, op)})


def version_of(text: str) -> tuple[int, ...]:
    """The first two numbers of a library's version."""
    return tuple(int(part) for part in text.split(".")[:2])


def _triton_limit(device: torch.device, *, width: int = 1, tokens: int = 1, **request: Any) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"expected a GPU of capability 8.0 or more, got {major}.{minor}"
    if width > _TRITON_WIDTH:
        return f"expected heads of at most {_TRITON_WIDTH} channels, got {width}"
    if tokens > _TRITON_TOKENS:
        return f"expected at most {_TRITON_TOKENS} tokens, got {tokens}"
    return _gpu_limit(device, **request)


_MOST_ANCHORS = 1024
_MOST_BLOCKS = 65535  # along the second and the third dimension of a launch
_CUDA_LOWER_GRIDS = 16  # kMostLows of csrc/cuda/output.cuh
_TRITON_WIDTH = 256
_TRITON_TOKENS = 128  # scores of a text stay in registers
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it: when it is imported

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KERNEL_DTYPES = {  # of every backend with kernels
    **dict.fromkeys(("aggregate", "aggregate_maps", "aggregate_cross"), _FLOATS[:3]),
    "merge": (torch.float32, torch.bfloat16),
    **dict.fromkeys(("label", "score_masks"), (torch.float32,)),
    "renumber": (torch.int32,),
}

BACKENDS = {
    backend.name: backend
    for backend in (  # in order of preference
        Backend(
            name="cpu",
            summary="C++ kernels (diffseg._cpu)",
            device_types=("cpu",),
            dtypes=_KERNEL_DTYPES,
            load=native.cpu,
            limit=_kernel_limit,
        ),
        Backend(
            name="cuda",
            summary="CUDA kernels (diffseg._cuda)",
            device_types=("cuda",),
            dtypes=_KERNEL_DTYPES,
            load=native.cuda,
            automatic=False,  # by name only, until measurements on a GPU are committed
            limit=_cuda_limit,
        ),
        Backend(
            name="triton",
            summary="Triton kernels" + (", interpreted" if _TRITON_INTERPRETED else ""),
            device_types=("cuda", "cpu") if _TRITON_INTERPRETED else ("cuda",),
            dtypes=_KERNEL_DTYPES,
            load=_load_triton,
            automatic=False,  # by name only, until measurements on a GPU are committed
            limit=_triton_limit,
        ),
        Backend(
            name="reference",
            summary="pure torch",
            device_types=(),
            dtypes=dict.fromkeys(OPS, _FLOATS) | {"renumber": (torch.int32,)},
            load=lambda: reference,
        ),
    )
}


def check_name(backend: str) -> None:
    """Raises ValueError unless ``backend`` is ``"auto"`` or the name of a backend."""
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")


def implementation(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, **request: Any
) -> Callable[..., Any]:
    """The function that serves ``op``: of the backend named, else of the first one that can; see ``can_run``."""
    check_name(backend)
    if backend != "auto":
        chosen = BACKENDS[backend]
        chosen.can_run(op, device, dtype, raise_error=True, **request)
    else:
        able = (each for each in BACKENDS.values() if each.automatic and each.can_run(op, device, dtype, **request))
        chosen = next(able, BACKENDS["reference"])
        chosen.can_run(op, device, dtype, raise_error=True, **request)
        compiled = BACKENDS["cpu"]
        if chosen.name == "reference" and device.type == "cpu" and dtype in compiled.dtypes[op]:
            _warn_of(compiled.unavailable())
    function: Callable[..., Any] = getattr(chosen.load(), op)
    return function


@cache
def _warn_of(obstacle: str | None) -> None:
    """Says once that the kernels are missing, which otherwise only the run time would show."""
    if obstacle is not None:
        warnings.warn(f"diffseg runs in plain torch, many times slower: {obstacle}", RuntimeWarning, stacklevel=2)


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that serve at least one op on float32 tensors on ``device``.

    ``"auto"`` takes the first that serves the op, apart from ``"cuda"`` and ``"triton"``, which run by name only.
    """
    device = torch.device(device)
    return [
        backend.name
        for backend in BACKENDS.values()
        if any(backend.can_run(op, device, torch.float32) for op in backend.dtypes)
    ]


def explain_backends() -> dict[str, str]:
    """For each backend, what it is and whether it can run on this machine; ``diffseg info`` prints it."""
    explained = {}
    for backend in BACKENDS.values():
        devices = " and ".join(backend.device_types) or "any device"
        reason = backend.unavailable()
        state = f"runs {', '.join(backend.dtypes)} on {devices}" if reason is None else f"cannot run: {reason}"
        explained[backend.name] = f"{backend.summary}; {state}"
    return explained
