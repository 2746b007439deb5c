"""Data sets with true segmentations, in the layouts in which they are published.

Images are read as :mod:`diffseg.images` reads those to segment, so upright, with transparent pixels laid on white.
An image and its truth are centre-cropped to a square and resized to ``resolution``, the image bilinearly without
antialiasing and labels to the nearest, as the published code does; or left as they are where there is no resolution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from .images import SUFFIXES, files_in, to_array, to_picture
from .reference import Grid

Labels = NDArray[np.int32]

UNLABELLED = -1
_OUTSIDE = -2  # the label of pixel values that must not occur

COCO_STUFF_27: dict[str, Sequence[int]] = {
    "electronic": range(71, 77),
    "appliance": range(77, 83),
    "food (thing)": range(51, 61),
    "furniture (thing)": range(61, 71),
    "indoor": range(83, 91),
    "kitchen": range(43, 51),
    "accessory": range(25, 33),
    "animal": range(15, 25),
    "outdoor": range(9, 15),
    "person": range(1),
    "sports": range(33, 43),
    "vehicle": range(1, 9),
    "ceiling": (101, 102),
    "floor": (100, 113, 114, 115, 116, 117),
    "food (stuff)": (120, 121, 152, 169),
    "furniture (stuff)": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": range(170, 177),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}
"""Values of the 182 COCO-Stuff labels in pixel maps (the label's id less 1) of each of the 27 coarse ones, in order.

These are the super-categories of COCO and COCO-Stuff (Caesar et al., CVPR 2018) as IIC (Ji et al., ICCV 2019) numbered
them, and after it PiCIE, STEGO and DiffSeg: 12 of things, then 15 of stuff.
"""

_STUFF = range(12, 27)
_CURATED_SIDE = 360  # of the images in IIC's list, at least
_CURATED_STUFF = 0.75  # share of their pixels that is stuff, at least

_CITYSCAPES_CLASSES = range(7, 34)  # ids of the 27; 0 to 6 are void

_LISTED = 20  # files that an error names before it counts the rest


class DatasetError(ValueError):
    """A data set that is not as it should be; the message names the file."""


class Sample(NamedTuple):
    """One image with its truths."""

    name: str
    image: NDArray[np.uint8]  # [H, W, 3]
    truths: list[Labels]  # [H, W] each, one an annotator; negative: unlabelled


class Item(NamedTuple):
    """Where a sample lies."""

    name: str
    image: Path
    truth: Path


class TruthFormat(Protocol):
    """A format of truth files."""

    def size(self, path: Path) -> Grid:
        """(H, W), from the file's header alone where the format has one."""

    def read(self, path: Path) -> list[Labels]:
        """The label maps, one an annotator; negative: unlabelled."""


@dataclass(frozen=True)
class PixelMaps:
    """Single-channel images whose pixel values are labels, or indices into ``mapping`` where there is one."""

    mapping: NDArray[np.int32] | None = None  # of each value its label, _OUTSIDE where the value must not occur
    classes: int | None = None
    unlabelled: int | None = None  # this value, where there is no mapping

    def size(self, path: Path) -> Grid:
        with Image.open(path) as image:
            _check_holds_labels(path, image)
            return image.height, image.width

    def read(self, path: Path) -> list[Labels]:
        with Image.open(path) as image:
            _check_holds_labels(path, image)
            values = np.asarray(image)
        if self.mapping is not None:
            labels = self._mapped(values)
        elif self.classes is not None:
            labels = np.maximum(values.astype(np.int32), UNLABELLED)
        else:
            labels = _numbered(values)
        if self.unlabelled is not None:
            labels[values == self.unlabelled] = UNLABELLED
        outside = (labels == _OUTSIDE) if self.classes is None else (labels == _OUTSIDE) | (labels >= self.classes)
        if outside.any():
            allowed = "the label map" if self.classes is None else f"the {self.classes} classes"
            raise DatasetError(f"{path}: expected labels of {allowed}, got {int(values[outside][0])}")
        return [labels]

    def _mapped(self, values: NDArray[Any]) -> Labels:
        assert self.mapping is not None
        known = (values >= 0) & (values < len(self.mapping))
        labels: Labels = np.where(known, self.mapping[np.where(known, values, 0)], _OUTSIDE)
        return labels


class NumpySegmentations:
    """``.npz`` files with ``segmentations``, integers [annotators, H, W]."""

    def size(self, path: Path) -> Grid:
        return self._stack(path).shape[1:]

    def read(self, path: Path) -> list[Labels]:
        return list(self._stack(path).astype(np.int32))

    def _stack(self, path: Path) -> NDArray[Any]:
        with np.load(path, allow_pickle=False) as file:
            if "segmentations" not in file:
                raise DatasetError(f"{path}: expected an array 'segmentations', got {', '.join(file) or 'none'}")
            stack: NDArray[Any] = file["segmentations"]
        if stack.ndim != 3 or len(stack) == 0 or stack.dtype.kind not in "ui":
            raise DatasetError(
                f"{path}: expected integers [annotators, H, W], got {stack.dtype} of shape {list(stack.shape)}"
            )
        return stack


class MatlabGroundTruth:
    """The ``.mat`` files of BSDS500: ``groundTruth``, a cell an annotator with the field ``Segmentation``."""

    def size(self, path: Path) -> Grid:
        height, width = self.read(path)[0].shape
        return height, width

    def read(self, path: Path) -> list[Labels]:
        from scipy.io import loadmat

        cells = loadmat(path).get("groundTruth")
        if cells is None or cells.size == 0 or cells.flat[0].dtype.names is None:
            raise DatasetError(f"{path}: expected BSDS500's cell array 'groundTruth'")
        return [np.asarray(cell["Segmentation"][0, 0]).astype(np.int32) for cell in cells.flat]


@dataclass(frozen=True)
class Dataset:
    """Images with true segmentations; :func:`open_dataset` makes one."""

    kind: str
    items: tuple[Item, ...]
    format: TruthFormat
    classes: int | None  # of labels that mean the same in every image; None: labels number an image's regions
    resolution: int | None

    def __len__(self) -> int:
        return len(self.items)

    def first(self, count: int | None) -> Dataset:
        """The data set of the first ``count`` images, or of all."""
        return replace(self, items=self.items[:count])

    def load(self, index: int) -> Sample:
        """Reads one sample; a :class:`DatasetError` or an ``ImageError`` names the file that is not as it should be."""
        name, image_path, truth_path = self.items[index]
        image = to_array(to_picture(image_path, str(image_path)))
        truths = self.format.read(truth_path)
        for truth in truths:
            _check_size(image_path, image.shape[:2], truth_path, truth.shape)
        if self.resolution is not None:
            image = _cropped_image(image, self.resolution)
            truths = [_cropped_labels(truth, self.resolution) for truth in truths]
        return Sample(name, image, truths)

    def problems(self) -> Iterable[tuple[Item, str | None]]:
        """Each item with what is wrong with its files, or None, without decoding those that look whole."""
        for item in self.items:
            try:
                _check_whole(item.image)
                _check_whole(item.truth)
                _check_size(item.image, _upright_size(item.image), item.truth, self.format.size(item.truth))
            except FileNotFoundError as error:
                yield item, f"{error.filename}: missing"
            except DatasetError as error:
                yield item, str(error)
            except Exception as error:  # what a damaged file makes a decoder raise can be anything
                yield item, f"{item.image} or {item.truth}: damaged ({error})"
            else:
                yield item, None


def check(problems: Iterable[tuple[Item, str | None]], total: int) -> None:
    """Raises a :class:`DatasetError` that lists what :meth:`Dataset.problems` found."""
    found = [problem for _, problem in problems if problem is not None]
    if found:
        rest = f"\n  and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        listed = "\n  ".join(found[:_LISTED])
        raise DatasetError(f"{len(found)} of {total} images cannot be used:\n  {listed}{rest}")


def open_dataset(
    kind: str,
    root: str | Path,
    *,
    split: str = "val",
    resolution: int | None = None,
    image_list: str | Path | None = None,
    classes: int | None = None,
    unlabelled: int | None = None,
    watch: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> Dataset:
    """Finds the images of a data set and their truths.

    Args:
        kind: one of :data:`KINDS`.
        root: the data set's folder.
        split: train, val or test, where the data set has them.
        resolution: side of the square to which samples are cropped and resized; None: 512 for coco-stuff and
            cityscapes, as they are for the others.
        image_list: a file with one name a line, without suffix: only these images, in this order.
        classes: for ``folder``: how many classes the labels are; None: they number an image's regions.
        unlabelled: for ``folder``: the pixel value of unlabelled pixels.
        watch: wraps the pixel maps while coco-stuff's list is derived from them (a progress bar).

    Raises:
        DatasetError: the layout is not there, or an image of the list is not.
    """
    root = Path(root)
    if kind not in KINDS:
        raise DatasetError(f"data set: expected one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in (("resolution", resolution), ("classes", classes)):
        if value is not None and value < 1:
            raise DatasetError(f"{name}: expected at least 1, got {value}")
    if kind != "folder" and (classes, unlabelled) != (None, None):
        raise DatasetError(f"classes, unlabelled: expected for folder alone, {kind} has its own")
    if not root.is_dir():
        raise DatasetError(
            f"{root}: expected a data set's folder, of layout {kind}, found {'a file' if root.exists() else 'nothing'}"
        )
    listed = None if image_list is None else _read_list(Path(image_list))
    if kind == "coco-stuff":
        items, truth_format, classes = _coco_stuff(root, split, listed, watch)
        resolution = resolution or 512
    elif kind == "cityscapes":
        items, truth_format, classes = _cityscapes(root, split)
        resolution = resolution or 512
    elif kind == "bsds500":
        items, truth_format = _bsds500(root, split)
    else:
        items, truth_format = _folder(root, classes, unlabelled)
    return Dataset(kind, tuple(_chosen(items, listed, image_list)), truth_format, classes, resolution)


KINDS = ("coco-stuff", "cityscapes", "bsds500", "folder")


def _coco_stuff(
    root: Path, split: str, listed: list[str] | None, watch: Callable[[Sequence[Path]], Iterable[Path]]
) -> tuple[list[Item], TruthFormat, int]:
    """The images of ``listed``, or of IIC's rule: sides of at least 360, at least 75 % of all pixels stuff.

    On val2017 IIC's list has 2,175 images.
    """
    year = f"{split}2017"
    maps = _first_folder(
        root,
        (f"annotation_{year}", f"annotations/{year}", f"stuffthingmaps/{year}", f"stuffthingmaps_trainval2017/{year}"),
        ".png",
        "COCO-Stuff's pixel maps",
    )
    images = _first_folder(root, (f"images/{year}", year), ".jpg", "COCO's images")
    truth_format = PixelMaps(_coco_stuff_mapping())
    if listed is None:
        paths = sorted(maps.glob("*.png"))
        listed = [path.stem for path in watch(paths) if _is_curated(truth_format, path)]
        if not listed:
            raise DatasetError(f"{maps}: expected images with mostly stuff, found none; name them with an image list")
    return [Item(name, images / f"{name}.jpg", maps / f"{name}.png") for name in listed], truth_format, 27


def _coco_stuff_mapping() -> NDArray[np.int32]:
    mapping = np.full(256, _OUTSIDE, np.int32)
    for coarse, fine in enumerate(COCO_STUFF_27.values()):
        mapping[list(fine)] = coarse
    mapping[255] = UNLABELLED
    return mapping


def _is_curated(truth_format: PixelMaps, path: Path) -> bool:
    try:
        if min(truth_format.size(path)) < _CURATED_SIDE:
            return False
        (labels,) = truth_format.read(path)
    except (OSError, SyntaxError) as error:
        raise DatasetError(f"{path}: damaged ({error})") from error
    return bool((labels >= _STUFF.start).mean() >= _CURATED_STUFF)


def _cityscapes(root: Path, split: str) -> tuple[list[Item], TruthFormat, int]:
    images = _first_folder(root, (f"leftImg8bit/{split}",), None, "Cityscapes' images")
    truths = _first_folder(root, (f"gtFine/{split}",), None, "Cityscapes' annotations")
    items = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = image.stem.removesuffix("_leftImg8bit")
        items.append(Item(name, image, truths / image.parent.name / f"{name}_gtFine_labelIds.png"))
    if not items:
        raise DatasetError(f"{images}: expected CITY/*_leftImg8bit.png, found none")
    mapping = np.full(256, _OUTSIDE, np.int32)
    mapping[list(_CITYSCAPES_CLASSES)] = range(len(_CITYSCAPES_CLASSES))
    mapping[: _CITYSCAPES_CLASSES.start] = UNLABELLED
    mapping[255] = UNLABELLED  # id -1, the licence plates
    return items, PixelMaps(mapping), len(_CITYSCAPES_CLASSES)


def _bsds500(root: Path, split: str) -> tuple[list[Item], TruthFormat]:
    """The official layout, from any of its upper folders, or one folder of NAME.jpg and NAME.npz."""
    flat = sorted(root.glob("*.npz"))
    if flat:
        return [Item(path.stem, path.with_suffix(".jpg"), path) for path in flat], NumpySegmentations()
    for data in (root, root / "data", root / "BSDS500" / "data"):
        images, truths = data / "images" / split, data / "groundTruth" / split
        if images.is_dir() and truths.is_dir():
            items = [Item(path.stem, path, truths / f"{path.stem}.mat") for path in sorted(images.glob("*.jpg"))]
            if not items:
                raise DatasetError(f"{images}: expected *.jpg, found none")
            return items, MatlabGroundTruth()
    raise DatasetError(
        f"{root}: expected BSDS500's images/{split} and groundTruth/{split} in it, in data/ or in BSDS500/data/, "
        f"or NAME.jpg with NAME.npz, found {_contents(root)}"
    )


def _folder(root: Path, classes: int | None, unlabelled: int | None) -> tuple[list[Item], TruthFormat]:
    images = _first_folder(root, ("images",), None, "images")
    masks = _first_folder(root, ("masks",), None, "masks")
    by_stem = _by_stem(masks)
    items = [Item(stem, path, by_stem.get(stem, masks / f"{stem}.png")) for stem, path in _by_stem(images).items()]
    if not items:
        raise DatasetError(f"{images}: expected images ({', '.join(SUFFIXES)}), found none")
    return items, PixelMaps(classes=classes, unlabelled=unlabelled)


def _by_stem(folder: Path) -> dict[str, Path]:
    """The images in ``folder`` by their names without suffix, in order; other files are ignored."""
    found: dict[str, Path] = {}
    for path in files_in(folder):
        first = found.setdefault(path.stem, path)
        if first != path:
            raise DatasetError(f"{folder}: expected one image of each name, got {first.name} and {path.name}")
    return found


def _first_folder(root: Path, candidates: Sequence[str], suffix: str | None, what: str) -> Path:
    for candidate in candidates:
        path = root / candidate
        if path.is_dir() and (suffix is None or any(each.suffix == suffix for each in path.iterdir())):
            return path
    holding = f" holding *{suffix}" if suffix else ""
    raise DatasetError(f"{root}: expected {what} in {' or '.join(candidates)}{holding}, found {_contents(root)}")


def _contents(folder: Path) -> str:
    names = sorted(each.name + "/" * each.is_dir() for each in folder.iterdir())
    return (", ".join(names[:8]) + ", ..." * (len(names) > 8)) or "an empty folder"


def _read_list(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: expected a text file with an image's name a line, got {error}") from error
    if not names:
        raise DatasetError(f"{path}: expected an image's name a line, found none")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DatasetError(f"{path}: expected each image once, got {', '.join(twice[:_LISTED])} more than once")
    return names


def _chosen(items: list[Item], listed: list[str] | None, image_list: str | Path | None) -> list[Item]:
    if listed is None:
        return items
    by_name = {item.name: item for item in items}
    unknown = [name for name in listed if name not in by_name]
    if unknown:
        raise DatasetError(f"{image_list}: expected names of the data set's images, got {', '.join(unknown[:_LISTED])}")
    return [by_name[name] for name in listed]


def _check_holds_labels(path: Path, image: Image.Image) -> None:
    one_channel = image.mode in ("1", "L", "P") or image.mode.startswith("I")
    if not one_channel or image.format == "JPEG":
        raise DatasetError(
            f"{path}: expected one channel of integer labels, compressed without loss, "
            f"got mode {image.mode} in a {image.format} file"
        )


def _numbered(values: NDArray[Any]) -> Labels:
    """Regions of any values as 0 and up, in order of those, since tables are as wide as the largest; negative: -1."""
    regions = np.unique(values[values >= 0])
    return np.where(values < 0, UNLABELLED, np.searchsorted(regions, values)).astype(np.int32)


_EXIF_ORIENTATION = 0x0112
_TURNED = range(5, 9)  # orientations whose rows are the picture's columns


def _upright_size(path: Path) -> Grid:
    """(H, W) of the image as it is read, turned by its EXIF orientation, from the file's header alone."""
    with Image.open(path) as image:
        orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION)  # that of PNG files would decode them first
        turned = orientation in _TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


def _check_size(image: Path, image_size: Sequence[int], truth: Path, truth_size: Sequence[int]) -> None:
    if tuple(image_size) != tuple(truth_size):
        raise DatasetError(
            f"{truth}: expected {image_size[0]} x {image_size[1]} (height x width) as {image.name}, "
            f"got {truth_size[0]} x {truth_size[1]}"
        )


_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}


def _check_whole(path: Path) -> None:
    """Raises DatasetError for a damaged file: one that ends as its format does is whole, another is decoded to see."""
    ending = _ENDS.get(path.suffix.lower(), b"")
    with path.open("rb") as file:
        length = file.seek(0, 2)
        file.seek(max(0, length - len(ending)))
        whole = length > 0 and file.read() == ending if ending else length > 0
    if length == 0:
        raise DatasetError(f"{path}: damaged (empty)")
    if not whole:
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise DatasetError(f"{path}: damaged ({error})") from error


def _cropped(array: NDArray[Any]) -> NDArray[Any]:
    """The largest centred square."""
    height, width = array.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(array[top : top + side, left : left + side])


def _cropped_image(image: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    channels = torch.from_numpy(_cropped(image)).movedim(-1, 0).float()
    resized = F.interpolate(channels[None], (resolution, resolution), mode="bilinear", align_corners=False)[0]
    square: NDArray[np.uint8] = (resized + 0.5).to(torch.uint8).movedim(0, -1).numpy()
    return square


def _cropped_labels(labels: Labels, resolution: int) -> Labels:
    channel = torch.from_numpy(_cropped(labels))[None, None].double()
    square: Labels = F.interpolate(channel, (resolution, resolution), mode="nearest-exact")[0, 0].int().numpy()
    return square
