"""The CUDA kernels without a GPU: their source, compiled for the host and run on an emulation, against the oracle.

What the emulation shows and what it does not stands in tests/cuda_host/host_device.h. Everything above the hardware is
the real thing: the ops' validation, native.py, the entry points, the plans of launches and the kernels.

With every access to global memory checked by the address sanitizer:

    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    DIFFSEG_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 python -m pytest tests/test_cuda_host.py
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from contract import (
    DIVISIBLE,
    DTYPES,
    INDIVISIBLE,
    NETWORKS,
    RULES,
    AggregateContract,
    LabelContract,
    MapsContract,
    MergeContract,
    SegmentContract,
    as_double,
    distances,
)
from torch import Tensor

import diffseg
from diffseg import backends, native
from diffseg.ops import resolve_weights

if sys.platform != "linux":
    pytest.skip("the emulation is written for Linux", allow_module_level=True)

SMALLEST_LIMIT = 99 << 10  # bytes of shared memory that a block can have on every GPU of capability 8.0 or more


class Host(NamedTuple):
    """The kernels on the host, and the switches of the emulation."""

    module: Any
    emulation: ctypes.CDLL

    @contextmanager
    def reversed(self) -> Iterator[None]:
        """Fibers run last first."""
        self.emulation.diffseg_host_reverse(True)
        yield
        self.emulation.diffseg_host_reverse(False)

    @contextmanager
    def recorded(self) -> Iterator[list[list[str]]]:
        """Launches are listed (name, grid, threads, bytes of shared memory), and not run."""
        launches: list[list[str]] = []
        self.emulation.diffseg_host_record(True)
        yield launches
        self.emulation.diffseg_host_record(False)
        self.emulation.diffseg_host_launches.restype = ctypes.c_char_p
        launches += [line.split() for line in self.emulation.diffseg_host_launches().decode().splitlines()]


class HostKernels(native.CudaKernels):
    """The ops on the host: no device to make current, no stream."""

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[Any]:
        yield self._module.Queue(0, 0)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    return load("cuda_host_build", Path(__file__).parent / "cuda_host" / "build.py")


@pytest.fixture(scope="session")
def host(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Host:
    flags = ["-fsanitize=address"] if os.environ.get("DIFFSEG_SANITIZE") else []
    library = builder.build(tmp_path_factory.mktemp("cuda_host"), *flags)
    return Host(load("cuda_host._cuda", library), ctypes.CDLL(str(library)))


@pytest.fixture(autouse=True)
def on_host(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" takes tensors of the CPU and runs on the host."""
    kernels = HostKernels(host.module)
    backend = dataclasses.replace(
        backends.BACKENDS["cuda"], device_types=("cpu",), load=lambda: kernels, limit=backends._kernel_limit
    )
    monkeypatch.setitem(backends.BACKENDS, "cuda", backend)


class TestAggregate(AggregateContract):
    backend = "cuda"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_more_rows_than_a_tile(self, layers: Callable[..., Any], dtype: torch.dtype) -> None:
        grids = [(11, 13), (5, 6), (11, 13)]
        scene = layers(grids, heads=1, dim=40, dtype=dtype)
        self.check(scene.queries, scene.keys, grids=grids)

    def test_projections_are_read_where_they_lie(self) -> None:
        projection = torch.rand(2, 12, 3, 16, dtype=torch.float16).transpose(1, 2)
        assert native._rows_of_16_bytes(projection) is projection
        assert native._rows_of_16_bytes(projection[..., 1:]) is not projection

    @pytest.mark.parametrize("given", [True, False], ids=["logsumexps", "computed"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_heads_of_one_chunk_and_of_several(
        self, host: Host, layers: Callable[..., Any], dtype: torch.dtype, given: bool
    ) -> None:
        """Both kernels that sum, each at the output grid and below it, more rows than a tile, projections' strides."""
        large, small, smaller = (11, 13), (5, 6), (4, 7)
        shapes = [
            (large, 2, 40), (large, 3, 24),  # one chunk of 96 bytes
            (large, 2, 128),  # two of 128
            (large, 1, 80),  # one of 160
            (small, 1, 160), (small, 2, 80),  # two of 160 in the launch
            (smaller, 1, 64),  # one of 128
        ]  # fmt: skip
        made = [layers([grid], batch=2, heads=heads, dim=dim, dtype=dtype) for grid, heads, dim in shapes]
        queries, keys = (
            [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
            for tensors in ([scene.queries[0] for scene in made], [scene.keys[0] for scene in made])
        )
        options: dict[str, Any] = {
            "grids": [grid for grid, _, _ in shapes],
            "scales": [0.1 + 0.05 * k for k in range(len(shapes))],
            "weights": [float(1 + k) for k in range(len(shapes))],
            "logsumexps": None,
        }
        if given:
            options["logsumexps"] = [
                (query.double() @ key.double().mT * scale).logsumexp(-1).float()
                for query, key, scale in zip(queries, keys, options["scales"], strict=True)
            ]
        with host.recorded() as launches:
            diffseg.aggregate(queries, keys, backend="cuda", **options)
        lows, output = ["sum_chunks", "sum_scores"], ["sum_chunks", "sum_scores", "sum_chunks"]
        names = [launch[0].removesuffix("_kernel") for launch in launches]
        assert [name for name in names if name.startswith("sum_")] == lows + output
        assert ("logsumexp" in names) != given
        self.check(queries, keys, **options)

    @pytest.mark.parametrize("small", [(2, 2), (2, 3)], ids=["divisible", "indivisible"])
    def test_more_layers_than_a_launch_takes(self, layers: Callable[..., Any], small: tuple[int, int]) -> None:
        grids = [(4, 4)] * 34 + [small] * 35
        scene = layers(grids, heads=1, dim=8, dtype=torch.float16)
        self.check(scene.queries, scene.keys, grids=grids, weights=[float(1 + k % 5) for k in range(len(grids))])


class TestAggregateMaps(MapsContract):
    backend = "cuda"

    @pytest.mark.parametrize(
        ("dtype", "grids"),
        [
            (torch.float16, [(8, 8), (4, 4), (3, 5)]),
            (torch.float32, [(2, 2)] * 35 + [(4, 4)] * 35),
            (torch.float32, [(1, 1200), (1, 7)]),
        ],
        ids=["aligned", "more than a launch takes", "more cells than threads take at once"],
    )
    def test_more_rows_that_need_not_sum_to_one(self, dtype: torch.dtype, grids: list[tuple[int, int]]) -> None:
        self.check_random(dtype, grids)

    def test_into_a_tensor_that_takes_no_vectors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        output, written = native.CudaKernels._output, []

        def note(*arguments: Any) -> Any:
            found = output(*arguments)
            written.append(found[0].data_ptr())
            return found

        monkeypatch.setattr(native.CudaKernels, "_output", note)
        memory = torch.full((2 * 36 + 2,), torch.nan)
        out, maps = memory[1:-1].view(2, 6, 6), [torch.rand(2, 6, 6)]
        assert out.data_ptr() % 16 != 0
        assert diffseg.aggregate_maps(maps, grids=[(2, 3)], backend="cuda", out=out) is out
        assert torch.equal(out, diffseg.aggregate_maps(maps, grids=[(2, 3)], backend="cuda"))
        assert memory[[0, -1]].isnan().all()
        assert not any(address % 16 for address in written)
        assert len(written) == 2

    def test_too_many_grids_are_refused(self) -> None:
        grids = [(1, width) for width in range(2, 20)]
        with pytest.raises(ValueError, match="expected at most 16 distinct ones below the output's, got 17"):
            diffseg.aggregate_maps([torch.rand(1, n, n) for _, n in grids], grids=grids, backend="cuda")


class TestMerge(MergeContract):
    backend = "cuda"

    @pytest.mark.parametrize("rule", RULES)
    def test_more_elements_than_a_tile(self, attention: Callable[..., Tensor], rule: Any) -> None:
        """The products of a part of the cells take four steps, those of the last part two and not all of a step."""
        grid = (13, 31)
        maps = attention(grid, regions=30, dtype=torch.float32)
        found = self.check(maps, grid, anchors=range(403), threshold=[1e-4, 0.02], iterations=2, rule=rule)
        assert 32 < int(found.counts) < 403

    def test_the_most_anchors(self, attention: Callable[..., Tensor]) -> None:
        anchors = torch.randint(0, 20, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
        maps = attention((4, 5), dtype=torch.float32)
        found = self.check(maps, (4, 5), anchors=anchors, threshold=[1e-5, 0.3], iterations=2)
        assert found.maps.shape[1] == 1024

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("iterations", [1, 2, 4])
    def test_any_number_of_rounds(self, attention: Callable[..., Tensor], iterations: int, rule: Any) -> None:
        maps = attention((5, 6), batch=2, regions=7, dtype=torch.float32)
        thresholds = [0.05, 0.2, 0.4, 0.7][:iterations]
        self.check(maps, (5, 6), anchors=5, threshold=thresholds, iterations=iterations, rule=rule)

    @pytest.mark.parametrize("sharpness", [1.0, 8.0, 25.0])
    def test_distances_are_within_the_contract(self, sharpness: float) -> None:
        """A pair is merged at a threshold of D + 1e-4, and is not at one of D - 1e-4."""
        generator = torch.Generator().manual_seed(1)
        shared = torch.randn(1, 144, generator=generator)
        logits = sharpness * (shared + 0.1 * torch.randn(6, 144, generator=generator))
        maps = logits.double().softmax(-1).float()
        exact = distances(maps[None], maps[None])[0, 0]
        attention = torch.eye(144)[None].clone()  # the other maps are far from all
        for other in range(1, len(maps)):
            attention[0, 0], attention[0, 1] = maps[0], maps[other]
            for offset, expected in ((1e-4, (maps[0] + maps[other]) / 2), (-1e-4, maps[0])):
                found = diffseg.merge(
                    attention, anchors=[0], threshold=float(exact[other]) + offset, iterations=1, backend="cuda"
                )
                torch.testing.assert_close(found.maps[0, 0], expected, rtol=1e-4, atol=1e-9)

    def test_an_image_does_not_depend_on_its_batch(self, attention: Callable[..., Tensor]) -> None:
        maps = attention((5, 5), batch=3, dtype=torch.float32)
        together = diffseg.merge(maps, anchors=4, threshold=0.3, backend="cuda")
        alone = diffseg.merge(maps[2:], anchors=4, threshold=0.3, backend="cuda")
        assert torch.equal(together.maps[2:], alone.maps)


class TestLabel(LabelContract):
    backend = "cuda"


def check_words(queries: Sequence[Tensor], keys: Sequence[Tensor], **options: Any) -> Tensor:
    found = diffseg.aggregate_cross(queries, keys, backend="cuda", **options)
    expected = diffseg.aggregate_cross(as_double(queries), as_double(keys), backend="reference", **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    return found


class TestAggregateCross:
    def text(self, queries: Sequence[Tensor], tokens: int) -> list[Tensor]:
        """Keys of a text, laid out as projections are."""
        generator = torch.Generator().manual_seed(5)
        return [
            torch.randn(query.shape[0], tokens, *query.shape[1::2], generator=generator).transpose(1, 2).to(query)
            for query in queries
        ]

    @pytest.mark.parametrize("size", [None, (17, 29)], ids=["largest grid", "pixels"])
    @pytest.mark.parametrize(
        ("grids", "batch", "tokens"),
        [([(9, 11)], 1, 1), ([(9, 11), (3, 5), (9, 11), (5, 4)], 2, 77), (DIVISIBLE, 1, 80), (INDIVISIBLE, 2, 9)],
        ids=["one", "several", "a whole tile", "small"],
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_meets_the_contract(
        self,
        layers: Callable[..., Any],
        dtype: torch.dtype,
        grids: list[tuple[int, int]],
        batch: int,
        tokens: int,
        size: tuple[int, int] | None,
    ) -> None:
        queries = layers(grids, batch=batch, heads=3, dim=24, dtype=dtype).queries
        words = [[0], [tokens - 1], sorted({0, tokens // 2, tokens - 1})]
        check_words(queries, self.text(queries, tokens), tokens=words, grids=grids, size=size)

    @pytest.mark.parametrize("tokens", [81, 163])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_text_of_several_tiles(self, layers: Callable[..., Any], dtype: torch.dtype, tokens: int) -> None:
        grids = [(7, 10), (3, 3)]
        queries = layers(grids, batch=2, heads=2, dim=40, dtype=dtype).queries
        words = [[0], [79], [80], [tokens - 1], [5, 80]]
        found = check_words(queries, self.text(queries, tokens), tokens=words, grids=grids)
        assert not torch.equal(found[0], found[1])

    @pytest.mark.parametrize("dim", [8, 63, 160])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_heads_of_any_width(self, layers: Callable[..., Any], dtype: torch.dtype, dim: int) -> None:
        queries = layers([(4, 5)], dim=dim, dtype=dtype).queries
        check_words(queries, self.text(queries, 77), tokens=[[3], [76]], grids=[(4, 5)])

    def test_layers_of_one_grid_need_not_be_alike(self, layers: Callable[..., Any]) -> None:
        grids, shapes = [(3, 3), (6, 6), (3, 3)], [(1, 8), (3, 28), (2, 40)]
        made = [layers([grid], heads=heads, dim=dim) for grid, (heads, dim) in zip(grids, shapes, strict=True)]
        queries = [scene.queries[0].float() for scene in made]
        check_words(queries, self.text(queries, 11), tokens=[[0], [10, 2]], grids=grids, scales=[0.2, -0.3, 0.5])

    def test_more_layers_and_grids_than_a_launch_takes(self, layers: Callable[..., Any]) -> None:
        grids = [(1, width) for width in range(1, 67)]
        queries = layers(grids, heads=1, dtype=torch.float16).queries
        check_words(queries, self.text(queries, 3), tokens=[[0], [1, 2]], grids=grids, size=(2, 70))

    def test_more_lines_and_longer_ones_than_a_block_takes(self, layers: Callable[..., Any]) -> None:
        grids = [(2, 150), (1, 4)]
        queries = layers(grids, heads=1, dtype=torch.float16).queries
        check_words(queries, self.text(queries, 5), tokens=[[0], [4]], grids=grids, size=(65, 1030))

    @pytest.mark.parametrize("tokens", [77, 90])
    def test_large_scores_do_not_overflow(self, layers: Callable[..., Any], tokens: int) -> None:
        queries = [20 * query for query in layers([(4, 4)], dtype=torch.float32).queries]
        keys = self.text(queries, tokens)
        scores = queries[0] @ keys[0].mT
        assert scores.max() > 128  # 2 ** 128 is beyond float32
        words = [[word] for word in scores.argmax(-1).unique().tolist()]  # others attend with less than float32 squares
        check_words(queries, keys, tokens=words, grids=[(4, 4)], scales=[1.0])

    def test_words_of_each_image(self, layers: Callable[..., Any]) -> None:
        """Images of a batch may have words of their own; rows of zeros fill up."""
        queries = layers([(5, 3)], batch=2, dtype=torch.float32).queries
        shares = torch.zeros(2, 2, 9)
        shares[0, 0, 5] = shares[0, 1, 6] = shares[1, 0, 8] = 1
        found = check_words(queries, self.text(queries, 9), tokens=shares, grids=[(5, 3)])
        assert found[1, 1].eq(0).all()
        assert found[:, 0].ne(0).all()

    @pytest.mark.parametrize("tokens", [9, 90])
    def test_nan_reaches_the_maps_of_its_image(self, layers: Callable[..., Any], tokens: int) -> None:
        queries = layers([(4, 4), (2, 2)], batch=2, dtype=torch.float32).queries
        queries[1][1, 0, 2, 0] = torch.nan
        options: dict[str, Any] = {"tokens": [[1], [2]], "grids": [(4, 4), (2, 2)], "backend": "cuda"}
        found = diffseg.aggregate_cross(queries, self.text(queries, tokens), **options)
        assert found.isnan().flatten(1).all(-1).tolist() == [False, True]
        assert found[0].isfinite().all()

    def test_an_image_does_not_depend_on_its_batch(self, layers: Callable[..., Any]) -> None:
        queries = layers(INDIVISIBLE, batch=3, dtype=torch.bfloat16).queries
        keys = self.text(queries, 12)
        options: dict[str, Any] = {"tokens": [[1], [2]], "grids": INDIVISIBLE, "backend": "cuda"}
        together = diffseg.aggregate_cross(queries, keys, **options)
        alone = diffseg.aggregate_cross(*([each[1:2] for each in tensors] for tensors in (queries, keys)), **options)
        assert torch.equal(together[1:2], alone)


class TestScoreMasks:
    @pytest.mark.parametrize(
        ("grid", "size", "words", "masks"),
        [
            ((5, 4), (13, 17), 3, 3),
            ((1, 1), (2, 9), 1, 1),
            ((6, 6), (6, 6), 8, 40),
            ((9, 7), (70, 61), 5, 7),  # more pixels than a band
            ((3, 2), (40, 9), 19, 5),  # more words than a block takes
            ((4, 3), (31, 33), 2, 300),  # more masks than a block takes
        ],
    )
    def test_equals_the_reference(self, grid: tuple[int, int], size: tuple[int, int], words: int, masks: int) -> None:
        generator = torch.Generator().manual_seed(6)
        maps = torch.rand(2, words, *grid, generator=generator)
        labels = torch.randint(-1, masks + 2, (2, *size), generator=generator, dtype=torch.int32)
        labels[:, 0, :2] = torch.tensor([-(2**31), 2**31 - 1])
        found = diffseg.score_masks(maps, labels, masks=masks, backend="cuda")
        expected = diffseg.score_masks(maps.double(), labels, masks=masks, backend="reference")
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)

    def test_masks_without_pixels_score_zero(self) -> None:
        labels = torch.full((1, 7, 9), 4, dtype=torch.int32)
        labels[:, 3:] = 1
        found = diffseg.score_masks(1 + torch.rand(1, 2, 3, 3), labels, masks=6, backend="cuda")
        assert found.ne(0).all(-1).tolist() == [[False, True, False, False, True, False]]
        assert found.eq(0).all(-1).tolist() == [[True, False, True, True, False, True]]
        none = diffseg.score_masks(torch.rand(1, 2, 3, 3), labels - 9, masks=6, backend="cuda")
        assert none.eq(0).all()

    def test_strided_maps_and_labels(self) -> None:
        maps, labels = torch.rand(2, 4, 3, 6)[:, ::2, :, ::2], torch.randint(0, 3, (2, 9, 8), dtype=torch.int32)
        found = diffseg.score_masks(maps, labels.mT, masks=3, backend="cuda")
        expected = diffseg.score_masks(maps.double(), labels.mT, masks=3, backend="reference")
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)

    def test_nan_reaches_the_scores_of_its_word(self) -> None:
        maps = torch.rand(1, 2, 4, 4)
        maps[0, 1, 3, 3] = torch.nan
        labels = torch.zeros(1, 4, 4, dtype=torch.int32)
        labels[:, 2:] = 1
        found = diffseg.score_masks(maps, labels, masks=2, backend="cuda")
        assert found.isnan().tolist() == [[[False, False], [False, True]]]

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        maps, labels = torch.rand(3, 2, 5, 5), torch.randint(0, 4, (3, 65, 64), dtype=torch.int32)
        together = diffseg.score_masks(maps, labels, masks=4, backend="cuda")
        assert torch.equal(together[2:], diffseg.score_masks(maps[2:], labels[2:], masks=4, backend="cuda"))


class TestSegment(SegmentContract):
    backend = "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_changes_no_bit(host: Host, layers: Callable[..., Any], dtype: torch.dtype) -> None:
    """Where a barrier is missing, threads that run last first see other values."""

    def run() -> tuple[Tensor, ...]:
        attention = diffseg.aggregate(scene.queries, scene.keys, grids=scene.grids, backend="cuda")
        proposals = diffseg.merge(attention, grid=(11, 13), anchors=range(0, 143, 9), threshold=0.3, backend="cuda")
        maps = diffseg.aggregate_maps([attention.to(dtype), scene.maps()[1]], grids=scene.grids, backend="cuda")
        labels, segments = diffseg.ops.numbered_labels(proposals, (20, 30), backend="cuda")
        text = [key[:, :, :28] for key in scene.keys], [key[:, :, :28].repeat(1, 1, 3, 1) for key in scene.keys]
        words = [
            diffseg.aggregate_cross(
                scene.queries, keys, tokens=[[0], [5, 9]], grids=scene.grids, size=(20, 30), backend="cuda"
            )
            for keys in text
        ]
        scores = diffseg.score_masks(words[0], labels, masks=16, backend="cuda")
        return attention, maps, *proposals[:2], labels, segments, *words, scores

    scene = layers([(11, 13), (4, 7)], dim=40, dtype=dtype)
    forward = run()
    with host.reversed():
        backward = run()
    for first, second in zip(forward, backward, strict=True):
        assert torch.equal(first, second)


def test_other_threads_run_beside_a_kernel(host: Host, layers: Callable[..., Any], monkeypatch: Any) -> None:
    done, steps, during = threading.Event(), 0, {}

    def count() -> None:
        nonlocal steps
        while not done.wait(1e-4):
            steps += 1

    def watched(name: str, run: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            before = steps
            run(*arguments)
            during[name] = steps - before

        return call

    for name in backends.OPS:
        monkeypatch.setattr(host.module, name, watched(name, getattr(host.module, name)))
    scene = layers([(16, 16)], dtype=torch.float32)
    counter = threading.Thread(target=count)
    counter.start()
    try:
        diffseg.aggregate(scene.queries, scene.keys, backend="cuda")
        attention = diffseg.aggregate_maps([torch.rand(1, 144, 144)], backend="cuda")
        proposals = diffseg.merge(attention, anchors=8, backend="cuda")
        labels, _ = diffseg.ops.numbered_labels(proposals, (512, 512), backend="cuda")
        maps = diffseg.aggregate_cross(scene.queries, scene.keys, tokens=[[0]], backend="cuda")
        diffseg.score_masks(maps, labels, masks=64, backend="cuda")
    finally:
        done.set()
        counter.join()
    assert all(during.values()), during
    assert set(during) == set(backends.OPS)


SUMS_OF_16_BITS = {  # heads of 160 channels are of two chunks
    "SD 1.4": {"sum_scores_kernel", "sum_chunks_kernel"},
    "SD 2.1": {"sum_chunks_kernel"},
    "SDXL": {"sum_chunks_kernel"},
}


class TestPlans:
    """What is launched at the shapes of real networks; nothing runs."""

    def layers(self, module: Any, network: str, given: bool) -> tuple[list[Any], Any]:
        shapes = [shape[1:] for shape in NETWORKS[network][0] for _ in range(shape[0])]
        grids = [(side, side) for side, _, _ in shapes]
        ratios = resolve_weights("proportional", grids)
        layers = []
        for (side, heads, channels), ratio in zip(shapes, ratios, strict=True):
            view = module.View(16, (heads * side**2 * channels, channels, heads * channels))
            layers.append(
                module.Layer(
                    queries=view, keys=view, logsumexps=16 if given else 0, heads=heads, depth=channels,
                    grid=(side, side), scale=channels**-0.5, ratio=ratio,
                )
            )  # fmt: skip
        return layers, module.Attention(data=16, dtype="float32", grid=grids[0], batch=1)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("network", NETWORKS)
    def test_aggregate(self, host: Host, network: str, dtype: str) -> None:
        layers, out = self.layers(host.module, network, given=False)
        assert host.module.aggregate_workspace(layers, dtype, out) < (32 << 20)
        with host.recorded() as launches:
            host.module.aggregate(layers, dtype, out, 256, host.module.Queue(0, 0))
        kernels = {"sum_scores_kernel"} if dtype == "float32" else SUMS_OF_16_BITS[network]
        assert {launch[0] for launch in launches} == {"logsumexp_kernel", "rows_kernel"} | kernels
        assert all(int(launch[5]) <= SMALLEST_LIMIT for launch in launches)
        if network == "SD 1.4" and dtype == "float16":
            sums = [(launch[0], int(launch[1])) for launch in launches if launch[0].startswith("sum_")]
            lows = 3 * 64 + 5 * 4 + 1  # three parts at 32 x 32, five at 16 x 16
            assert sums == [("sum_scores_kernel", lows), ("sum_chunks_kernel", 32 * 32)]

    def test_aggregate_of_layers_below_the_output_grid(self, host: Host) -> None:
        """A row of A_f is as long as the output grid asks, without shared memory to hold it."""
        layers, _ = self.layers(host.module, "SD 1.4", given=True)
        side, _, _ = NETWORKS["SD 1.4"][0][0][1:]
        out = host.module.Attention(data=16, dtype="float32", grid=(2 * side, 2 * side), batch=1)
        with host.recorded() as launches:
            host.module.aggregate(layers, "float16", out, 256, host.module.Queue(0, 0))
        last = launches[-1]
        assert (last[0], int(last[1]), int(last[5])) == ("rows_kernel", (2 * side) ** 2, 0)
        assert all(int(launch[5]) <= SMALLEST_LIMIT for launch in launches)

    def test_aggregate_maps_takes_the_shared_memory_that_is_asked_for(self, host: Host) -> None:
        module, grids = host.module, [(16, 8), (64, 48), (3, 5)]
        layers = [
            module.MapLayer(maps=module.View(16, (0, 0, h * w)), heads=2, grid=(h, w), ratio=0.3) for h, w in grids
        ]
        out = module.Attention(data=16, dtype="float32", grid=grids[1], batch=1)
        with host.recorded() as launches:
            module.aggregate_maps(layers, "float32", out, 256, module.Queue(0, 0))
        assert [int(launch[5]) for launch in launches] == [module.row_bytes(grids[0]), module.row_bytes(grids[1])]

    @pytest.mark.parametrize("cells", [4096, 9216])
    def test_merge(self, host: Host, cells: int) -> None:
        module = host.module
        options = module.MergeOptions(anchors=list(range(256)), thresholds=[1.0] * 3, exclusive=True)
        assert module.merge_workspace(1, cells, options) < (64 << 20 if cells > 4096 else 32 << 20)
        with host.recorded() as launches:
            attention = module.View(16, (cells * cells, 0, cells))
            module.merge(attention, "float32", 1, cells, options, 16, 16, 256, module.Queue(0, 0))
        later = ["terms_kernel", "products_kernel", "bits_kernel", "walk_kernel", "means_kernel"]
        assert [launch[0] for launch in launches] == [
            "positions_kernel", "terms_kernel", "products_kernel", "bits_kernel", "means_kernel", *later * 2,
        ]  # fmt: skip
        assert all(int(launch[5]) <= SMALLEST_LIMIT for launch in launches)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("network", NETWORKS)
    def test_aggregate_cross(self, host: Host, network: str, dtype: str) -> None:
        module = host.module
        layers, _ = self.layers(module, network, given=False)
        words, size = module.Words(shares=16, count=20, tokens=77), (1024, 1024)
        assert module.aggregate_cross_workspace(layers, words, 1, size) < (16 << 20)
        with host.recorded() as launches:
            module.aggregate_cross(layers, dtype, words, 1, size, 16, 256, module.Queue(0, 0))
        names = ["words_kernel"] * -(-len(layers) // 32) + ["upsample_kernel", "normalise_kernel"]
        assert [launch[0] for launch in launches] == names
        assert all(int(launch[5]) <= SMALLEST_LIMIT for launch in launches)
        if network == "SD 1.4":
            assert int(launches[0][1]) == 5 * (64 + 16 + 4) + 1

    @pytest.mark.parametrize(
        ("masks", "grid"), [(10, (128, 1)), (256, (128, 1)), (300, (128, 2)), (10**4, (17, 40)), (10**6, (1, 3907))]
    )
    def test_score_masks(self, host: Host, masks: int, grid: tuple[int, int]) -> None:
        """Bands of pixels fill a GPU as long as their sums stay small."""
        module, size = host.module, (512, 512)
        assert module.score_masks_workspace(1, 5, size, masks) <= max(4 << 20, 24 * masks) + 512
        with host.recorded() as launches:
            module.score_masks(16, 16, 16, 1, 5, (64, 64), size, masks, 256, module.Queue(0, 0))
        assert [launch[0] for launch in launches] == ["mask_sums_kernel", "scores_kernel"]
        assert tuple(int(word) for word in launches[0][1:3]) == grid
        assert all(int(launch[5]) <= SMALLEST_LIMIT for launch in launches)


@pytest.fixture(scope="session")
def broken(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources = [builder.HERE / "broken.cpp", builder.HERE / "host_device.cpp"]
    return ctypes.CDLL(str(builder.build(tmp_path_factory.mktemp("broken"), sources=sources)))


class TestEmulation:
    """Kernels that are wrong on purpose."""

    def run(self, broken: ctypes.CDLL, name: str) -> tuple[str, Tensor]:
        """What the emulation says, and the 64 floats that the kernel writes."""
        function = getattr(broken, name)
        function.restype = ctypes.c_char_p
        out = torch.zeros(64)
        return function(ctypes.c_void_p(out.data_ptr())).decode(), out

    @pytest.mark.parametrize("name", ["read_unwritten", "read_early"])
    def test_shared_memory_is_nan_until_written(self, broken: ctypes.CDLL, name: str) -> None:
        complaint, out = self.run(broken, name)
        assert complaint == ""
        assert out.isnan().any()

    def test_a_copy_arrives_when_waited_for(self, broken: ctypes.CDLL) -> None:
        _, out = self.run(broken, "read_copy")
        assert out[0].isnan()
        assert out[1] == 2

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("copy_unwaited", "broken_kernel: a thread ended before its copies arrived"),
            ("copy_misaligned", "broken_kernel: the target of a copy is outside shared memory or not aligned"),
            ("shuffle_half", "broken_kernel: lanes of a warp do not meet"),
            ("diverge", "broken_kernel: lanes of a warp are at "),
        ],
    )
    def test_it_complains(self, broken: ctypes.CDLL, name: str, expected: str) -> None:
        assert self.run(broken, name)[0].startswith(expected)
