"""Attention with its log-sum-exp: the output of the public function, and the exact log-sum-exp."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffseg import sdpa


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_logsumexp_comes_with_the_same_output(dtype: torch.dtype, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, d in ((64, 8), (60, 5), (1, 16), (521, 40)):
        query, key, value = (
            torch.randn(2, n, 3, d, generator=generator).to(dtype).transpose(1, 2) * 1.5 for _ in range(3)
        )
        output, logsumexp = sdpa.scaled_dot_product_attention(query, key, value, scale)
        expected = F.scaled_dot_product_attention(query, key, value, scale=scale)
        assert torch.equal(output, expected)
        assert output.stride() == expected.stride()
        scores = query.double() @ key.double().mT * (d**-0.5 if scale is None else scale)
        assert logsumexp is not None
        assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-4)
        torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("signature", "usable"),
    [
        ("Tensor query, Tensor key, Tensor value, *, float? scale=None) -> (Tensor output, Tensor logsumexp)", True),
        ("Tensor query, Tensor key, Tensor value, *, float? scale=None) -> (Tensor output, Tensor max)", False),
        ("Tensor query, Tensor key, Tensor value) -> (Tensor output, Tensor logsumexp)", False),
        ("Tensor query, Tensor value, Tensor key, float? scale=None) -> (Tensor output, Tensor log_sumexp)", False),
        (
            "Tensor query, Tensor key, Tensor value, int new, float? scale=None) -> (Tensor output, Tensor logsumexp)",
            False,
        ),
    ],
)
def test_operators_with_another_signature_are_not_called(signature: str, usable: bool) -> None:
    schema = torch._C.parse_schema(f"diffseg::attention({signature}")
    assert sdpa._has_signature(schema, {"scale"}) is usable


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "backend",
    [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, None],
)
def test_logsumexp_on_a_gpu(backend: SDPBackend | None, dtype: torch.dtype) -> None:
    served = 0
    generator = torch.Generator("cuda").manual_seed(0)
    for n, d in ((4096, 40), (1024, 80), (256, 160), (60, 64), (49, 8)):
        query, key, value = (
            torch.randn(2, n, 8, d, generator=generator, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)
        )
        with contextlib.nullcontext() if backend is None else sdpa_kernel([backend, SDPBackend.MATH]):
            output, logsumexp = sdpa.scaled_dot_product_attention(query, key, value, None)
            expected = F.scaled_dot_product_attention(query, key, value)
        exact = backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
        atol = 0.0 if exact else 2**-7 if dtype == torch.bfloat16 else 2e-3  # two units of values up to 1
        torch.testing.assert_close(output, expected, rtol=0, atol=atol)
        if logsumexp is not None:
            served += 1
            scores = query.double() @ key.double().mT * d**-0.5
            assert logsumexp.dtype == torch.float32
            torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=0, atol=1e-3)
    if backend in (None, SDPBackend.EFFICIENT_ATTENTION) or (exact and dtype != torch.float32):
        assert served == 5
