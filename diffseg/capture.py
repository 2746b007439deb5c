"""Records queries and keys of a diffusers UNet's attention during a forward pass, never an attention map.

The recording processor computes what the UNet's own processor computes, by the same operator. ``torch.compile`` traces
it and the hooks: what they record they only store, as attributes of objects that stay the same from one recording to
the next, so that no guard ever fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

from . import ops
from .memory import of_images
from .reference import Grid
from .sdpa import scaled_dot_product_attention

_DEFAULT_SCALE = (AttnProcessor2_0, FusedAttnProcessor2_0)  # scale by d ** -0.5, whatever attn.scale says
_OWN_SCALE = (AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor)  # scale by attn.scale, without norm_q, norm_k
_STOCK = _DEFAULT_SCALE + _OWN_SCALE
_PARTS = ("down_blocks", "mid_block", "up_blocks")  # in forward order


class AttentionRecord:
    """What one forward pass of a UNet left behind: one item a recorded layer, in forward order.

    Inside :func:`record_attention` it holds the last pass that ran to its end, and is empty as long as there is none.
    From :meth:`diffseg.DiffSegPipeline.record` it holds that pass, which may have stopped early. Its lists can be
    passed to :func:`diffseg.segment` and :func:`diffseg.aggregate` as they are, those of cross-attention to
    :func:`diffseg.aggregate_cross`.
    """

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder: _Recorder | None = recorder
        self._layers: list[_Layer] = []
        self._output_grid: Grid = (0, 0)

    @property
    def queries(self) -> list[Tensor]:
        """[B, heads, n, d] each, detached, in the dtype and on the device that the layer computes in."""
        return [layer.query for layer in self._settled()]

    @property
    def keys(self) -> list[Tensor]:
        """As the queries; in cross-attention [B, heads, tokens, d]."""
        return [layer.key for layer in self._settled()]

    @property
    def grids(self) -> list[Grid]:
        """(h, w) each, h * w = n."""
        return [layer.grid for layer in self._settled()]

    @property
    def output_grid(self) -> Grid:
        """The largest grid of all layers of the UNet that could be recorded, also where the pass ended before it."""
        self._settled()
        return self._output_grid

    @property
    def scales(self) -> list[float]:
        """The factor of Q K^T in each layer."""
        return [layer.scale for layer in self._settled()]

    @property
    def logsumexps(self) -> list[Tensor] | None:
        """Log-sum-exp of each row of the scaled scores, [B, heads, n] each, float32 (float64 in a float64 model).

        None unless the attention operator of every layer returned it: there is none from compiled code, under autocast,
        and where PyTorch picks its unfused implementation.
        """
        found = [layer.logsumexp for layer in self._settled() if layer.logsumexp is not None]
        return found if found and len(found) == len(self._layers) else None

    @property
    def names(self) -> list[str]:
        """Path of each Attention module in the UNet."""
        return [layer.name for layer in self._settled()]

    def aggregate(self, *, images: slice | None = None, **options: Any) -> Tensor:
        """A_f [B, N, N] of the recorded self-attention: :func:`diffseg.aggregate` with ``options``, such as weights.

        Its ``grid`` is :attr:`output_grid` unless another is given. ``images`` are those of the batch that it is made
        of; None: all.
        """
        logsumexps = self.logsumexps
        return ops.aggregate(
            of_images(self.queries, images), of_images(self.keys, images), grids=self.grids, scales=self.scales,
            logsumexps=logsumexps and of_images(logsumexps, images), **{"grid": self.output_grid, **options},
        )  # fmt: skip

    def _settled(self) -> list[_Layer]:
        if self._recorder is not None:
            self._layers, self._output_grid = self._recorder.collect()
        return self._layers

    def _close(self) -> None:
        if self._recorder is None:
            return
        try:
            self._settled()
        finally:
            self._recorder.clear()
            self._recorder = None


@contextmanager
def record_attention(unet: Any, *, cross: bool = False) -> Iterator[AttentionRecord]:
    """Records queries, keys and, where they cost nothing, log-sum-exps of every self-attention layer of ``unet``.

    Inside the context the UNet's outputs are as without it: the same bits where its processors call
    ``F.scaled_dot_product_attention``, equal up to rounding where they are eager, sliced or xFormers'. Each forward
    pass replaces the record. On exit, also after an exception, the UNet gets its own processors back; layers that are
    not recorded keep theirs all along. A compiled UNet is compiled once more at its first recording.

    Q and K are those that the layer multiplies, after the split into heads and after ``norm_q`` and ``norm_k``.
    ``upcast_attention`` does not change them: it asks for scores in float32 of the same Q and K.

    Args:
        unet: a diffusers UNet2DConditionModel, or what ``torch.compile`` made of one.
        cross: record the cross-attention layers instead: queries of the image, keys of the text.

    Yields:
        :class:`AttentionRecord`; it stays valid after the context.

    Raises:
        TypeError: ``unet`` is something else.
        ValueError: it has no such attention; a layer of it has a processor that computes something else, or is being
            recorded already; in the forward pass, an attention mask, or cross-attention without a text; at the end, a
            layer whose number of queries is not that of its level in the UNet.
    """
    model = getattr(unet, "_orig_mod", unet)
    if not isinstance(model, UNet2DConditionModel):
        raise TypeError(f"unet: expected a diffusers UNet2DConditionModel, got {type(model).__name__}")
    layers = _attention_layers(model, cross)
    if not layers:
        kind = "cross" if cross else "self"
        raise ValueError(f"unet: expected {kind}-attention in its down, mid or up blocks, found none")
    own = {name: attn.get_processor() for name, attn in layers.items()}
    recorder = _RECORDERS[cross].setdefault(model, _Recorder(cross))
    recording = recorder.prepare(layers, levels=len(model.config.block_out_channels))
    record = AttentionRecord(recorder)
    hooks: list[Any] = []

    def end() -> None:
        _set_processors(layers, own)
        for hook in hooks:
            hook.remove()
        record._close()

    try:  # from here on, since an interrupt may come anywhere
        _set_processors(layers, recording)
        hooks.append(model.register_forward_pre_hook(recorder.begin, with_kwargs=True))
        hooks.append(model.register_forward_hook(recorder.end))
        yield record
    finally:
        try:
            end()
        except BaseException:  # an interrupt here too, after which processors left behind would be refused for ever
            end()
            raise


def count_layers(unet: UNet2DConditionModel) -> int:
    """The number of its self-attention layers."""
    return len(_self_attention_levels(unet))


def attention_grid(unet: UNet2DConditionModel, latent: Grid) -> Grid:
    """The largest grid of its self-attention in a pass on latents of that height and width."""
    return _halved(latent, min(_self_attention_levels(unet)))


def _self_attention_levels(unet: UNet2DConditionModel) -> list[int]:
    """How often the latent has been halved at each layer; found once, which takes longer than it may in each call."""
    if unet not in _LEVELS:
        levels = len(unet.config.block_out_channels)
        _LEVELS[unet] = [_level(name, levels) for name in _attention_layers(unet, cross=False)]
    return _LEVELS[unet]


def record_pass(
    unet: Any, *inputs: Any, layers: int | None = None, cross: bool = False, **more: Any
) -> AttentionRecord:
    """What :func:`record_attention` records of one call of ``unet`` that is made for nothing else.

    The pass ends where the last of the first ``layers`` layers of the kind (None: of all) has been recorded, unless
    somebody may wait for its end: hooks, which look at what passes or move weights, attention processors that keep what
    they see, or compiled code.

    Raises:
        ValueError, TypeError: as :func:`record_attention`; ValueError if the pass left out a layer before the last.
    """
    whole = hasattr(unet, "_orig_mod") or _has_global_hooks() or any(map(is_altered, _modules_of(unet)))
    with record_attention(unet, cross=cross) as record:
        recorder = cast(_Recorder, record._recorder)
        if not whole:
            recorder.end_after(layers)
        try:
            unet(*inputs, **more)
        except _PassEnded:
            recorder.end()
        names = recorder.names
        if record.names != names[: len(record.names)]:
            missing = next(name for name in names if name not in record.names)
            raise ValueError(f"unet: expected attention in the order of its modules, but {missing} was not executed")
    return record


class _PassEnded(Exception):  # noqa: N818  (no error)
    """All layers that are wanted have been recorded."""


def _has_global_hooks() -> bool:
    """Whether PyTorch calls hooks in every module."""
    everywhere = torch.nn.modules.module
    return bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def is_altered(module: torch.nn.Module) -> bool:
    """By hooks of PyTorch, by those of accelerate and diffusers, which replace ``forward``, by compiling, or by
    somebody's own attention processor.

    Hooks that have been removed leave the module's own ``forward`` behind, as an attribute of the object.
    """
    if module._forward_hooks or module._forward_pre_hooks or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return True
    return isinstance(module, Attention) and type(module.get_processor()) not in _STOCK


def moves_weights(network: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers move or cast its weights as it runs."""
    return any(
        "_hf_hook" in held or getattr(held.get("_diffusers_hook"), "hooks", None)
        for held in (module.__dict__ for module in _modules_of(network))  # torch.compile of 2.6 breaks at vars()
    )


def _modules_of(network: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """As ``network.modules()``, in another order, with repeats, in less than half the time."""
    found = [network]
    while found:
        module = found.pop()
        yield module
        found += [child for child in module._modules.values() if child is not None]


def _set_processors(layers: dict[str, Attention], processors: Mapping[str, Any]) -> None:
    for name, attn in layers.items():
        attn.set_processor(processors[name])


class _Layer(NamedTuple):
    name: str
    query: Tensor
    key: Tensor
    logsumexp: Tensor | None
    scale: float
    grid: Grid


class _Recorder:
    """A UNet's recording processors and hooks; kept, since compiled code may be guarded by their identity."""

    def __init__(self, cross: bool) -> None:
        self._cross = cross
        self._processors: dict[str, _RecordingProcessor] = {}
        self._layers: list[_Layer] = []
        self._latent: Grid = (0, 0)
        self._output_grid: Grid = (0, 0)
        self._complete = False

    @property
    def names(self) -> list[str]:
        """Of all layers that could be recorded."""
        return list(self._processors)

    def prepare(self, layers: dict[str, Attention], levels: int) -> dict[str, _RecordingProcessor]:
        """The processors that stand in for those of ``layers``, in a UNet of so many levels."""
        for name, attn in layers.items():
            _check_processor(name, attn)
        kind = _CrossRecordingProcessor if self._cross else _RecordingProcessor
        self._processors = {name: self._processors.get(name) or kind(name) for name in layers}
        for name, attn in layers.items():
            self._processors[name].imitate(attn, _level(name, levels))
        return self._processors

    def begin(self, module: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clear()
        sample = args[0] if args else kwargs["sample"]
        self._latent = (sample.shape[-2], sample.shape[-1])

    def end_after(self, layers: int | None) -> None:
        """Has the pass end by :class:`_PassEnded` when the first ``layers``, or all, have been recorded."""
        list(self._processors.values())[:layers][-1].last = True

    def end(self, *_: Any) -> None:
        self._complete = True

    def collect(self) -> tuple[list[_Layer], Grid]:
        """The layers of the last pass, if it came to its end, and the largest grid of all that there are.

        Takes them from the processors; is never compiled.
        """
        if self._complete:
            self._complete = False
            processors = self._processors.values()
            self._layers = [each.layer(self._latent) for each in processors if each.query is not None]
            self._output_grid = ops.output_grid([each.grid(self._latent) for each in processors])
            self._forget()
        return self._layers, self._output_grid

    def clear(self) -> None:
        self._layers = []
        self._complete = False
        self._forget()

    def _forget(self) -> None:
        for processor in self._processors.values():
            processor.forget()


_RECORDERS: tuple[WeakKeyDictionary[UNet2DConditionModel, _Recorder], ...] = (WeakKeyDictionary(), WeakKeyDictionary())
"""Of self-attention and of cross-attention."""

_LEVELS: WeakKeyDictionary[UNet2DConditionModel, list[int]] = WeakKeyDictionary()


class _RecordingProcessor:
    """Computes a layer's self-attention as its own processor does, and holds Q, K and the log-sum-exp."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.forget()

    def imitate(self, attn: Attention, level: int) -> None:
        """Prepares to stand in for the processor of ``attn``, where the latent has been halved ``level`` times."""
        kind = type(attn.get_processor())
        self._level = level
        self._scale = float(attn.scale)
        self._scale_argument = None if kind in _DEFAULT_SCALE else self._scale
        self._fused = kind is FusedAttnProcessor2_0
        self.last = False

    def forget(self) -> None:
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.logsumexp: Tensor | None = None
        self.compiled = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None while {self._name} is recorded, got a mask")
        self._check_text(encoder_hidden_states)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for each in self._project(attn, hidden_states, encoder_hidden_states)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        output, logsumexp = scaled_dot_product_attention(query, key, value, self._scale_argument)
        self._keep(query, key, logsumexp)
        if self.last:
            raise _PassEnded
        output = output.transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](output))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        rescaled: Tensor = output / attn.rescale_output_factor
        return rescaled

    def _check_text(self, text: Tensor | None) -> None:
        if text is not None:
            raise ValueError(f"encoder_hidden_states: expected None in the self-attention {self._name}, got a tensor")

    def _project(self, attn: Attention, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Q, K and V, heads beside each other, [B, n, heads * d] each."""
        if self._fused:
            return attn.to_qkv(image).chunk(3, dim=-1)
        return attn.to_q(image), attn.to_k(image), attn.to_v(image)

    def _keep(self, query: Tensor, key: Tensor, logsumexp: Tensor | None) -> None:
        self.query, self.key = query.detach(), key.detach()
        if self._fused and not _in_a_graph(query):  # views that would keep V alive
            self.query, self.key = self.query.clone(), self.key.clone()
        self.logsumexp = None if logsumexp is None else logsumexp.detach()
        self.compiled = torch.compiler.is_compiling()

    def grid(self, latent: Grid) -> Grid:
        """Of the queries."""
        return _halved(latent, self._level)

    def layer(self, latent: Grid) -> _Layer:
        """What was recorded."""
        query, key = cast(Tensor, self.query), cast(Tensor, self.key)
        grid = self.grid(latent)
        if query.shape[2] != grid[0] * grid[1]:
            raise ValueError(
                f"{self._name}: expected {grid[0]} x {grid[1]} queries for a latent of {latent[0]} x {latent[1]}, got "
                f"{query.shape[2]}; merged or added tokens cannot be recorded"
            )
        if self.compiled and query.is_cuda:  # the next replay of a CUDA graph may overwrite them
            query, key = query.clone(), key.clone()
        return _Layer(self._name, query, key, self.logsumexp, self._scale, grid)


def _in_a_graph(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which two copies a layer cost more than the memory of V."""
    return not torch.compiler.is_compiling() and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class _CrossRecordingProcessor(_RecordingProcessor):
    """The same of a layer in which the image attends to a text."""

    def _check_text(self, text: Tensor | None) -> None:
        if text is None:
            raise ValueError(f"encoder_hidden_states: expected a tensor in the cross-attention {self._name}, got None")

    def _project(self, attn: Attention, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Q of the image, [B, n, heads * d], K and V of the text, [B, tokens, heads * d]."""
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        if self._fused:
            return attn.to_q(image), *attn.to_kv(text).chunk(2, dim=-1)
        return attn.to_q(image), attn.to_k(text), attn.to_v(text)


def _attention_layers(unet: UNet2DConditionModel, cross: bool) -> dict[str, Attention]:
    """The attention modules of a kind by path, in forward order, without those of image prompts' encoders."""
    return {
        name: module
        for part in _PARTS
        if getattr(unet, part) is not None
        for name, module in getattr(unet, part).named_modules(prefix=part)
        if isinstance(module, Attention) and module.is_cross_attention == cross
    }


def _halved(latent: Grid, times: int) -> Grid:
    """Each level of a UNet halves the sides of the last, rounding up."""
    step = 2**times
    return -(-latent[0] // step), -(-latent[1] // step)


def _level(name: str, levels: int) -> int:
    """How often the latent has been halved where the module ``name`` is."""
    part, index, *_ = name.split(".")
    if part == "mid_block":
        return levels - 1
    return int(index) if part == "down_blocks" else levels - 1 - int(index)


def _check_processor(name: str, attn: Attention) -> None:
    processor = attn.get_processor()
    obstacle = _obstacle(attn, processor)
    if obstacle is not None:
        raise ValueError(f"unet: cannot record {name} with its processor {type(processor).__name__}: {obstacle}")


def _obstacle(attn: Attention, processor: Any) -> str | None:
    """Why the recording processor cannot stand in for ``processor``; None where it can."""
    kind = type(processor)
    if isinstance(processor, _RecordingProcessor):
        return "it is being recorded already"
    if kind not in _STOCK:
        return f"expected one of {', '.join(known.__name__ for known in _STOCK)}"
    default = (attn.inner_dim // attn.heads) ** -0.5
    if kind in _DEFAULT_SCALE and not math.isclose(attn.scale, default):
        return f"it scales by {default:.6g}, but the layer asks for {attn.scale:.6g}"
    if kind in _OWN_SCALE and (attn.norm_q is not None or attn.norm_k is not None):
        return "it ignores the layer's norm_q and norm_k"
    return None
