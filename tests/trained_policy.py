"""A policy that was trained until it picks things up, by the shortest training that does: for tests of success."""

import json
from pathlib import Path

from command_lines import data as build_dataset
from training_runs import run_here

from stereovla.evaluation.rollouts import RolloutConfig
from stereovla.simulation import WorldConfig

# one red cube that lies within 2 cm of one place, where an arm that always starts alike closes and lifts
PICTURES = {"camera_range": "small", "image_size": 64, "num_objects": 1}
WORLD = {
    "preset": "easy",
    "objects": ["cube"],
    "colors": ["red"],
    "workspace_extent": [0.04, 0.04],
    "table_height_m": 0,
    "start_x": 0.44,
    "start_y": 0,
    "start_height_m": 0.15,
    "start_yaw_rad": 0,
}
EPISODES, STEPS, MAX_STEPS = 32, 120, 30


def rollout_config(execution_horizon: int) -> RolloutConfig:
    """Episodes in the world that the policy was trained for."""
    return RolloutConfig(WorldConfig.from_preset(**PICTURES, **WORLD), execution_horizon, MAX_STEPS)


def train_policy(folder: Path) -> Path:
    """Records demonstrations, trains a StereoVLA on them, and returns the folder of its model."""
    own = [word for name, value in PICTURES.items() for word in (f"--{name}", str(value))]
    own += ["--train_episodes", str(EPISODES), "--validation_episodes", "0", "--episodes_per_shard", "16"]
    dataset, output = str(folder / "data"), folder / "training"
    assert build_dataset(["build", "--preset", "tiny", "--out", dataset, "--world", json.dumps(WORLD), *own]) == 0
    how = ["--steps", str(STEPS), "--batch_size", "32", "--warmup_steps", "20", "--checkpoint_every", str(STEPS)]
    how += ["--mixture", "1:0:0:0", "--depth_map_share", "0", "--tracker", "none", "--config", '{"image_size": 64}']
    run_here(["--preset", "demo", "--dataset", dataset, "--output_dir", str(output), *how])
    return output / "model"
