"""DiffSeg in real time: segments images from the self-attention of one Stable Diffusion forward pass.

The ops work on plain tensors and need torch alone. ``DiffSegPipeline``, ``record_attention`` and ``compat`` load on
first use; diffusers and transformers are imported with the pipeline, not before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .backends import available_backends, explain_backends
from .ops import Proposals, aggregate, aggregate_cross, aggregate_maps, label, merge, refine, score_masks, segment

if TYPE_CHECKING:
    from . import compat
    from .capture import AttentionRecord, record_attention
    from .pipeline import DiffSegOutput, DiffSegPipeline
    from .preparation import warmup

__version__ = "0.1.0"

__all__ = [
    "AttentionRecord",
    "DiffSegOutput",
    "DiffSegPipeline",
    "Proposals",
    "aggregate",
    "aggregate_cross",
    "aggregate_maps",
    "available_backends",
    "compat",
    "explain_backends",
    "label",
    "merge",
    "record_attention",
    "refine",
    "score_masks",
    "segment",
    "warmup",
]

_LAZY = {
    "AttentionRecord": "capture",
    "DiffSegOutput": "pipeline",
    "DiffSegPipeline": "pipeline",
    "compat": "compat",
    "record_attention": "capture",
    "warmup": "preparation",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    value = module if name == _LAZY[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
