"""Which implementation serves an op here, and why the others do not.

Each backend has one predicate, :meth:`Backend.can_run`; it serves the automatic choice and the error text alike. A
backend that is asked for by name never falls back to another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

OPS = ("aggregate", "aggregate_maps", "merge", "label")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: where it runs, in which dtypes, and what it needs."""

    name: str
    summary: str
    device_types: tuple[str, ...]  # empty: any
    dtypes: dict[str, tuple[torch.dtype, ...]]  # op -> dtypes of its tensors; an op that is absent is not served
    load: Callable[[], Any]  # the functions, one an op; raises ImportError with the reason where it cannot
    automatic: bool = True
    most_proposals: int | None = None  # that merge serves; None: any number

    def can_run(
        self, op: str, device: torch.device, dtype: torch.dtype, *, proposals: int = 1, raise_error: bool = False
    ) -> bool:
        """Whether ``op`` runs here on tensors of ``dtype`` on ``device``; or raises a ValueError that says why not.

        ``proposals`` is the length of the list that merge starts from.
        """
        reason = self._obstacle(op, device, dtype, proposals)
        if reason is not None and raise_error:
            raise ValueError(f"backend={self.name!r} cannot run {op} here: {reason}")
        return reason is None

    def _obstacle(self, op: str, device: torch.device, dtype: torch.dtype, proposals: int) -> str | None:
        if op not in self.dtypes:
            return f"it serves {', '.join(self.dtypes)} only"
        if self.device_types and device.type not in self.device_types:
            return f"expected tensors on {' or '.join(self.device_types)}, got {device}"
        if dtype not in self.dtypes[op]:
            return f"expected {' or '.join(str(known) for known in self.dtypes[op])}, got {dtype}"
        if self.most_proposals is not None and proposals > self.most_proposals:
            return f"expected at most {self.most_proposals} anchors, got {proposals}"
        return self.unavailable()

    def unavailable(self) -> str | None:
        """Why this backend cannot be loaded on this machine; None where it can."""
        try:
            self.load()
        except ImportError as error:
            return str(error)
        return None


def _load_reference() -> Any:
    return importlib.import_module("diffseg.reference")


def _load_cpu() -> Any:
    return importlib.import_module("diffseg.native").cpu()


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

BACKENDS = {
    backend.name: backend
    for backend in (  # in order of preference
        Backend(
            name="cpu",
            summary="C++ kernels (diffseg._cpu)",
            device_types=("cpu",),
            dtypes={
                "aggregate": (torch.float32, torch.float16, torch.bfloat16),
                "aggregate_maps": (torch.float32, torch.float16, torch.bfloat16),
                "merge": (torch.float32, torch.bfloat16),
                "label": (torch.float32,),
            },
            load=_load_cpu,
            most_proposals=1024,
        ),
        Backend(
            name="reference",
            summary="pure torch",
            device_types=(),
            dtypes=dict.fromkeys(OPS, _FLOATS),
            load=_load_reference,
        ),
    )
}


def check_name(backend: str) -> None:
    """Raises ValueError unless ``backend`` is ``"auto"`` or the name of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")


def implementation(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, *, proposals: int = 1
) -> Callable[..., Any]:
    """The function that serves ``op``: of the backend named, else of the first one that can."""
    check_name(backend)
    if backend != "auto":
        chosen = BACKENDS[backend]
        chosen.can_run(op, device, dtype, proposals=proposals, raise_error=True)
    else:
        chosen = next(
            each
            for each in BACKENDS.values()
            if each.automatic and each.can_run(op, device, dtype, proposals=proposals)
        )
    function: Callable[..., Any] = getattr(chosen.load(), op)
    return function


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that serve at least one op on float32 tensors on ``device``, the preferred one first."""
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
