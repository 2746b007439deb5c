"""Generated scenes with their true masks, on which the bundled model is trained and reported.

A scene is a background of one to three regions, then two to five opaque shapes, back to front. Each region has a base
colour, a linear shading gradient and a texture; shapes drop soft shadows, one light falls over everything, and sensor
noise ends it. A rich scene has more of what photographs have: grounds in perspective, noise of natural spectra in its
three colours, shapes that turn away from the light at their rims, and clutter that is no region of its own. Everything
follows from the seed.

The three seed ranges never meet: training never sees a scene on which the threshold is chosen or a figure is reported.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

TRAIN_SEEDS = range(1_000_000, 2_000_000)
THRESHOLD_SEEDS = range(2_000_000, 3_000_000)
REPORT_SEEDS = range(3_000_000, 4_000_000)
SIDE = 64  # pixels

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

_SUPERSAMPLING = 2
_SMALLEST_REGION = 0.015  # a region that shows less of itself than this fraction of the picture is not a region


def scene(seed: int, *, rich: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One scene: ``(image, mask)``, uint8 [SIDE, SIDE, 3] (sRGB) and uint8 [SIDE, SIDE] (regions 0..S-1, no gaps)."""
    rng = np.random.default_rng((seed, 1) if rich else seed)
    surface = _rich_surface if rich else _surface
    side = SIDE * _SUPERSAMPLING
    y, x = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) / side

    mask = _background(rng, x, y)
    image = np.zeros((side, side, 3), np.float32)
    for region in range(mask.max() + 1):
        image[mask == region] = surface(rng, *_ground(rng, x, y) if rich else (x, y))[mask == region]

    for _ in range(rng.integers(2, 6)):
        inside = _shape(rng, x, y)
        if inside.mean() < _SMALLEST_REGION:
            continue
        if rng.random() < 0.5:
            image *= _shadow(rng, inside)[..., None]
        image[inside] = surface(rng, x, y)[inside]
        if rich:
            image *= _rim(rng, inside)[..., None]
        mask[inside] = mask.max() + 1

    if rich and rng.random() < 0.6:
        _clutter(rng, x, y, image, mask)
    image *= _light(rng, x, y)[..., None]
    image = image.reshape(SIDE, _SUPERSAMPLING, SIDE, _SUPERSAMPLING, 3).mean((1, 3))
    image += rng.normal(0, rng.uniform(0, 0.02), image.shape)
    mask = mask[::_SUPERSAMPLING, ::_SUPERSAMPLING]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), _without_specks(mask)


def _background(rng: np.random.Generator, x: Array, y: Array) -> NDArray[np.int64]:
    """One region, or two or three divided by wavy lines at any angle."""
    mask = np.zeros(x.shape, np.int64)
    angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])
    along, across = _rotated(x, y, angle)
    for region, level in enumerate(np.sort(rng.uniform(-0.3, 0.3, rng.integers(0, 3))), start=1):
        wave = rng.uniform(0, 0.06) * np.sin(2 * np.pi * (rng.uniform(0.5, 3) * along + rng.random()))
        mask[across > level + wave] = region
    return mask


def _rotated(x: Array, y: Array, angle: float, centre: tuple[float, float] = (0.5, 0.5)) -> tuple[Array, Array]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    return cos * dx + sin * dy, cos * dy - sin * dx


def _shape(rng: np.random.Generator, x: Array, y: Array) -> Mask:
    centre = tuple(rng.uniform(0.1, 0.9, 2))
    u, v = _rotated(x, y, rng.uniform(0, 2 * np.pi), centre)
    size = rng.uniform(0.12, 0.35)
    aspect = np.exp(rng.uniform(-0.7, 0.7))
    u, v = u / np.float32(size * np.sqrt(aspect)), v * np.float32(np.sqrt(aspect) / size)
    kinds = (_ellipse, _box, _polygon, _blob, _blob, _ring)
    return kinds[rng.integers(len(kinds))](rng, u, v)


def _ellipse(rng: np.random.Generator, u: Array, v: Array) -> Mask:
    return u * u + v * v < 1


def _box(rng: np.random.Generator, u: Array, v: Array) -> Mask:
    power = rng.uniform(2.5, 12)  # from a cushion to a sharp box
    return np.abs(u) ** power + np.abs(v) ** power < 0.8


def _polygon(rng: np.random.Generator, u: Array, v: Array) -> Mask:
    corners = rng.integers(3, 7)
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) / corners
    distance = np.max([u * np.cos(a) + v * np.sin(a) for a in angles.astype(np.float32)], axis=0)
    return distance < 0.75


def _blob(rng: np.random.Generator, u: Array, v: Array) -> Mask:
    angle, radius = np.arctan2(v, u), np.sqrt(u * u + v * v)
    outline = np.ones_like(radius)
    for frequency in range(2, 6):
        outline += rng.normal(0, 0.35 / frequency) * np.cos(frequency * angle + rng.uniform(0, 2 * np.pi))
    return radius < np.clip(outline, 0.3, 1.7)


def _ring(rng: np.random.Generator, u: Array, v: Array) -> Mask:
    radius = u * u + v * v
    return (radius < 1.2) & (radius > rng.uniform(0.25, 0.5))


def _surface(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Colour, shading gradient and texture, float32 [side, side, 3], roughly in [0, 1]."""
    colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.beta(1.5, 1.5), rng.uniform(0.25, 1)), np.float32)
    along, across = _rotated(x, y, rng.uniform(0, 2 * np.pi))
    shade = 1 + rng.uniform(0, 0.6) * along
    texture = np.float32(rng.choice([0, rng.uniform(0.03, 0.2)], p=[0.45, 0.55])) * _texture(rng, along, across)
    tint = 1 + rng.normal(0, 0.15, 3).astype(np.float32)
    return colour * shade[..., None] + texture[..., None] * tint * (0.3 + 0.7 * colour.mean())


def _texture(rng: np.random.Generator, along: Array, across: Array) -> Array:
    """Stripes, checks or filtered noise, about zero, of amplitude one."""
    frequency = np.float32(2 * np.pi * rng.uniform(4, 16))
    kind = rng.integers(0, 4)
    if kind == 0:
        return np.sin(frequency * along + np.float32(rng.uniform(0, 6)))
    if kind == 1:
        return np.sign(np.sin(frequency * along) * np.sin(frequency * across))
    return _noise(rng, along.shape)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], power: float | None = None) -> Array:
    """Noise of the spectrum 1 / f ** power, about zero, of deviation one; power: from 0 to 1.5 unless given."""
    spectrum = np.fft.rfft2(rng.normal(size=shape))
    power = rng.uniform(0, 1.5) if power is None else power
    noise = np.fft.irfft2(spectrum / np.maximum(_frequencies(shape[0]), 1 / shape[0]) ** power, s=shape)
    return ((noise - noise.mean()) / noise.std()).clip(-2.5, 2.5).astype(np.float32)


def _frequencies(side: int) -> NDArray[np.float64]:
    return np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))


def _blurred(inside: Mask, scale: float) -> NDArray[np.float64]:
    """Gaussian blur, of a deviation of ``scale`` pictures."""
    side = len(inside)
    decay = np.exp(-2 * (np.pi * _frequencies(side) * side * scale) ** 2)
    return np.fft.irfft2(np.fft.rfft2(inside.astype(np.float32)) * decay, s=inside.shape)


def _rich_surface(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """A surface, half of the time with noise of a natural spectrum, 1 / f to 1 / f ** 2, of its own in each colour."""
    surface = _surface(rng, x, y)
    if rng.random() < 0.5:
        common, strength = rng.uniform(0.5, 1), rng.uniform(0.03, 0.2)
        power = rng.uniform(1, 2)
        shared = _noise(rng, x.shape, power)
        for channel in range(3):
            noise = common * shared + (1 - common) * _noise(rng, x.shape, power)
            surface[..., channel] *= 1 + np.float32(strength) * noise
    return surface


def _ground(rng: np.random.Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Coordinates of a plane that recedes towards one side, half of the time: its texture is finer there."""
    if rng.random() < 0.5:
        return x, y
    side, depth = rng.integers(4), np.float32(rng.uniform(1, 3))
    across, along = ((x, y), (x, 1 - y), (y, x), (y, 1 - x))[side]
    scale = (1 + depth * along) / 2
    return ((across - 0.5) * scale + 0.5).astype(np.float32), (along * scale).astype(np.float32)


def _rim(rng: np.random.Generator, inside: Mask) -> Array:
    """The factor by which a shape darkens towards its rim."""
    depth = _blurred(inside, 1 / rng.uniform(4, 12))
    return np.where(inside, 1 - np.float32(rng.uniform(0, 0.8)) * (1 - depth.clip(0, 1)), 1).astype(np.float32)


def _clutter(rng: np.random.Generator, x: Array, y: Array, image: Array, mask: NDArray[np.int64]) -> None:
    """Paints leaves, stones or strokes of a few pixels onto one region, of which they stay a part."""
    region = mask == rng.integers(mask.max() + 1)
    colours = [_surface(rng, x, y).mean((0, 1)) for _ in range(2)]
    length, width = rng.uniform(0.01, 0.05), rng.uniform(0.01, 0.02)
    upright = rng.uniform(0, np.pi)
    for _ in range(rng.integers(10, 80)):
        u, v = _rotated(x, y, upright + rng.normal(0, 0.4), tuple(rng.random(2)))
        spot = region & ((u / np.float32(length)) ** 2 + (v / np.float32(width)) ** 2 < 1)
        image[spot] = colours[rng.integers(2)] * np.float32(rng.uniform(0.7, 1.2))


def _shadow(rng: np.random.Generator, inside: Mask) -> Array:
    """The factor by which a shape darkens what lies behind it: the shape moved aside and blurred."""
    side = len(inside)
    moved = np.roll(inside, tuple(rng.integers(-side // 12, side // 12 + 1, 2)), (0, 1))
    return (1 - rng.uniform(0.1, 0.4) * _blurred(moved, 1 / 40)).astype(np.float32)


def _light(rng: np.random.Generator, x: Array, y: Array) -> Array:
    along, _ = _rotated(x, y, rng.uniform(0, 2 * np.pi))
    return 1 + np.float32(rng.uniform(0, 0.5)) * along


def _without_specks(mask: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Gives the pixels of almost hidden regions to the nearest other region, then numbers regions without gaps."""
    while True:
        regions, areas = np.unique(mask, return_counts=True)
        small = regions[areas < _SMALLEST_REGION * mask.size]
        if len(small) == 0:
            return np.unique(mask, return_inverse=True)[1].reshape(mask.shape).astype(np.uint8)
        speck = mask == small[0]
        while speck.any():  # grow the neighbours inwards, one pixel a pass
            for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
                source, neighbour = np.roll(speck, step, axis), np.roll(mask, step, axis)
                edge = [slice(None), slice(None)]
                edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
                source[tuple(edge)] = True  # nothing comes round the picture's edge
                take = speck & ~source
                mask = np.where(take, neighbour, mask)
                speck = speck & ~take
