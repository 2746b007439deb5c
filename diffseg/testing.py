"""Random checkpoints with the layer structure of Stable Diffusion: small ones for tests, a full one for benchmarks.

Nothing is downloaded. The weights mean nothing, but the self-attention is sharp enough that its maps differ.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Layout = Literal["sd1", "sd2", "sdxl"]

TOKENS = 77  # CLIP's context length
_CROSS_ATTENTION_DIM = 32
_SCORE_GAIN = 3.0  # on the weights of Q and of K: scores get a standard deviation near 3 instead of 1/3
_FULL_SCORE_GAIN = 9.0  # of the full architecture: D between its maps lies on both sides of 1, not below 0.06

_COMMON = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "cross_attention_dim": _CROSS_ATTENTION_DIM,
    "norm_num_groups": 8,
}
_FOUR_LEVELS = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_LAYOUTS: dict[str, dict[str, Any]] = {
    "sd1": {**_FOUR_LEVELS, "block_out_channels": (64, 64, 128, 128), "attention_head_dim": 8},
    "sd2": {
        **_FOUR_LEVELS,
        "block_out_channels": (16, 32, 64, 64),
        "attention_head_dim": (2, 4, 8, 8),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 64),
        "attention_head_dim": (2, 4, 8),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": _CROSS_ATTENTION_DIM + 6 * 8,
    },
}


def tiny_unet(
    layout: Layout, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> UNet2DConditionModel:
    """A narrow random UNet, in eval mode.

    Args:
        layout: ``"sd1"``: 5 + 5 + 5 + 1 self-attention layers of 8 heads on four grids; ``"sd2"``: the same layers,
            heads of 8 channels, linear projections; ``"sdxl"``: three levels, none at the top, 2 and 3 (for 2 and 10)
            transformer blocks a layer below, text and time embeddings.
        seed: of the weights; the global random state is left as it was.
        dtype: of the weights.
        config: further arguments of UNet2DConditionModel, e.g. ``upcast_attention=True``.

    Raises:
        ValueError: ``layout`` is none of these.
    """
    settings = {**_COMMON, **_layout(layout), **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _sharpened(UNet2DConditionModel(**settings))
    return _cast(unet, dtype).eval()


def unet_inputs(
    unet: UNet2DConditionModel, batch_size: int = 1, height: int = 16, width: int = 16, *, seed: int = 0
) -> dict[str, Any]:
    """Random keyword arguments of one forward pass, ``unet(**unet_inputs(unet))``, in the UNet's dtype and device.

    Returns:
        ``sample`` [batch, channels, height, width] (a latent), ``timestep`` [], ``encoder_hidden_states``
        [batch, 77, dim], and ``added_cond_kwargs`` where the UNet has text and time embeddings.
    """
    config, generator = unet.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(unet.device, unet.dtype)

    inputs: dict[str, Any] = {
        "sample": normal(batch_size, config.in_channels, height, width),
        "timestep": torch.tensor(300, device=unet.device),
        "encoder_hidden_states": normal(batch_size, TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        time_ids = torch.tensor([8.0 * height, 8.0 * width, 0.0, 0.0, 8.0 * height, 8.0 * width])
        text_dim = config.projection_class_embeddings_input_dim - len(time_ids) * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": normal(batch_size, text_dim),
            "time_ids": time_ids.to(unet.device, unet.dtype).expand(batch_size, -1),
        }
    return inputs


def tiny_pipeline(
    layout: Literal["sd1", "sd2"],
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Writes a whole random checkpoint that ``StableDiffusionPipeline.from_pretrained(directory)`` loads offline.

    Args:
        layout, dtype, config: as in :func:`tiny_unet`.
        directory: where to write; made if it is not there.

    Returns:
        ``directory`` as a path. Weights are safetensors; images of 128 x 128 have latents of the default size, 16 x 16.

    Raises:
        ValueError: ``layout`` is neither ``"sd1"`` nor ``"sd2"``.
    """
    from diffusers import StableDiffusionPipeline  # of which transformers warns, where torchvision is missing

    if layout not in ("sd1", "sd2"):
        raise ValueError(f"layout: expected 'sd1' or 'sd2', got {layout!r}")
    unet = tiny_unet(layout, dtype=dtype, **config)
    tokenizer = spelling_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = _tiny_text_encoder(tokenizer, unet.config.cross_attention_dim)
        vae = _tiny_vae()
    pipeline = StableDiffusionPipeline(
        vae=_cast(vae, dtype),
        text_encoder=_cast(text_encoder, dtype),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(layout),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def stable_diffusion_components(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The arguments of ``DiffSegPipeline`` in Stable Diffusion 1.4's architecture, with random weights, for benchmarks.

    UNet (0.86 G parameters) and VAE are as published. The text encoder is a small one of the same width: it runs once a
    pipeline, and not in the forward pass.

    Args:
        dtype: of the weights.
        device: where the weights are drawn, which takes seconds on a CPU; they depend on it.
    """
    device = torch.device(device)
    tokenizer = spelling_tokenizer()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type), device:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        _sharpened(unet, _FULL_SCORE_GAIN)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
        text_encoder = _tiny_text_encoder(tokenizer, unet.config.cross_attention_dim)
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return {**{name: _cast(part, dtype).eval() for name, part in parts.items()}, "tokenizer": tokenizer}


def _sharpened(unet: UNet2DConditionModel, gain: float = _SCORE_GAIN) -> UNet2DConditionModel:
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter *= gain
    return unet


def _layout(layout: str) -> dict[str, Any]:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected one of {tuple(_LAYOUTS)}, got {layout!r}")
    return _LAYOUTS[layout]


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(model, dtype)  # diffusers' own warns about modules to keep in float32: there are none


def _tiny_vae() -> AutoencoderKL:
    """Downscales by 8, as Stable Diffusion's own."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    ).eval()


def _tiny_text_encoder(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            projection_dim=hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def spelling_tokenizer() -> CLIPTokenizer:
    """Spells text in single letters, digits and punctuation marks, each in two tokens: within and at a word's end."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _scheduler(layout: str) -> SchedulerMixin:
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    common = {**noise, "set_alpha_to_one": False, "steps_offset": 1}
    if layout == "sd1":
        return PNDMScheduler(**common, skip_prk_steps=True)
    return DDIMScheduler(**common, clip_sample=False, prediction_type="v_prediction")
