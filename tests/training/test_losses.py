"""What a step's losses are divided by and weighted with."""

import numpy as np
import pytest
import torch

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.objectives import PointingObjective, Predictions, Targets
from stereovla.modeling_stereovla.pointing import Pointed
from stereovla.training.losses import ANSWERS, answer, answer_counts, answer_weights

NAMES = ["box", "action", "depth", "box", "pose", "camera", "depth", "action"]


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = StereoVLAConfig.from_preset("tiny")
    size = config.num_visual_tokens + 12
    ids = torch.randint(10, 700, (len(NAMES), size), generator=generator)
    ids[:, 1 : 1 + config.num_visual_tokens] = config.image_token_id
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, ids, -100)
    labels[:, : 1 + config.num_visual_tokens] = -100
    pixels = torch.rand(len(NAMES), 2, 3, config.image_size, config.image_size, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def test_weighted_language_loss_is_the_weighted_sum_of_the_means_of_each_answer(batch):
    """Against the losses of each answer's samples computed alone."""
    torch.manual_seed(0)
    model = StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny")).eval()
    shares = {"action": 5.0, "depth": 2.0, "box": 3.0, "pose": 1.0, "camera": 0.5}
    counts = {"language": float((batch["labels"][:, 1:] != -100).sum())}
    counts |= {name: float(count) for name, count in answer_counts(batch["labels"], NAMES).items()}
    weights = torch.tensor(answer_weights(shares, NAMES, counts))
    with torch.no_grad():
        found = model(**batch, language_weights=weights).language_loss
        expected = 0.0
        for name in ANSWERS:
            rows = [number for number, objective in enumerate(NAMES) if answer(objective) == name]
            alone = model(**{key: value[rows] for key, value in batch.items()}).language_loss
            expected += shares[name] / shares["action"] * float(alone)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_pointing_hits_are_the_tokens_that_hold_the_points():
    """Against integer division of the pixel."""
    config = StereoVLAConfig.from_preset("tiny", use_pointers=True)
    objective, rng = PointingObjective(config), np.random.default_rng(0)
    grid = config.image_size // config.patch_size
    points = rng.uniform(0, config.image_size, (50, 2, 2)).astype(np.float32)
    points[3, 1] = np.nan
    cells = rng.integers(grid * grid, size=(50, 2))
    cells[::2] = (points[::2] // config.patch_size @ np.array([1, grid])).astype(int).clip(0)
    logits = torch.nn.functional.one_hot(torch.from_numpy(cells), grid * grid).float()
    hits = 0
    for sample in range(50):
        for point in range(2):
            u, v = points[sample, point]
            at = -1 if np.isnan(u) else int(v // config.patch_size) * grid + int(u // config.patch_size)
            hits += cells[sample, point] == at
    targets = Targets(points=torch.from_numpy(points))
    assert objective.count(targets) == 99 and 40 < hits < 70
    found = objective.outputs(Predictions(pointed=Pointed(logits)), targets, 99)
    assert found["pointing_accuracy"] == hits / torch.tensor(99)
