"""A drop-in for the class ``DiffSeg`` of the published code (github.com/google/diffseg, ``diffseg/segmentor.py``).

Code that has DiffSeg today renames the published folder ``diffseg``, which would hide this package or be hidden by it,
and swaps one import; TensorFlow is not needed::

    from diffseg.compat import DiffSeg  # was: from diffseg.segmentor import DiffSeg
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import backends, ops, reference
from .checks import describe
from .memory import attention_memory

_SIDE = 64  # of the grid of A_f
_CELLS = _SIDE * _SIDE
_PIXELS = 512  # side of the label map
_ROUNDS = 3  # when one threshold is given for all


class DiffSeg:
    """The published class on diffseg's ops: same methods, shapes and dtypes, ``rule="official"``, published anchors.

    Arrays come in as NumPy arrays, torch tensors, or anything with ``__dlpack__`` or ``__array__`` (JAX, TensorFlow),
    and go out as NumPy arrays. ``segment`` makes one A_f, float32 [4096, 4096], an image.

    It differs from the published class where that one crashes, loses something or rounds:

    - The first merge runs in float32. The published one runs in float16, which moves divergences by about 0.1 %, and
      where cells below 3e-8 become 0 and their divergence NaN: those maps match nothing, an anchor among them is lost,
      and where all are it crashes. On sharp maps that leaves it fewer segments. Here probabilities are clamped at 1e-30
      inside logarithms, and a map always matches itself.
    - float16 input is averaged over heads, and normed in ``get_semantics``, in more than float16, where the published
      code rounds the means and overflows in the norms.
    - ``segment`` and ``generate_masks`` do not call the other steps: a subclass that overrides ``KL``, ``mask_merge``
      or ``aggregate_weights`` does not change their labels.
    - ``kl_threshold`` may be one number, for three rounds, or a list of one, for one round; both crash there.
    - ``num_points=1`` is the one anchor (31, 31), as in ``diffseg.merge``; there it divides by zero. More than 64 are
      refused; there they are all the same point.
    - A grid with any number of points is used whole; there, points beyond a square number are left out.
      ``mask_merge`` without a grid takes the constructor's.
    - Refinement runs until labels are stable and drops a cluster that ends empty; there scikit-learn moves one that
      empties to the row farthest from its centre, so that it stays.
    - ``aggregate_x_weights`` takes any number of tokens, not 77 alone. It returns [1, 512, 512, tokens], as there, for
      one image: the published demo indexes it with the number of the image and so fails from the second image on.
      ``get_semantics`` takes it whole, leading 1 included.
    - ``get_semantics`` without nouns returns an empty dict, and a noun whose attention is 0 everywhere wins nothing;
      there, the first crashes and the second, NaN, wins everything. ``voting`` other than ``"majority"`` and
      ``"mean"`` is refused; there it means ``"mean"``. Ids are in ascending order.
    - ``KL`` returns a NumPy array, finite for zeros and never negative. ``upsampled`` is a NumPy array, computed when
      it is read.
    - Bad input raises a ValueError or TypeError that names the argument, what was expected and what came.

    Args:
        kl_threshold: tau > 0 of each round, or one number for three rounds.
        refine: whether to refine the proposals by k-means.
        num_points: anchors a side, 1 to 64.
        backend: ``"auto"`` or one of :func:`diffseg.available_backends`.
        device: where to compute; None: where the arrays are (NumPy arrays: the CPU).
    """

    def __init__(
        self,
        kl_threshold: float | Sequence[float],
        refine: bool,
        num_points: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        backends.check_name(backend)
        self.grid = self.generate_sampling_grid(num_points)
        self.kl_threshold = np.array(_check_thresholds(kl_threshold))
        self.refine = refine
        self.backend = backend
        self.device = None if device is None else torch.device(device)
        self._proposals: ops.Proposals | None = None

    def generate_sampling_grid(self, num_of_points: int) -> NDArray[np.int64]:
        """The (row, column) of each anchor, int64 [num_of_points ** 2, 2]: the widest centred grid of whole steps."""
        if isinstance(num_of_points, bool) or not isinstance(num_of_points, Integral):
            raise TypeError(f"num_of_points: expected an int, got {describe(num_of_points)}")
        if not 1 <= num_of_points <= _SIDE:
            raise ValueError(f"num_of_points: expected 1 to {_SIDE}, got {num_of_points}")
        gaps = int(num_of_points) - 1
        step = (_SIDE - 1) // max(gaps, 1)
        line = (_SIDE - 1 - step * gaps) // 2 + step * np.arange(gaps + 1, dtype=np.int64)
        return np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)

    def get_weight_rato(self, weight_list: Sequence[Any]) -> NDArray[np.float64]:
        """The share of each layer, [..., n, tokens], in proportion to sqrt(n): float64 [layers], sum 1."""
        _check_weight_list(weight_list)
        shapes = [np.shape(weights) for weights in weight_list]
        if min(len(shape) for shape in shapes) < 2:
            raise ValueError(f"weight_list: expected arrays [..., n, tokens], got shapes {shapes}")
        sides = np.sqrt([shape[-2] for shape in shapes])
        return np.asarray(sides / sides.sum())

    def segment(
        self,
        weight_64: Any,
        weight_32: Any,
        weight_16: Any,
        weight_8: Any,
        weight_ratio: Sequence[float] | None = None,
    ) -> NDArray[np.int64]:
        """Segments a batch.

        Args:
            weight_64, weight_32, weight_16, weight_8: self-attention [batch, heads, n, n], n = 64 ** 2 ... 8 ** 2, or
                lists of [heads, n, n].
            weight_ratio: weight of each resolution, not renormalised: A_f, and with it the divergence, grows with their
                sum. None: in proportion to the side, sum 1.

        Returns:
            int64 [batch, 512, 512], for each pixel the index of the winning proposal.
        """
        given = {64: weight_64, 32: weight_32, 16: weight_16, 8: weight_8}
        layers = [_images(f"weight_{side}", weights, side) for side, weights in given.items()]
        for side, images in zip(given, layers, strict=True):
            if len(images) != len(layers[0]):
                raise ValueError(f"weight_{side}: expected {len(layers[0])} images, as in weight_64, got {len(images)}")
        thresholds = _check_thresholds(self.kl_threshold)
        masks = []
        for maps in zip(*layers, strict=True):
            ratios, images = self._ratios(maps, weight_ratio), self._on_device(maps)
            with attention_memory(images[0], (_SIDE, _SIDE)) as out:
                attention = self._aggregate(images, ratios, out)
                masks.append(self._masks(attention, sum(ratios), thresholds, self.grid))
        return np.stack(masks)

    def aggregate_weights(
        self, weight_list: Sequence[Any], weight_ratio: Sequence[float] | None = None
    ) -> NDArray[np.float64]:
        """Aggregates self-attention maps, [heads, n, n] a layer, sqrt(n) a divisor of 64: float64 [64, 64, 64, 64].

        Each map sums to the sum of ``weight_ratio``; None: in proportion to sqrt(n), sum 1.
        """
        _check_weight_list(weight_list)
        maps = [_self_attention(f"weight_list[{index}]", weights) for index, weights in enumerate(weight_list)]
        ratios = self._ratios(maps, weight_ratio)
        attention = self._aggregate(self._on_device(maps), ratios)
        return _to_numpy(attention.double().mul_(sum(ratios))).reshape(_SIDE, _SIDE, _SIDE, _SIDE)

    def aggregate_x_weights(
        self, weight_list: Sequence[Any], weight_ratio: Sequence[float] | None = None
    ) -> NDArray[np.float64]:
        """Aggregates cross-attention maps, [heads, n, tokens] a layer: float64 [1, 512, 512, tokens].

        Each layer is averaged over heads, upsampled and normalised over tokens; ``weight_ratio`` as in
        :meth:`aggregate_weights`.
        """
        _check_weight_list(weight_list)
        layers = [self._tensor(f"weight_list[{index}]", weights) for index, weights in enumerate(weight_list)]
        tokens = layers[0].shape[-1]
        sides = []
        for index, weights in enumerate(layers):
            if weights.ndim != 3 or 0 in weights.shape or weights.shape[2] != tokens:
                raise ValueError(f"weight_list[{index}]: expected [heads, n, {tokens}], got {describe(weights)}")
            sides.append(_side(f"weight_list[{index}]", weights.shape[1], _PIXELS))
        ratios = self._ratios(layers, weight_ratio)
        total = torch.zeros(_PIXELS, _PIXELS, tokens, dtype=torch.float32, device=layers[0].device)
        for weights, side, ratio in zip(layers, sides, ratios, strict=True):
            averaged = weights.mean(0, dtype=torch.float32).view(1, side, side, tokens).permute(0, 3, 1, 2)
            mass = _upsample(averaged.sum(1, keepdim=True)).clamp_min(reference.SMALLEST_PROBABILITY)
            total.addcmul_(_upsample(averaged)[0].permute(1, 2, 0), ratio / mass[0].permute(1, 2, 0))
        return _to_numpy(total[None].double())

    def generate_masks(
        self, attns: Any, kl_threshold: float | Sequence[float], grid: NDArray[np.integer[Any]]
    ) -> NDArray[np.int64]:
        """Merges the maps ``attns`` [64, 64, 64, 64] from the anchors ``grid`` [A, 2] and labels every pixel.

        Returns:
            int64 [512, 512], the index of the winning proposal; the proposals are then in :attr:`upsampled`.
        """
        attention, scale = self._attention(attns)
        return self._masks(attention, scale, _check_thresholds(kl_threshold), grid)

    @property
    def upsampled(self) -> NDArray[np.float32]:
        """The proposals of the image labelled last, upsampled: float32 [proposals, 512, 512, 1]."""
        if self._proposals is None:
            raise AttributeError("upsampled: expected generate_masks or segment to have run before")
        maps = self._proposals.maps[0, : int(self._proposals.counts[0])]
        return _to_numpy(_upsample(maps.view(-1, 1, _SIDE, _SIDE).float()).permute(0, 2, 3, 1))

    def mask_merge(
        self,
        iter: int,
        attns: Any,
        kl_threshold: float | Sequence[float],
        grid: NDArray[np.integer[Any]] | None = None,
    ) -> NDArray[np.floating[Any]]:
        """One round of merging, at the threshold ``kl_threshold[iter]``.

        Args:
            iter: 0 merges all maps, [64, 64, 64, 64], into the anchors ``grid`` [A, 2]; None: the constructor's. Later
                rounds merge a list, [P, 64, 64] or [P, 1, 64, 64].

        Returns:
            float64 [A, 64, 64] from round 0; [proposals, 1, 64, 64] in the dtype of ``attns`` from later ones.
        """
        thresholds = _check_thresholds(kl_threshold)
        if not isinstance(iter, Integral) or not 0 <= iter < len(thresholds):
            raise ValueError(f"iter: expected 0 to {len(thresholds) - 1}, one of the rounds, got {iter}")
        if iter > 0:
            return self._merge_list(attns, thresholds[iter])
        attention, scale = self._attention(attns)
        anchors = _flat_indices(self.grid if grid is None else grid)
        maps = self._merge(attention, scale, thresholds[:1], anchors).maps[0]
        return _to_numpy(maps.double() * scale).reshape(-1, _SIDE, _SIDE)

    def get_semantics(
        self, pred: Any, x_weight: Any, nouns: Sequence[tuple[int, str]], voting: str = "majority"
    ) -> defaultdict[str, list[Any]]:
        """Names each mask with a noun of the prompt.

        Args:
            pred: labels of one image, [H, W] or any shape of as many elements.
            x_weight: its cross-attention [H, W, tokens] or [1, H, W, tokens], from :meth:`aggregate_x_weights`.
            nouns: (index, word) of each noun, the index counting the prompt's words from 0: token index + 1.
            voting: ``"majority"``: the median, over the mask's pixels, of the position in ``nouns`` of each pixel's
                strongest noun (so the published code defines it); ``"mean"``: the noun with the largest mean attention.

        Returns:
            word -> ids of its masks.
        """
        if voting not in ("majority", "mean"):
            raise ValueError(f"voting: expected 'majority' or 'mean', got {voting!r}")
        labels = _to_numpy(_to_tensor("pred", pred))
        weights = _to_numpy(_float_tensor("x_weight", x_weight))
        weights = weights[0] if weights.ndim == 4 and len(weights) == 1 else weights
        if weights.ndim != 3 or labels.size != weights[..., 0].size:
            raise ValueError(
                "pred, x_weight: expected [H, W] and [H, W, tokens] of one image, "
                f"got {list(labels.shape)} and {list(weights.shape)}"
            )
        words: defaultdict[str, list[Any]] = defaultdict(list)
        if not nouns:
            return words
        attention = weights[..., _token_indices(nouns, weights.shape[-1])].reshape(labels.size, -1).astype(np.float64)
        attention /= np.maximum(np.linalg.norm(attention, axis=0), np.finfo(np.float64).tiny)
        ids, mask_of = np.unique(labels.reshape(-1), return_inverse=True)
        vote = _median_noun if voting == "majority" else _strongest_noun
        for mask, noun in zip(ids, vote(attention, mask_of), strict=True):
            words[nouns[noun][1]].append(mask)
        return words

    def KL(self, x: Any, Y: Any) -> NDArray[np.floating[Any]]:  # noqa: N802, N803
        """Symmetric KL divergence of maps [..., h, w], the leading dimensions broadcast, in the dtype of the input."""
        first, second = self._tensor("x", x), self._tensor("Y", Y)
        if first.ndim < 2 or second.ndim < 2 or first.shape[-2:] != second.shape[-2:]:
            raise ValueError(
                f"x, Y: expected maps [..., h, w] of one size, got {list(first.shape)} and {list(second.shape)}"
            )
        divergence = _divergence(first.flatten(-2), second.flatten(-2))
        return _to_numpy(divergence.to(torch.promote_types(first.dtype, second.dtype)))

    def _tensor(self, name: str, array: Any) -> Tensor:
        return self._moved(_float_tensor(name, array))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _ratios(self, weight_list: Sequence[Any], weight_ratio: Sequence[float] | None) -> list[float]:
        given = self.get_weight_rato(weight_list) if weight_ratio is None else weight_ratio
        ratios = _numbers("weight_ratio", given)
        if ratios.shape != (len(weight_list),):
            raise ValueError(f"weight_ratio: expected {len(weight_list)} numbers, one a layer, got {weight_ratio}")
        if ratios.min() < 0 or ratios.sum() <= 0:
            raise ValueError(f"weight_ratio: expected no negative number and a positive sum, got {weight_ratio}")
        return [float(ratio) for ratio in ratios]

    def _on_device(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [heads, n, n] as [1, heads, n, n], of one dtype."""
        dtype = reduce(torch.promote_types, (layer.dtype for layer in maps))
        return [self._moved(layer[None]).to(dtype) for layer in maps]

    def _aggregate(self, layers: list[Tensor], ratios: list[float], out: Tensor | None = None) -> Tensor:
        """A_f [1, N, N], rows of sum 1; the published rows have the sum of ``ratios``."""
        return ops.aggregate_maps(layers, weights=ratios, grid=(_SIDE, _SIDE), backend=self.backend, out=out)

    def _attention(self, attns: Any) -> tuple[Tensor, float]:
        """Maps [64, 64, 64, 64] as A_f [1, N, N] with rows of sum 1, and the sum that they had."""
        maps = self._tensor("attns", attns)
        if maps.shape != (_SIDE,) * 4:
            raise ValueError(f"attns: expected [64, 64, 64, 64], got {describe(maps)}")
        attention = maps.reshape(1, _CELLS, _CELLS).float()
        scale = float(attention[0, 0].sum())
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"attns: expected maps with a finite and positive sum, got {scale} in the first")
        return (attention, 1.0) if abs(scale - 1) < 1e-3 else (attention / scale, scale)

    def _masks(self, attention: Tensor, scale: float, thresholds: list[float], grid: Any) -> NDArray[np.int64]:
        proposals = self._merge(attention, scale, thresholds, _flat_indices(grid))
        if self.refine:
            proposals = ops.refine(attention, proposals)
        self._proposals = proposals._replace(maps=proposals.maps * scale)
        return _to_numpy(ops.label(proposals, (_PIXELS, _PIXELS), backend=self.backend)[0].long())

    def _merge(self, attention: Tensor, scale: float, thresholds: list[float], anchors: list[int]) -> ops.Proposals:
        """The proposals of ``scale * attention``, divided by the scale: D is proportional to it."""
        return ops.merge(
            attention,
            anchors=anchors,
            iterations=len(thresholds),
            threshold=[threshold / scale for threshold in thresholds],
            rule="official",
            backend=self.backend,
        )

    def _merge_list(self, attns: Any, threshold: float) -> NDArray[np.floating[Any]]:
        maps = self._tensor("attns", attns)
        if maps.ndim not in (3, 4) or maps.shape[-2:] != (_SIDE, _SIDE) or maps.numel() != len(maps) * _CELLS:
            raise ValueError(f"attns: expected a list of maps [P, 64, 64] or [P, 1, 64, 64], got {describe(maps)}")
        if not bool(torch.isfinite(maps).all()):
            raise ValueError("attns: expected finite values, found NaN or infinity")
        listed = maps.reshape(1, -1, _CELLS).double()
        length = torch.tensor([listed.shape[1]], device=listed.device)
        merged, counts = reference.later_round(listed, length, threshold, "official", "host")
        return _to_numpy(merged[0, : int(counts)].to(maps.dtype)).reshape(-1, 1, _SIDE, _SIDE)


def _divergence(x: Tensor, y: Tensor) -> Tensor:
    """Symmetric KL of maps [..., N] in float64; the cross terms are matrix products, so that nothing is broadcast."""
    x, log_x, entropy_x = reference.log_terms(x.double())
    y, log_y, entropy_y = reference.log_terms(y.double())
    cross = torch.einsum("...n,...n->...", x, log_y) + torch.einsum("...n,...n->...", log_x, y)
    return ((entropy_x + entropy_y - cross) / 2).clamp_min(0)


def _upsample(maps: Tensor) -> Tensor:
    return F.interpolate(maps, (_PIXELS, _PIXELS), mode="bilinear", align_corners=False)


def _median_noun(attention: NDArray[np.float64], mask_of: NDArray[np.intp]) -> NDArray[np.intp]:
    """The median of each mask's winning nouns, rounded down, from their histogram: [pixels, nouns] -> [masks]."""
    nouns = attention.shape[1]
    votes = np.bincount(mask_of * nouns + attention.argmax(-1), minlength=nouns * (int(mask_of.max()) + 1))
    votes = votes.reshape(-1, nouns).cumsum(-1)
    size = votes[:, -1:]
    medians: NDArray[np.intp] = ((votes >= (size + 1) // 2).argmax(-1) + (votes >= size // 2 + 1).argmax(-1)) // 2
    return medians


def _strongest_noun(attention: NDArray[np.float64], mask_of: NDArray[np.intp]) -> NDArray[np.intp]:
    """The noun with the largest total in each mask: [pixels, nouns] -> [masks]."""
    strongest: NDArray[np.intp] = np.stack([np.bincount(mask_of, noun) for noun in attention.T]).argmax(0)
    return strongest


def _token_indices(nouns: Sequence[tuple[int, str]], tokens: int) -> list[int]:
    for noun in nouns:
        if not isinstance(noun, Sequence) or len(noun) != 2 or not isinstance(noun[0], Integral):
            raise TypeError(f"nouns: expected (index, word), got {describe(noun)}")
        if not 0 <= noun[0] < tokens - 1:
            raise ValueError(f"nouns: expected indices from 0 to {tokens - 2}, got {noun[0]} for {noun[1]!r}")
    return [int(index) + 1 for index, _ in nouns]


def _flat_indices(grid: Any) -> list[int]:
    """Flat indices of anchors [A, 2]."""
    points = np.asarray(grid)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or points.dtype.kind not in "iu":
        raise ValueError(f"grid: expected ints [A, 2], (row, column), got {describe(points)}")
    if points.min() < 0 or points.max() >= _SIDE:
        raise ValueError(f"grid: expected rows and columns from 0 to {_SIDE - 1}, got {points.min()} to {points.max()}")
    flat: list[int] = (points[:, 0].astype(np.int64) * _SIDE + points[:, 1]).tolist()
    return flat


def _check_thresholds(kl_threshold: Any) -> list[float]:
    """The threshold of each round; one number stands for three rounds."""
    thresholds = _numbers("kl_threshold", kl_threshold)
    if thresholds.ndim == 0:
        thresholds = thresholds.repeat(_ROUNDS)
    if thresholds.ndim != 1 or not len(thresholds) or thresholds.min() <= 0:
        raise ValueError(f"kl_threshold: expected one positive number a round, got {kl_threshold}")
    return [float(threshold) for threshold in thresholds]


def _numbers(name: str, values: Any) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, got {describe(values)}") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: expected finite numbers, got {describe(values)}")
    return numbers


def _check_weight_list(weight_list: Any) -> None:
    if not isinstance(weight_list, (list, tuple)):
        raise TypeError(f"weight_list: expected a list of arrays, got {describe(weight_list)}")
    if not weight_list:
        raise ValueError("weight_list: expected at least one array, got none")


def _images(name: str, weights: Any, side: int) -> list[Tensor]:
    """The maps [heads, n, n] of each image, n = side ** 2."""
    if isinstance(weights, (list, tuple)):
        images = [_float_tensor(f"{name}[{index}]", image) for index, image in enumerate(weights)]
    else:
        batch = _float_tensor(name, weights)
        if batch.ndim != 4:
            raise ValueError(f"{name}: expected [batch, heads, {side**2}, {side**2}], got {describe(batch)}")
        images = list(batch)
    if not images:
        raise ValueError(f"{name}: expected at least one image, got none")
    for index, image in enumerate(images):
        if image.ndim != 3 or not len(image) or image.shape[1:] != (side**2, side**2):
            raise ValueError(f"{name}[{index}]: expected [heads, {side**2}, {side**2}], got {describe(image)}")
    return images


def _self_attention(name: str, weights: Any) -> Tensor:
    """Maps [heads, n, n] whose grid's side divides 64."""
    maps = _float_tensor(name, weights)
    if maps.ndim != 3 or 0 in maps.shape or maps.shape[1] != maps.shape[2]:
        raise ValueError(f"{name}: expected [heads, n, n], got {describe(maps)}")
    _side(name, maps.shape[1], _SIDE)
    return maps


def _side(name: str, cells: int, largest: int) -> int:
    side = math.isqrt(cells)
    if side**2 != cells or largest % side:
        raise ValueError(f"{name}: expected n = side ** 2, the side a divisor of {largest}, got n = {cells}")
    return side


def _float_tensor(name: str, array: Any) -> Tensor:
    tensor = _to_tensor(name, array)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating-point values, got {tensor.dtype}")
    return tensor


def _to_tensor(name: str, array: Any) -> Tensor:
    """``array`` as a tensor, without a copy where its memory allows."""
    if isinstance(array, Tensor):
        return array.detach()
    if hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray):
        tensor: Tensor = from_dlpack(array)
        return tensor
    if not hasattr(array, "__array__"):
        raise TypeError(f"{name}: expected an array, got {describe(array)}")
    numpy = np.asarray(array)
    if not numpy.dtype.isnative or min(numpy.strides, default=0) < 0:
        numpy = numpy.astype(numpy.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
        try:
            return torch.from_numpy(numpy)
        except TypeError as error:
            raise TypeError(f"{name}: expected an array of numbers that torch knows, got {describe(array)}") from error


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    """``tensor`` as a contiguous array, bfloat16, which NumPy lacks, as float32."""
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().cpu().numpy()
    return array
