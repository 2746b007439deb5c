"""Semantic DiffSeg: names for the masks, from a caption and the UNet's cross-attention (the paper's appendix 8.7).

A caption comes from an image-to-text model or from the caller, its nouns from a part-of-speech tagger (HanTa, whose
package carries its English model). Each noun is the tokens that spell it, whatever their number.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import ops
from .capture import record_pass
from .checks import describe
from .reference import Grid

CAPTIONER = "Salesforce/blip-image-captioning-base"

_CAPTION_TOKENS = 40
_WORD = re.compile(r"['\u2019]\s?s\b|[^\W\d_]+(?:(?:-|['\u2019](?!s\b))[^\W\d_]+)*", re.IGNORECASE)

Captioner = Callable[[list[Any]], Sequence[str]]  # PIL images -> a caption each
Span = tuple[int, int]  # of characters


class Prompt(NamedTuple):
    """A text for the UNet, and where in it each name stands."""

    text: str
    names: dict[str, list[Span]]


class Encoded(NamedTuple):
    """A prompt in tokens."""

    ids: Tensor  # [1, tokens]
    names: dict[str, list[int]]  # the tokens of each name


class ModelCaptioner:
    """An image-to-text model of transformers, such as BLIP, GIT or a vision encoder with a language model.

    Args:
        name: of a checkpoint, on the hub or in a folder.
        device, dtype: where and in what it runs.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is not an image-to-text model.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        self.name = name
        self.model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(name)
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    @torch.no_grad()
    def __call__(self, images: list[Any]) -> list[str]:
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        tokens = self.model.generate(
            pixel_values=pixels.to(self.model.device, self.model.dtype), max_new_tokens=_CAPTION_TOKENS
        )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        return [text.strip() for text in texts]


def check_request(caption: Any, labels: Any, captioner: Any, images: int) -> tuple[list[str] | None, list[str] | None]:
    """The captions, one an image, and the labels, or None.

    Raises:
        ValueError, TypeError: naming the argument.
        ImportError: nouns will be asked for, and the tagger is not installed.
    """
    if not isinstance(captioner, str) and not callable(captioner):
        raise TypeError(f"captioner: expected a model's name or a function, got {describe(captioner)}")
    captions = None
    if caption is not None:
        captions = [caption] * images if isinstance(caption, str) else caption
        _check_texts("caption", captions)
        if len(captions) != images:
            raise ValueError(f"caption: expected one text, or {images}, one an image, got {len(captions)}")
    if labels is not None:
        _check_texts("labels", labels)
        if not labels or not all(label.strip() for label in labels):
            raise ValueError(f"labels: expected at least one word, and none empty, got {list(labels)}")
        labels = list(dict.fromkeys(" ".join(label.split()) for label in labels))
    else:
        tagger()
    return captions if captions is None else list(captions), labels


def _check_texts(name: str, texts: Any) -> None:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise TypeError(f"{name}: expected texts, got {describe(texts)}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name}: expected texts, got {describe(text)}")


def checked_captions(captions: Any, images: int) -> list[str]:
    """What a captioner returned: a text an image."""
    texts = list(captions) if isinstance(captions, Iterable) and not isinstance(captions, str) else []
    if len(texts) != images or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"captioner: expected {images} texts from it, got {describe(captions)}")
    return texts


def prompts(captions: Sequence[str] | None, labels: Sequence[str] | None, images: int) -> list[Prompt]:
    """The text of each image: its caption, or, where there is none, the labels."""
    if captions is not None:
        return [captioned(caption, labels) for caption in captions]
    return [listed(labels or ())] * images


def captioned(caption: str, labels: Sequence[str] | None = None) -> Prompt:
    """A caption as a prompt, whose names are its nouns, or those ``labels`` that it contains.

    Raises:
        ValueError: a label does not stand in the caption.
        ImportError: the nouns are asked for, and the tagger is not installed.
    """
    if labels is None:
        return Prompt(caption, nouns(caption))
    names = {label: _spans(label, caption) for label in labels}
    if missing := [label for label, spans in names.items() if not spans]:
        raise ValueError(f"labels: expected words of the caption {caption!r}, got {', '.join(map(repr, missing))}")
    return Prompt(caption, names)


def listed(labels: Sequence[str]) -> Prompt:
    """Labels as a prompt: the labels, separated by commas."""
    names, start = {}, 0
    for label in labels:
        names[label] = [(start, start + len(label))]
        start += len(label) + len(", ")
    return Prompt(", ".join(labels), names)


def nouns(text: str) -> dict[str, list[Span]]:
    """The nouns of an English text, in lower case, in order and without a possessive 's, and where they stand in it."""
    words = list(_WORD.finditer(text))
    found: dict[str, list[Span]] = {}
    if words:
        tagged = tagger().tag_sent([word[0] if word[0][0].isalpha() else "'s" for word in words])
        for word, (_, _, tag) in zip(words, tagged, strict=True):
            if tag.startswith(("NN", "NP")):
                found.setdefault(word[0].lower(), []).append(word.span())
    return found


@cache
def tagger() -> Any:
    """HanTa with its English model; ImportError, with what to do, where it is not installed."""
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError as error:
        raise ImportError(
            f"finding the nouns of a caption needs HanTa ({error}): pip install -e '.[semantic]' in a checkout, or "
            "pass labels="
        ) from error
    return HanoverTagger("morphmodel_en.pgz")


def _spans(label: str, text: str) -> list[Span]:
    pattern = r"\s+".join(re.escape(word) for word in label.split())
    return [found.span() for found in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]


def encode(tokenizer: Any, prompt: Prompt) -> Encoded:
    """A prompt in the tokens of ``tokenizer``; names that do not fit in its length are left out, with a warning."""
    length = tokenizer.model_max_length
    ids = tokenizer(
        prompt.text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    names: dict[str, list[int]] = {}
    for name, places in prompt.names.items():
        spelled = [_tokens(tokenizer, prompt.text, span) for span in places]
        whole = [indices for indices in spelled if indices and indices[-1] < length - 1]  # the last one ends the text
        if whole:
            names[name] = [index for indices in whole for index in indices]
    if lost := [name for name in prompt.names if name not in names]:
        warnings.warn(f"{', '.join(lost)}: left out, the prompt is longer than {length} tokens", stacklevel=2)
    return Encoded(ids, names)


def _tokens(tokenizer: Any, text: str, span: Span) -> list[int]:
    """Indices of the tokens that spell the characters ``span`` of ``text``, the start token being number 0."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False).offset_mapping
        return [i for i, (start, end) in enumerate(offsets) if start < end and start < span[1] and end > span[0]]
    before, through = (len(tokenizer(text[:end], verbose=False).input_ids) - 1 for end in span)  # less the end token
    return list(range(before, through))


def token_shares(names: Sequence[dict[str, list[int]]], length: int, device: torch.device) -> Tensor:
    """The share of each token in each name, [B, names, tokens]; rows of zeros fill up."""
    return pad_sequence([ops.token_shares(each.values(), length) for each in names], batch_first=True).to(device)


def name_maps(
    unet: Any,
    text_encoder: Any,
    latents: Tensor,
    prompts: Sequence[Encoded],
    timestep: int,
    size: Grid,
    backend: str,
) -> Tensor:
    """Where each image attends to each name of its prompt, [B, names, *size], zeros where there are fewer names."""
    ids = torch.cat([prompt.ids for prompt in prompts]).to(latents.device)
    context = text_encoder(ids)[0].to(latents)
    steps = torch.full((len(ids),), timestep, device=latents.device)
    record = record_pass(unet, latents, steps, cross=True, encoder_hidden_states=context)
    return ops.aggregate_cross(
        record.queries,
        record.keys,
        tokens=token_shares([prompt.names for prompt in prompts], ids.shape[1], latents.device),
        grids=record.grids,
        scales=record.scales,
        size=size,
        backend=backend,
    )


def named_segments(
    labels: Tensor, scores: Tensor, names: Sequence[str], label_ids: dict[str, int], *, fuse: bool
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Masks with the names that fit them best, as transformers returns segments.

    Args:
        labels: int32 [H, W], masks 0..S-1.
        scores: [S, names] from :func:`diffseg.score_masks`.
        names: one a column of the scores; none: the masks stay without names.
        label_ids: the number of each name.
        fuse: make one segment of the masks of one name.

    Returns:
        Segments int32 [H, W], 0 and up, in order of their first mask, and for each ``id``, ``label_id``, ``label``,
        ``score`` (the mean over its pixels) and ``was_fused``; without names the middle three are None.
    """
    masks = len(scores)
    areas = torch.bincount(labels.flatten(), minlength=masks).tolist()
    if names:
        best, winners = (each.tolist() for each in scores[:, : len(names)].max(-1))
    else:
        best, winners = [None] * masks, list(range(masks))
    groups: dict[int, list[int]] = {}
    for mask, winner in enumerate(winners):
        groups.setdefault(winner if fuse else mask, []).append(mask)
    segment_of = torch.empty(masks, dtype=torch.int32)
    infos = []
    for number, members in enumerate(groups.values()):
        segment_of[members] = number
        name = names[winners[members[0]]] if names else None
        area = sum(areas[mask] for mask in members)
        infos.append(
            {
                "id": number,
                "label_id": None if name is None else label_ids[name],
                "label": name,
                "score": None if name is None else sum(best[mask] * areas[mask] for mask in members) / area,
                "was_fused": len(members) > 1,
            }
        )
    return segment_of.to(labels.device)[labels.long()], infos
