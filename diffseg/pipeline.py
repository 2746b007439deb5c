"""DiffSeg as a diffusers pipeline: images in, label maps out."""

import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Union

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from . import backends, memory, ops, semantics
from . import images as image_io
from .capture import AttentionRecord, attention_grid, count_layers, moves_weights, record_pass
from .checks import check_bool, check_integer, check_pair, check_rule, check_thresholds, check_weight_scheme, plain
from .graphs import (
    Options,
    Recordings,
    Segmented,
    Shape,
    download,
    fuse_projections,
    lock_of,
    split_projections,
    staging,
    upload,
)
from .memory import in_parts
from .ops import Proposals, Rule, Weights
from .reference import Grid
from .visualize import label_image

DEFAULT_THRESHOLD = 1.0
"""The paper's value for images in the wild with Stable Diffusion."""

DEFAULT_TIMESTEP = 300

TRAINING_STEPS = 1000
"""Of Stable Diffusion's noise schedule, where a UNet's configuration names no other number."""

_LITTLE_MEMORY = 1 << 30  # bytes of A_f that nobody need ask for

_OWN_DTYPES = object()  # asks ``to`` for no cast, where diffusers cannot be kept from asking for one

_NOT_NEEDED = ("feature_extractor", "image_encoder", "requires_safety_checker", "safety_checker", "scheduler")


@dataclass
class DiffSegOutput(BaseOutput):  # type: ignore[misc]
    """What :class:`DiffSegPipeline` returns, one entry an image, in order."""

    labels: list[Any]
    """Segments 0..S-1 [H, W] at the image's own size: int32 arrays, int32 tensors or PIL images."""

    num_segments: list[int]
    """S of each image."""

    timings: dict[str, float] = field(default_factory=dict)
    """Seconds in each stage, over all images; empty unless ``time_stages``."""

    captions: list[str] | None = None
    """The text that each image was shown with, where names were asked for."""

    semantics: list[dict[str, Any]] | None = None
    """Where names were asked for, segments as transformers returns them: ``segmentation``, of the type of ``labels``,
    and ``segments_info``, a list of ``id``, ``label_id``, ``label``, ``score`` and ``was_fused``."""


class DiffSegPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Segments images from the self-attention of one UNet pass (arXiv 2308.12469).

    Loads Stable Diffusion 1.x and 2.x checkpoints by ``from_pretrained``, takes over the parts of a loaded pipeline by
    ``from_pipe``, and runs UNets in pixel space, such as the bundled one, without the other three components.

    Args:
        unet: gives the attention.
        vae: encodes the image; None: the UNet works on pixels in [-1, 1]. An ``AutoencoderTiny`` costs far less than
            Stable Diffusion's own, which costs more than the UNet; what it does to the labels has not been measured.
        text_encoder, tokenizer: give the embedding of the empty prompt; needed with a ``vae``.
        threshold: the checkpoint's default for the merging threshold tau.
        timestep: at which the UNet is read; no noise is added.
        weights: the checkpoint's default for the shares of the layers in A_f, as in :func:`diffseg.aggregate`.
    """

    model_cpu_offload_seq = "text_encoder->vae->unet"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: Union[AutoencoderKL, AutoencoderTiny, None] = None,  # noqa: UP007 (diffusers reads these annotations)
        text_encoder: Union[CLIPTextModel, None] = None,  # noqa: UP007
        tokenizer: Union[CLIPTokenizer, None] = None,  # noqa: UP007
        threshold: float = DEFAULT_THRESHOLD,
        timestep: int = DEFAULT_TIMESTEP,
        weights: Weights = "proportional",
    ) -> None:
        super().__init__()
        _check_components(unet, vae, text_encoder, tokenizer)
        self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(threshold=threshold, timestep=timestep, weights=weights)
        self._empty_prompt: Tensor | None = None
        self._prompt_source: tuple[Any, torch.dtype] | None = None  # a weak reference to its encoder, in that dtype
        self._recordings = Recordings()
        self._fused: Any = None  # the UNet whose projections are joined
        self._laid_out: list[Any] = []  # networks made channels-last
        self._compiled: tuple[Callable[[Tensor], Tensor], Any] | None = None
        self._captioner: semantics.ModelCaptioner | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "DiffSegPipeline":
        """As ``DiffusionPipeline.from_pretrained``, but reads safetensors only, unless ``use_safetensors`` is given."""
        kwargs.setdefault("use_safetensors", True)
        pipe: DiffSegPipeline = super().from_pretrained(os.fspath(pretrained_model_name_or_path), **kwargs)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: Any, **kwargs: Any) -> Any:
        """As ``DiffusionPipeline.download``, without the files of what segmentation does not need.

        Raises:
            ValueError: the checkpoint has no UNet, or one that is conditioned on more than text; nothing is downloaded.
        """
        from diffusers import StableDiffusionPipeline  # of which transformers warns, where torchvision is missing

        where = {
            each: kwargs[each] for each in ("cache_dir", "local_files_only", "revision", "token") if each in kwargs
        }

        def configuration(name: str) -> Any:
            return json.loads(Path(hf_hub_download(pretrained_model_name, name, **where)).read_text())

        with suppress(OSError):  # where a file is missing, the download below says why
            cls.extract_init_dict(configuration("model_index.json"))
            if "unet" not in kwargs:
                _check_conditioning(configuration("unet/config.json"))
        return StableDiffusionPipeline.download(pretrained_model_name, **{**kwargs, **dict.fromkeys(_NOT_NEEDED)})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "DiffSegPipeline":
        """A pipeline on the components of a loaded one, which stay as they are, each in its dtype."""
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = _OWN_DTYPES
        pipe: DiffSegPipeline = super().from_pipe(pipeline, **kwargs)
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Leaves out what a generating pipeline has and segmentation does not need.

        Raises:
            ValueError: the checkpoint has no UNet.
        """
        if "unet" not in config_dict:
            raise ValueError(
                "expected a checkpoint with a UNet, as of Stable Diffusion 1.x and 2.x, got one of a "
                f"{config_dict.get('_class_name')}"
            )
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in _NOT_NEEDED}, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "DiffSegPipeline":
        """As ``DiffusionPipeline.to``, after calls under way; ends the recordings of weights that it moves."""
        modules = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        dtype = kwargs.get("dtype")
        if dtype is _OWN_DTYPES or all(getattr(part, "dtype", None) == dtype for part in modules):
            kwargs.pop("dtype", None)  # diffusers warns that a cast loses precision, also where it changes nothing
        with lock_of(self.unet):
            super().to(*args, **kwargs)
            self._recordings.drop_stale(self._networks())
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As ``DiffusionPipeline.save_pretrained``; ValueError where :meth:`warmup` has joined projections."""
        if self._fused is not None:
            raise ValueError(
                "save_pretrained: expected the weights as they were loaded, found Q, K and V joined by warmup: "
                "call release() first"
            )
        super().save_pretrained(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: without graphs, compiled networks and references to the original's parts."""
        return {**self.__dict__, "_recordings": Recordings(), "_compiled": None, "_prompt_source": None}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent cell, along a side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """What the sides of the processed image must be a multiple of, so that every UNet level halves evenly."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        *,
        threshold: float | Sequence[float] | None = None,
        anchors: int = 16,
        iterations: int = 3,
        rule: Rule = "paper",
        weights: Weights | None = None,
        refine: bool = False,
        timestep: int | None = None,
        processing_resolution: int | tuple[int, int] | None = None,
        match_input_resolution: bool = True,
        batch_size: int = 1,
        output_type: Literal["np", "pt", "pil"] = "np",
        return_dict: bool = True,
        backend: str = "auto",
        time_stages: bool = False,
        semantic: bool = False,
        caption: str | Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        captioner: str | semantics.Captioner = semantics.CAPTIONER,
        fuse: bool = True,
    ) -> DiffSegOutput | Any:  # Any, not the tuple: else type checkers would refuse ``pipe(image).labels``
        """Segments one image or several.

        ``semantic=True`` names the segments (the paper's appendix 8.7): a second pass of the UNet, with a caption
        instead of the empty prompt, gives the cross-attention; it changes no mask.

        Args:
            image: a path, PIL image, array [H, W, C] or tensor [C, H, W] (uint8, uint16, or floats in [0, 1]), or a
                list of these, of any sizes.
            threshold: tau of :func:`diffseg.merge`; None: the checkpoint's own.
            anchors: anchors a side; on a grid whose shorter side is less, that many.
            iterations, rule, backend: as in :func:`diffseg.merge`.
            weights: of the layers, as in :func:`diffseg.aggregate`; None: the checkpoint's own, usually
                ``"proportional"``. The UNet's pass ends at the last layer that has a share, unless hooks,
                attention processors of somebody's own or compiled code may wait for its end.
            refine: add k-means refinement (:func:`diffseg.refine`).
            timestep: at which the UNet is read; None: the checkpoint's own, usually 300.
            processing_resolution: the longer side, in pixels, at which the image is processed, or (height, width);
                rounded to :attr:`size_multiple`. None: the size the UNet was trained at.
            match_input_resolution: return labels at the image's own size, else at the processed size.
            batch_size: images a UNet pass; only images processed at one size share a pass.
            output_type: ``"np"``, int32 arrays; ``"pt"``, int32 tensors; ``"pil"``, palette images.
            return_dict: return a :class:`DiffSegOutput`, else its fields as a tuple, without those that are None.
            time_stages: wait for the device after each stage and report seconds in ``timings``.
            semantic: name the segments by the nouns of a caption; fills ``captions`` and ``semantics``.
            caption: the caption, or one an image; None: the captioner writes it.
            labels: the names to choose from, instead of nouns. Without a ``caption`` they are the text; with one they
                must stand in it.
            captioner: name of an image-to-text model of transformers, loaded when it is first needed; or a function
                from PIL images to captions.
            fuse: make one segment of the masks that get the same name.

        Raises:
            ValueError, TypeError: on bad input, before any work; ValueError if the attention is not finite.
            FileNotFoundError: a path leads nowhere.
            ImportError: nouns are needed, and HanTa (``diffseg[semantic]``) is not installed.
        """
        if output_type not in ("np", "pt", "pil"):
            raise ValueError(f"output_type: expected 'np', 'pt' or 'pil', got {output_type!r}")
        check_integer("batch_size", batch_size, 1)
        for name, flag in (
            ("refine", refine),
            ("match_input_resolution", match_input_resolution),
            ("semantic", semantic),
            ("fuse", fuse),
        ):
            check_bool(name, flag)
        options = self.options(
            threshold=threshold,
            anchors=anchors,
            iterations=iterations,
            rule=rule,
            weights=weights,
            timestep=timestep,
            backend=backend,
        )
        given = image_io.as_list(image)
        if semantic:
            if self.text_encoder is None:
                raise ValueError(
                    "semantic: expected a checkpoint with a text encoder, as Stable Diffusion has, got a UNet in pixel "
                    "space, which no text reaches"
                )
            captions, labels = semantics.check_request(caption, labels, captioner, len(given))
        elif caption is not None or labels is not None:
            raise ValueError(f"{'labels' if caption is None else 'caption'}: expected semantic=True with it")
        if not given:
            raise ValueError("image: expected at least one image, got an empty list")
        pictures = [
            image_io.to_picture(each, "image" if len(given) == 1 else f"image[{i}]") for i, each in enumerate(given)
        ]
        sizes = [self.processed_size((each.shape[1], each.shape[2]), processing_resolution) for each in pictures]

        clock = _StageClock(self._execution_device if time_stages else None)
        if semantic:
            with clock("caption"):
                if captions is None and labels is None:
                    captions = self._captions(pictures, captioner, batch_size)
                prompts = semantics.prompts(captions, labels, len(pictures))
        for size in set(sizes):
            self._check_memory(size)
        targets = [tuple(each.shape[1:]) for each in pictures] if match_input_resolution else sizes
        found_labels: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        latents: dict[int, Tensor] = {}  # for the second pass
        with self._progress(len(pictures)) as progress, lock_of(self.unet):
            for batch in _batches(sizes, batch_size):
                some, places = [pictures[i] for i in batch], [targets[i] for i in batch]
                found, encoded = self._segment(some, sizes[batch[0]], places, options, refine, clock)
                arrived, segments = _arrived(found, stay=output_type == "pt")
                if 0 in segments:
                    raise ValueError(_overflow([i for i, count in zip(batch, segments, strict=True) if count == 0]))
                found_labels.update(zip(batch, arrived, strict=True))
                counts.update(zip(batch, segments, strict=True))
                if semantic and encoded is not None:
                    latents.update(zip(batch, encoded, strict=True))
                progress.update(len(batch))
            ordered = [found_labels[i] for i in range(len(pictures))]
            named = None
            if semantic:
                named = self._named(pictures, sizes, latents, ordered, prompts, batch_size, options, fuse, clock)
            self.maybe_free_model_hooks()

        output = DiffSegOutput(
            labels=[_converted(each, output_type) for each in ordered],
            num_segments=[counts[i] for i in range(len(pictures))],
            timings=clock.seconds,
            captions=[prompt.text for prompt in prompts] if semantic else None,
            semantics=named
            and [{"segmentation": _converted(each, output_type), "segments_info": infos} for each, infos in named],
        )
        return output if return_dict else output.to_tuple()

    @torch.inference_mode(False)  # a tensor of that mode could not be written to, nor trained, outside
    @torch.no_grad()
    def warmup(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        compile: bool = False,
        threshold: float | Sequence[float] | None = None,
        anchors: int = 16,
        iterations: int = 3,
        rule: Rule = "paper",
        weights: Weights | None = None,
        timestep: int | None = None,
        processing_resolution: int | tuple[int, int] | None = None,
        match_input_resolution: bool = True,
        backend: str = "auto",
    ) -> None:
        """Makes ready for batches of images of one size, so that later calls take them at the speed of the network.

        On a GPU everything from pixels to labels is recorded as one CUDA graph. Later calls with as many images that
        are processed at the same size, with the same options, replay it; images of another size of their own get their
        labels outside the graph. Each shape holds the memory of its pass. Other calls run eagerly, which the logger of
        ``diffseg.graphs`` says once a shape at debug level; so do those with ``refine`` or ``time_stages``. On a CPU
        the same call is made once, so that kernels are loaded.

        The weights are laid out channels-last and, on a GPU, those of Q, K and V are copied into one product: they must
        not be changed, loaded or adapted until :meth:`release`; then warm up again. A network that is moved, cast or
        replaced ends the recordings.

        Args:
            batch_size: images a pass.
            height, width: of the images, before they are resized for processing.
            compile: run the networks through ``torch.compile``. Compiled attention returns no log-sum-exps, which are
                then computed from Q and K.
            threshold, anchors, iterations, rule, weights, timestep, processing_resolution, match_input_resolution,
                backend: as in :meth:`__call__`.

        Raises:
            ValueError, TypeError: on bad input; ValueError where hooks move or cast the weights.
        """
        for name, value in (("batch_size", batch_size), ("height", height), ("width", width)):
            check_integer(name, value, 1)
        for name, flag in (("compile", compile), ("match_input_resolution", match_input_resolution)):
            check_bool(name, flag)
        options = self.options(
            threshold=threshold,
            anchors=anchors,
            iterations=iterations,
            rule=rule,
            weights=weights,
            timestep=timestep,
            backend=backend,
        )
        size = self.processed_size((height, width), processing_resolution)
        self._check_memory(size)
        if any(map(moves_weights, self._networks())):
            raise ValueError("warmup: expected weights that stay as they are, found hooks that move or cast them")
        target = (height, width) if match_input_resolution else size
        clock = _StageClock(None)

        def run(pixels: Tensor) -> Segmented:
            latents = self._encoded(pixels, clock, compiled=compile)
            proposals, finite = self._proposals(latents, options, False, clock, compiled=compile)
            return Segmented.at([target] * batch_size, proposals, finite, options.backend)

        with lock_of(self.unet):
            self._lay_out()
            self._context(batch_size)
            if compile and (self._compiled is None or self._compiled[1]._orig_mod is not self.unet):
                self._compiled = torch.compile(self._latents, dynamic=False), torch.compile(self.unet, dynamic=False)
            self._recordings.add(run, Shape(batch_size, size), options, self._execution_device, self._networks())

    @torch.inference_mode(False)
    def release(self) -> None:
        """Frees graphs, buffers, compiled networks and the memory of A_f that a CPU keeps.

        The weights are laid out as they were before :meth:`warmup`, and their projections apart.
        """
        with lock_of(self.unet):
            self._recordings.clear()
            self._compiled = None
            self._split()
            for network in self._laid_out:
                network.to(memory_format=torch.contiguous_format)
            self._laid_out.clear()
        memory.release()

    @torch.no_grad()
    def attention(
        self,
        image: Any,
        *,
        timestep: int | None = None,
        processing_resolution: int | tuple[int, int] | None = None,
        weights: Weights | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Grid]:
        """The aggregated attention A_f [1, N, N] of one image and its grid, for :func:`diffseg.merge` and studies.

        Arguments as in :meth:`__call__`.
        """
        options = self.options(weights=weights, timestep=timestep, backend=backend)
        record = self._record_image(image, processing_resolution, options)
        return _aggregated(record, options), record.output_grid

    @torch.no_grad()
    def record(
        self,
        image: Any,
        *,
        timestep: int | None = None,
        processing_resolution: int | tuple[int, int] | None = None,
    ) -> AttentionRecord:
        """Queries and keys of every self-attention layer for one image, for studies of what is done with them.

        Arguments as in :meth:`__call__`.
        """
        options = self.options(timestep=timestep, weights="proportional")  # all layers
        return self._record_image(image, processing_resolution, options)

    def options(
        self,
        *,
        threshold: float | Sequence[float] | None = None,
        anchors: int = 16,
        iterations: int = 3,
        rule: Rule = "paper",
        weights: Weights | None = None,
        timestep: int | None = None,
        backend: str = "auto",
    ) -> Options:
        """The options of a call, checked, with the checkpoint's own filled in.

        Arguments as in :meth:`__call__`.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        timestep = self.config.timestep if timestep is None else timestep
        steps = getattr(self.unet.config, "num_train_timesteps", None) or TRAINING_STEPS
        check_integer("timestep", timestep, 0, steps - 1)
        thresholds = check_thresholds(self.config.threshold if threshold is None else threshold, iterations)
        check_integer("anchors", anchors, 1)
        check_rule(rule)
        weights = plain(self.config.weights if weights is None else weights)
        check_weight_scheme(weights)
        if not isinstance(weights, str):
            weights = tuple(ops.resolve_weights(weights, [(1, 1)] * count_layers(self.unet)))
        backends.check_name(backend)
        return Options(timestep, tuple(thresholds), anchors, rule, weights, backend)

    def like(self, **components: Any) -> "DiffSegPipeline":
        """A pipeline on the same components but for ``components``, with the same defaults; holds no recording."""
        defaults = {name: self.config[name] for name in ("threshold", "timestep", "weights")}
        other = type(self)(**{**self.components, **components}, **defaults)
        other.set_progress_bar_config(disable=True)
        return other

    def _progress(self, images: int) -> Any:
        """A bar over several images."""
        return self.progress_bar(total=images) if images > 1 else nullcontext(SimpleNamespace(update=lambda _: None))

    def _networks(self) -> list[Any]:
        return [network for network in (self.vae, self.unet) if network is not None]

    def _segment(
        self,
        pictures: list[Tensor],
        size: Grid,
        targets: list[Any],
        options: Options,
        refine: bool,
        clock: "_StageClock",
    ) -> tuple[Segmented, Tensor | None]:
        """A batch of pictures [3, H, W] processed at ``size``, its labels at ``targets``; recorded or eager.

        Also what the UNet read, unless that stays inside a recording.
        """
        latents = None
        recording = None
        if not refine and clock.device is None:  # diffusers walks all modules to say where it runs: nobody asks here
            recording = self._recordings.find(Shape(len(pictures), size), options, self._networks())
        if recording is None:
            with clock("preprocess"):
                pixels = self._uploaded(pictures, size)
            latents = self._encoded(pixels, clock)
            proposals, finite = self._proposals(latents, options, refine, clock)
        else:
            found = recording(pictures)
            if [tuple(each.shape) for each in found.labels] == targets:
                return found, None
            proposals, finite = found.proposals, found.finite
        with clock("label"):
            return Segmented.at(targets, proposals, finite, options.backend), latents

    def _uploaded(self, pictures: list[Tensor], size: Grid) -> Tensor:
        """Pixels float32 [B, 3, h, w] in [0, 1] on the device."""
        device = self._execution_device if moves_weights(self.unet) else next(self.unet.parameters()).device
        host, pixels = staging(Shape(len(pictures), size), device)
        upload(pictures, host, pixels)
        return pixels

    def _record_image(self, image: Any, resolution: Any, options: Options) -> AttentionRecord:
        """What the UNet leaves behind of one image."""
        picture = image_io.to_picture(image)
        size = self.processed_size((picture.shape[1], picture.shape[2]), resolution)
        self._check_memory(size)
        clock = _StageClock(None)
        with lock_of(self.unet):
            record = self._record(self._encoded(self._uploaded([picture], size), clock), options, clock)
            self.maybe_free_model_hooks()
        return record

    def _proposals(
        self, latents: Tensor, options: Options, refine: bool, clock: "_StageClock", *, compiled: bool = False
    ) -> tuple[Proposals, Tensor]:
        """The proposals of a batch of latents, and whether each image's attention is finite, bool [B]."""
        record = self._record(latents, options, clock, compiled=compiled)
        grid = record.output_grid

        def proposed(images: slice | None, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            with clock("aggregate"):
                attention = _aggregated(record, options, images, out)
            with clock("merge"):
                proposals = ops.merge(
                    attention,
                    grid=grid,
                    anchors=min(options.anchors, *grid),
                    iterations=len(options.threshold),
                    threshold=options.threshold,
                    rule=options.rule,
                    backend=options.backend,
                )
                finite = _finite(attention)
            if refine:
                with clock("refine"):
                    proposals = ops.refine(attention, proposals)
            return proposals.maps, proposals.counts, finite

        maps, counts, finite = in_parts(proposed, latents, grid)
        return Proposals(maps, counts, grid), finite

    def _record(
        self, latents: Tensor, options: Options, clock: "_StageClock", *, compiled: bool = False
    ) -> AttentionRecord:
        """What the UNet leaves behind up to the last layer that has a share."""
        layers = None
        if not isinstance(options.weights, str):
            layers = max(layer for layer, share in enumerate(options.weights) if share > 0) + 1
        unet = self._compiled[1] if compiled and self._compiled else self.unet
        context = self._context(len(latents), latents.device).to(latents)
        with clock("unet"):
            steps = torch.full((len(latents),), options.timestep, device=latents.device)
            return record_pass(unet, latents, steps, layers=layers, encoder_hidden_states=context)

    def _encoded(self, pixels: Tensor, clock: "_StageClock", *, compiled: bool = False) -> Tensor:
        """The latents of pixels [B, 3, h, w] in [0, 1]."""
        encode = self._compiled[0] if compiled and self._compiled else self._latents
        with clock("encode"):
            return encode(pixels)

    def _latents(self, pixels: Tensor) -> Tensor:
        """What the UNet reads: the VAE's latents, or the pixels in [-1, 1], in the UNet's dtype."""
        pixels = pixels * 2 - 1
        if self.vae is None:
            return pixels.to(_dtype(self.unet))
        encoded = self.vae.encode(pixels.to(_dtype(self.vae)))
        latents = encoded.latents if "latents" in encoded else encoded.latent_dist.mean
        return (latents * self.vae.config.scaling_factor).to(_dtype(self.unet))

    def load_captioner(self, name: str = semantics.CAPTIONER) -> semantics.ModelCaptioner:
        """The image-to-text model of that name, on the pipeline's device; the last one is kept for later calls.

        Raises:
            OSError: there is no such checkpoint.
            ValueError: it is not an image-to-text model.
        """
        if self._captioner is None or self._captioner.name != name:
            self._captioner = semantics.ModelCaptioner(name, self._execution_device, self.unet.dtype)
        self._captioner.model.to(self._execution_device)
        return self._captioner

    def _captions(self, pictures: list[Tensor], captioner: Any, batch_size: int) -> list[str]:
        """A caption an image, from a function or from the model of that name."""
        if isinstance(captioner, str):
            captioner = self.load_captioner(captioner)
        captions: list[str] = []
        for start in range(0, len(pictures), batch_size):
            some = [image_io.to_pil(each) for each in pictures[start : start + batch_size]]
            captions += semantics.checked_captions(captioner(some), len(some))
        return captions

    def _named(
        self,
        pictures: list[Tensor],
        sizes: list[Grid],
        latents: dict[int, Tensor],
        labels: list[Tensor],
        prompts: list[semantics.Prompt],
        batch_size: int,
        options: Options,
        fuse: bool,
        clock: "_StageClock",
    ) -> list[Any]:
        """The segments of each image, named, from a second pass over those in whose text there is a name.

        ``latents`` are those that the first pass left behind.
        """
        encoded = [semantics.encode(self.tokenizer, prompt) for prompt in prompts]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.names)
        label_ids = {name: number for number, name in enumerate(names)}
        scores = [torch.empty(int(each.max()) + 1, 0, dtype=torch.float32, device="cpu") for each in labels]
        with clock("semantic"):
            for batch in _batches(sizes, batch_size):
                shown = [i for i in batch if encoded[i].names]
                if not shown:
                    continue
                size = sizes[batch[0]]
                if all(i in latents for i in shown):
                    read = torch.stack([latents[i] for i in shown])
                else:
                    read = self._latents(self._uploaded([pictures[i] for i in shown], size))
                maps = semantics.name_maps(
                    self.unet,
                    self.text_encoder,
                    read,
                    [encoded[i] for i in shown],
                    options.timestep,
                    size,
                    options.backend,
                )
                for i, image_maps in zip(shown, maps, strict=True):
                    masks = labels[i][None].to(maps.device)
                    found = ops.score_masks(image_maps[None], masks, masks=len(scores[i]), backend=options.backend)
                    scores[i] = found[0].cpu() * math.sqrt(size[0] * size[1])  # 1: as with even attention
                if overflown := [i for i in shown if not bool(scores[i].isfinite().all())]:
                    raise ValueError(_overflow(overflown))
        return [
            semantics.named_segments(each, scores[i], list(encoded[i].names), label_ids, fuse=fuse)
            for i, each in enumerate(labels)
        ]

    def _context(self, batch_size: int, device: torch.device | None = None) -> Tensor:
        """The empty prompt's embedding [B, tokens, channels]; zeros for a UNet in pixel space.

        Computed once, and again, which ends the recordings, after the text encoder was cast or replaced.
        """
        encoder = self.text_encoder
        source = None if encoder is None else (weakref.ref(encoder), encoder.dtype)
        if source is not None and source != self._prompt_source:
            tokens = self.tokenizer(
                "", padding="max_length", max_length=self.tokenizer.model_max_length, return_tensors="pt"
            )
            self._recordings.clear()
            self._empty_prompt = encoder(tokens.input_ids.to(self._execution_device))[0]
            self._prompt_source = source
        elif self._empty_prompt is None:
            self._empty_prompt = torch.zeros(1, 1, self.unet.config.cross_attention_dim, dtype=torch.float32)
        self._empty_prompt = self._empty_prompt.to(device or self._execution_device)
        return self._empty_prompt.expand(batch_size, -1, -1)

    def _lay_out(self) -> None:
        """The weights as they are read fastest."""
        for network in self._networks():
            if not _is_channels_last(network):
                self._laid_out.append(network)  # first, so that after an interrupt release() finds it
                network.to(memory_format=torch.channels_last)
        if self._execution_device.type == "cuda" and self._fused is not self.unet:
            self._split()
            if fuse_projections(self.unet):
                self._fused = self.unet

    def _split(self) -> None:
        """Takes joined projections apart, also those of a UNet that has been replaced since."""
        if self._fused is not None:
            with lock_of(self._fused):
                split_projections(self._fused)
            self._fused = None

    def processed_size(self, size: Grid, resolution: int | Sequence[int] | None = None) -> Grid:
        """The (height, width) at which an image is processed.

        Args:
            size: (height, width) of the image.
            resolution: ``processing_resolution`` of :meth:`__call__`.

        Raises:
            ValueError, TypeError: naming ``processing_resolution``.
        """
        wanted: tuple[float, float]
        resolution = plain(resolution)
        if isinstance(resolution, Sequence):
            wanted = check_pair("processing_resolution", resolution)
        else:
            longer = self._default_resolution() if resolution is None else resolution
            check_integer("processing_resolution", longer, 1)
            wanted = (longer * size[0] / max(size), longer * size[1] / max(size))
        height, width = (max(1, round(side / self.size_multiple)) * self.size_multiple for side in wanted)
        return height, width

    def _check_memory(self, size: Grid) -> None:
        """Raises ValueError where A_f of one image would not fit into the memory that is there."""
        factor = self.vae_scale_factor
        cells = math.prod(attention_grid(self.unet, (size[0] // factor, size[1] // factor)))
        needed = 4 * cells**2
        if needed > _LITTLE_MEMORY and needed > (there := memory.available(self._execution_device)):
            raise ValueError(
                f"processing_resolution: at {size[0]} x {size[1]} A_f has {cells} x {cells} entries, "
                f"{needed / 2**30:.0f} GiB, and {there / 2**30:.0f} GiB of memory are available; the model's own size "
                f"is {self._default_resolution()} pixels"
            )

    def _default_resolution(self) -> int:
        """The side, in pixels, at which the UNet was trained."""
        config = self.unet.config
        side = max(config.sample_size) if isinstance(config.sample_size, Sequence) else config.sample_size
        if self.vae is not None and backends.version_of(config.get("_diffusers_version", "0.9")) < (0, 9):
            side = max(side, 64)  # fine-tunes of that time say 32; diffusers' own pipeline corrects them too
        return int(side * self.vae_scale_factor)


def _aggregated(
    record: AttentionRecord, options: Options, images: slice | None = None, out: Tensor | None = None
) -> Tensor:
    """A_f [B, N, N] of the recorded layers, which may be the first of those that have weights."""
    weights = options.weights if isinstance(options.weights, str) else options.weights[: len(record.grids)]
    return record.aggregate(images=images, weights=weights, backend=options.backend, out=out)


def _finite(attention: Tensor) -> Tensor:
    """Whether each image's A_f [B, N, N] is finite, bool [B]; on a CPU the ops have refused what is not."""
    if attention.device.type == "cpu":
        return torch.ones(len(attention), dtype=torch.bool, device="cpu")
    return attention.sum((1, 2)).isfinite()


class _StageClock:
    """Adds up the seconds of named stages on a device; without one it does nothing, and waits for nothing."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.device is None:
            yield
            return
        start = self._now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _check_components(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    config = getattr(unet, "config", None)
    if config is None or not hasattr(config, "cross_attention_dim"):
        raise TypeError(f"unet: expected a UNet2DConditionModel, got {type(unet).__name__}")
    _check_conditioning(config)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    missing = [name for name, part in parts.items() if part is None]
    if missing and len(missing) < len(parts):
        raise ValueError(
            f"{missing[0]}: expected all of {', '.join(parts)} (latent diffusion) or none (a UNet in pixel space), "
            f"got no {', no '.join(missing)}"
        )
    positions = getattr(getattr(text_encoder, "config", None), "max_position_embeddings", math.inf)
    if tokenizer is not None and tokenizer.model_max_length > positions:
        raise ValueError(
            f"tokenizer: expected a model_max_length of at most {positions}, the text encoder's, got "
            f"{tokenizer.model_max_length}, as where files are missing"
        )
    channels = 3 if vae is None else vae.config.latent_channels
    if config.in_channels != channels:
        raise ValueError(
            f"unet: expected {channels} input channels, {'RGB' if vae is None else 'the latents of the vae'}, got "
            f"{config.in_channels}: inpainting, depth and upscaling checkpoints are not served"
        )


def _check_conditioning(config: Mapping[str, Any]) -> None:
    """Of a UNet, which may be in a file that leaves out defaults."""
    kinds = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")  # of SDXL, unCLIP and IP-Adapters
    if more := [f"{kind}={config[kind]!r}" for kind in kinds if config.get(kind) is not None]:
        raise ValueError(
            "unet: expected a UNet conditioned on text alone, as in Stable Diffusion 1.x and 2.x, got one with "
            f"{', '.join(more)} (SDXL is served by diffseg.record_attention and diffseg.segment)"
        )


def _batches(sizes: list[Grid], batch_size: int) -> Iterator[list[int]]:
    """Indices of images of one size, at most ``batch_size`` at a time, in order of first appearance."""
    for size in dict.fromkeys(sizes):
        same = [index for index, each in enumerate(sizes) if each == size]
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _dtype(network: Any) -> torch.dtype:
    """In which it computes; asked so, since diffusers takes milliseconds to answer."""
    dtype: torch.dtype = network.dtype if moves_weights(network) else next(network.parameters()).dtype
    return dtype


def _is_channels_last(network: torch.nn.Module) -> bool:
    return all(each.is_contiguous(memory_format=torch.channels_last) for each in network.parameters() if each.ndim == 4)


def _arrived(found: Segmented, stay: bool) -> tuple[list[Tensor], list[int]]:
    """Labels, on the host or, with ``stay``, on their device, and numbers of segments; after one wait."""
    if stay:
        labels = [each.clone() for each in found.labels]  # before the wait: then a replay on another stream may begin
        (segments,) = download([found.segments])
        return labels, segments.tolist()
    *labels, segments = download([*found.labels, found.segments])
    return labels, segments.tolist()


def _overflow(indices: list[int]) -> str:
    return (
        f"image {', '.join(map(str, indices))}: expected finite attention, found NaN or infinity; if the weights are "
        "in float16 the network overflowed: load them with dtype=torch.bfloat16 or torch.float32"
    )


def _converted(labels: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return labels
    array = labels.cpu().numpy()
    return label_image(array) if output_type == "pil" else array
