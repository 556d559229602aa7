"""A small dataset whose rows have one view, or a pair, and further views that are absent in some rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from synthetic_dataset import list_shards, make_row

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.folders import count_shards, describe_folder
from stereovla.dataset_builder.dataset.statistics import compute_statistics

WRIST, WRIST_DEPTH = schema.image_key("wrist"), schema.depth_key("wrist")
SMALL = (20, 24)  # height and width of the wrist's view
MONO = (schema.RIGHT, *schema.CALIBRATION, "target.box_right_px")  # what a row of one camera has not


def has_wrist(episode: int, frame: int) -> bool:
    """Whether a frame has the wrist's view: all but the third ones."""
    return frame % 3 != 2


def views_row(
    rng: np.random.Generator,
    episode: int,
    frame: int,
    without: Sequence[str] = (),
    wrist: Callable[[int, int], bool] = has_wrist,
) -> dict:
    """As `make_row`, with a wrist's view in the frames that have it, without these columns."""
    row = make_row(rng, episode, frame)
    row[WRIST] = row[WRIST_DEPTH] = None
    if wrist(episode, frame):
        row[WRIST] = np.full((*SMALL, 3), [frame * 20, 60, 200], np.uint8)
        row[WRIST_DEPTH] = np.full(SMALL, (1 + frame) / 10, np.float32)
    return {key: value for key, value in row.items() if key not in without}


def write_views(
    folder: Path,
    lengths: Sequence[int],
    without: Sequence[str] = (),
    wrist: Callable[[int, int], bool] = has_wrist,
    **said,
) -> Path:
    """A whole dataset of one split, an episode per shard; `said` goes into meta/info.json."""
    rng = np.random.default_rng(0)
    tasks = []
    keys = [key for key in (*schema.row_columns(), WRIST, WRIST_DEPTH) if key not in without]
    for index, length in enumerate(lengths):
        rows = [shards.encode_row(views_row(rng, index, frame, without, wrist)) for frame in range(length)]
        path = shards.shard_path("train", index, len(lengths))
        layout = schema.features(columns=keys)
        shards.write_shard(folder / path, rows, temporary=folder / ".temporary", layout=layout)
        tasks.append(("train", path, 1))
    shards.write_json(folder / "meta/stats.json", compute_statistics([folder / path for _, path, _ in tasks]))
    splits, sentences = count_shards(folder, tasks)
    columns = shards.open_shard(folder / tasks[0][1]).schema_arrow.names
    info = {"fps": 10, "tasks": sentences, "splits": splits, "embodiments": ["franka_panda"], "state_dim": 7}
    info |= {"action_dim": 7, "state_is_pose": True, "vertical_misalignment_px": 0.0, "columns": columns}
    info |= {"views": list(schema.views_of(columns)), "license": "mit", "source": {"format": "a test"}, "dropped": {}}
    describe_folder(folder, {**info, "not_judged": [], "import": {}, **said}, tasks)
    return list_shards(folder)
