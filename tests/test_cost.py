"""The cost model against figures worked out for Stable Diffusion 1.4 at 512 x 512, and the kernels' headers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from diffseg.bench import cost
from diffseg.bench.cost import SD14, Ceilings, Layer

KERNELS = Path(__file__).parents[1] / "kernels"
H100 = Ceilings(copy=3e12, products={"bfloat16": 0.79e15}, exponentials=3.7e12, overlap=True)
TWO_CORES = Ceilings(copy=26e9, products={"float32": 155e9}, exponentials=3.4e9)

FULL = [layer for layer in SD14 if layer.grid == (64, 64)]  # the layers of the output grid
CELLS, ANCHORS = 4096, 256


def header(kernel: str, module: str) -> str:
    """The docstring of a Triton kernel, its whitespace single."""
    tree = ast.parse((KERNELS / f"{module}.py").read_text())
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == kernel)
    return re.sub(r"\s+", " ", ast.get_docstring(found) or "")


def test_aggregate_of_stable_diffusion() -> None:
    full, whole = cost.aggregate(FULL, element=2, logsumexps=True), cost.aggregate(SD14, element=2, logsumexps=True)
    assert f"{full.flops / 1e9:.0f}" == "54"
    assert f"{whole.flops / 1e9:.0f}" == "61"
    assert f"{full.exponentials / 1e9:.2f}" == "0.67"
    assert cost.attention_bytes(SD14) == 64 << 20
    assert cost.aggregate(FULL, element=2).exponentials == 2 * full.exponentials
    assert cost.aggregate(FULL, element=2, passes=1).exponentials == full.exponentials
    assert cost.aggregate(FULL, element=2, logsumexps=True, batch=3).flops == 3 * full.flops


def test_merge_of_stable_diffusion() -> None:
    nothing_merges = cost.first_round(CELLS, ANCHORS, density=0.0)
    assert f"{nothing_merges.flops / 1e9:.0f}" == "17"
    assert f"{nothing_merges.exponentials / 1e6:.0f}" == "17"
    assert f"{(cost.first_round(CELLS, ANCHORS).flops - nothing_merges.flops) / 1e9:.0f}" == "9"
    assert cost.first_round(CELLS, ANCHORS, density=0.0, products=3).flops == 3 * nothing_merges.flops
    assert nothing_merges.bytes == 4 * CELLS * (CELLS + ANCHORS)
    assert cost.first_round(CELLS, ANCHORS, density=0.0, batch=3) == nothing_merges * 3
    assert cost.later_rounds(CELLS, ANCHORS, 2, batch=3) == cost.later_rounds(CELLS, ANCHORS, 1) * 6
    assert cost.later_rounds(CELLS, ANCHORS, 1).bytes == 2 * 4 * CELLS * ANCHORS
    assert f"{cost.later_rounds(CELLS, ANCHORS, 2).flops / 2e9:.1f}" == "0.5"


def test_floors_of_an_h100() -> None:
    assert 1000 * H100.floor(cost.aggregate(SD14, element=2, logsumexps=True), "bfloat16") == pytest.approx(
        0.19, abs=0.01
    )
    assert 1000 * H100.floor(cost.aggregate(SD14, element=2), "bfloat16") == pytest.approx(0.38, abs=0.01)
    merge = cost.first_round(CELLS, ANCHORS, products=cost.SPLIT_PRODUCTS)
    assert 1000 * H100.floor(merge, "bfloat16") == pytest.approx(0.08, abs=0.005)
    assert 1000 * H100.floor(cost.label(CELLS, 20, (512, 512)) * 1, "bfloat16") < 0.01


def test_floors_of_two_cores() -> None:
    assert TWO_CORES.floor(cost.aggregate(SD14, logsumexps=True), "float32") == pytest.approx(0.6, abs=0.05)
    assert TWO_CORES.floor(cost.first_round(CELLS, ANCHORS, density=0.2), "float32") == pytest.approx(0.13, abs=0.02)


def test_maps_are_bytes_alone() -> None:
    work = cost.aggregate_maps([Layer((4, 4), 2, 8), Layer((2, 2), 2, 8)])
    assert work.bytes == 4 * (2 * (256 + 16) + 256)
    assert (work.flops, work.exponentials) == (0, 0)


def test_label_by_hand() -> None:
    assert cost.label(16, 3, (5, 8), batch=2) == cost.Work(bytes=2 * 4 * (3 * 16 + 40), flops=2 * 3 * 40 * 3)


def test_a_floor_is_the_slowest_of_what_overlaps() -> None:
    work = cost.Work(bytes=10, flops=20, exponentials=30)
    limits = {"copy": 1.0, "products": {"float32": 1.0}, "exponentials": 1.0}
    assert Ceilings(**limits, overlap=True).floor(work, "float32") == 30  # type: ignore[arg-type]
    assert Ceilings(**limits).floor(work, "float32") == 50  # type: ignore[arg-type]


def kernel_figures() -> list[tuple[str, str, str]]:
    """(module, kernel, what its header must say): the model's figures, in the header's units."""
    full = cost.aggregate(FULL, element=2, logsumexps=True)
    products = f"{full.flops / 1e9:.0f} GFLOP"
    exponentials = f"{full.exponentials / 1e9:.2f} G exp2"
    attention = f"{cost.attention_bytes(SD14) >> 20} MB"
    inputs = sum(2 * layer.heads * layer.cells * layer.channels * 2 for layer in FULL)
    padded = sum(2 * layer.heads * layer.cells**2 * 48 for layer in FULL)
    maps = cost.aggregate_maps(SD14).bytes - cost.attention_bytes(SD14)
    one_product = 2 * ANCHORS * CELLS**2
    proposals = 4 * ANCHORS * CELLS >> 20
    logarithms = cost.first_round(CELLS, ANCHORS).exponentials
    return [
        ("aggregate", "_logsumexps_kernel", products),
        ("aggregate", "_logsumexps_kernel", exponentials),
        ("aggregate", "_tiles_kernel", products),
        ("aggregate", "_tiles_kernel", f"({padded / 1e9:.0f} with the padded width)"),
        ("aggregate", "_tiles_kernel", exponentials),
        ("aggregate", "_tiles_kernel", f"{attention} written"),
        ("aggregate", "_tiles_kernel", f"Q and K ({inputs / 1e6:.0f} MB)"),
        ("aggregate", "_rows_kernel", f"reads {maps / 1e9:.1f} GB of maps, writes {attention}"),
        ("merge", "_products_kernel", f"reads A_f ({attention})"),
        ("merge", "_products_kernel", f"writes 2 x {4 * ANCHORS * CELLS >> 20} MB"),
        ("merge", "_products_kernel", f"{2 * cost.SPLIT_PRODUCTS} products of {one_product / 1e9:.1f} GFLOP"),
        ("merge", "_products_kernel", f"({logarithms / 1e6:.0f} M distinct ones)"),
        ("merge", "_means_kernel", f"reads A_f ({attention})"),
        ("merge", "_means_kernel", f"writes {proposals} MB"),
        ("merge", "_means_kernel", f"2 products of {one_product / 1e9:.1f} GFLOP"),
        ("label", "_label_kernel", "H W x 4 bytes written"),
    ]


@pytest.mark.parametrize(("module", "kernel", "figure"), kernel_figures())
def test_kernels_state_the_same_figures(module: str, kernel: str, figure: str) -> None:
    assert figure in header(kernel, module)
