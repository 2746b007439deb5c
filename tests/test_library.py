"""The ops as torch.library operators: shapes of the fakes, and whole-graph compilation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils._pytree import tree_map

import diffseg
from diffseg.backends import version_of

BACKENDS = ("cpu", "reference")
GRIDS = [(8, 6), (4, 3)]


def layers(batch=2, grids=GRIDS, depth=8):
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(batch, 2, height * width, depth, generator=generator) for height, width in grids] for _ in range(2)
    ]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend):
    queries, keys = layers()
    flat, ratios, dtype = [8, 6, 4, 3], [0.75, 0.25], torch.float32
    logsumexps = [torch.logsumexp(query @ key.mT * 0.5, -1) for query, key in zip(queries, keys, strict=True)]
    operators = torch.ops.diffseg
    attention = operators.aggregate(queries, keys, flat, [0.5, 0.5], None, ratios, [8, 6], dtype, backend)
    maps, counts = operators.merge(attention, [8, 6], [0, 7, 21, 40], [0.3, 0.3], "paper", backend)
    texts, shares = [key[:, :, :5] for key in keys], torch.eye(3, 5).expand(2, -1, -1)
    words = operators.aggregate_cross(queries, texts, flat, [0.5, 0.5], shares, [16, 12], backend)
    winners = operators.label(maps, counts, [8, 6], [13, 11], backend)
    for operator, arguments in (
        (operators.aggregate, (queries, keys, flat, [0.5, 0.5], None, ratios, [8, 6], dtype, backend)),
        (operators.aggregate, (queries, keys, flat, [0.5, 0.5], logsumexps, ratios, [9, 6], torch.bfloat16, backend)),
        (operators.aggregate_maps, ([attention[:, None]], [8, 6], [1.0], [8, 6], dtype, backend)),
        (
            operators.aggregate_into,
            (queries, keys, flat, [0.5, 0.5], None, ratios, [8, 6], torch.zeros_like(attention), backend),
        ),
        (
            operators.aggregate_maps_into,
            ([attention[:, None]], [8, 6], [1.0], [8, 6], torch.zeros_like(attention), backend),
        ),
        (operators.merge, (attention, [8, 6], [0, 7, 21, 40], [0.3, 0.3], "paper", backend)),
        (operators.merge, (attention.bfloat16(), [8, 6], [0, 7], [0.3], "official", backend)),
        (operators.label, (maps, counts, [8, 6], [13, 11], backend)),
        (operators.renumber, (winners, 4, backend)),
        (operators.refine, (attention, maps, counts, 5)),
        (operators.aggregate_cross, (queries, texts, flat, [0.5, 0.5], shares, [16, 12], backend)),
        (operators.score_masks, (words, winners, 4, backend)),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "reference", "rule": "official"},
        {"refine": True},
        {"weights": [2.0, 1.0], "scales": [0.5, 0.25]},
        {"iterations": 2, "threshold": [0.3, 0.6], "anchors": [0, 5, 30]},
    ],
    ids=str,
)
def test_segment_compiles_into_one_graph(options):
    queries, keys = layers()

    def segment(queries, keys):
        return diffseg.segment(queries, keys, (20, 14), grids=GRIDS, **{"anchors": 4, "threshold": 0.3, **options})

    compiled = torch.compile(segment, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, keys), segment(queries, keys))
    other = [[tensor[:1] for tensor in each] for each in layers()]
    assert torch.equal(compiled(*other), segment(*other))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("explicit", [False, True], ids=["square", "grids"])
def test_other_sizes_compile_into_one_graph_each(explicit, dynamic):
    def segment(queries, keys, grids, image):
        return diffseg.segment(queries, keys, image.shape, grids=grids, anchors=2, threshold=0.3)

    compiled = torch.compile(segment, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for side in (8, 6, 10):
        grids = [(side, side - explicit), (side // 2, 3 if explicit else side // 2)]
        queries, keys = layers(grids=grids, depth=side)
        arguments = queries, keys, grids if explicit else None, torch.empty(2 * side, 3 * side)
        assert torch.equal(compiled(*arguments), segment(*arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aggregating_into_a_tensor_gives_the_same_and_no_other(backend, dtype):
    queries, keys = layers()
    options = {"grids": GRIDS, "dtype": dtype, "backend": backend}
    maps = [(query @ key.mT).softmax(-1) for query, key in zip(queries, keys, strict=True)]
    for run in (
        lambda **more: diffseg.aggregate(queries, keys, **options, **more),
        lambda **more: diffseg.aggregate_maps(maps, **options, **more),
    ):
        out = torch.full((2, 48, 48), torch.nan, dtype=dtype)
        assert run(out=out) is out
        assert torch.equal(out, run())
        compiled = torch.compile(lambda out, run=run: run(out=out) * 2, fullgraph=True, backend="aot_eager")
        out = torch.full((2, 48, 48), torch.nan, dtype=dtype)
        assert torch.equal(compiled(out), run() * 2)
        assert torch.equal(out, run())


def test_changing_thresholds_compile_into_one_graph():
    queries, keys = layers()

    def segment(threshold):
        return diffseg.segment(queries, keys, (20, 14), grids=GRIDS, anchors=4, threshold=threshold)

    compiled = torch.compile(segment, fullgraph=True, backend="aot_eager")
    found = [compiled(threshold) for threshold in (0.1, 0.3, 0.9)]
    assert all(torch.equal(each, segment(threshold)) for each, threshold in zip(found, (0.1, 0.3, 0.9), strict=True))
    assert not torch.equal(found[0], found[2])


def test_operators_stay_opaque_to_the_compiler():
    queries, keys = layers()
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(lambda q, k: diffseg.segment(q, k, (16, 12), grids=GRIDS, anchors=4), backend=note, fullgraph=True)(
        queries, keys
    )
    assert [name for name in seen if name.startswith("diffseg.")] == [
        "diffseg.aggregate", "diffseg.merge", "diffseg.label", "diffseg.renumber",
    ]  # fmt: skip


@pytest.mark.skipif(version_of(torch.__version__) < (2, 7), reason="torch 2.6 does not say what was raised")
def test_compiled_bad_input_is_refused_as_it_is_eagerly():
    queries, keys = layers()
    compiled = torch.compile(
        lambda q, k: diffseg.segment(q, k, (16, 12), grids=GRIDS, anchors=9), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match="anchors: expected 1 to 6 anchors a side"):
        compiled(queries, keys)


def test_compiled_counts_beyond_the_maps_are_refused():
    maps = torch.rand(2, 3, 48)
    compiled = torch.compile(
        lambda counts: diffseg.label(diffseg.Proposals(maps, counts, (8, 6)), (9, 7)),
        fullgraph=True,
        backend="aot_eager",
    )
    assert compiled(torch.tensor([3, 1], dtype=torch.int32)).max() < 3
    with pytest.raises(ValueError, match=r"proposals.counts: expected 1 to 3, got \[3, 4\]"):
        compiled(torch.tensor([3, 4], dtype=torch.int32))


def test_fake_tensors_have_the_shapes_of_real_ones(inputs):
    expected = results(inputs, "auto")
    with FakeTensorMode() as mode:
        fakes = results(tree_map(mode.from_tensor, inputs), "auto")
    assert [(each.shape, each.dtype) for each in fakes] == [(each.shape, each.dtype) for each in expected]


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_the_size_of_an_image(strict):
    class Segmenter(torch.nn.Module):
        def forward(self, queries, keys, image):
            return diffseg.segment([queries], [keys], image.shape, grids=[(8, 6)], anchors=4, threshold=0.3)

    (query, _), (key, _) = layers()
    sizes = {0: Dim.AUTO, 1: Dim.AUTO}
    arguments = query, key, torch.empty(20, 14)
    program = torch.export.export(
        Segmenter(), arguments, strict=strict, dynamic_shapes=({0: Dim("batch")}, {0: Dim("batch")}, sizes)
    )
    one = query[:1], key[:1], arguments[2]
    for given in (arguments, one):
        assert torch.equal(program.module()(*given), Segmenter()(*given))


@pytest.fixture(scope="module")
def inputs():
    queries, keys = layers()
    text = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    maps = [(query @ key.mT).softmax(-1) for query, key in zip(queries, keys, strict=True)]
    return queries, keys, maps, text


def results(inputs, backend):
    """Of each op."""
    queries, keys, maps, text = inputs
    options = {"grids": GRIDS, "backend": backend}
    attention = diffseg.aggregate(queries, keys, **options)
    proposals = diffseg.merge(attention, grid=GRIDS[0], anchors=3, threshold=0.02, backend=backend)
    labels = diffseg.label(proposals, (16, 12), backend=backend)
    words = diffseg.aggregate_cross(queries, [text, text], tokens=[[0], [1, 2]], size=(16, 12), **options)
    return [
        attention,
        diffseg.aggregate_maps(maps, **options),
        *proposals[:2],
        *diffseg.refine(attention, proposals)[:2],
        labels,
        words,
        diffseg.score_masks(words, labels, masks=9, backend=backend),
        diffseg.segment(queries, keys, (16, 12), anchors=3, threshold=0.02, **options),
    ]


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(inputs, default_dtype, backend, dtype):
    expected = results(inputs, backend)
    default_dtype(dtype)
    for one, other in zip(results(inputs, backend), expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(inputs, backend, dtype):
    expected = results(inputs, backend)
    with torch.autocast("cpu", dtype=dtype):
        found = results(inputs, backend)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
