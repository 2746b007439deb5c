"""The Triton and the CUDA backend on a GPU, at the shapes of Stable Diffusion 1.4, 2.1 and XL, and at odd ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from contract import (
    NETWORKS,
    as_double,
    assert_layers_without_a_share_are_not_read,
    assert_numbered_as_the_reference,
    assert_same_attention,
    skip_unless_it_runs,
)
from torch import Tensor

import diffseg
from diffseg.backends import BACKENDS
from diffseg.bench import gates

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_unless_it_runs(name)
    return name


class Scene(NamedTuple):
    """What a forward pass hands over, on the GPU, laid out as projections are."""

    queries: list[Tensor]
    keys: list[Tensor]
    grids: list[tuple[int, int]]
    logsumexps: list[Tensor]
    size: tuple[int, int]


def make_scene(network: str, *, batch: int = 1, dtype: torch.dtype = torch.float16, seed: int = 0) -> Scene:
    """Layers that look at one scene of regions: cells of a region attend to each other, more so where they are near."""
    layers, side = NETWORKS[network]
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    centres = torch.rand(batch, 12, 2, generator=generator, device="cuda")
    queries, keys, grids, logsumexps = [], [], [], []
    for number, cells, heads, channels in layers:
        line = (torch.arange(cells, device="cuda") + 0.5) / cells
        points = torch.cartesian_prod(line, line).expand(batch, -1, -1)
        region = torch.cdist(points, centres).argmin(-1)
        for _ in range(number):
            features = 1.2 * randn(batch, 12, heads, channels)
            shared = features.gather(1, region[:, :, None, None].expand(-1, -1, heads, channels))
            shared = shared + (points @ randn(2, channels))[:, :, None]
            query, key = ((shared + 0.3 * randn(*shared.shape)).to(dtype).transpose(1, 2) for _ in range(2))
            queries.append(query)
            keys.append(key)
            grids.append((cells, cells))
            logsumexps.append(logsumexp(query, key))
    return Scene(queries, keys, grids, logsumexps, (side, side))


def logsumexp(query: Tensor, key: Tensor) -> Tensor:
    """[B, heads, n] float32, one head at a time."""
    rows = [
        (query[:, head].double() @ key[:, head].double().mT * query.shape[-1] ** -0.5).logsumexp(-1)
        for head in range(query.shape[1])
    ]
    return torch.stack(rows, 1).float()


def aggregate(scene: Scene, backend: str, *, given: bool = True, **options: Any) -> Tensor:
    return diffseg.aggregate(
        scene.queries, scene.keys, grids=scene.grids, logsumexps=scene.logsumexps if given else None,
        backend=backend, **options,
    )  # fmt: skip


def segment(scene: Scene, backend: str, **options: Any) -> Tensor:
    return diffseg.segment(
        scene.queries, scene.keys, scene.size, grids=scene.grids, logsumexps=scene.logsumexps, backend=backend,
        **options,
    )  # fmt: skip


def oracle(scene: Scene) -> Tensor:
    """A_f in float64."""
    return diffseg.aggregate(
        as_double(scene.queries), as_double(scene.keys), grids=scene.grids,
        dtype=torch.float64, backend="reference",
    )  # fmt: skip


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("given", [True, False], ids=["logsumexps", "computed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("network", NETWORKS)
def test_aggregate_meets_the_contract(backend: str, network: str, dtype: torch.dtype, given: bool) -> None:
    scene = make_scene(network, dtype=dtype)
    assert_same_attention(aggregate(scene, backend, given=given), oracle(scene))


@pytest.mark.parametrize("grids", [[(48, 48), (24, 24), (12, 12)], [(20, 37), (9, 37), (12, 12)]])
def test_layers_without_a_share_are_not_read(backend: str, layers: Callable[..., Any], grids: Any) -> None:
    scene = layers(grids, batch=2, dtype=torch.float32)
    on_gpu = ([each.cuda() for each in tensors] for tensors in (scene.queries, scene.keys))
    assert_layers_without_a_share_are_not_read(backend, *on_gpu, grids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_aggregate_maps_meets_the_contract(backend: str, dtype: torch.dtype) -> None:
    grids = [(64, 64), (32, 32), (64, 64), (24, 40), (8, 8)]
    maps = [torch.rand(2, 4, h * w, h * w, device="cuda").to(dtype) for h, w in grids]
    found = diffseg.aggregate_maps(maps, grids=grids, backend=backend)
    expected = diffseg.aggregate_maps(as_double(maps), grids=grids, dtype=torch.float64, backend="reference")
    assert_same_attention(found, expected)
    memory = torch.full((found.numel() + 1,), torch.nan, device="cuda")
    for out in (memory[:-1].view_as(found), memory[1:].view_as(found)):  # aligned for vectors, and not
        assert diffseg.aggregate_maps(maps, grids=grids, backend=backend, out=out) is out
        assert torch.equal(out, found)


@pytest.mark.parametrize("network", NETWORKS)
def test_first_round_decides_as_the_oracle_outside_the_band(backend: str, network: str) -> None:
    attention = aggregate(make_scene(network), backend)
    cells = attention.shape[1]
    found = diffseg.merge(attention, iterations=1, backend=backend)
    anchors = list(diffseg.ops.anchor_indices(found.grid, 16))
    maps = attention[0].double()
    exact = gates.divergences(maps[anchors], maps)
    near = exact < 1.0
    near[torch.arange(len(anchors)), anchors] = True
    expected = near.double() @ maps / near.sum(-1, keepdim=True)
    band = (exact - 1.0).abs() < 1e-3
    sure = ~band.any(-1)
    assert sure.float().mean() > 0.25, "too few anchors without a pair in the band: the test would show little"
    torch.testing.assert_close(found.maps[0, sure].double(), expected[sure], rtol=1e-4, atol=1e-9)
    # a flip moves a mean by no more than the share of the maps in the band
    share = band.sum(-1) / near.sum(-1)
    assert ((found.maps[0].double() - expected).abs().sum(-1) <= 2.1 * share + 1e-4).all()
    assert cells == found.maps.shape[2]


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("network", NETWORKS)
def test_labels_agree_with_the_oracle(backend: str, network: str, rule: Any) -> None:
    scene = make_scene(network)
    expected = oracle(scene)
    proposals = diffseg.merge(expected, rule=rule, backend="reference")
    labels, segments = diffseg.ops.numbered_labels(proposals, scene.size, backend="reference")
    assert segments.min() > 3
    assert (segment(scene, backend, rule=rule) == labels).float().mean() >= 0.999


@pytest.mark.parametrize("size", [(512, 512), (3, 5), (333, 517)])
@pytest.mark.parametrize("length", [1, 33, 256, 1024])
def test_numbering_equals_the_reference(backend: str, size: tuple[int, int], length: int) -> None:
    assert_numbered_as_the_reference(backend, length, size, "cuda", batch=3)


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize(
    ("grids", "channels"),
    [([(37, 53), (19, 27), (37, 53), (5, 7)], 40), ([(24, 40), (12, 20)], 63)],
    ids=["odd", "even"],
)
def test_odd_shapes_agree_with_the_oracle(backend: str, grids: list[tuple[int, int]], channels: int, rule: Any) -> None:
    generator = torch.Generator("cuda").manual_seed(2)
    queries, keys = [], []
    for h, w in grids:
        points = torch.cartesian_prod(torch.arange(h, device="cuda") / h, torch.arange(w, device="cuda") / w)
        region = (4 * points).floor() @ torch.tensor([4.0, 1.0], device="cuda")
        features = torch.randn(2, 3, 16, channels, generator=generator, device="cuda")
        for made in (queries, keys):
            noise = torch.randn(2, 3, h * w, channels, generator=generator, device="cuda")
            made.append((features[:, :, region.long()] + 0.3 * noise).half())
    found = diffseg.aggregate(queries, keys, grids=grids, backend=backend)
    expected = diffseg.aggregate(
        as_double(queries), as_double(keys), grids=grids, dtype=torch.float64, backend="reference",
    )  # fmt: skip
    assert_same_attention(found, expected)
    options = {"grid": grids[0], "anchors": 9, "rule": rule}
    labels, oracle_labels = (
        diffseg.label(diffseg.merge(maps, backend=name, **options), (111, 170), backend=name)
        for maps, name in ((found, backend), (expected, "reference"))
    )
    assert (labels == oracle_labels).float().mean() >= 0.999


def test_a_batch_equals_its_images(backend: str) -> None:
    scene = make_scene("SD 1.4", batch=3)
    together = segment(scene, backend)
    for item in range(3):
        alone = Scene(
            *([tensor[item : item + 1] for tensor in tensors] for tensors in (scene.queries, scene.keys)),
            scene.grids, [rows[item : item + 1] for rows in scene.logsumexps], scene.size,
        )  # fmt: skip
        assert torch.equal(together[item], segment(alone, backend)[0])


def test_same_bits_in_100_runs(backend: str) -> None:
    scene = make_scene("SD 1.4")
    attention = aggregate(scene, backend, given=False)
    proposals = diffseg.merge(attention, backend=backend)
    labels = diffseg.label(proposals, scene.size, backend=backend)
    for _ in range(100):
        again = aggregate(scene, backend, given=False)
        assert torch.equal(again, attention)
        merged = diffseg.merge(again, backend=backend)
        assert torch.equal(merged.maps, proposals.maps)
        assert torch.equal(merged.counts, proposals.counts)
        assert torch.equal(diffseg.label(merged, scene.size, backend=backend), labels)


@pytest.mark.parametrize("anchors", [16, list(range(0, 4096, 17))], ids=["evenly spaced", "given"])
def test_the_stage_never_waits_and_can_be_recorded(backend: str, anchors: Any) -> None:
    scene, other = make_scene("SD 1.4"), make_scene("SD 1.4", seed=1)
    segment(scene, backend, anchors=anchors)  # compiles
    with no_waiting():
        eager = segment(scene, backend, anchors=anchors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = segment(scene, backend, anchors=anchors)
    graph.replay()
    assert torch.equal(recorded, eager)
    expected = segment(other, backend, anchors=anchors)
    for name in ("queries", "keys", "logsumexps"):
        for tensor, replacement in zip(getattr(scene, name), getattr(other, name), strict=True):
            tensor.copy_(replacement)
    graph.replay()
    assert torch.equal(recorded, expected)


def test_memory_beyond_the_attention_is_small(backend: str) -> None:
    scene = make_scene("SD 1.4")
    segment(scene, backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    segment(scene, backend)
    attention = 4096 * 4096 * 4
    assert torch.cuda.max_memory_allocated() - before - attention < 32 * 2**20


WORDS = [[1], [2, 3], [7], [75, 76]]


def make_text(scene: Scene, tokens: int = 77) -> list[Tensor]:
    """Keys of a text for the queries of a scene, laid out as projections are."""
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(query.shape[0], tokens, query.shape[1], query.shape[3]) for query in scene.queries]
    keys = [torch.randn(shape, generator=generator, device="cuda").transpose(1, 2) for shape in shapes]
    return [key.to(query) for key, query in zip(keys, scene.queries, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("network", NETWORKS)
def test_cross_attention_meets_the_contract(backend: str, network: str, dtype: torch.dtype) -> None:
    scene = make_scene(network, batch=2, dtype=dtype)
    text, options = make_text(scene), {"tokens": WORDS, "grids": scene.grids, "size": scene.size}
    found = diffseg.aggregate_cross(scene.queries, text, backend=backend, **options)
    expected = diffseg.aggregate_cross(as_double(scene.queries), as_double(text), backend="reference", **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    labels = segment(scene, backend)
    scores = diffseg.score_masks(found, labels, backend=backend)
    expected = diffseg.score_masks(expected, labels, backend="reference")
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 80, 120, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cross_attention_of_odd_shapes_meets_the_contract(backend: str, dtype: torch.dtype, tokens: int) -> None:
    device = torch.device("cuda")
    if not BACKENDS[backend].can_run("aggregate_cross", device, dtype, tokens=tokens):
        pytest.skip(f"{backend} takes shorter texts only")
    grids = [(37, 53), (19, 27), (37, 53), (5, 7)]
    generator = torch.Generator(device).manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    queries = [2 * randn(2, 3, h * w, 63) for h, w in grids]
    keys = [randn(2, 3, tokens, 63) for _ in grids]
    options: dict[str, Any] = {"tokens": [[0], [tokens - 1], [0, tokens // 2]], "grids": grids, "size": (111, 170)}
    found = diffseg.aggregate_cross(queries, keys, backend=backend, **options)
    expected = diffseg.aggregate_cross(as_double(queries), as_double(keys), backend="reference", **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("masks", [3, 300])
@pytest.mark.parametrize("words", [1, 20])
def test_scores_of_odd_shapes_equal_the_reference(backend: str, words: int, masks: int) -> None:
    maps = torch.rand(2, words, 37, 53, device="cuda")
    labels = torch.randint(-1, masks + 2, (2, 111, 170), dtype=torch.int32, device="cuda")
    labels[labels == 1] = 0  # a mask without pixels
    found = diffseg.score_masks(maps, labels, masks=masks, backend=backend)
    expected = diffseg.score_masks(maps.double(), labels, masks=masks, backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    assert found[:, 1].eq(0).all()


def test_cross_attention_has_the_same_bits_again_and_in_a_graph(backend: str) -> None:
    scene, other = make_scene("SD 1.4"), make_scene("SD 1.4", seed=1)
    text, labels = make_text(scene), segment(scene, backend)
    shares = torch.eye(5, 77, device="cuda")[None]

    def run(queries: list[Tensor]) -> tuple[Tensor, Tensor]:
        maps = diffseg.aggregate_cross(
            queries, text, tokens=shares, grids=scene.grids, size=scene.size, backend=backend
        )
        return maps, diffseg.score_masks(maps, labels, masks=256, backend=backend)

    def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(first, second, strict=True))

    first, expected = run(scene.queries), run(other.queries)
    with no_waiting():
        second = run(scene.queries)
    assert same(first, second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(scene.queries)
    graph.replay()
    assert same(recorded, first)
    for tensor, replacement in zip(scene.queries, other.queries, strict=True):
        tensor.copy_(replacement)
    graph.replay()
    assert same(recorded, expected)
    assert not same(recorded, first)


def test_offsets_beyond_32_bits(backend: str) -> None:
    cells, batch = 4096, 130  # 130 x 4096 x 4096 > 2 ** 31
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip("needs 16 GB of free memory")
    one = torch.rand(1, cells, cells, device="cuda").square_().bfloat16()
    found = diffseg.aggregate_maps([one.expand(batch, -1, -1)], dtype=torch.bfloat16, backend=backend)
    assert torch.equal(found[-1], found[0])
    options = {"anchors": 4, "threshold": 0.3, "iterations": 2, "backend": backend}
    last = diffseg.merge(found, **options)
    assert torch.equal(last.maps[-1], diffseg.merge(found[:1], **options).maps[0])


def test_warmup_leaves_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    skip_unless_it_runs("triton")
    layers, side = NETWORKS["SD 1.4"]
    shapes = [((cells, cells), heads, channels) for number, cells, heads, channels in layers for _ in range(number)]
    diffseg.warmup(shapes, (side, side), backend="triton")

    def compiled(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a kernel was compiled after warmup")

    scene = make_scene("SD 1.4")
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", compiled, raising=False)
    monkeypatch.setattr(triton, "compile", compiled)
    segment(scene, "triton")
    diffseg.segment(scene.queries, scene.keys, scene.size, grids=scene.grids, backend="triton")
