"""streaming.augmentation: colours change alike in both views, places do not, and a resume repeats them."""

from itertools import islice

import numpy as np
import pytest
from synthetic_dataset import write_dataset

from stereovla.dataset_builder.streaming.augmentation import PhotometricAugmentation
from stereovla.dataset_builder.streaming.window_stream import WindowStream

PLACE = (0, 0, 3, 5)


def picture(seed=0, size=24):
    return np.random.default_rng(seed).integers(40, 200, (size, size, 3)).astype(np.uint8)


def test_views_get_the_same_map_where_none_between_them_is_asked():
    augmentation = PhotometricAugmentation(between_views=0.0)
    left = picture()
    right = np.roll(left, -4, axis=1)  # a disparity of 4 px everywhere
    new_left, new_right = augmentation({"left": left, "right": right}, PLACE).values()
    assert not np.array_equal(new_left, left)
    np.testing.assert_array_equal(new_right, np.roll(new_left, -4, axis=1))


def test_pixels_follow_the_stated_formula():
    """Against the steps written out one after the other: saturation, brightness and balance, contrast."""
    image = picture()
    for seed in range(5):
        augmentation = PhotometricAugmentation(0.2, 0.3, 0.4, 0.1, 0.05)
        new, other = augmentation({"left": image, "right": image}, (seed, 0, 0, 0)).values()
        rng = np.random.default_rng((seed, 0, 0, 0, 1))
        b, c, s = (1 + rng.uniform(-1, 1) * limit for limit in (0.2, 0.3, 0.4))
        gain = b * (1 + 0.1 * rng.uniform(-1, 1, 3))
        exposure, black = 0.05 * rng.uniform(-1, 1, 2)
        values = image.astype(float)
        grey = (values * [0.299, 0.587, 0.114]).sum(-1, keepdims=True)
        values = (grey + s * (values - grey)) * gain
        values = 127.5 + c * (values - 127.5 * 1.0)
        assert np.abs(new - np.clip(values, 0, 255)).max() <= 0.51
        values = values * (1 + exposure) + 255 * black
        assert np.abs(other - np.clip(values, 0, 255)).max() <= 0.51


def test_views_differ_a_little_and_no_more_than_asked():
    grey = np.full((8, 8, 3), 120, np.uint8)
    quiet = PhotometricAugmentation(0, 0, 0, 0, between_views=0.05)
    differences = []
    for episode in range(100):
        left, right = quiet({"left": grey, "right": grey}, (0, 0, episode, 0)).values()
        np.testing.assert_array_equal(left, grey)
        differences.append(float(right.mean()) - 120)
    assert 2 < np.abs(differences).max() <= 0.05 * (120 + 255) + 0.5


def test_nothing_asked_changes_nothing():
    left, right = picture(0), picture(1)
    new_left, new_right = PhotometricAugmentation(0, 0, 0, 0, 0)({"left": left, "right": right}, PLACE).values()
    np.testing.assert_array_equal(new_left, left)
    np.testing.assert_array_equal(new_right, right)


def test_wrong_ranges_are_named():
    with pytest.raises(ValueError, match=r"contrast=1.5 must be in \[0, 1\)"):
        PhotometricAugmentation(contrast=1.5)


def test_stream_augments_differently_every_epoch_and_resumes_exactly(tmp_path):
    write_dataset(tmp_path, [4, 5, 3], 2)
    options = {"lanes": 2, "depth_map_share": 0.0, "mixture": {"action": 1}, "augmentation": PhotometricAugmentation()}
    whole = list(islice(WindowStream(tmp_path, **options), 30))
    plain = list(islice(WindowStream(tmp_path, **{**options, "augmentation": None}), 30))
    by_place: dict[tuple[int, int], list[np.ndarray]] = {}
    for window, original in zip(whole, plain, strict=True):
        assert window["frame_index"] == original["frame_index"]
        np.testing.assert_array_equal(window["boxes"], original["boxes"])
        by_place.setdefault((window["episode_index"], window["frame_index"]), []).append(window["left"])
    assert any(not np.array_equal(a[0], a[1]) for a in by_place.values() if len(a) > 1)
    stream = WindowStream(tmp_path, **options)
    list(islice(stream, 13))
    resumed = WindowStream(tmp_path, **options)
    resumed.load_state_dict(stream.state_dict())
    for window, wanted in zip(islice(resumed, 17), whole[13:], strict=True):
        np.testing.assert_array_equal(window["left"], wanted["left"])
        np.testing.assert_array_equal(window["right"], wanted["right"])
