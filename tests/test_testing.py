"""The random checkpoints that tests and benchmarks run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffseg import record_attention
from diffseg.testing import tiny_pipeline, tiny_unet, unet_inputs


def test_maps_of_the_tiny_checkpoints_are_neither_flat_nor_one_hot() -> None:
    unet = tiny_unet("sd1")
    with torch.no_grad(), record_attention(unet) as record:
        unet(**unet_inputs(unet))
    peaks = (record.queries[0] @ record.keys[0].mT * record.scales[0]).softmax(-1).amax(-1)
    assert peaks.median() > 4 / 256
    assert peaks.median() < 0.9


def test_tiny_unet_follows_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    first = tiny_unet("sd2", seed=3).conv_in.weight
    state = torch.get_rng_state()
    again = tiny_unet("sd2", seed=3).conv_in.weight
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, tiny_unet("sd2", seed=4).conv_in.weight)


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_tiny_pipeline_is_a_whole_checkpoint(layout: Any, tmp_path: Any) -> None:
    assert tiny_pipeline(layout, tmp_path, dtype=torch.bfloat16) == tmp_path
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for name, tensor in tiny_unet(layout, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], tensor)
    tokens = pipeline.tokenizer("cat", padding="max_length", return_tensors="pt").input_ids
    assert tokens.shape == (1, 77)
    assert pipeline.tokenizer.decode(tokens[0], skip_special_tokens=True) == "cat"
    with record_attention(pipeline.unet) as record:
        (image,) = pipeline("a cat", num_inference_steps=1, output_type="np").images
    assert image.shape == (128, 128, 3)
    assert record.grids[0] == (16, 16)
    assert record.queries[0].shape[0] == 2  # classifier-free guidance


@pytest.mark.parametrize("make", [tiny_unet, lambda layout: tiny_pipeline(layout, "unused")])
def test_unknown_layout(make: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"layout: expected .*'sd2'.*, got 'sd3'"):
        make("sd3")
