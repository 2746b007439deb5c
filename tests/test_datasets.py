"""Data sets in their published layouts, written here; and what is said of those that are not as they should be."""

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from scipy.io import savemat
from torch import from_numpy

from diffseg import datasets
from diffseg.datasets import DatasetError, open_dataset
from diffseg.images import ImageError, to_picture

RNG = np.random.default_rng(0)


def write_image(path, height=48, width=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def write_labels(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, np.uint8)).save(path)


@pytest.fixture
def coco(tmp_path):
    """Two images of which IIC's rule takes the first, by the names that the published code uses."""
    for name, stuff in (("000000000139", 0.8), ("000000000285", 0.5)):
        write_image(tmp_path / "val2017" / f"{name}.jpg", 360, 400)
        labels = np.full((360, 400), 156)  # sky
        labels[: round(360 * (1 - stuff))] = 0  # person
        labels[0, :5] = 255
        write_labels(tmp_path / "annotation_val2017" / f"{name}.png", labels)
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    for city, name in (("lindau", "lindau_000000_000019"), ("frankfurt", "frankfurt_000001_000001")):
        write_image(tmp_path / "leftImg8bit" / "val" / city / f"{name}_leftImg8bit.png", 32, 64)
        labels = np.tile(np.arange(32), (32, 2))
        labels[0] = 33
        labels[2] = 255  # a licence plate
        write_labels(tmp_path / "gtFine" / "val" / city / f"{name}_gtFine_labelIds.png", labels)
        write_labels(tmp_path / "gtFine" / "val" / city / f"{name}_gtFine_instanceIds.png", labels)
    return tmp_path


@pytest.fixture
def bsds(tmp_path):
    """The official layout: a cell array of structs."""
    write_image(tmp_path / "BSDS500" / "data" / "images" / "val" / "3096.jpg", 32, 48)
    cells = np.empty((1, 2), object)
    for annotator in range(2):
        segmentation = np.full((32, 48), annotator + 1, np.uint16)
        cells[0, annotator] = {"Segmentation": segmentation, "Boundaries": np.zeros((32, 48), np.uint8)}
    truth = tmp_path / "BSDS500" / "data" / "groundTruth" / "val" / "3096.mat"
    truth.parent.mkdir(parents=True)
    savemat(truth, {"groundTruth": cells})
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "images" / f"{name}.png")
        write_labels(tmp_path / "masks" / f"{name}.png", np.arange(48 * 64).reshape(48, 64) % 5)
    return tmp_path


def check(dataset):
    datasets.check(dataset.problems(), len(dataset))


THINGS = {9: 1, 11: 8, 8: 6, 7: 10, 6: 8, 10: 10, 5: 8, 2: 10, 3: 10, 0: 6, 1: 6, 4: 8}
"""How many values, from 0 on, have each coarse label, as IIC and STEGO number them."""

STUFF = """
    17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 15
    17 16 15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17 22
    14 18 18 18 18 18 18 18 26 26 19 19 24
"""
"""The coarse labels of the values after those."""


def test_coarse_labels_are_numbered_as_in_the_literature():
    mapping = datasets._coco_stuff_mapping()[:182].tolist()
    things = [coarse for coarse, count in THINGS.items() for _ in range(count)]
    assert mapping == [*things, *map(int, STUFF.split())]
    names = list(datasets.COCO_STUFF_27)
    # pixel values of person, car, dog, pizza, grass, sky-other, wall-brick, sea, wood
    known = {0: "person", 2: "vehicle", 17: "animal", 58: "food (thing)", 123: "plant", 156: "sky", 170: "wall"}
    known |= {154: "water", 181: "solid"}
    assert {value: names[mapping[value]] for value in known} == known


@pytest.mark.parametrize(
    ("height", "stuff", "unlabelled", "taken"),
    [(360, 270, 90, True), (360, 269, 91, False), (360, 269, 0, False), (359, 359, 0, False)],
)
def test_iics_rule(coco, height, stuff, unlabelled, taken):
    """Sides of at least 360, three quarters of all pixels stuff, the unlabelled ones counted: by rows of a map."""
    labels = np.zeros((height, 400))
    labels[:stuff] = 91
    labels[stuff : stuff + unlabelled] = 255
    write_labels(coco / "annotation_val2017" / "000000000001.png", labels)
    assert ("000000000001" in [item.name for item in open_dataset("coco-stuff", coco).items]) == taken


def test_coco_stuff(coco):
    dataset = open_dataset("coco-stuff", coco)
    check(dataset)
    assert [item.name for item in dataset.items] == ["000000000139"]
    assert (dataset.classes, dataset.resolution) == (27, 512)
    sample = dataset.load(0)
    assert sample.image.shape == (512, 512, 3)
    (truth,) = sample.truths
    assert set(np.unique(truth)) == {9, 23}  # person, sky; the crop takes 20 columns at each side, the unlabelled too
    assert (truth == 23).mean() == pytest.approx(0.8, abs=0.01)


def test_coco_stuff_by_a_list_and_in_another_layout(coco, tmp_path):
    (coco / "annotations").mkdir()
    (coco / "annotation_val2017").rename(coco / "annotations" / "val2017")
    (coco / "images").mkdir()
    (coco / "val2017").rename(coco / "images" / "val2017")
    names = tmp_path / "list.txt"
    names.write_text("000000000285\n000000000139\n\n")
    dataset = open_dataset("coco-stuff", coco, image_list=names, resolution=320)
    check(dataset)
    assert [item.name for item in dataset.items] == ["000000000285", "000000000139"]
    assert dataset.load(0).truths[0].shape == (320, 320)


def test_coco_stuffs_unlabelled_pixels(coco):
    path = coco / "annotation_val2017" / "000000000139.png"
    write_labels(path, np.where(np.arange(400) < 200, 255, 181) * np.ones((360, 1)))
    names = coco / "list.txt"
    names.write_text("000000000139")
    (truth,) = open_dataset("coco-stuff", coco, image_list=names).load(0).truths
    assert set(np.unique(truth)) == {-1, 24}


def test_coco_stuffs_list_does_not_pass_over_damaged_maps(coco):
    path = coco / "annotation_val2017" / "000000000285.png"
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(DatasetError, match=r"000000000285.png: damaged"):
        open_dataset("coco-stuff", coco)


def test_cityscapes(cityscapes):
    dataset = open_dataset("cityscapes", cityscapes, resolution=32)
    check(dataset)
    assert [item.name for item in dataset.items] == ["frankfurt_000001_000001", "lindau_000000_000019"]
    (truth,) = dataset.load(0).truths
    assert dataset.classes == 27
    assert set(truth[0]) == {26}  # id 33
    # the crop takes columns 16 to 47: ids 16 to 31, then 0 to 15, of which 0 to 6 are void
    assert list(truth[1]) == [*range(9, 25), *[-1] * 7, *range(9)]
    assert set(truth[2]) == {-1}


def test_bsds500(bsds):
    for root in (bsds, bsds / "BSDS500", bsds / "BSDS500" / "data"):
        dataset = open_dataset("bsds500", root)
        check(dataset)
        sample = dataset.load(0)
        assert (sample.name, sample.image.shape) == ("3096", (32, 48, 3))
        assert [set(np.unique(truth)) for truth in sample.truths] == [{1}, {2}]
        assert dataset.classes is None


def test_bsds500_as_numpy_files(tmp_path):
    write_image(tmp_path / "12084.jpg", 24, 32)
    truths = RNG.integers(1, 9, (5, 24, 32)).astype(np.uint16)
    np.savez_compressed(tmp_path / "12084.npz", segmentations=truths)
    dataset = open_dataset("bsds500", tmp_path)
    check(dataset)
    assert np.array_equal(dataset.load(0).truths, truths)


def test_folder(folder):
    dataset = open_dataset("folder", folder)
    check(dataset)
    assert [item.name for item in dataset.items] == ["a", "b"]
    assert dataset.load(1).image.shape == (48, 64, 3)
    assert set(np.unique(dataset.load(1).truths[0])) == set(range(5))
    (truth,) = open_dataset("folder", folder, classes=5, unlabelled=4).load(0).truths
    assert set(np.unique(truth)) == {-1, 0, 1, 2, 3}
    assert len(dataset.first(1)) == 1
    assert len(dataset.first(None)) == 2


def test_files_that_are_no_images_count_for_nothing(folder):
    for path in (folder / "images" / "c.txt", folder / "images" / "._a.png", folder / "masks" / "a.txt"):
        path.write_text("a note")
    dataset = open_dataset("folder", folder)
    check(dataset)
    assert [item.truth.name for item in dataset.items] == ["a.png", "b.png"]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_two_files_of_one_name_are_refused(folder, kind):
    write_image(folder / kind / "a.jpg")
    with pytest.raises(DatasetError, match=rf"{kind}: expected one image of each name, got a.jpg and a.png"):
        open_dataset("folder", folder)


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_masks_of_other_modes(folder, mode):
    values = (np.arange(48 * 64).reshape(48, 64) % 2).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 10, 10])
    elif mode == "1":
        image = Image.fromarray(values.astype(bool))
    image.save(folder / "masks" / "a.png")
    assert np.array_equal(open_dataset("folder", folder).load(0).truths[0], values)


def test_regions_of_any_number_make_small_tables(folder):
    values = np.array([-3, 7, 2_000_000_000, 7], np.int32)[np.arange(48 * 64).reshape(48, 64) % 4]
    (folder / "masks" / "a.png").unlink()
    Image.fromarray(values).save(folder / "masks" / "a.tif")
    for unlabelled, expected in ((None, [-1, 0, 1, 0]), (7, [-1, -1, 1, -1])):
        (truth,) = open_dataset("folder", folder, unlabelled=unlabelled).load(0).truths
        assert truth[0, :4].tolist() == expected
    Image.fromarray(np.minimum(values, 8)).save(folder / "masks" / "a.tif")
    (truth,) = open_dataset("folder", folder, classes=9).load(0).truths
    assert truth[0, :4].tolist() == [-1, 7, 8, 7]


def test_images_are_read_as_segment_reads_them(folder):
    values = RNG.integers(0, 65536, (48, 64), dtype=np.uint16)
    Image.fromarray(values).save(folder / "images" / "a.png")
    colours = RNG.integers(0, 256, (48, 64, 4), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "images" / "b.png")
    dataset = open_dataset("folder", folder)
    check(dataset)
    grey, on_white = (dataset.load(index).image for index in range(2))
    assert np.abs(grey - values[..., None] / 257).max() <= 0.501
    alpha = colours[..., 3:] / 255
    assert np.abs(on_white - (colours[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.501


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_turned_image_fits_an_upright_mask(folder, suffix):
    for name in ("a", "b"):
        (folder / "images" / f"{name}.png").unlink()
        stored = np.full((64, 48, 3), 200, np.uint8)  # upright, this end is on the right
        stored[:32] = 20
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        Image.fromarray(stored).save(folder / "images" / f"{name}.{suffix}", exif=exif)
    dataset = open_dataset("folder", folder)
    check(dataset)
    image = dataset.load(0).image
    assert image.shape == (48, 64, 3)
    assert image[:, :28].min() > 150
    assert image[:, 36:].max() < 60
    write_labels(folder / "masks" / "b.png", np.zeros((64, 48)))
    with pytest.raises(DatasetError, match=rf"masks/b.png: expected 48 x 64 .* as b.{suffix}, got 64 x 48"):
        check(dataset)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_every_orientation_is_that_of_the_image_as_read(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert datasets._upright_size(tmp_path / "a.jpg") == to_picture(tmp_path / "a.jpg").shape[1:]


def test_an_image_that_cannot_be_read_is_named(folder):
    (folder / "images" / "a.png").write_bytes(b"no image at all")
    with pytest.raises(ImageError, match=r"images/a.png: expected a readable image"):
        open_dataset("folder", folder).load(0)


@pytest.mark.parametrize(("shape", "middle"), [((48, 64), np.s_[:, 8:56]), ((64, 48), np.s_[8:56])])
def test_crop_and_resize(folder, shape, middle):
    write_image(folder / "images" / "a.png", *shape)
    write_labels(folder / "masks" / "a.png", RNG.integers(0, 5, shape))
    whole, sample = (open_dataset("folder", folder, resolution=side).load(0) for side in (None, 20))
    square = from_numpy(whole.image[middle].astype(np.float32)).permute(2, 0, 1)[None]
    expected = F.interpolate(square, (20, 20), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    assert np.abs(sample.image - expected).max() <= 0.5001
    centres = ((np.arange(20) + 0.5) * 48 / 20).astype(int)  # half-pixel centres, as TensorFlow's nearest
    assert np.array_equal(sample.truths[0], whole.truths[0][middle][centres][:, centres])


@pytest.mark.parametrize("kind", datasets.KINDS)
def test_a_wrong_root(kind, tmp_path):
    with pytest.raises(DatasetError, match=f"nowhere: expected a data set's folder, of layout {kind}, found nothing"):
        open_dataset(kind, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=f"file: expected a data set's folder, of layout {kind}, found a file"):
        open_dataset(kind, tmp_path / "file")
    (tmp_path / "root" / "something").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"root: expected .*, found something/"):
        open_dataset(kind, tmp_path / "root")


def test_an_unknown_kind(tmp_path):
    with pytest.raises(DatasetError, match="expected one of coco-stuff, cityscapes, bsds500, folder, got 'voc'"):
        open_dataset("voc", tmp_path)


def test_arguments_that_cannot_be_meant(cityscapes, folder):
    with pytest.raises(DatasetError, match="resolution: expected at least 1, got 0"):
        open_dataset("folder", folder, resolution=0)
    with pytest.raises(DatasetError, match="classes: expected at least 1, got 0"):
        open_dataset("folder", folder, classes=0)
    with pytest.raises(DatasetError, match="classes, unlabelled: expected for folder alone, cityscapes has its own"):
        open_dataset("cityscapes", cityscapes, unlabelled=0)


def test_lists_that_cannot_be_used(folder):
    names = folder / "list.txt"
    with pytest.raises(DatasetError, match=r"list.txt: expected a text file"):
        open_dataset("folder", folder, image_list=names)
    for text, message in (
        ("\n", "list.txt: expected an image's name a line, found none"),
        ("a\nc\n", "list.txt: expected names of the data set's images, got c"),
        ("a\na\n", "list.txt: expected each image once, got a more than once"),
    ):
        names.write_text(text)
        with pytest.raises(DatasetError, match=message):
            open_dataset("folder", folder, image_list=names)


def test_every_bad_file_is_named_at_once(tmp_path):
    for index in range(6):
        write_image(tmp_path / "images" / f"{index}.jpg")
        write_labels(tmp_path / "masks" / f"{index}.png", np.zeros((48, 64)))
    (tmp_path / "masks" / "0.png").unlink()
    image = tmp_path / "images" / "1.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    mask = tmp_path / "masks" / "2.png"
    mask.write_bytes(mask.read_bytes()[:60])
    (tmp_path / "images" / "3.jpg").write_text("no image at all")
    (tmp_path / "images" / "4.jpg").write_bytes(b"")
    write_labels(tmp_path / "masks" / "5.png", np.zeros((48, 63)))
    with pytest.raises(DatasetError) as raised:
        check(open_dataset("folder", tmp_path))
    message = str(raised.value)
    assert message.startswith("6 of 6 images cannot be used:")
    for part in ("masks/0.png: missing", "images/1.jpg: damaged", "masks/2.png: damaged", "images/3.jpg: damaged"):
        assert part in message
    assert "images/4.jpg: damaged (empty)" in message
    assert "masks/5.png: expected 48 x 64 (height x width) as 5.jpg, got 48 x 63" in message


def test_a_long_list_of_bad_files_is_cut(tmp_path):
    for index in range(30):
        write_image(tmp_path / "images" / f"{index}.png", 2, 2)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DatasetError, match="and 10 more"):
        check(open_dataset("folder", tmp_path))


def test_bytes_after_the_end_of_an_image_are_no_damage(folder):
    for path in (folder / "images" / "a.png", folder / "masks" / "a.png"):
        path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    check(open_dataset("folder", folder))


def test_labels_outside_the_map(coco, cityscapes, folder):
    write_labels(coco / "annotation_val2017" / "000000000139.png", np.full((360, 400), 182))
    with pytest.raises(DatasetError, match=r"000000000139.png: expected labels of the label map, got 182"):
        open_dataset("coco-stuff", coco)
    path = cityscapes / "gtFine" / "val" / "lindau" / "lindau_000000_000019_gtFine_labelIds.png"
    write_labels(path, np.full((32, 64), 34))
    with pytest.raises(DatasetError, match=r"lindau_000000_000019_gtFine_labelIds.png: .* label map, got 34"):
        open_dataset("cityscapes", cityscapes).load(1)
    with pytest.raises(DatasetError, match=r"a.png: expected labels of the 4 classes, got 4"):
        open_dataset("folder", folder, classes=4).load(0)


def test_truths_of_another_form(folder, bsds, tmp_path):
    write_image(folder / "masks" / "a.png")
    (folder / "masks" / "b.png").unlink()
    write_labels(folder / "masks" / "b.jpg", np.zeros((48, 64)))  # values that compression changes
    dataset = open_dataset("folder", folder)
    expected = "expected one channel of integer labels, compressed without loss, got mode"
    with pytest.raises(DatasetError) as raised:
        check(dataset)
    assert f"masks/a.png: {expected} RGB in a PNG file" in str(raised.value)
    assert f"masks/b.jpg: {expected} L in a JPEG file" in str(raised.value)
    with pytest.raises(DatasetError, match=rf"masks/a.png: {expected} RGB"):
        dataset.load(0)
    truth = bsds / "BSDS500" / "data" / "groundTruth" / "val" / "3096.mat"
    savemat(truth, {"other": np.zeros(3)})
    with pytest.raises(DatasetError, match=r"3096.mat: expected BSDS500's cell array 'groundTruth'"):
        check(open_dataset("bsds500", bsds))
    flat = tmp_path / "flat"
    write_image(flat / "1.jpg", 8, 8)
    for arrays, message in (
        ({"labels": np.zeros((8, 8))}, r"1.npz: expected an array 'segmentations', got labels"),
        ({"segmentations": np.zeros((8, 8), int)}, r"1.npz: expected integers \[annotators, H, W\]"),
    ):
        np.savez(flat / "1.npz", **arrays)
        with pytest.raises(DatasetError, match=message):
            check(open_dataset("bsds500", flat))


def test_sizes_are_compared_when_a_sample_is_read(folder):
    write_labels(folder / "masks" / "a.png", np.zeros((64, 48)))
    with pytest.raises(DatasetError, match=r"masks/a.png: expected 48 x 64 .* as a.png, got 64 x 48"):
        open_dataset("folder", folder).load(0)
