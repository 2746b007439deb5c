"""Recording: what is recorded is what the model computes, and the model notices nothing."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest.mock import Mock

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from pipelines import modules_run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffseg
from diffseg import AttentionRecord, capture, record_attention, sdpa
from diffseg.capture import record_pass
from diffseg.testing import tiny_unet, unet_inputs

ONE_LAYER = {
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (16,),
    "attention_head_dim": 2,
    "layers_per_block": 1,
}
TWO_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "attention_head_dim": (2, 4),
    "layers_per_block": 1,
}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """These networks are too small to share out."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def shared_unet(layout: Any) -> UNet2DConditionModel:
    return tiny_unet(layout)


def forward(unet: Any, inputs: dict[str, Any]) -> Tensor:
    output: Tensor = unet(**inputs).sample
    return output


def recorded(unet: Any, inputs: dict[str, Any], **options: Any) -> tuple[AttentionRecord, Tensor]:
    with record_attention(unet, **options) as record:
        output = forward(unet, inputs)
    return record, output


def record_maps(record: AttentionRecord) -> list[Tensor]:
    """softmax(Q K^T scale), [B, heads, n, n], in float64."""
    return [
        (query.double() @ key.double().mT * scale).softmax(-1)
        for query, key, scale in zip(record.queries, record.keys, record.scales, strict=True)
    ]


def eager_maps(unet: UNet2DConditionModel, inputs: dict[str, Any], cross: bool = False) -> dict[str, Tensor]:
    """Attention probabilities [B * heads, n, n or tokens] by path, in the order of diffusers' eager processors."""
    maps: dict[str, Tensor] = {}

    def spy(name: str, score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spied(*args: Any) -> Tensor:
            assert name not in maps
            maps[name] = score(*args)
            return maps[name]

        return spied

    own = unet.attn_processors
    with pytest.MonkeyPatch.context() as patch:
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and module.is_cross_attention == cross:
                patch.setattr(module, "get_attention_scores", spy(name, module.get_attention_scores))
        if not all(type(each) is AttnProcessor for each in own.values()):
            unet.set_attn_processor(AttnProcessor())
        forward(unet, inputs)
        unet.set_attn_processor(dict(own))
    return maps


def assert_logsumexps(record: AttentionRecord, tolerance: float) -> None:
    assert record.logsumexps is not None
    for query, key, scale, found in zip(record.queries, record.keys, record.scales, record.logsumexps, strict=True):
        expected = (query.double() @ key.double().mT * scale).logsumexp(-1)
        assert found.shape == query.shape[:3]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("layout", "size", "grids"),
    [
        ("sd1", (16, 16), {(16, 16): 5, (8, 8): 5, (4, 4): 5, (2, 2): 1}),
        ("sd1", (20, 12), {(20, 12): 5, (10, 6): 5, (5, 3): 5, (3, 2): 1}),
        ("sd2", (8, 24), {(8, 24): 5, (4, 12): 5, (2, 6): 5, (1, 3): 1}),
        ("sd2", (13, 7), {(13, 7): 5, (7, 4): 5, (4, 2): 5, (2, 1): 1}),
        ("sdxl", (16, 16), {(8, 8): 10, (4, 4): 18}),
        ("sdxl", (22, 10), {(11, 5): 10, (6, 3): 18}),
    ],
)
def test_record_is_what_the_model_attends_to(layout: str, size: tuple[int, int], grids: dict[Any, int]) -> None:
    unet = shared_unet(layout)
    inputs = unet_inputs(unet, 2, *size)
    plain = forward(unet, inputs)

    record, output = recorded(unet, inputs)

    assert torch.equal(output, plain)
    expected = eager_maps(unet, inputs)
    assert record.names == list(expected)
    assert Counter(record.grids) == grids
    for query, (height, width), found, probabilities in zip(
        record.queries, record.grids, record_maps(record), expected.values(), strict=True
    ):
        assert query.shape[2] == height * width
        torch.testing.assert_close(found.flatten(0, 1).float(), probabilities, rtol=1e-3, atol=1e-6)
    assert_logsumexps(record, 2e-5)


def test_record_is_argument_of_segment() -> None:
    unet = shared_unet("sd2")
    record, _ = recorded(unet, unet_inputs(unet, 2, 16, 24))
    options: dict[str, Any] = {"grids": record.grids, "scales": record.scales, "anchors": 8}
    labels = diffseg.segment(record.queries, record.keys, (32, 48), logsumexps=record.logsumexps, **options)
    assert labels.shape == (2, 32, 48)
    without = diffseg.segment(record.queries, record.keys, (32, 48), **options)
    assert (labels == without).float().mean() > 0.99


def test_cross_attention_keeps_its_processors_and_all_come_back() -> None:
    unet = shared_unet("sd1")
    own = unet.attn_processors
    with record_attention(unet):
        during = unet.attn_processors
        replaced = {name for name in own if during[name] is not own[name]}
        assert replaced == {name for name in own if ".attn1." in name}
    assert_same_processors(unet, own)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("layout", "size"), [("sd1", (20, 12)), ("sd2", (13, 7)), ("sdxl", (16, 16))])
def test_cross_record_is_what_the_model_attends_to(layout: Any, size: tuple[int, int], fused: bool) -> None:
    unet = tiny_unet(layout)
    inputs = unet_inputs(unet, 2, *size)
    expected = eager_maps(unet, inputs, cross=True)
    if fused:
        unet.fuse_qkv_projections()
    own, plain = unet.attn_processors, forward(unet, inputs)

    record, output = recorded(unet, inputs, cross=True)

    assert torch.equal(output, plain)
    assert_same_processors(unet, own)
    assert record.names == list(expected)
    assert all(".attn2" in name for name in record.names)
    assert {key.shape[2] for key in record.keys} == {inputs["encoder_hidden_states"].shape[1]}
    for (height, width), found, probabilities in zip(record.grids, record_maps(record), expected.values(), strict=True):
        assert found.shape[2] == height * width
        torch.testing.assert_close(found.flatten(0, 1).float(), probabilities, rtol=1e-3, atol=1e-6)
    assert_logsumexps(record, 2e-5)


def test_both_kinds_at_once_are_as_each_alone() -> None:
    unet = shared_unet("sd2")
    inputs = unet_inputs(unet, 1, 8, 8)
    alone = [recorded(unet, inputs, cross=cross)[0] for cross in (False, True)]
    with record_attention(unet) as first, record_attention(unet, cross=True) as second:
        forward(unet, inputs)
    for found, expected in zip((first, second), alone, strict=True):
        assert found.names == expected.names
        for one, other in zip(found.queries + found.keys, expected.queries + expected.keys, strict=True):
            assert torch.equal(one, other)


def test_cross_attention_with_a_norm_of_its_own() -> None:
    unet = tiny_unet("sd2", **TWO_LEVELS)
    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            module.norm_cross = torch.nn.LayerNorm(32)
            torch.nn.init.normal_(module.norm_cross.weight)
    inputs = unet_inputs(unet, 1, 8, 8)
    expected = eager_maps(unet, inputs, cross=True)
    record, output = recorded(unet, inputs, cross=True)
    assert torch.equal(output, forward(unet, inputs))
    for found, probabilities in zip(record_maps(record), expected.values(), strict=True):
        torch.testing.assert_close(found.flatten(0, 1).float(), probabilities, rtol=1e-3, atol=1e-6)


def test_after_an_exception_processors_come_back_and_the_record_stays() -> None:
    unet = shared_unet("sd2")
    own = unet.attn_processors
    inputs = unet_inputs(unet, 1, 8, 8)

    def interrupted() -> None:
        nonlocal record
        with record_attention(unet) as record:
            forward(unet, inputs)
            raise KeyError("mine")

    record: Any = None
    with pytest.raises(KeyError, match="mine"):
        interrupted()
    assert_same_processors(unet, own)
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks
    queries = record.queries
    recorded(unet, unet_inputs(unet, 1, 16, 8))
    assert [id(each) for each in record.queries] == [id(each) for each in queries]
    assert len(queries) == 16


def test_an_interrupt_before_the_pass_leaves_the_unet_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = shared_unet("sd2")
    own = unet.attn_processors
    monkeypatch.setattr(unet, "register_forward_hook", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recorded(unet, unet_inputs(unet, 1, 8, 8))
    assert_same_processors(unet, own)
    assert not unet._forward_pre_hooks


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Attention, "set_processor"), (torch.utils.hooks.RemovableHandle, "remove"), (capture._Recorder, "clear")],
)
def test_an_interrupt_at_the_end_leaves_the_unet_as_it_was(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    unet = shared_unet("sd2")
    own = unet.attn_processors
    run = getattr(owner, name)

    def interrupted(*_: Any) -> None:
        monkeypatch.setattr(owner, name, run)
        raise KeyboardInterrupt

    recording = record_attention(unet)
    recording.__enter__()
    forward(unet, unet_inputs(unet, 1, 8, 8))
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        recording.__exit__(None, None, None)
    assert_same_processors(unet, own)
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks
    assert capture._RECORDERS[False][unet]._layers == []


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_outlives_the_record_and_the_unet(fails: bool) -> None:
    unet = tiny_unet("sd2")
    model = weakref.ref(unet)
    queries: list[weakref.ref[Tensor]] = []

    def look(*_: Any) -> None:
        attn: Any = model().down_blocks[0].attentions[0].transformer_blocks[0].attn1
        queries.append(weakref.ref(attn.processor.query))
        if fails:
            raise KeyError("mine")

    unet.mid_block.register_forward_pre_hook(look)
    with record_attention(unet) as record:
        with contextlib.suppress(KeyError):
            forward(unet, unet_inputs(unet, 1, 8, 8))
        assert queries[0]() is not None
    del record
    assert queries[0]() is None
    del unet
    gc.collect()
    assert model() is None


@pytest.mark.parametrize(("layout", "layers"), [("sd1", 1), ("sd1", 3), ("sd1", 7), ("sd2", None), ("sdxl", 4)])
def test_a_pass_for_the_record_ends_where_it_is_complete(layout: str, layers: int | None) -> None:
    unet = shared_unet(layout)
    inputs = unet_inputs(unet, 1, 20, 12)
    full, output = recorded(unet, inputs)
    own = dict(unet.attn_processors)
    with modules_run() as modules:
        record = record_pass(unet, layers=layers, **inputs)
    names = {module: name for name, module in unet.named_modules()}
    ran = [names[module] for module in modules]
    assert record.names == full.names[:layers]
    assert record.output_grid == full.output_grid == max(full.grids)
    for found, expected in zip(record.queries + record.keys, full.queries[:layers] + full.keys[:layers], strict=True):
        assert torch.equal(found, expected)
    assert [name for name in ran if name in full.names] == record.names
    assert f"{record.names[-1]}.to_v" in ran
    assert f"{record.names[-1]}.to_out.0" not in ran
    assert "conv_out" not in ran
    assert_same_processors(unet, own)
    assert torch.equal(forward(unet, inputs), output)


def discard(_: Any) -> None:
    """What a lambda returns, where nothing is to be."""


def hook_on(module: Any) -> None:
    module.register_forward_hook(lambda *_: None)


def keep_what_is_seen(unet: UNet2DConditionModel) -> None:
    class Keeping(AttnProcessor2_0):
        pass

    name = next(name for name in reversed(unet.attn_processors) if "attn2" in name)
    unet.get_submodule(name.removesuffix(".processor")).set_processor(Keeping())


def offload(module: Any) -> None:
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


@pytest.mark.parametrize(
    "alter",
    [
        hook_on,
        lambda unet: hook_on(unet.up_blocks[-1].resnets[0]),
        lambda unet: discard(unet.conv_out.register_forward_pre_hook(lambda *_: None)),
        keep_what_is_seen,
        lambda unet: offload(unet.conv_out),
        lambda unet: unet.compile(backend="eager", fullgraph=True),
        lambda unet: unet.compile_repeated_blocks(backend="eager", fullgraph=True),
        lambda unet: torch.compile(unet, backend="eager", fullgraph=True),
    ],
    ids=[
        "hook",
        "hook of a part",
        "pre-hook",
        "processor",
        "accelerate",
        "compiled in place",
        "compiled in part",
        "compiled",
    ],
)
def test_a_pass_for_the_record_runs_to_its_end_where_somebody_may_wait_for_it(alter: Callable[[Any], Any]) -> None:
    torch.compiler.reset()
    unet = tiny_unet("sd2", **TWO_LEVELS)
    inputs = unet_inputs(unet, 1, 8, 8)
    full, _ = recorded(unet, inputs)
    altered = alter(unet)
    record = record_pass(unet if altered is None else altered, layers=2, **inputs)
    assert record.names == full.names
    assert len(record.names) > 2


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_pass_for_the_record_runs_to_its_end_under_hooks_of_all_modules(register: str) -> None:
    unet = shared_unet("sd1")
    seen = []
    hook = getattr(torch.nn.modules.module, register)(lambda module, *_: seen.append(module))
    try:
        record = record_pass(unet, layers=1, **unet_inputs(unet, 1, 8, 8))
    finally:
        hook.remove()
    assert len(record.names) == 16
    assert unet.conv_out in seen


@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
def test_a_pass_for_the_record_ends_early_after_hooks_have_been_removed(library: str) -> None:
    unet = tiny_unet("sd2", **TWO_LEVELS)
    if library == "accelerate":
        offload(unet.conv_out)
        accelerate.hooks.remove_hook_from_module(unet.conv_out)
    else:
        registry = HookRegistry.check_if_exists_or_initialize(unet.conv_out)
        registry.register_hook(ModelHook(), "test")
        registry.remove_hook("test")
    assert "forward" in vars(unet.conv_out)
    assert len(record_pass(unet, layers=1, **unet_inputs(unet, 1, 8, 8)).names) == 1


def test_a_layer_that_is_passed_over_is_reported() -> None:
    """Shares are given by the number of a layer."""
    unet = tiny_unet("sd2", **TWO_LEVELS)
    blocks = unet.down_blocks[0]
    blocks.attentions[0].forward = lambda hidden_states, **_: (hidden_states,)
    first = next(name for name in unet.attn_processors if "attn1" in name).removesuffix(".processor")
    for layers in (2, None):
        with pytest.raises(ValueError, match=f"in the order of its modules, but {first} was not executed"):
            record_pass(unet, layers=layers, **unet_inputs(unet, 1, 8, 8))


def test_a_record_that_ends_early_aggregates_on_the_grid_of_all() -> None:
    unet = shared_unet("sd1")
    inputs = unet_inputs(unet, 1, 8, 12)
    full, _ = recorded(unet, inputs)
    record = record_pass(unet, layers=4, **inputs)
    shares = [0.0, 0.0, 2.0, 1.0]
    assert record.grids[2:] == [(4, 6)] * 2
    found = record.aggregate(weights=shares)
    assert found.shape == (1, 96, 96)
    assert torch.equal(found, full.aggregate(weights=shares + [0.0] * 12))


def assert_same_processors(unet: UNet2DConditionModel, own: dict[str, Any]) -> None:
    now = unet.attn_processors
    assert list(now) == list(own)
    assert all(now[name] is own[name] for name in own)


def test_record_is_empty_before_a_pass() -> None:
    with record_attention(shared_unet("sd1")) as record:
        pass
    assert (record.queries, record.keys, record.grids, record.scales, record.names) == ([], [], [], [], [])
    assert record.logsumexps is None


def test_a_second_pass_replaces_the_first() -> None:
    unet = shared_unet("sd2")
    first, second = unet_inputs(unet, 1, 8, 8), unet_inputs(unet, 2, 8, 16, seed=1)
    with record_attention(unet) as record:
        forward(unet, first)
        queries = record.queries
        forward(unet, second)
    alone, _ = recorded(unet, second)
    assert record.grids == alone.grids
    assert all(torch.equal(*pair) for pair in zip(record.queries, alone.queries, strict=True))
    assert queries[0].shape[2] == 64
    alone, _ = recorded(unet, first)
    assert all(torch.equal(*pair) for pair in zip(queries, alone.queries, strict=True))


def test_a_pass_that_fails_leaves_an_empty_record() -> None:
    unet = shared_unet("sd2")
    inputs = unet_inputs(unet, 1, 8, 8)
    with record_attention(unet) as record:
        forward(unet, inputs)
        with pytest.raises(RuntimeError):
            forward(unet, {**inputs, "encoder_hidden_states": torch.zeros(1, 77, 5)})
        assert record.names == []
        forward(unet, inputs)
        assert len(record.names) == 16


@pytest.mark.parametrize("cross", [False, True])
def test_nested_recording_is_refused_and_the_outer_goes_on(cross: bool) -> None:
    unet = shared_unet("sd2")
    with record_attention(unet, cross=cross) as record:
        with (
            pytest.raises(ValueError, match=r"down_blocks\.0\.attentions\.0\..*recorded already"),
            record_attention(unet, cross=cross),
        ):
            pass
        forward(unet, unet_inputs(unet, 1, 8, 8))
    assert len(record.names) == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    unet = tiny_unet("sd2", dtype=dtype)
    inputs = unet_inputs(unet, 2, 8, 8)
    plain = forward(unet, inputs)
    projected: dict[str, Tensor] = {}
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: projected.update({name: output})
        )
        for name, _ in unet.named_modules()
        if name.endswith(("attn1.to_q", "attn1.to_k"))
    ]

    record, output = recorded(unet, inputs)

    for hook in hooks:
        hook.remove()
    assert torch.equal(output, plain)
    for name, query, key in zip(record.names, record.queries, record.keys, strict=True):
        for tensor, linear in ((query, "to_q"), (key, "to_k")):
            assert tensor.dtype == dtype
            assert torch.equal(tensor.transpose(1, 2).flatten(2), projected[f"{name}.{linear}"])
    assert_logsumexps(record, 2e-4)


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_upcast_attention_changes_neither_q_nor_k(processor: type) -> None:
    unet = tiny_unet("sd2", dtype=torch.bfloat16, upcast_attention=True)
    unet.set_attn_processor(processor())
    inputs = unet_inputs(unet, 1, 8, 8)
    record, _ = recorded(unet, inputs)
    name, expected = next(iter(eager_maps(unet, inputs).items()))  # later layers differ by earlier layers' rounding
    assert record.names[0] == name
    assert record.queries[0].dtype == torch.bfloat16
    torch.testing.assert_close(record_maps(record)[0][0], expected.double(), rtol=2**-8, atol=1e-8)


def test_fused_projections() -> None:
    unet = tiny_unet("sd1")
    inputs = unet_inputs(unet, 2, 8, 16)
    apart, _ = recorded(unet, inputs)
    unet.fuse_qkv_projections()
    own, plain = unet.attn_processors, forward(unet, inputs)

    record, output = recorded(unet, inputs)

    assert torch.equal(output, plain)
    assert_same_processors(unet, own)
    assert record.names == apart.names
    for found, expected in zip(record.queries + record.keys, apart.queries + apart.keys, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    unet.unfuse_qkv_projections()  # leaves the fused layers in place
    record, _ = recorded(unet, inputs)
    assert all(torch.equal(*pair) for pair in zip(record.queries, apart.queries, strict=True))


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(2)])
def test_processors_that_honour_the_scale(processor: Any) -> None:
    unet = tiny_unet("sd2")
    unet.set_attn_processor(processor)
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.scale = 0.2
    inputs = unet_inputs(unet, 2, 8, 8)
    plain = forward(unet, inputs)

    record, output = recorded(unet, inputs)

    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    assert record.scales == [0.2] * 16
    for found, expected in zip(record_maps(record), eager_maps(unet, inputs).values(), strict=True):
        torch.testing.assert_close(found.flatten(0, 1).float(), expected, rtol=1e-3, atol=1e-6)
    assert_logsumexps(record, 2e-5)


def test_xformers_processor_is_replaced_by_the_same_attention() -> None:
    unet = tiny_unet("sd2")
    inputs = unet_inputs(unet, 1, 8, 8)
    plain = forward(unet, inputs)
    xformers = XFormersAttnProcessor()
    unet.set_attn_processor(
        {name: xformers if ".attn1." in name else each for name, each in unet.attn_processors.items()}
    )
    _, output = recorded(unet, inputs)
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-6)
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor is xformers


def test_attention_blocks_without_text() -> None:
    """Their attention takes [B, C, h, w], normalises by group, adds the residual and rescales."""
    unet = tiny_unet(
        "sd1",
        down_block_types=("AttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("AttnUpBlock2D",) * 3,
        attention_head_dim=16,
    )
    attn = unet.down_blocks[0].attentions[0]
    assert attn.group_norm is not None
    assert attn.residual_connection
    attn.rescale_output_factor = 1.7
    attn.spatial_norm = lambda hidden_states, temb: 1.3 * hidden_states
    attn.norm_q, attn.norm_k = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
    inputs = unet_inputs(unet, 2, 16, 8)
    plain = forward(unet, inputs)
    record, output = recorded(unet, inputs)
    assert torch.equal(output, plain)
    assert record.grids[0] == (16, 8)
    torch.testing.assert_close(record.queries[0].mean(-1), torch.zeros(2, 4, 128), rtol=0, atol=1e-5)
    torch.testing.assert_close(record.keys[0].mean(-1), torch.zeros(2, 4, 128), rtol=0, atol=1e-5)


def test_gradients_flow_and_the_record_is_detached() -> None:
    unet = tiny_unet("sd2", **TWO_LEVELS)
    inputs = unet_inputs(unet, 1, 8, 8)
    weight = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(forward(unet, inputs).sum(), weight)
        record, output = recorded(unet, inputs)
        (found,) = torch.autograd.grad(output.sum(), weight)
    assert torch.equal(found, expected)
    assert record.logsumexps is not None
    assert not any(each.requires_grad for each in record.queries + record.keys + record.logsumexps)


@pytest.mark.parametrize("fused", [False, True])
def test_record_keeps_queries_and_keys_alone(fused: bool) -> None:
    unet = tiny_unet("sd2")
    if fused:
        unet.fuse_qkv_projections()
    record, _ = recorded(unet, unet_inputs(unet, 1, 8, 8))
    for tensor in record.queries + record.keys:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_offloaded_weights() -> None:
    unet = tiny_unet("sd2")
    inputs = unet_inputs(unet, 1, 8, 8)
    expected, plain = recorded(unet, inputs)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    assert unet.conv_in.weight.device.type == "meta"
    record, output = recorded(unet, inputs)
    assert torch.equal(output, plain)
    assert all(torch.equal(*pair) for pair in zip(record.keys, expected.keys, strict=True))


def test_encoder_of_an_image_prompt_is_not_recorded() -> None:
    unet = tiny_unet("sd2")
    unet.encoder_hid_proj = IPAdapterPlusImageProjection(embed_dims=8, output_dims=8, hidden_dims=8, depth=1, heads=1)
    assert any("encoder_hid_proj" in name for name in unet.attn_processors)
    record, _ = recorded(unet, unet_inputs(unet, 1, 8, 8))
    assert len(record.names) == 16


def compile_whole(unet: Any, **options: Any) -> Any:
    return torch.compile(unet, **options)


def compile_in_place(unet: Any, **options: Any) -> Any:
    unet.compile(**options)
    return unet


def compile_blocks(unet: Any, **options: Any) -> Any:
    unet.compile_repeated_blocks(**options)
    return unet


@pytest.mark.parametrize(
    ("compiler", "backend", "config"),
    [
        (compile_whole, "eager", ONE_LAYER),
        (compile_in_place, "eager", ONE_LAYER),
        (compile_blocks, "aot_eager", TWO_LEVELS),
    ],
)
def test_compiled_unet(compiler: Callable[..., Any], backend: str, config: dict[str, Any]) -> None:
    torch.compiler.reset()
    unet = tiny_unet("sd2", **config)
    inputs, others = unet_inputs(unet, 1, 9, 6), unet_inputs(unet, 1, 9, 6, seed=1)
    expected, plain = recorded(unet, inputs)
    other, _ = recorded(unet, others)
    own = unet.attn_processors
    counter = CompileCounterWithBackend(backend)
    compiled = compiler(unet, backend=counter, fullgraph=True)
    torch.testing.assert_close(forward(compiled, inputs), plain, rtol=1e-4, atol=1e-5)
    once = counter.frame_count
    assert once > 0

    for passes in ([inputs], [others, inputs], [inputs]):
        with record_attention(compiled) as record:
            for each in passes:
                output = forward(compiled, each)
                truth = expected if each is inputs else other
                assert_same_record(record, truth)
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
        assert_same_record(record, expected)
        assert record.logsumexps is None
        assert_same_processors(unet, own)
        torch.testing.assert_close(forward(compiled, inputs), plain, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2 * once  # once for the recording, whatever the number of recordings


def assert_same_record(found: AttentionRecord, expected: AttentionRecord) -> None:
    assert (found.names, found.grids, found.scales) == (expected.names, expected.grids, expected.scales)
    for tensor, true in zip(found.queries + found.keys, expected.queries + expected.keys, strict=True):
        torch.testing.assert_close(tensor, true, rtol=1e-4, atol=1e-5)


def test_compiled_for_any_size() -> None:
    torch.compiler.reset()
    unet = tiny_unet("sd2", **ONE_LAYER)
    compiled = torch.compile(unet, backend="eager", fullgraph=True, dynamic=True)
    for size in ((6, 8), (10, 6)):
        inputs = unet_inputs(unet, 1, *size)
        record, _ = recorded(compiled, inputs)
        expected, _ = recorded(unet, inputs)
        assert_same_record(record, expected)


def test_autocast_has_no_logsumexps() -> None:
    unet = tiny_unet("sd2", **TWO_LEVELS)
    inputs = unet_inputs(unet, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain = forward(unet, inputs)
        record, output = recorded(unet, inputs)
    assert torch.equal(output, plain)
    assert record.queries[0].dtype == torch.bfloat16
    assert record.logsumexps is None


def test_unfused_attention_has_no_logsumexps() -> None:
    unet = shared_unet("sd2")
    inputs = unet_inputs(unet, 1, 8, 8)
    with sdpa_kernel(SDPBackend.MATH):
        plain = forward(unet, inputs)
        record, output = recorded(unet, inputs)
    assert torch.equal(output, plain)
    assert record.logsumexps is None


def test_one_missing_logsumexp_drops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = sdpa._fused_operator
    monkeypatch.setattr(
        sdpa, "_fused_operator", lambda query, *args: None if query.shape[2] == 4 else choose(query, *args)
    )
    unet = shared_unet("sd2")
    record, _ = recorded(unet, unet_inputs(unet, 1, 8, 8))
    assert record.logsumexps is None
    assert len(record.queries) == 16


@pytest.mark.parametrize("step", [3, 4])
def test_merged_tokens_are_refused(step: int) -> None:
    """Also where their number is that of another level of the UNet."""
    unet = tiny_unet("sd2")
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.register_forward_pre_hook(lambda _, args: (args[0][:, ::step], *args[1:]))
    attn.register_forward_hook(lambda _, __, output: output.repeat_interleave(step, 1)[:, :144])
    own = unet.attn_processors
    with pytest.raises(ValueError, match=rf"{'attn1'}: expected 12 x 12 queries .* got {144 // step}; merged"):
        recorded(unet, unet_inputs(unet, 1, 12, 12))
    assert_same_processors(unet, own)


def test_attention_mask_is_refused() -> None:
    unet = shared_unet("sd2")
    mask = {"attention_mask": torch.ones(1, 64)}
    with pytest.raises(ValueError, match=r"attention_mask: expected None .*down_blocks\.0"), record_attention(unet):
        forward(unet, {**unet_inputs(unet, 1, 8, 8), **mask})


def test_self_attention_to_something_else_is_refused() -> None:
    unet = tiny_unet("sd2", **TWO_LEVELS)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "encoder_hidden_states": args[0]}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"encoder_hidden_states: expected None in the self-attention down_blocks\.0"):
        recorded(unet, unet_inputs(unet, 1, 8, 8))


def test_cross_attention_without_a_text_is_refused() -> None:
    unet = tiny_unet("sd2", **TWO_LEVELS)
    inputs = {**unet_inputs(unet, 1, 8, 8), "encoder_hidden_states": None}
    with pytest.raises(ValueError, match=r"encoder_hidden_states: expected a tensor in the cross-attention down_bl"):
        recorded(unet, inputs, cross=True)


class SubclassedProcessor(AttnProcessor2_0):
    pass


@pytest.mark.parametrize("processor", [SubclassedProcessor(), PAGIdentitySelfAttnProcessor2_0()])
def test_other_processors_are_refused(processor: Any) -> None:
    unet = tiny_unet("sd2")
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(processor)
    own = unet.attn_processors
    name = r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1"
    with (
        pytest.raises(ValueError, match=rf"{name} with its processor {type(processor).__name__}: expected one of Attn"),
        record_attention(unet),
    ):
        pass
    assert_same_processors(unet, own)


def test_processors_that_contradict_their_layer_are_refused() -> None:
    unet = tiny_unet("sd2")
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.scale = 1.0
    with pytest.raises(ValueError, match=r"scales by 0\.353553, but the layer asks for 1"), record_attention(unet):
        pass
    attn.set_processor(AttnProcessor())
    attn.norm_k = torch.nn.LayerNorm(8)
    with pytest.raises(ValueError, match="ignores the layer's norm_q and norm_k"), record_attention(unet):
        pass


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None, "unet"])
def test_not_a_unet(model: Any) -> None:
    with (
        pytest.raises(TypeError, match=f"unet: expected a diffusers UNet2DConditionModel, got {type(model).__name__}"),
        record_attention(model),
    ):
        pass


def test_no_self_attention() -> None:
    unet = tiny_unet(
        "sd1",
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        mid_block_type="UNetMidBlock2D",
    )
    for cross, kind in ((False, "self"), (True, "cross")):
        with (
            pytest.raises(ValueError, match=rf"unet: expected {kind}-attention .* found none"),
            record_attention(unet, cross=cross),
        ):
            pass


@pytest.mark.gpu
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_record_on_a_gpu(layout: Any, cross: bool) -> None:
    unet = tiny_unet(layout, dtype=torch.float16).cuda()
    inputs = unet_inputs(unet, 2, 32, 24)
    plain = forward(unet, inputs)
    record, output = recorded(unet, inputs, cross=cross)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-2)
    for query, key, scale, logsumexp in zip(
        record.queries, record.keys, record.scales, record.logsumexps or [], strict=True
    ):
        expected = (query.double() @ key.double().mT * scale).logsumexp(-1)
        torch.testing.assert_close(logsumexp.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_records_outlive_the_replays_of_inductor_graphs() -> None:
    torch.compiler.reset()
    unet = tiny_unet("sd1", dtype=torch.float16, **{**TWO_LEVELS, "attention_head_dim": 2}).cuda()
    inputs = [unet_inputs(unet, 1, 16, 16, seed=seed) for seed in range(5)]
    expected = [recorded(unet, each)[0] for each in inputs]
    compiled = torch.compile(unet, mode="reduce-overhead", fullgraph=True)
    records = [recorded(compiled, each)[0] for each in inputs]
    for found, true in zip(records, expected, strict=True):
        for tensor, other in zip(found.queries + found.keys, true.queries + true.keys, strict=True):
            torch.testing.assert_close(tensor, other, rtol=2e-2, atol=2e-2)
