"""Writes the LeRobot dataset beside this file with lerobot itself (0.4.4), in an environment of its own:

python -m venv lerobot && lerobot/bin/pip install lerobot==0.4.4 && lerobot/bin/python tests/lerobot_written/make.py

lerobot cannot be installed beside this project's packages, so its output is kept as test data.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from stereo_scene import poses, textured_pair  # noqa: E402

SIZE, FPS, LENGTHS, TASKS = 96, 12, (7, 5, 6), ("pick up the cup", "open the drawer", "pick up the cup")


def main() -> None:
    target = HERE / "dataset"
    shutil.rmtree(target, ignore_errors=True)
    image = {"dtype": "video", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (7,), "names": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]}
    features = {
        "observation.images.eye_a": image,
        "observation.images.eye_b": image,
        "observation.state": vector,
        "action": vector,
    }
    dataset = LeRobotDataset.create("test/written", FPS, features, root=target, robot_type="test_arm")
    for episode, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
        states = poses(episode, length + 1)
        for frame in range(length):
            left, right = textured_pair(100 * episode + frame, SIZE, SIZE)
            dataset.add_frame(
                {
                    "observation.images.eye_a": left,
                    "observation.images.eye_b": right,
                    "observation.state": states[frame],
                    "action": np.array(states[frame + 1]),
                    "task": task,
                }
            )
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    main()
