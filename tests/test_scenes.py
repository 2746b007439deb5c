import numpy as np
import pytest

from diffseg.tiny import scenes


def test_scene():
    image, mask = scenes.scene(7)
    assert image.shape == (64, 64, 3)
    assert image.dtype == mask.dtype == np.uint8
    assert np.array_equal(np.unique(mask), np.arange(mask.max() + 1))
    again, mask_again = scenes.scene(7)
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)
    assert not np.array_equal(image, scenes.scene(8)[0])


@pytest.mark.parametrize("seed", range(20))
def test_regions_can_be_seen(seed):
    _, mask = scenes.scene(seed)
    assert np.bincount(mask.ravel()).min() >= 0.015 * mask.size


def test_seed_ranges_do_not_meet():
    ranges = (scenes.TRAIN_SEEDS, scenes.THRESHOLD_SEEDS, scenes.REPORT_SEEDS)
    for first, second in zip(ranges, ranges[1:], strict=False):
        assert first.stop <= second.start
