"""PyTorch's scaled dot-product attention with the log-sum-exp that its fused operators compute anyway."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """``F.scaled_dot_product_attention`` and, where the operator that it picks returns it, the log-sum-exp.

    Fused operators compute the log-sum-exp for their backward pass; the public function drops it. The choice is asked
    from PyTorch itself, so the output is the same.

    Args:
        query, key, value: [B, heads, n, d].
        scale: of the scores; None: d ** -0.5.

    Returns:
        output [B, heads, n, d], and log-sum-exp [B, heads, n], float32 (float64 for float64), or None.
    """
    operator = None if torch.compiler.is_compiling() else _fused_operator(query, key, value, scale)
    if operator is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale), None
    output, logsumexp, *_ = operator(query, key, value, scale=scale)
    # the efficient operator pads n, cuDNN's adds a last dimension of 1
    return output, logsumexp.flatten(2)[..., : query.shape[2]]


def _fused_operator(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Callable[..., Any] | None:
    """The operator that ``F.scaled_dot_product_attention`` would pick, if it is known to return the log-sum-exp."""
    device = query.device.type
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None or type(query) is not Tensor or device not in ("cpu", "cuda") or torch.version.hip is not None:
        return None
    if torch.is_autocast_enabled(device):  # casts the arguments of the public function only
        return None
    choice = choose(query, key, value, scale=scale)
    if device == "cuda" and choice == SDPBackend.FLASH_ATTENTION.value and query.shape[-1] % 8 != 0:
        return None  # the public function pads d
    return _operators().get((device, choice))


@cache
def _operators() -> dict[tuple[str, int], Callable[..., Any]]:
    """By device and SDPBackend, those operators of this PyTorch whose signature is as expected."""
    flags = {"attn_bias": None, "compute_log_sumexp": True}
    expected = {
        ("cpu", SDPBackend.FLASH_ATTENTION): ("_scaled_dot_product_flash_attention_for_cpu", {}),
        ("cuda", SDPBackend.FLASH_ATTENTION): ("_scaled_dot_product_flash_attention", {}),
        ("cuda", SDPBackend.EFFICIENT_ATTENTION): ("_scaled_dot_product_efficient_attention", flags),
        ("cuda", SDPBackend.CUDNN_ATTENTION): ("_scaled_dot_product_cudnn_attention", flags),
    }
    found: dict[tuple[str, int], Callable[..., Any]] = {}
    for (device, backend), (name, arguments) in expected.items():
        operator = getattr(torch.ops.aten, name, None)
        if operator is not None and _has_signature(operator.default._schema, {*arguments, "scale"}):
            found[device, backend.value] = partial(operator.default, **arguments)
    return found


def _has_signature(schema: Any, names: set[str]) -> bool:
    """Whether it takes query, key, value and ``names``, needs nothing else, and returns output and log-sum-exp."""
    inputs = [argument.name for argument in schema.arguments]
    needed = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    outputs = [output.name.replace("_", "") for output in schema.returns]
    return (
        inputs[:3] == ["query", "key", "value"]
        and names <= set(inputs)
        and needed <= {*inputs[:3], *names}
        and outputs[:2] == ["output", "logsumexp"]
    )
