"""Every kind of image is read as RGB in [0, 1], or refused by a message that says why."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffseg import images

RED = np.zeros((2, 3, 3), np.uint8)
RED[..., 0] = 255


def _palette_image():
    return Image.fromarray(RED).convert("P")


def _transparent_palette_image():
    image = Image.new("P", (3, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 0])
    image.info["transparency"] = 1
    return image


READABLE = {
    "array uint8": (RED, (1, 0, 0)),
    "array float": (RED / 255, (1, 0, 0)),
    "array float32": ((RED / 255).astype(np.float32), (1, 0, 0)),
    "array bool": (RED.astype(bool), (1, 0, 0)),
    "array uint16": (RED.astype(np.uint16) * 257, (1, 0, 0)),
    "array uint16, big-endian": ((RED.astype(np.uint16) * 257).astype(">u2"), (1, 0, 0)),
    "array greyscale": (np.full((2, 3), 128, np.uint8), (128 / 255,) * 3),
    "array greyscale with channel": (np.full((2, 3, 1), 128, np.uint8), (128 / 255,) * 3),
    "array RGBA, opaque": (np.dstack([RED, np.full((2, 3), 255, np.uint8)]), (1, 0, 0)),
    "array RGBA, transparent": (np.dstack([RED, np.zeros((2, 3), np.uint8)]), (1, 1, 1)),
    "array mirrored (negative strides)": (RED[:, ::-1], (1, 0, 0)),
    "tensor uint8": (torch.from_numpy(RED).permute(2, 0, 1), (1, 0, 0)),
    "tensor float": (torch.from_numpy(RED).permute(2, 0, 1) / 255, (1, 0, 0)),
    "tensor bfloat16": ((torch.from_numpy(RED).permute(2, 0, 1) / 255).bfloat16(), (1, 0, 0)),
    "tensor greyscale": (torch.full((2, 3), 0.5), (0.5,) * 3),
    "PIL RGB": (Image.fromarray(RED), (1, 0, 0)),
    "PIL L": (Image.new("L", (3, 2), 128), (128 / 255,) * 3),
    "PIL 1": (Image.new("1", (3, 2), 1), (1, 1, 1)),
    "PIL LA": (Image.new("LA", (3, 2), (0, 0)), (1, 1, 1)),
    "PIL RGBA": (Image.new("RGBA", (3, 2), (255, 0, 0, 255)), (1, 0, 0)),
    "PIL RGBA, half transparent": (Image.new("RGBA", (3, 2), (255, 0, 0, 51)), (1, 0.8, 0.8)),
    "PIL P": (_palette_image(), (1, 0, 0)),
    "PIL P, transparent": (_transparent_palette_image(), (1, 0, 0)),
    "PIL CMYK": (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), (1, 0, 0)),
    "PIL YCbCr": (Image.new("YCbCr", (3, 2), (255, 128, 128)), (1, 1, 1)),
    "PIL HSV": (Image.new("HSV", (3, 2), (0, 255, 255)), (1, 0, 0)),
    "PIL I;16": (Image.fromarray(np.full((2, 3), 32768, np.uint16)), (32768 / 65535,) * 3),
    "PIL I": (Image.new("I", (3, 2), 65535), (1, 1, 1)),
    "PIL F": (Image.new("F", (3, 2), 0.25), (0.25,) * 3),
}


@pytest.mark.parametrize("name", READABLE)
def test_reads(name):
    image, colour = READABLE[name]
    tensor = images.to_tensor(image)
    assert tensor.shape == (3, 2, 3)
    assert tensor.dtype == torch.float32
    assert torch.allclose(tensor, torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand(3, 2, 3), atol=1e-6)


REFUSED = {
    "array of rank 1": (np.zeros(3), "array of shape [3]"),
    "array of rank 5": (np.zeros((1, 1, 1, 1, 3)), "array of shape [1, 1, 1, 1, 3]"),
    "array with two channels": (np.zeros((4, 4, 2)), "an array of shape [4, 4, 2]"),
    "empty array": (np.zeros((0, 4, 3)), "an array of shape [0, 4, 3]"),
    "floats beyond 1": (np.full((2, 2, 3), 255.0), "expected floats in [0, 1], got values from 255 to 255"),
    "negative floats": (np.full((2, 2, 3), -0.5), "expected floats in [0, 1], got values from -0.5"),
    "NaN": (np.full((2, 2, 3), np.nan), "expected floats in [0, 1], got values from nan"),
    "int64": (np.zeros((2, 2, 3), np.int64), "expected bool, uint8, uint16 or floats, got torch.int64"),
    "tensor of rank 4": (torch.zeros(2, 3, 4, 4), "tensor of shape [2, 3, 4, 4]"),
    "tensor channels last": (torch.zeros(5, 6, 3), "a tensor of shape [5, 6, 3]"),
    "PIL of no size": (Image.new("RGB", (0, 4)), "expected at least one pixel, got 0 x 4"),
    "PIL I beyond 16 bit": (Image.new("I", (3, 2), 70000), "expected integers from 0 to 65535"),
    "a number": (3, "expected a path, a PIL image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    image, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=r"image: .*" + re.escape(message)):
        images.to_tensor(image)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff", ".gif"])
def test_reads_files(tmp_path, suffix):
    path = tmp_path / f"red{suffix}"
    Image.fromarray(np.tile(RED, (8, 8, 1))).save(path)
    for given in (path, str(path)):
        tensor = images.to_tensor(given)
        assert tensor.shape == (3, 16, 24)
        assert torch.allclose(tensor.mean((1, 2)), torch.tensor([1.0, 0, 0]), atol=0.02)


def test_16_bit_png(tmp_path):
    Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 13107).save(tmp_path / "grey.png")
    assert torch.allclose(images.to_tensor(tmp_path / "grey.png")[1], torch.arange(6).view(2, 3) / 5)


def test_exif_orientation(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = images.to_tensor(tmp_path / "turned.png")
    assert upright.shape == (3, 3, 2)
    assert torch.equal(upright[0], torch.tensor([[0.0, 1], [0, 0], [0, 0]]))


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_damaged_files(tmp_path, content):
    path = tmp_path / "damaged.png"
    if content is None:  # cut off in the middle
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(images.ImageError, match=r"damaged.png: expected a readable image") as error:
        images.to_tensor(path)
    assert str(error.value).count("damaged.png") == 1


@pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="Pillow was built without AVIF")
def test_an_error_of_a_decoder_is_an_image_that_cannot_be_read(tmp_path):
    path = tmp_path / "damaged.avif"
    Image.new("RGB", (16, 16)).save(path)
    path.write_bytes(path.read_bytes().replace(b"pitm", b"free"))  # Pillow's decoder raises a RuntimeError
    with pytest.raises(images.ImageError, match=r"damaged.avif: expected a readable image, got .*decode"):
        images.to_tensor(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.to_tensor(tmp_path / "nothing.png")


def test_as_list():
    assert len(images.as_list(RED)) == 1
    assert len(images.as_list([RED, RED])) == 2
    assert len(images.as_list(np.stack([RED, RED]))) == 2
    assert len(images.as_list(torch.zeros(3, 3, 4, 4))) == 3


def test_resize_averages_when_shrinking():
    chequered = torch.zeros(3, 8, 8)
    chequered[:, ::2, ::2] = chequered[:, 1::2, 1::2] = 1
    assert torch.allclose(images.resize(chequered, (2, 2)), torch.full((3, 2, 2), 0.5), atol=0.05)
    assert images.resize(chequered, (8, 8)) is chequered


@pytest.mark.parametrize("size", [(16, 24), (64, 300), (500, 20), (517, 260)])
def test_large_photographs_are_resized_in_parts_to_the_same_bits(monkeypatch, size):
    monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 3000)
    given = np.random.default_rng(0).integers(0, 256, (517, 260, 3), dtype=np.uint8)
    expected = images.resize(images.to_tensor(given), size)
    converted = []
    as_float = images._as_float
    monkeypatch.setattr(images, "_as_float", lambda picture: (converted.append(picture.shape), as_float(picture))[1])
    assert torch.equal(images.resize(images.to_picture(given), size), expected)
    assert size == (517, 260) or max(height * width for _, height, width in converted) <= 3000


def test_to_array_is_the_inverse():
    assert np.array_equal(images.to_array(images.to_tensor(RED)), RED)
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(images.to_array(images.to_tensor(every)), every)


@pytest.mark.parametrize("kind", ["array", "greyscale", "tensor", "file", "PIL"])
def test_8_bits_stay_8_bits(tmp_path, kind):
    array = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    given = {
        "array": array,
        "greyscale": array[..., 0],
        "tensor": torch.from_numpy(array).movedim(-1, 0),
        "file": tmp_path / "picture.png",
        "PIL": Image.fromarray(array),
    }[kind]
    picture = images.to_picture(given)
    assert picture.dtype == torch.uint8
    assert np.array_equal(images.to_array(picture), array if kind != "greyscale" else array[..., :1].repeat(3, 2))
    for size in ((9, 14), (5, 7), (20, 11)):
        assert torch.equal(images.resize(picture, size), images.resize(images.to_tensor(given), size))
        assert images.resize(picture, size).is_contiguous()


@pytest.mark.parametrize("name", READABLE)
def test_others_are_floats_or_8_bits(name):
    image, _ = READABLE[name]
    assert torch.equal(images.resize(images.to_picture(image), (2, 3)), images.to_tensor(image))
