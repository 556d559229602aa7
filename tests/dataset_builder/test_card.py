"""dataset_builder.dataset.card: the card says what is in the folder, and its picture shows the true disparity."""

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from synthetic_dataset import write_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.card import disparity_colors, sample_picture, sample_rows, write_card
from stereovla.dataset_builder.dataset.statistics import camera_ranges, compute_statistics


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path, [4, 5, 3], 2)
    write_dataset(tmp_path, [2], 2, split="validation")
    paths = sorted((tmp_path / "data").glob("train-*"))
    shards.write_json(tmp_path / "meta/stats.json", compute_statistics(paths))
    world = {"fovy_deg": 45.0, "shapes": ["cube", "ball"]}
    build = {"noise_m": 0.01, "noise_rad": 0.05, "push_m": 0.05, "push_probability": 0.04, "relabel": 0.5}
    info = {
        "fps": 10,
        "embodiments": ["franka_panda"],
        "state_dim": 7,
        "tasks": ["pick up the red cube"],
        "splits": {
            "train": {"episodes": 3, "frames": 12, "shards": 2},
            "validation": {"episodes": 1, "frames": 2, "shards": 1},
        },
        "failed_attempts": {"target fell off the table": 7},
        "cameras": camera_ranges(paths),
        "columns": list(shards.open_shard(paths[0]).schema_arrow.names),
        "build": {**build, "camera_range": "small", "camera_per_frame": True, "world": world},
    }
    shards.write_json(tmp_path / "meta/info.json", info)
    return tmp_path


def test_card_is_valid_and_says_what_is_there(dataset):
    card = DatasetCard.load(write_card(dataset))
    assert card.data.license == "apache-2.0"
    assert card.data.task_categories == ["robotics"]
    assert card.data.size_categories == ["n<1K"]
    text = card.text
    for line in (
        "14 frames in 4 episodes",
        "| train | 3 | 12 | 2 |",
        "7 x target fell off the table",
        "Camera range: small, a new camera pose for every frame",
        "| shapes | cube, ball |",
        '"pick up the red cube"',
        "| `franka_panda` | from | to |",
        "| baseline, m | 0.063 | 0.063 |",
        "| azimuth, deg | 0 | 0 |",
        "| `observation.depth` | image (H, W) | m |",
        "| state[6] | 1 | 1 | 1 | 1 | 1 | 0 |",
        "](images/samples.png)",
    ):
        assert line in text, line
    Image.open(dataset / "images/samples.png").verify()


def test_splits_load_through_the_card(dataset):
    write_card(dataset)
    loaded = load_dataset(str(dataset), streaming=True)
    assert {name: sum(1 for _ in split) for name, split in loaded.items()} == {"train": 12, "validation": 2}


def test_disparity_colors_run_from_far_to_near():
    colors = disparity_colors(np.array([[0.0, 1e-6, 5.0, 10.0, 30.0]]), 10.0)[0].astype(int)
    assert colors[0].tolist() == [0, 0, 0]
    assert colors[1].tolist() == [13, 22, 80]
    assert colors[3].tolist() == colors[4].tolist() == [250, 230, 40]
    assert colors[1].sum() < colors[2].sum() < colors[3].sum()


def test_picture_has_left_right_and_disparity(dataset):
    rows = sample_rows(dataset, 3)
    picture = np.asarray(sample_picture(rows))
    size = 32
    assert picture.shape == (3 * size + 2 * 4, 3 * size + 2 * 4, 3)
    assert np.array_equal(picture[:size, :size], rows[0]["observation.images.left"])
    assert np.array_equal(picture[:size, size + 4 : 2 * size + 4], rows[0]["observation.images.right"])
    depth, shown = rows[0]["observation.depth"], picture[:size, 2 * size + 8 :]
    assert (shown[depth == 0] == 0).all()
    near, far = depth == depth[depth > 0].min(), depth == depth.max()
    assert shown[near].sum() / near.sum() > shown[far].sum() / far.sum()
