"""Anything that a caller may call an image, as RGB [3, H, W]: a picture.

Its values are uint8 where the image had 8 bits, a quarter of the memory that they would take as floats, and otherwise
float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip

_PIXELS_AT_ONCE = 1 << 21  # that become floats, in a photograph of 8 bits that is to be resized

_ACCEPTED = (
    "a path, a PIL image, an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or a tensor [C, H, W], C = 1, 3, 4"
)


def files_in(folder: Path) -> list[Path]:
    """The images in ``folder``, in order of their names, without hidden files, such as macOS's ``._NAME.jpg``."""
    shown = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in shown if path.suffix.lower() in SUFFIXES and path.is_file())


class ImageError(ValueError):
    """An image that cannot be read or understood."""


def as_list(images: Any) -> list[Any]:
    """One image or several (a list, an array [B, H, W, C] or a tensor [B, C, H, W]) as a list of single ones."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def to_tensor(image: Any, name: str = "image") -> Tensor:
    """``image`` as float32 [3, H, W] in [0, 1]; see :func:`to_picture`."""
    return _as_float(to_picture(image, name))


def to_picture(image: Any, name: str = "image") -> Tensor:
    """``image`` as uint8, or float32 in [0, 1], [3, H, W], on the CPU, or where the tensor was; maybe its own memory.

    Files and PIL images of any mode are turned upright by their EXIF orientation; transparent pixels are laid on white;
    16-bit values are scaled by 65535. Arrays and tensors hold bool, uint8, uint16 or floats in [0, 1].
    """
    if isinstance(image, (str, Path)):
        return _from_pil(_open(image), name)
    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ImageError(f"{name}: expected {_ACCEPTED}, got an array of shape {list(image.shape)}")
        if image.dtype.byteorder == ">":
            image = image.astype(image.dtype.newbyteorder("="))
        if not image.flags.writeable:  # torch warns of such memory
            image = image.copy()
        channels_last = image[..., None] if image.ndim == 2 else image
        _check_shape(channels_last.shape[-1], image.shape, name, "an array")
        return _from_channels(torch.from_numpy(np.ascontiguousarray(channels_last)).movedim(-1, 0), name)
    if isinstance(image, Tensor):
        if image.ndim not in (2, 3):
            raise ImageError(f"{name}: expected {_ACCEPTED}, got a tensor of shape {list(image.shape)}")
        channels_first = image.detach()[None] if image.ndim == 2 else image.detach()
        _check_shape(channels_first.shape[0], image.shape, name, "a tensor")
        return _from_channels(channels_first, name)
    raise TypeError(f"{name}: expected {_ACCEPTED}, got {type(image).__name__}")


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: expected a readable image, got a file of no known image format") from error
    except Exception as error:  # what a damaged file makes a decoder raise can be anything
        raise ImageError(f"{path}: expected a readable image, got {str(error) or type(error).__name__}") from error


def _from_pil(image: Image.Image, name: str) -> Tensor:
    if 0 in image.size:
        raise ImageError(f"{name}: expected at least one pixel, got {image.width} x {image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow may also hold as 32-bit integers
        values = np.asarray(image).astype(np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: expected integers from 0 to 65535, got {values.min():.0f} to {values.max():.0f}")
        return _from_channels(torch.from_numpy(values / 65535)[None], name)
    if image.mode == "F":
        return _from_channels(torch.from_numpy(np.array(image))[None], name)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return to_picture(np.array(image.convert("RGBA" if transparent else "RGB")), name)


def _check_shape(channels: int, shape: Sequence[int], name: str, kind: str) -> None:
    if channels not in (1, 3, 4) or 0 in shape:
        raise ImageError(f"{name}: expected {_ACCEPTED}, got {kind} of shape {list(shape)}")


def _from_channels(image: Tensor, name: str) -> Tensor:
    channels, height, width = image.shape
    if image.dtype == torch.uint8 and channels != 4:
        return image.expand(3, height, width)
    if image.dtype in (torch.bool, torch.uint8, torch.uint16):
        image = image.float() / {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}[image.dtype]
    elif image.is_floating_point():
        image = image.float()
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):
            raise ImageError(f"{name}: expected floats in [0, 1], got values from {low:.4g} to {high:.4g}")
    else:
        raise TypeError(f"{name}: expected bool, uint8, uint16 or floats, got {image.dtype}")
    if channels == 4:
        image, alpha = image[:3], image[3:]
        image = image * alpha + (1 - alpha)
    return image.expand(3, height, width).contiguous()


def _as_float(picture: Tensor) -> Tensor:
    if picture.is_floating_point():
        return picture
    return picture.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def resize(picture: Tensor, size: Sequence[int]) -> Tensor:
    """The picture resized to ``size`` (height, width), bilinear with antialiasing, float32."""
    if tuple(picture.shape[1:]) == tuple(size):
        return _as_float(picture)
    rows = max(1, _PIXELS_AT_ONCE // picture.shape[2])
    if picture.is_floating_point() or picture.device.type != "cpu" or picture.shape[1] <= rows:
        return _interpolated(_as_float(picture), size)
    # The same sums, width first, a few rows at a time: memory for a large photograph as floats takes half the time.
    narrow = [_interpolated(_as_float(some), (some.shape[1], size[1])) for some in picture.split(rows, 1)]
    return _interpolated(torch.cat(narrow, 1), size)


def _interpolated(image: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(image[None], tuple(size), mode="bilinear", align_corners=False, antialias=True)[0]


def to_pil(picture: Tensor) -> Image.Image:
    """The picture as a PIL image."""
    return Image.fromarray(to_array(picture))


def to_array(picture: Tensor) -> NDArray[np.uint8]:
    """The picture as uint8 [H, W, 3], maybe its own memory."""
    values = (picture * 255 + 0.5).to(torch.uint8) if picture.is_floating_point() else picture
    array: NDArray[np.uint8] = values.movedim(0, -1).cpu().numpy()
    return array
