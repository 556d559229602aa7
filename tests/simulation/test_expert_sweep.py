"""The expert by physics alone on 200 seeds of every preset and task: at least 95 % succeed, and why the others fail."""

from collections import Counter

import numpy as np
import pytest
from tqdm.auto import tqdm

from stereovla.simulation import Expert, World, WorldConfig
from stereovla.simulation.config import KEYFRAMES, PRESETS, TASKS

SEEDS, MOST_STEPS = 200, 120


def failure(world: World, seed: int, noise_m: float = 0.0) -> str | None:
    """Why the expert fails on a seed when gaussian noise of `noise_m` moves every executed step; None: it succeeds."""
    try:
        world.reset(seed)
    except RuntimeError as error:
        return str(error)
    expert, rng = Expert(world), np.random.default_rng(seed)
    held = False
    while not expert.done:
        if world.object_pose()[0][2] < world.table_z - 0.05:
            return "the target fell off the table"
        if world.steps == MOST_STEPS:
            return f"{'lost or not placed' if held else 'never held'} in {MOST_STEPS} steps"
        action = expert.plan(1)[0][0].copy()
        action[:3] += rng.normal(0.0, noise_m, 3)
        try:
            world.step(action)
        except RuntimeError as error:
            return str(error)
        held |= world.held
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "task", "noise_m", "least"),
    [
        *((preset, task, 0.0, 0.95) for preset in PRESETS for task in TASKS),
        ("easy", "pick", 0.01, 0.98),
        ("easy", "pick", 0.015, 0.90),
    ],
)
def test_expert_succeeds(preset, task, noise_m, least, capsys):
    # the preset easy names the keyframes of picking alone
    world = World(WorldConfig.from_preset(preset, tasks=task, keyframes=KEYFRAMES, image_size=32))
    failed, steps = {}, []
    with capsys.disabled():  # a bar in a terminal, one line in a log
        for seed in tqdm(range(SEEDS), desc=f"{preset} {task} {noise_m:g}", unit="seed", leave=False, disable=None):
            why = failure(world, seed, noise_m)
            if why is None:
                steps.append(world.steps)
            else:
                failed[seed] = why
        print(
            f"\n{preset} {task}, noise {noise_m * 100:g} cm: {len(steps)} of {SEEDS} succeed in {np.mean(steps):.0f} "
            f"steps; failures: {dict(Counter(failed.values())) or 'none'}"
        )
    assert len(steps) >= least * SEEDS, failed
