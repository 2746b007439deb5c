"""Rows with a network: what recording costs in a forward pass, image to labels, and files to files.

The network is the bundled one, a checkpoint on disk, or Stable Diffusion 1.4's architecture with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from . import cases, gates
from .cases import Unavailable
from .rows import Plan, Row, Settings
from .timing import Contender

ARCHITECTURES = ("sd14",)
FOLDER_IMAGES, FOLDER_BATCH = 12, 2


def plan(row: Row, settings: Settings) -> Plan:
    try:
        pipe = load(settings)
    except ImportError as error:
        raise Unavailable(f"it needs diffusers and transformers ({error})") from error
    with torch.no_grad():
        return _PLANS[row.stage](pipe, row, settings)


def load(settings: Settings) -> Any:
    """The pipeline that the settings name, on their device."""
    from ..pipeline import DiffSegPipeline

    if settings.architecture is not None:
        from ..testing import stable_diffusion_components

        pipe = DiffSegPipeline(**stable_diffusion_components(dtype=settings.dtype, device=settings.device))
    elif settings.model is not None:
        pipe = DiffSegPipeline.from_pretrained(settings.model, dtype=settings.dtype, local_files_only=True)
    else:
        pipe = cases.bundled_pipeline()
    pipe = pipe.to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def forward(pipe: Any, pixels: Tensor) -> Callable[[Any], Tensor]:
    """The bare network on images [B, 3, h, w] in [0, 1]: the VAE, if there is one, and the UNet, nothing recorded."""
    pixels = pixels.to(pipe.unet.device)
    tokens = 1 if pipe.text_encoder is None else pipe.text_encoder.config.max_position_embeddings
    context = torch.zeros(
        len(pixels), tokens, pipe.unet.config.cross_attention_dim, dtype=pipe.unet.dtype, device=pixels.device
    )
    steps = torch.full((len(pixels),), pipe.config.timestep, device=pixels.device)

    @torch.no_grad()
    def run(_: Any) -> Tensor:
        sample: Tensor = pipe.unet(pipe._latents(pixels), steps, encoder_hidden_states=context).sample
        return sample

    return run


def _images(pipe: Any, row: Row) -> list[Tensor]:
    """Images of the size that the network takes for this row: the bundled model reads an eighth of it."""
    size = row.grid if pipe.vae is None else row.size
    return cases.pictures(row.batch, size)


def _capture(pipe: Any, row: Row, settings: Settings) -> Plan:
    from ..capture import record_attention

    bare = forward(pipe, torch.stack(_images(pipe, row)))

    def recorded(_: Any) -> Tensor:
        with record_attention(pipe.unet) as record:
            sample = bare(None)
        assert record.queries
        return sample

    expected = cache(lambda: bare(None))

    def check(found: Tensor) -> None:
        if not torch.equal(found, expected()) and not torch.allclose(found, expected(), rtol=1e-2, atol=1e-2):
            raise gates.GateError("recording changed what the network returns")

    contenders = [
        Contender("record_attention", "subject", recorded, check),
        Contender("bare forward", "baseline", bare, check),
    ]
    return Plan([None], contenders)


def _pipeline(pipe: Any, row: Row, settings: Settings) -> Plan:
    from ..backends import BACKENDS

    pictures = _images(pipe, row)
    size = tuple(pictures[0].shape[1:])
    bare = forward(pipe, torch.stack(pictures))
    given = cases.pictures(row.batch, row.size)

    def labels(pipe: Any, backend: str) -> Callable[[Any], Tensor]:
        def run(images: Any) -> Tensor:
            output = pipe(images, processing_resolution=size, batch_size=row.batch, backend=backend, output_type="pt")
            return torch.stack(output.labels)

        return run

    def warm(backend: str) -> Any:
        twin = pipe.like()
        twin.warmup(row.batch, *given[0].shape[1:], processing_resolution=size, backend=backend)
        return twin

    check = gates.labels_gate(lambda: labels(pipe, "reference")(given))
    names = settings.backends or [name for name in BACKENDS if name != "reference"]
    able = [name for name in names if all(
        BACKENDS[name].can_run(op, settings.device, torch.float32) for op in ("aggregate", "merge", "label")
    )]  # fmt: skip
    contenders = [Contender(f"pipe, {name}", "subject", labels(pipe, name), check) for name in able]
    if settings.device.type == "cuda":
        contenders += [Contender(f"pipe, {name}, warm", "subject", labels(warm(name), name), check) for name in able]
    contenders.append(Contender("bare VAE + UNet", "baseline", bare, recordable=True, note="other work: no labels"))
    return Plan([given], contenders)


def _folder(pipe: Any, row: Row, settings: Settings) -> Plan:
    import numpy as np
    from PIL import Image

    from .. import images, visualize
    from ..folder import OVERLAY_COMPRESSION, Job, segment_files

    folder = TemporaryDirectory()
    sources = [Path(folder.name) / f"{index}.jpg" for index in range(FOLDER_IMAGES)]
    for source, picture in zip(sources, cases.pictures(FOLDER_IMAGES, row.size), strict=True):
        Image.fromarray(images.to_array(picture)).save(source, quality=95)

    def jobs(name: str) -> list[Job]:
        out = Path(folder.name) / name
        return [
            Job(source, out / f"{source.stem}_labels.png", out / f"{source.stem}_overlay.png") for source in sources
        ]

    def read(done: list[Job]) -> Tensor:
        return torch.stack([torch.from_numpy(np.array(Image.open(job.labels)).astype(np.int32)) for job in done])

    def at_once(_: Any) -> list[Job]:
        done = jobs("segment")
        outcomes, _ = segment_files(pipe, done, {}, batch_size=FOLDER_BATCH)
        assert not any(outcome.error for outcome in outcomes)
        return done

    def one_by_one(_: Any) -> list[Job]:
        done = jobs("loop")
        for job in done:
            image = Image.open(job.source).convert("RGB")
            found = pipe(image).labels[0]
            job.labels.parent.mkdir(exist_ok=True)
            visualize.label_image(found).save(job.labels)
            overlay = Image.fromarray(visualize.overlay(np.asarray(image), found))
            overlay.save(job.overlay, compress_level=OVERLAY_COMPRESSION)
        return done

    gate = gates.labels_gate(lambda: read(one_by_one(None)))

    def check(done: list[Job]) -> None:
        assert folder.name  # held as long as the contenders are
        gate(read(done))

    contenders = [
        Contender(f"diffseg segment, {FOLDER_IMAGES} files", "subject", at_once, check),
        Contender("for path in paths: pipe(open(path))", "baseline", one_by_one, check),
    ]
    return Plan([None], contenders)


_PLANS: dict[str, Callable[[Any, Row, Settings], Plan]] = {
    "capture": _capture,
    "pipeline": _pipeline,
    "folder": _folder,
}
