"""The exactness contract on the aggregated attention, and what tests of several backends hold results against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def logsumexps_of(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> list[Tensor]:
    """Of the rows of Q K^T d ** -0.5, computed in float64, float32."""
    return [
        (query.double() @ key.double().mT * query.shape[-1] ** -0.5).logsumexp(-1).float()
        for query, key in zip(queries, keys, strict=True)
    ]


def assert_same_attention(found: Tensor, expected: Tensor) -> None:
    """The contract on A_f: entries within 1e-4 relative + 1e-9, rows that sum to 1 within 1e-5."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    assert (found.double().sum(-1) - 1).abs().max() < 1e-5


def distances(first: Tensor, second: Tensor) -> Tensor:
    """D of all pairs, float64, [B, P, N] and [B, F, N] -> [B, P, F]."""
    first, second = first.double().clamp_min(1e-30), second.double().clamp_min(1e-30)
    difference = first[:, :, None] - second[:, None]
    return (difference * (first.log()[:, :, None] - second.log()[:, None])).sum(-1) / 2
