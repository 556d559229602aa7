"""Writes losses.json: losses, outputs and gradients of the small presets on fixed batches, as the code computes them.

    python tests/recorded_losses/make.py

The file was written before the losses became objects (commit c6cb3aa) and must not change when only the code's order
does. Weights and inputs are exact fractions of whole numbers, so that every processor begins with the same bits; the
arithmetic is float64 but for the losses' last step, which is float32.
"""

import json
from pathlib import Path

import torch

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.configuration_stereovla import SMALL_STEREO

FILE = Path(__file__).with_name("losses.json")
LOSSES = [f"{name}_loss" for name in ("action", "language", "disparity", "pointing", "keyframe")]
OUTPUTS = ("loss", *LOSSES, "pointing_accuracy", "sample_action_loss", "sample_language_loss", "sample_token_accuracy")
SAMPLES = 4
# As the presets were when these were recorded: the yaw of a displacement is a number, answers are not taught to look.
BEFORE = {
    "turn_symmetry": 0,
    "language_pointing_layer": None,
    "language_pointing_loss_weight": 0.0,
    "place_code": False,
    "bin_smoothing": 0.0,
}
OF_LAB = BEFORE | {
    "image_size": 128,
    "patch_size": 8,
    "semantic_config": {"hidden_sizes": [32, 96], "depths": [1, 1]},
    "stereo_config": SMALL_STEREO | {"refinement_channels": 0},
    "points_frame": None,
    "points_at_destination": False,
    "calibration_dropout": 0.0,
    "disparity_loss_weight": 1.0,
}
OF_DEMO = BEFORE | {"language_loss_weight": 0.5}
# preset, changes of its config, and of the batch: what is left out, or the samples with an action loss
CASES = {
    "everything": ("demo", OF_DEMO, {}),
    "no action": ("demo", OF_DEMO, {"is_action": []}),
    "every sample acts": ("demo", OF_DEMO, {"without": ["is_action", "language_weights"]}),
    "no known disparity": ("demo", OF_DEMO, {"without": ["disparity"]}),
    "no points": ("demo", OF_DEMO, {"without": ["points", "displacement"]}),
    "answers alone": ("demo", OF_DEMO, {"without": ["actions", "is_action", "state", "points", "displacement"]}),
    "actions alone": ("demo", OF_DEMO | {"direct_probability": 0.5}, {"without": ["labels", "language_weights"]}),
    "two draws, all learn": ("lab", OF_LAB | {"flow_draws": 2, "stereo_learns_from": "all"}, {}),
    "no pointers": ("tiny", {}, {"without": ["points", "displacement"]}),
    "mono": ("tiny", {"stereo_config": None}, {"without": ["points", "displacement", "disparity"]}),
}


def fractions(shape: tuple[int, ...], salt: int, scale: float = 1.0) -> torch.Tensor:
    """Numbers in [-scale, scale) that look random and are the same on every processor, float64."""
    count = torch.Size(shape).numel()
    mixed = (torch.arange(count, dtype=torch.int64) * 7919 + salt * 104729 + 12345) * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    return (scale * ((mixed ^ (mixed >> 13)) % 65536).double() / 32768 - scale).view(shape)


def build(preset: str, changes: dict) -> StereoVLAForActionPrediction:
    """The preset's model with exact weights, in float64."""
    model = StereoVLAForActionPrediction(StereoVLAConfig.from_preset(preset, **changes)).double().eval()
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.state_dict().items())):
            if not weight.is_floating_point():
                continue
            if weight.ndim > 1:
                weight.copy_(fractions(tuple(weight.shape), number, scale=1.5 * weight[0].numel() ** -0.5))
            elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "running_var", "gamma", "lambda1")):
                weight.copy_(1 + fractions(tuple(weight.shape), number, scale=0.25))
    return model


def batch(config: StereoVLAConfig, without: list[str] = (), is_action: list[int] = (0, 2)) -> dict[str, torch.Tensor]:
    """Inputs of `forward` with two padded rows, samples without each of the labels, and all draws given."""
    size, low = config.image_size, config.action_vocab_size - config.num_bins
    bins = 1 + fractions((SAMPLES, 7 * config.state_history + 7), 1)
    bins = low + (bins * (config.num_bins - 1) / 2).long()
    words = 10 + ((1 + fractions((SAMPLES, 6), 2)) * 195).long()
    start = torch.full((SAMPLES, 1), config.text_config.bos_token_id)
    image = torch.full((SAMPLES, config.num_visual_tokens), config.image_token_id)
    end = torch.full((SAMPLES, 1), config.text_config.eos_token_id)
    ids = torch.cat([start, image, words, bins, end], dim=1)
    mask = torch.ones_like(ids)
    for row in (1, 3):  # two rows are shorter
        ids[row, 3:] = ids[row, :-3].clone()
        ids[row, :3] = config.text_config.pad_token_id
        mask[row, :3] = 0
    labels = ids.clone()
    labels[:, :-8] = -100
    labels[3] = -100
    disparity = 4 + 3 * fractions((SAMPLES, size, size), 3)
    disparity[1] = 0
    disparity[0, : size // 3] = 0
    points = size / 2 + fractions((SAMPLES, 2, 2), 4, scale=0.7 * size)
    points[2, 1] = float("nan")
    displacement = fractions((SAMPLES, config.pose_dim), 5, scale=0.3)
    displacement[1, 2] = float("nan")
    draws = (SAMPLES, config.flow_draws)
    acts = torch.zeros(SAMPLES, dtype=torch.bool)
    acts[list(is_action)] = True
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": (1 + fractions((SAMPLES, 2, 3, size, size), 6)) / 2,
        "state": fractions((SAMPLES, config.state_history, config.state_dim), 7),
        "actions": fractions((SAMPLES, config.chunk_size, config.action_dim), 8),
        "is_action": acts,
        "disparity": disparity,
        "points": points,
        "displacement": displacement,
        "noise": fractions((*draws, config.chunk_size, config.action_dim), 9, scale=2.0),
        "time": (1 + fractions(draws, 10)) / 2,
        "hide_pose": torch.tensor([True, False, False, True]),
        "language_weights": torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64),
    }
    if "actions" in without:
        without = [*without, "noise", "time", "hide_pose"]
    return {name: value for name, value in inputs.items() if name not in without}


def compute(name: str) -> dict[str, list[float]]:
    """Numbers of one of `CASES`: the outputs, the counts, and the gradient of the loss by part."""
    preset, changes, change = CASES[name]
    model = build(preset, changes)
    inputs = batch(model.config, **change)
    found = {f"count {key}": [float(value)] for key, value in model.loss_counts(**inputs).items()}
    output = model(**inputs, counts={key: torch.tensor(2.0 + len(key)) for key in COUNTED})
    for key in OUTPUTS:
        if (value := output.get(key)) is not None:
            found[key] = value.double().flatten().tolist()
    for key in ("logits", "velocity", "disparity"):
        if (value := output.get(key)) is not None:
            if key == "disparity":
                value = value / 4  # it was recorded in px of a quarter of the resolution
            found[key] = [value.double().mean().item(), value.double().square().mean().item()]
    plain = model(**inputs).loss
    found["loss by own counts"] = [plain.item()]
    output.loss.backward()
    parts = {part.split(".")[0] + "." + part.split(".")[1] for part, _ in model.named_parameters()}
    for part in sorted(parts):
        gradients = [w.grad for key, w in model.named_parameters() if key.startswith(f"{part}.") and w.grad is not None]
        found[f"gradient {part}"] = [sum(g.square().sum().item() for g in gradients) ** 0.5, len(gradients)]
    return found


COUNTED = ("action", "language", "disparity", "pointing", "keyframe")


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: compute(name) for name in CASES}, indent=1) + "\n")
