"""The Triton kernels compiled ahead of time for GPUs that are not here, and the costs that their headers state.

All configurations, networks and targets: ``make aot``. Here: each kernel's defaults at Stable Diffusion 1.4's shapes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process: nothing can be compiled", allow_module_level=True)

from diffseg.kernels import aggregate, aot, cross, merge

NETWORK = "SD 1.4 at 512"
KERNELS = {
    "_write_integers", "_stretch_kernel", "_tiles_kernel", "_logsumexps_kernel", "_rows_kernel",
    "_even_positions_kernel", "_terms_kernel", "_products_kernel", "_bits_kernel", "_walk_kernel", "_means_kernel",
    "_label_kernel", "_present_kernel", "_numbers_kernel", "_renumber_kernel", "_words_kernel",
    "_upsample_words_kernel", "_mask_sums_kernel",
}  # fmt: skip
MATRIX = {"_tiles_kernel", "_logsumexps_kernel", "_products_kernel", "_means_kernel", "_words_kernel"}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.mark.parametrize("name", TENSOR_CORES)
def test_defaults_compile_without_spills(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = aot.TARGETS[name]
    network = aot.NETWORKS[NETWORK]
    launches = [
        *aot.record(network, torch.float16, True, target),
        *aot.record(network, torch.float16, False, target, anchors=32),
        *aot.record_maps(network, torch.float16, target),
        *aot.record_cross(network, torch.float16, target),
    ]
    compiled = list(aot.compile_launches(launches, target))
    assert {each.name for each in compiled} == KERNELS
    for each in compiled:
        if each.tile.get("GRIDS") and each.name == "_tiles_kernel":
            assert "ld.global.v4.b32" in each.assembly, "stretched sums are not read as vectors"
        assert each.stores, f"{each.name} {each.tile}: compiled to nothing"
        assert each.spilled == 0, each
        assert each.shared <= target.shared_limit, each
        if each.name in {"_terms_kernel", "_products_kernel"}:
            assert "lg2.approx" in each.assembly, f"{each.name}: logarithms of twenty instructions"
        if each.name in MATRIX:
            assert TENSOR_CORES[name] in each.assembly, f"{each.name} {each.tile}: no tensor cores"
            assert "cp.async" in each.assembly, f"{each.name} {each.tile}: loads are not pipelined"


def test_what_a_recorded_stage_launches() -> None:
    names = [
        each.kernel.__name__ for each in aot.record(aot.NETWORKS[NETWORK], torch.float16, True, aot.TARGETS["sm_90"])
    ]
    later_round = ["_terms_kernel", "_products_kernel", "_bits_kernel", "_walk_kernel", "_means_kernel"]
    assert [name for name in names if name != "_write_integers"] == [
        *["_tiles_kernel"] * 3, "_stretch_kernel", "_tiles_kernel", "_even_positions_kernel", "_terms_kernel",
        "_products_kernel", "_bits_kernel", "_means_kernel", *later_round, "_label_kernel", "_present_kernel",
        "_numbers_kernel", "_renumber_kernel",
    ]  # fmt: skip


def small_tiles() -> list[Any]:
    """The launches that sum the low-resolution grids, the smallest first."""
    launches = aot.record(aot.NETWORKS[NETWORK], torch.float16, True, aot.TARGETS["sm_90"])
    return [each for each in launches if each.kernel is aggregate._tiles_kernel and not each.arguments["GRIDS"]]


def stated(kernel: Any) -> str:
    return re.sub(r"\s+", " ", kernel.fn.__doc__)


def test_headers_state_the_costs_of_the_design() -> None:
    """Operations, exponentials, logarithms and bytes for SD 1.4 at 512 x 512, computed here from the shapes."""
    layers = aot.NETWORKS[NETWORK].layers
    number, grid, heads, width = layers[0]
    cells = grid[0] * grid[1]
    pairs = number * heads * cells**2
    anchors = 16**2
    tiles = stated(aggregate._tiles_kernel)
    assert f"{2 * pairs * width / 1e9:.0f} GFLOP" in tiles
    assert f"({2 * pairs * 48 / 1e9:.0f} with the padded width)" in tiles
    assert f"{pairs / 1e9:.2f} G exp2" in tiles
    assert f"{cells**2 * 4 / 2**20:.0f} MB written" in tiles
    assert f"Q and K ({2 * number * heads * cells * width * 2 / 1e6:.0f} MB)" in tiles
    assert f"{2 * 128 * width * 2 / 1e3:.0f} KB a head" in tiles
    assert f"{pairs / 1e9:.2f} G exp2 and {2 * pairs * width / 1e9:.0f} GFLOP" in stated(aggregate._logsumexps_kernel)
    lows = [(h, w) for _, (h, w), _, _ in layers[1:]]
    parts = [each.arguments["heads"] // each.arguments["share"] for each in small_tiles()]
    reads = sum(count * (h * w) ** 2 * 4 for count, (h, w) in zip(parts, reversed(lows), strict=True))
    writes = sum(h * w * h * grid[1] * 4 for h, w in lows)
    assert f"reads {reads / 1e6:.1f} MB, writes {writes / 1e6:.1f} MB" in stated(aggregate._stretch_kernel)
    maps = sum(number * heads * (h * w) ** 2 * 4 for number, (h, w), heads, _ in layers)
    assert f"reads {maps / 1e9:.1f} GB of maps" in stated(aggregate._rows_kernel)

    words = stated(cross._words_kernel)
    assert f"{2 * heads * cells * 77 * width / 1e9:.1f} GFLOP" in words
    assert f"{heads * cells * 77 / 1e6:.1f} M exp2" in words
    assert f"{heads * cells * width * 2 / 1e6:.1f} MB of queries" in words
    assert f"{cells * 4 // 1024} KB a word" in words
    sums = stated(cross._mask_sums_kernel)
    assert f"{2 * 256 * 16 * 512**2 / 1e9:.1f} GFLOP" in sums
    assert f"{256 * 256 * 16 * 4 // 2**20} MB of partial sums" in sums

    one_product = f"{2 * anchors * cells**2 / 1e9:.1f} GFLOP"
    products = stated(merge._products_kernel)
    assert f"6 products of {one_product}" in products
    assert f"{2 * cells**2 / 1e6:.0f} M logarithms ({cells**2 / 1e6:.0f} M distinct ones)" in products
    assert f"writes 2 x {anchors * cells * 4 / 2**20:.0f} MB" in products
    means = stated(merge._means_kernel)
    assert f"2 products of {one_product}" in means
    assert f"reads A_f ({cells**2 * 4 / 2**20:.0f} MB)" in means
    assert f"the bits ({2 * anchors * cells / 2**20:.0f} MB a block of cells" in means
