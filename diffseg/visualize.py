"""Label maps as pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LARGEST_PALETTE = 256

_ROWS_AT_ONCE = 64  # of an overlay that exist as floats at one time
_GOLDEN_RATIO = 0.618033988749895


def palette(colours: int) -> NDArray[np.uint8]:
    """Distinct colours, uint8 [colours, 3]; the first are the same whatever their number."""
    hues = (0.58 + _GOLDEN_RATIO * np.arange(colours)) % 1
    values = [colorsys.hsv_to_rgb(hue, (0.75, 0.5, 0.9)[i % 3], (0.95, 0.85, 0.7)[i % 3]) for i, hue in enumerate(hues)]
    return (np.array(values).reshape(-1, 3) * 255).astype(np.uint8)


def label_image(labels: NDArray[np.integer[Any]]) -> Image.Image:
    """Labels [H, W] as an image whose pixel values are the labels: with a palette up to 256 of them, else 16-bit."""
    if labels.max() >= LARGEST_PALETTE:
        return Image.fromarray(labels.astype(np.uint16))
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette(LARGEST_PALETTE).tobytes())
    return image


def boundaries(labels: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Pixels whose right or lower neighbour has another label, bool [H, W]."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def overlay(image: NDArray[np.uint8], labels: NDArray[np.integer[Any]], opacity: float = 0.45) -> NDArray[np.uint8]:
    """The image [H, W, 3] tinted by segment, with white outlines edged in black, uint8 [H, W, 3]."""
    tints = (opacity * palette(int(labels.max()) + 1) + 0.5).astype(np.float32)
    blended = np.empty_like(image)
    for top in range(0, len(image), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        blended[rows] = np.float32(1 - opacity) * image[rows] + tints.take(labels[rows], axis=0)
    line = boundaries(labels)
    for _ in range(max(1, round(min(labels.shape) / 400)) - 1):
        line = _grown(line)
    blended[_grown(line)] = 0
    blended[line] = 255
    return blended


def write_names(
    image: NDArray[np.uint8], labels: NDArray[np.integer[Any]], names: Mapping[int, str]
) -> NDArray[np.uint8]:
    """The image [H, W, 3] with names written inside their segments of ``labels`` [H, W], uint8 [H, W, 3]."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(10.0, min(labels.shape) / 24))
    for segment, name in names.items():
        row, column = _inside(labels == segment)
        draw.text((column, row), name, fill="white", font=font, anchor="mm", stroke_width=2, stroke_fill="black")
    return np.asarray(picture)


def _inside(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """A pixel well within a mask: the middle of the longest run in its middle row."""
    rows = np.flatnonzero(mask.any(1))
    row = int(rows[np.searchsorted(np.cumsum(mask[rows].sum(1)), mask.sum() / 2)])
    edges = np.flatnonzero(np.diff(mask[row], prepend=False, append=False))
    starts, stops = edges[::2], edges[1::2]
    longest = int((stops - starts).argmax())
    return row, int(starts[longest] + stops[longest]) // 2


def coloured(labels: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Labels [H, W] in the palette's colours, negative ones grey, uint8 [H, W, 3]."""
    colours = np.vstack([palette(max(int(labels.max()) + 1, 0)), np.full((1, 3), 96, np.uint8)])
    return colours[np.where(labels < 0, len(colours) - 1, labels)]


def sheet(rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], title: str, height: int = 200) -> Image.Image:
    """Rows of pictures [H, W, 3] at one height, each under its caption."""
    line, gap = 18, 6
    shown = [
        (caption, [Image.fromarray(each).resize((_width(each, height), height)) for each in pictures])
        for caption, pictures in rows
    ]
    widest = max((sum(each.width + gap for each in pictures) for _, pictures in shown), default=0)
    page = Image.new("RGB", (max(widest + gap, 480), line + gap + len(rows) * (line + height + gap)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((gap, gap), title, fill="black")
    top = line + gap
    for caption, pictures in shown:
        draw.text((gap, top), caption, fill="black")
        left = gap
        for each in pictures:
            page.paste(each, (left, top + line))
            left += each.width + gap
        top += line + height + gap
    return page


def _width(picture: NDArray[np.uint8], height: int) -> int:
    return max(1, round(picture.shape[1] * height / picture.shape[0]))


def _grown(line: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = line.copy()
    grown[1:] |= line[:-1]
    grown[:-1] |= line[1:]
    grown[:, 1:] |= line[:, :-1]
    grown[:, :-1] |= line[:, 1:]
    return grown
