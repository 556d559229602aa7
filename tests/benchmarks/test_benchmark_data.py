"""benchmarks.data: the ways that are compared read the same frames, and a small run prints every table."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")
av = pytest.importorskip("av")

from synthetic_dataset import write_dataset  # noqa: E402

from stereovla.benchmarks.data import CODECS, decode_frame, write_videos  # noqa: E402
from stereovla.dataset_builder.dataset import shards  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_any_frame_of_a_video_is_the_frame_of_the_dataset(tmp_path):
    """Frames have colours of their own, so a frame that is off by one would be seen."""
    folder = write_dataset(tmp_path / "dataset", [5, 6, 4], 2, size=64)
    rows = [row for path in sorted((folder / "data").iterdir()) for row in shards.read_rows(path)]
    videos = write_videos(folder, tmp_path / "videos")
    assert set(videos) == set(CODECS)
    for paths in videos.values():
        for path, side in zip(paths, ("left", "right"), strict=True):
            with av.open(str(path)) as container:
                for number in (0, 7, 3, 14, 8, 8, 1):
                    difference = (
                        decode_frame(container, number).astype(int) - rows[number][f"observation.images.{side}"]
                    )
                    assert np.abs(difference.mean((0, 1))).max() < 8  # quality 30; the next frame differs by 20
                with pytest.raises(ValueError, match="frame 15 is beyond the end"):
                    decode_frame(container, 15)


@pytest.mark.slow
def test_the_command_prints_its_tables():
    arguments = {"image_size": 32, "episodes": 8, "record_episodes": 1, "windows": 32, "batch_size": 8, "rounds": 1}
    command = [sys.executable, "-m", "benchmarks.data", "--workers", "0,1"]
    command += [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for part in (
        "depth, masks, boxes",
        "| ours |",
        "datasets, torch format",
        "mp4, AV1",
        "5,000,000 trajectories",
        "core h",
    ):
        assert part in printed
