"""dataset_builder.dataset.shards: rows survive the round trip, shards are whole or absent, damage is named."""

import io

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from synthetic_dataset import make_row, write_dataset

from stereovla.dataset_builder.dataset import schema, shards


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), [3, 4, 2, 5], 2)


def test_rows_survive(dataset):
    rng = np.random.default_rng(0)  # the generator of write_dataset
    expected = [make_row(rng, 0, frame) for frame in range(3)]
    for row, wanted in zip(shards.read_rows(dataset / shards.shard_path("train", 0, 2)), expected, strict=False):
        schema.validate_row(row)
        for key, value in wanted.items():
            if value is None:
                assert key not in row
            elif key.startswith("observation.images."):
                assert np.abs(row[key].astype(int) - value).max() <= 3  # JPEG
            elif key == "observation.depth":
                np.testing.assert_allclose(row[key], value, atol=0.51e-4)
            else:
                np.testing.assert_array_equal(row[key], np.float32(value) if isinstance(value, float) else value)


def test_depth_is_a_16_bit_png_of_tenth_millimetres_and_far_is_none():
    data = shards.encode_image("observation.depth", np.array([[0.1234, 0.0, 6.5535, 7.0]], np.float32))
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and image.mode.startswith("I;16")
    assert np.asarray(image).tolist() == [[1234, 0, 65535, 0]]
    np.testing.assert_allclose(shards.decode_image("observation.depth", data), [[0.1234, 0, 6.5535, 0]], atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 41), (128, 96)])
def test_simplejpeg_gives_pillows_pixels(height, width):
    pytest.importorskip("simplejpeg")
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)
    data = shards.encode_image("observation.images.left", smooth)
    decoded = shards.decode_image("observation.images.left", data)
    np.testing.assert_array_equal(decoded, np.array(Image.open(io.BytesIO(data))))
    for broken in (b"", data[:5], data[: len(data) // 2]):
        with pytest.raises(shards.ShardError, match=rf"the {len(broken)} bytes of observation.images.left cannot be"):
            shards.decode_image("observation.images.left", broken)


def test_depth_survives_at_any_size():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (3, 7), (60, 33)):
        steps = rng.integers(0, 65536, (height, width))
        data = shards.encode_image("observation.depth", steps.astype(np.float32) * np.float32(1e-4))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), steps)


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [3, 3], 1)
    for path in (tmp_path / "a" / "data").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "data" / path.name).read_bytes()


def test_info_travels_in_the_shard(tmp_path):
    rows = [shards.encode_row(make_row(np.random.default_rng(0), 0, 0))]
    shards.write_shard(tmp_path / "x.parquet", rows, temporary=tmp_path / "t", info={"failures": {"dropped": 2}})
    assert shards.shard_info(tmp_path / "x.parquet") == {"failures": {"dropped": 2}}
    assert not (tmp_path / "t").exists()


def test_datasets_reads_the_folder_as_from_the_hub(dataset):
    rows = list(load_dataset(str(dataset), split="train", streaming=True))
    assert [(row["episode_index"], row["frame_index"]) for row in rows] == [
        (episode, frame) for episode, length in enumerate([3, 4, 2, 5]) for frame in range(length)
    ]
    assert rows[0]["observation.images.left"].size == (32, 32)
    assert np.shape(rows[0]["calibration.transform_camera_to_base"]) == (4, 4)
    assert rows[8]["target.box_right_px"] == [3, 10, 10, 20] and rows[13]["target.box_right_px"] is None


def test_numbers_turn_null_rows_into_nan(dataset):
    table = shards.read_table(dataset / shards.shard_path("train", 1, 2), ["target.box_right_px", "action_plan"])
    boxes = shards.numbers(table.slice(1), "target.box_right_px")
    assert boxes.shape == (6, 4) and np.isnan(boxes[-1]).all() and boxes[0].tolist() == [3, 10, 10, 20]
    assert shards.numbers(table.slice(1, 2), "action_plan").shape == (2, 16, 7)
