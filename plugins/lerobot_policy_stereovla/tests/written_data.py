"""A dataset that lerobot itself wrote, `tests/lerobot_written/dataset`, as its training loads it."""

from pathlib import Path
from typing import Any

from lerobot.datasets import LeRobotDataset
from lerobot.datasets.factory import resolve_delta_timestamps
from torch.utils.data import default_collate

WRITTEN = Path(__file__).parents[3] / "tests/lerobot_written/dataset"
ID = "test/written"
VIEWS = {"left": "observation.images.eye_a", "right": "observation.images.eye_b"}


def dataset_for(config: Any) -> LeRobotDataset:
    """With the windows that a policy of this config asks for."""
    plain = LeRobotDataset(ID, root=WRITTEN)
    return LeRobotDataset(
        ID, root=WRITTEN, delta_timestamps=resolve_delta_timestamps(config, plain.meta), return_uint8=True
    )


def batch_of(dataset: LeRobotDataset, rows: list[int]) -> dict[str, Any]:
    """As lerobot-train hands it to the preprocessor."""
    batch = default_collate([dataset[row] for row in rows])
    for key in dataset.meta.camera_keys:
        batch[key] = batch[key].float() / 255
    return batch
