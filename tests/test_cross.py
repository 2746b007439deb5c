"""aggregate_cross and score_masks: the reference by hand, and each backend against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import diffseg
from diffseg import reference

pytest.importorskip("diffseg._cpu")

TOKENS = 77
HALF = [torch.float16, torch.bfloat16]
STACKS: dict[str, list[tuple[tuple[int, int], int, int]]] = {  # grid, heads, channels of each layer
    "square": [((8, 8), 4, 40), ((16, 16), 2, 80), ((8, 8), 4, 40), ((4, 4), 3, 160)],
    "wide": [((6, 10), 2, 16), ((12, 20), 2, 33), ((3, 5), 1, 8)],
    "non-divisible": [((7, 9), 2, 16), ((12, 20), 1, 24), ((5, 20), 3, 13), ((12, 20), 2, 8)],
    "one": [((5, 7), 2, 11)],
}
WORDS = [[1], [2, 3], [75, 76, 4], [0]]


def layers(
    stack: str, *, batch: int = 1, tokens: int = TOKENS, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = STACKS[stack]
    queries = [3 * torch.randn(batch, heads, h * w, d, generator=generator) for (h, w), heads, d in shapes]
    keys = [torch.randn(batch, heads, tokens, d, generator=generator) for _, heads, d in shapes]
    return [each.to(dtype) for each in queries], [each.to(dtype) for each in keys], [grid for grid, _, _ in shapes]


def oracle(queries: Sequence[Tensor], keys: Sequence[Tensor], **options: Any) -> Tensor:
    wide = [[each.double() for each in tensors] for tensors in (queries, keys)]
    return diffseg.aggregate_cross(*wide, backend="reference", **options)


def assert_same_maps(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


def test_by_hand() -> None:
    """Two tokens, one head, one channel: the softmax is the logistic function of the query."""
    queries = [torch.tensor([[[[0.0], [1.0], [2.0], [3.0]]]]).double()]
    keys = [torch.tensor([[[[0.0], [1.0]]]]).double()]
    found = diffseg.aggregate_cross(queries, keys, tokens=[[1], [0], [0, 1]], backend="reference")
    second = torch.sigmoid(queries[0].view(2, 2))
    expected = torch.stack([second, 1 - second, torch.full((2, 2), 0.5).double()])
    torch.testing.assert_close(found[0], expected / expected.flatten(1).norm(dim=1)[:, None, None])


def test_the_paper_in_six_lines() -> None:
    """Equations 7 to 10 as the paper words them: the maps of all tokens, upsampled, summed, normalised a token."""
    queries, keys, grids = layers("square", tokens=6)
    size = (32, 32)
    total = torch.zeros(6, *size, dtype=torch.float64)
    for query, key, grid in zip(queries, keys, grids, strict=True):
        maps = (query[0].double() @ key[0].double().mT * query.shape[-1] ** -0.5).softmax(-1).mean(0)
        total += F.interpolate(maps.T.view(1, 6, *grid), size, mode="bilinear")[0]
    expected = total / total.flatten(1).norm(dim=1)[:, None, None]
    found = oracle(queries, keys, tokens=[[i] for i in range(6)], grids=grids, size=size)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stack", STACKS)
def test_aggregate_cross(isa: str, stack: str, batch: int, dtype: torch.dtype) -> None:
    queries, keys, grids = layers(stack, batch=batch, dtype=dtype)
    for size in (None, (32, 41), (5, 3)):
        options: dict[str, Any] = {"tokens": WORDS, "grids": grids, "size": size}
        found = diffseg.aggregate_cross(queries, keys, backend="cpu", **options)
        assert found.shape == (batch, len(WORDS), *(size or max(grids)))
        assert_same_maps(found, oracle(queries, keys, **options))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_reference_in_narrow_types(dtype: torch.dtype) -> None:
    queries, keys, grids = layers("non-divisible", batch=2, dtype=dtype)
    found = diffseg.aggregate_cross(queries, keys, tokens=WORDS, grids=grids, backend="reference")
    assert_same_maps(found, oracle(queries, keys, tokens=WORDS, grids=grids))


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 77, 150])
def test_any_number_of_tokens(isa: str, tokens: int) -> None:
    queries, keys, grids = layers("wide", tokens=tokens)
    options: dict[str, Any] = {"tokens": [[0], [tokens - 1]], "grids": grids, "scales": [0.3, 0.1, 0.5]}
    found = diffseg.aggregate_cross(queries, keys, backend="cpu", **options)
    assert_same_maps(found, oracle(queries, keys, **options))


def test_strided_inputs(isa: str) -> None:
    queries, keys, grids = layers("wide", batch=2)
    strided = [
        [each.transpose(1, 2).contiguous().transpose(1, 2) for each in queries],
        [torch.cat([each, each], -1)[..., ::2].copy_(each) for each in keys],
    ]
    expected = diffseg.aggregate_cross(queries, keys, tokens=WORDS, grids=grids, backend="cpu")
    assert torch.equal(diffseg.aggregate_cross(*strided, tokens=WORDS, grids=grids, backend="cpu"), expected)


def test_scores_of_several_hundred(isa: str) -> None:
    queries, keys, grids = layers("square")
    keys = [100 * key for key in keys]
    found = diffseg.aggregate_cross(queries, keys, tokens=WORDS, grids=grids, backend="cpu")
    # float32 scores of several hundred carry an error of several 1e-5, and so do their exponentials
    torch.testing.assert_close(found.double(), oracle(queries, keys, tokens=WORDS, grids=grids), rtol=5e-3, atol=1e-6)


def test_pieces_of_a_word_are_averaged(isa: str) -> None:
    queries, keys, grids = layers("square")
    apart = torch.zeros(1, 1, TOKENS)
    apart[0, 0, [2, 3]] = 0.5
    options: dict[str, Any] = {"grids": grids, "backend": "cpu"}
    found = diffseg.aggregate_cross(queries, keys, tokens=[[2, 3]], **options)
    assert torch.equal(found, diffseg.aggregate_cross(queries, keys, tokens=apart, **options))
    for same in ([[3, 2]], [[2, 3, 3, 2]]):
        assert torch.equal(found, diffseg.aggregate_cross(queries, keys, tokens=same, **options))
    assert not torch.equal(found, diffseg.aggregate_cross(queries, keys, tokens=[[2]], **options))


def test_words_of_each_image(isa: str) -> None:
    """Images of a batch may have words of their own; rows of zeros fill up."""
    queries, keys, grids = layers("wide", batch=2)
    shares = torch.zeros(2, 2, TOKENS)
    shares[0, 0, 5] = shares[0, 1, 6] = shares[1, 0, 9] = 1
    found = diffseg.aggregate_cross(queries, keys, tokens=shares, grids=grids, backend="cpu")
    for item, words in enumerate([[[5], [6]], [[9]]]):
        alone = [[each[item : item + 1] for each in tensors] for tensors in (queries, keys)]
        expected = diffseg.aggregate_cross(*alone, tokens=words, grids=grids, backend="cpu")
        assert torch.equal(found[item, : len(words)], expected[0])
    assert (found[1, 1] == 0).all()


def test_maps_have_norm_one(isa: str) -> None:
    queries, keys, grids = layers("non-divisible")
    found = diffseg.aggregate_cross(queries, keys, tokens=WORDS, grids=grids, size=(40, 64), backend="cpu")
    torch.testing.assert_close(found.flatten(2).norm(dim=2), torch.ones(1, len(WORDS)), rtol=1e-5, atol=0)


def same_bits(run: Callable[[], Tensor]) -> bool:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run())
    return all(torch.equal(found[0], each) for each in found[1:])


def test_threads_change_no_bit(isa: str) -> None:
    queries, keys, grids = layers("non-divisible", batch=2)
    options: dict[str, Any] = {"tokens": WORDS, "grids": grids, "size": (64, 64), "backend": "cpu"}
    assert same_bits(lambda: diffseg.aggregate_cross(queries, keys, **options))
    maps = diffseg.aggregate_cross(queries, keys, **options)
    labels = blobs((150, 130), masks=9, batch=2)
    assert same_bits(lambda: diffseg.score_masks(maps, labels, masks=9, backend="cpu"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_layers_are_named(backend: str, value: float) -> None:
    queries, keys, grids = layers("square")
    for tensors in (queries, keys):
        kept = tensors[2].clone()
        tensors[2][0, 1, 5, 3] = value
        with pytest.raises(ValueError, match="layer 2: expected finite attention"):
            diffseg.aggregate_cross(queries, keys, tokens=WORDS, grids=grids, backend=backend)
        tensors[2] = kept
    queries[3] = queries[3] * 1e20
    keys[3] = keys[3] * 1e20  # finite, but their products are not
    with pytest.raises(ValueError, match="layer 3: expected finite attention"):
        diffseg.aggregate_cross(queries, keys, tokens=WORDS, grids=grids, backend=backend)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_maps_of_all_heads_never_exist() -> None:
    """In the reference; the kernels' buffers do not depend on the number of heads."""
    heads, grid = 8, (32, 32)
    cells = grid[0] * grid[1]
    queries = [torch.rand(1, heads, cells, 16) for _ in range(3)]
    keys = [torch.rand(1, heads, TOKENS, 16) for _ in range(3)]
    with Largest() as largest:  # it does not see into an operator
        reference.aggregate_cross(queries, keys, [grid] * 3, [0.25] * 3, torch.eye(4, TOKENS)[None], (64, 64))
    assert cells * TOKENS <= largest.elements < 2 * cells * TOKENS


def blobs(size: tuple[int, int], masks: int, batch: int) -> Tensor:
    """Labels [batch, *size]: each pixel that of the nearest of ``masks`` random points."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(batch, masks, 2, generator=generator) * torch.tensor(size)
    pixels = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).float().expand(batch, -1, -1)
    return torch.cdist(pixels, points).argmin(-1).to(torch.int32).view(batch, *size)


def test_scores_by_hand() -> None:
    """Two masks of a 2 x 4 image, two maps at its own size: plain means."""
    maps = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8]], [[0, 0, 1, 1], [0, 0, 1, 1]]]])
    labels = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 3]]], dtype=torch.int32)
    expected = torch.tensor([[[8 / 3, 0], [5.0, 0.75], [0, 0], [8, 1]]])
    for backend in ("reference", "cpu"):
        torch.testing.assert_close(diffseg.score_masks(maps, labels, backend=backend), expected)
        torch.testing.assert_close(diffseg.score_masks(maps, labels, masks=2, backend=backend), expected[:, :2])
        torch.testing.assert_close(diffseg.score_masks(maps, labels - 1, masks=1, backend=backend), expected[:, 1:2])


@pytest.mark.parametrize("size", [(16, 16), (37, 50), (128, 96), (9, 300)])
@pytest.mark.parametrize("grid", [(16, 16), (5, 7), (1, 1)])
def test_score_masks(isa: str, grid: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, *grid, generator=generator)
    labels = blobs(size, masks=12, batch=2)
    expected = torch.zeros(2, 13, 3, dtype=torch.float64)
    upsampled = F.interpolate(maps.double(), size, mode="bilinear")
    for item in range(2):
        for mask in labels[item].unique().tolist():
            expected[item, mask] = upsampled[item][:, labels[item] == mask].mean(1)
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        found = diffseg.score_masks(maps.to(dtype), labels, masks=13, backend=backend)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-6, atol=1e-9)


def test_pixels_of_the_reference_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, labels = torch.rand(2, 3, 5, 7), blobs((37, 50), masks=12, batch=2)
    whole = diffseg.score_masks(maps, labels, backend="reference")
    monkeypatch.setattr(reference, "_PIXELS_AT_ONCE", 10 * 50)
    torch.testing.assert_close(diffseg.score_masks(maps, labels, backend="reference"), whole)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), masks=st.integers(1, 40), words=st.integers(1, 5), height=st.integers(1, 40))
def test_the_best_word_does_not_depend_on_the_backend(seed: int, masks: int, words: int, height: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(1, words, 6, 4, generator=generator)
    labels = torch.randint(0, masks, (1, height, 31), generator=generator, dtype=torch.int32)
    found, expected = (diffseg.score_masks(maps, labels, masks=masks, backend=name) for name in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_float64_goes_to_the_reference() -> None:
    queries, keys, grids = layers("one", dtype=torch.float64)
    assert diffseg.aggregate_cross(queries, keys, tokens=[[1]], grids=grids).dtype == torch.float64
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run aggregate_cross here: expected torch\.float32"):
        diffseg.aggregate_cross(queries, keys, tokens=[[1]], grids=grids, backend="cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": []}, ValueError, "keys: expected at least one layer"),
        ({"keys": [torch.rand(1, 2, 9, 10)]}, ValueError, r"keys\[0\]: expected \[1, 2, 9, 11\], got \[1, 2, 9, 10\]"),
        ({"keys": [torch.rand(1, 2, 9, 11).half()]}, ValueError, r"keys\[0\]: expected batch 1, torch.float32"),
        ({"queries": [torch.rand(1, 2, 35)]}, ValueError, r"queries\[0\]: expected \[batch, heads, n, d\]"),
        ({"grids": None}, ValueError, "35 is no square: pass grids="),
        ({"tokens": [1, 2]}, TypeError, r"tokens\[0\]: expected a list, one item a token, got int 1"),
        ({"tokens": []}, ValueError, "tokens: expected at least one word"),
        ({"tokens": [[]]}, ValueError, r"tokens\[0\]: expected at least one token"),
        ({"tokens": [[1], [9]]}, ValueError, r"tokens\[1\]: expected indices from 0 to 8, got 9"),
        ({"tokens": [[-1]]}, ValueError, r"tokens\[0\]: expected at least 0, got -1"),
        ({"tokens": torch.ones(2, 1, 9)}, ValueError, r"tokens: expected \[1, words, 9\], as in keys, got \[2, 1, 9\]"),
        ({"tokens": torch.ones(1, 1, 9).int()}, TypeError, "tokens: expected floating-point"),
        ({"size": (4,)}, TypeError, "size: expected"),
        ({"scales": [1.0, 2.0]}, ValueError, "scales: expected 1 items"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input_of_aggregate_cross(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "queries": [torch.rand(1, 2, 35, 11)], "keys": [torch.rand(1, 2, 9, 11)], "tokens": [[1]], "grids": [(5, 7)]
    }  # fmt: skip
    with pytest.raises(error, match=message):
        diffseg.aggregate_cross(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"maps": torch.rand(2, 3, 4)}, ValueError, r"maps: expected \[batch, words, h, w\]"),
        ({"maps": torch.rand(1, 2, 4, 4).half()}, ValueError, "maps: expected torch.float32 or torch.float64"),
        ({"labels": torch.zeros(1, 8, 8)}, ValueError, r"labels: expected an int32 tensor \[batch, H, W\]"),
        (
            {"labels": torch.zeros(2, 8, 8).int()},
            ValueError,
            "labels: expected batch 1 on cpu, as in maps, got batch 2",
        ),
        ({"masks": 0}, ValueError, "masks: expected at least 1, got 0"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input_of_score_masks(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"maps": torch.rand(1, 2, 4, 4), "labels": torch.zeros(1, 8, 8, dtype=torch.int32)}
    with pytest.raises(error, match=message):
        diffseg.score_masks(**(given | changes))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("gap", [30.0, 50.0, 60.0, 80.0])
def test_a_word_that_is_hardly_attended_to_does_not_explode(backend: str, gap: float) -> None:
    """Its norm is 1, or less where float32 has lost its squares."""
    queries = [torch.ones(1, 1, 16, 1) + 0.01 * torch.rand(1, 1, 16, 1)]
    keys = [torch.tensor([0.0, -gap]).view(1, 1, 2, 1)]
    maps = diffseg.aggregate_cross(queries, keys, tokens=[[1]], scales=[1.0], size=(16, 16), backend=backend)
    assert float(maps.norm()) < 1.001
    assert gap > 30 or float(maps.norm()) > 0.999


def test_labels_of_no_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: expected at least one mask, got negative labels only"):
        diffseg.score_masks(torch.rand(1, 2, 4, 4), torch.full((1, 8, 8), -1, dtype=torch.int32))
