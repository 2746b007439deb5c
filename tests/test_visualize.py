import tracemalloc

import numpy as np
from PIL import Image

from diffseg import visualize

HALVES = np.repeat([[0, 0, 1, 1]], 4, axis=0).astype(np.int32)


def test_label_image_keeps_the_labels(tmp_path):
    for labels in (HALVES, *(np.arange(most)[None].astype(np.int32) for most in (256, 257, 1024))):
        visualize.label_image(labels).save(tmp_path / "labels.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "labels.png")), labels)


def test_palette_is_distinct_and_stable():
    colours = visualize.palette(64)
    assert len(np.unique(colours, axis=0)) == 64
    assert np.array_equal(colours[:5], visualize.palette(5))


def test_boundaries():
    assert np.array_equal(visualize.boundaries(HALVES), np.repeat([[False, True, False, False]], 4, axis=0))
    assert not visualize.boundaries(np.zeros((3, 3), int)).any()


def test_overlay_tints_and_outlines():
    labels = np.repeat(np.arange(2).repeat(20)[None], 40, axis=0)
    grey = np.full((40, 40, 3), 128, np.uint8)
    picture = visualize.overlay(grey, labels)
    assert picture.dtype == np.uint8
    assert picture.shape == grey.shape
    assert (picture[:, 19] == 255).all()
    assert (picture[:, 18] == 0).all()
    assert not np.array_equal(picture[20, 5], picture[20, 35])
    assert np.array_equal(grey, np.full((40, 40, 3), 128))


def test_outlines_are_wider_on_larger_pictures():
    for side, wide in ((40, 1), (1200, 5)):
        labels = np.repeat(np.arange(2).repeat(side // 2)[None], side, axis=0)
        line = visualize.overlay(np.full((side, side, 3), 128, np.uint8), labels)[0, :, 0]
        assert ((line == 255).sum(), (line == 0).sum()) == (wide, 2)


def test_overlay_blends_without_copies_in_floats():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1000, 700, 3), dtype=np.uint8)
    labels = (np.arange(1000) // 300)[:, None].repeat(700, axis=1)
    tracemalloc.start()
    picture = visualize.overlay(image, labels, opacity=0.3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * image.nbytes  # float32 takes 4 times as much
    expected = 0.7 * image + 0.3 * visualize.palette(4)[labels]
    inside = np.arange(1000) % 300
    inside = (inside > 5) & (inside < 295)
    assert np.abs(picture[inside] - expected[inside]).max() <= 0.501


def test_coloured_labels():
    labels = np.array([[0, 1], [5, -1]])
    colours = visualize.coloured(labels)
    assert colours.shape == (2, 2, 3)
    assert np.array_equal(colours[1, 0], visualize.palette(6)[5])
    assert colours[1, 1].tolist() == [96, 96, 96]
    assert visualize.coloured(np.full((2, 2), -1)).tolist() == [[[96] * 3] * 2] * 2


def test_a_sheet_holds_its_pictures():
    red, blue = (np.full((10, 20, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    page = np.asarray(visualize.sheet([("first", [red, blue]), ("second", [blue])], "title", height=50))
    counts = [(page == colour).all(-1).sum() for colour in ((255, 0, 0), (0, 0, 255))]
    assert counts == [50 * 100, 2 * 50 * 100]
    assert visualize.sheet([], "nothing").size[0] > 0
