"""Rows with a network: what recording costs in a forward pass, and image to labels.

The network is the bundled one, a checkpoint on disk, or Stable Diffusion 1.4's architecture with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cases, gates
from .cases import Unavailable
from .timing import Contender

if TYPE_CHECKING:
    from .suite import Plan, Row, Settings

ARCHITECTURES = ("sd14",)
_SCORE_GAIN = 3.0  # on random weights of Q and of K: maps that differ, as trained ones do


def plan(row: Row, settings: Settings) -> Plan:
    from .suite import Plan

    try:
        pipe = load(settings)
    except ImportError as error:
        raise Unavailable(f"it needs diffusers and transformers ({error})") from error
    with torch.no_grad():
        return Plan(*(_capture if row.stage == "capture" else _pipeline)(pipe, row, settings))


def load(settings: Settings) -> Any:
    """The pipeline that the settings name, on their device."""
    from ..pipeline import DiffSegPipeline

    if settings.architecture is not None:
        pipe = random_pipeline(settings.device, settings.dtype)
    elif settings.model is not None:
        pipe = DiffSegPipeline.from_pretrained(settings.model, dtype=settings.dtype, local_files_only=True)
    else:
        pipe = cases.bundled_pipeline()
    pipe = pipe.to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_pipeline(device: torch.device, dtype: torch.dtype) -> Any:
    """Stable Diffusion 1.4's VAE, text encoder and UNet, in its own shapes, with random weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ..pipeline import DiffSegPipeline
    from ..testing import spelling_tokenizer

    tokenizer = spelling_tokenizer()
    with device, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter *= _SCORE_GAIN
    unet, vae, text_encoder = (torch.nn.Module.to(part, dtype).eval() for part in (unet, vae, text_encoder))
    return DiffSegPipeline(unet, vae, text_encoder, tokenizer)


def forward(pipe: Any, pixels: Tensor) -> Callable[[Any], Tensor]:
    """The bare network on images [B, 3, h, w] in [-1, 1]: the VAE, if there is one, and the UNet, nothing recorded."""
    pixels = pixels.to(pipe.unet.device, pipe.unet.dtype)
    tokens = 1 if pipe.text_encoder is None else pipe.text_encoder.config.max_position_embeddings
    context = pixels.new_zeros(len(pixels), tokens, pipe.unet.config.cross_attention_dim)
    steps = torch.full((len(pixels),), pipe.config.timestep, device=pixels.device)

    @torch.no_grad()
    def run(_: Any) -> Tensor:
        latents = pixels
        if pipe.vae is not None:
            latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        sample: Tensor = pipe.unet(latents, steps, encoder_hidden_states=context).sample
        return sample

    return run


def _images(pipe: Any, row: Row) -> list[Tensor]:
    """Images of the size that the network takes for this row: the bundled model reads an eighth of it."""
    size = row.grid if pipe.vae is None else row.size
    return cases.pictures(row.batch, size)


def _capture(pipe: Any, row: Row, settings: Settings) -> tuple[Any, ...]:
    from ..capture import record_attention

    bare = forward(pipe, torch.stack(_images(pipe, row)) * 2 - 1)
    expected = bare(None)

    def recorded(_: Any) -> Tensor:
        with record_attention(pipe.unet) as record:
            sample = bare(None)
        assert record.queries
        return sample

    def check(found: Tensor) -> None:
        if not torch.equal(found, expected) and not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            raise gates.GateError("recording changed what the network returns")

    return [None], [
        Contender("record_attention", "subject", recorded, check),
        Contender("bare forward", "baseline", bare, check),
    ]


def _pipeline(pipe: Any, row: Row, settings: Settings) -> tuple[Any, ...]:
    from ..backends import BACKENDS

    pictures = _images(pipe, row)
    size = tuple(pictures[0].shape[1:])
    bare = forward(pipe, torch.stack(pictures) * 2 - 1)
    given = cases.pictures(row.batch, row.size)

    def labels(backend: str) -> Callable[[Any], Tensor]:
        def run(images: Any) -> Tensor:
            output = pipe(images, processing_resolution=size, batch_size=row.batch, backend=backend, output_type="pt")
            return torch.stack(output.labels)

        return run

    expected = labels("reference")(given)
    check = gates.labels_gate(expected)
    names = settings.backends or [name for name in BACKENDS if name != "reference"]
    able = [name for name in names if all(
        BACKENDS[name].can_run(op, settings.device, torch.float32) for op in ("aggregate", "merge", "label")
    )]  # fmt: skip
    contenders = [Contender(f"pipe, {name}", "subject", labels(name), check) for name in able]
    contenders.append(Contender("bare VAE + UNet", "baseline", bare, recordable=True, note="other work: no labels"))
    return [given], contenders
