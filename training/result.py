"""The result of a training: a folder that loads by the Auto classes and that the Hub accepts."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from stereovla.dataset_builder.streaming.questions import calibration_of, depth_of, view_key, views_of
from stereovla.training.checkpoints import write_tensors
from stereovla.training.models import Policy, Processor, load_policy, load_processor

# of normalised actions: the same weights on the same device, by other kernels or orders of summation; another model's
# actions differ by 0.1 and more
SAME_MODEL = 1e-3


@dataclass
class Prediction:
    """One action chunk and what it was predicted for.

    window: as in `schema.WINDOW`. noise, normalised: (1, chunk_size, action_dim). actions: the same in robot units.
    """

    window: dict[str, Any]
    noise: torch.Tensor
    normalised: torch.Tensor
    actions: torch.Tensor


def predict_one(model: Policy | PeftModel, processor: Processor, window: dict) -> Prediction:
    """What the model in memory predicts for a window, in evaluation mode, in which it stays. Where processes share its
    weights, all of them must call this.
    """
    config, device = model.eval().config, next(model.parameters()).device
    inputs = processor(
        images=views_of(window, processor.pixel_views),
        depth_map=depth_of(window) if config.reads_depth else None,
        calibration=calibration_of(window) if processor.points_frame else None,
        text=window["task"],
        state=window["state_history"],
        embodiment=window["embodiment"],
    ).to(device)
    noise = torch.randn(1, config.chunk_size, config.action_dim, generator=torch.Generator().manual_seed(0))
    normalised = model.predict_action(**inputs, noise=noise.to(device)).float().cpu()
    actions = processor.decode_actions(normalised, embodiment=window["embodiment"])
    return Prediction(window, noise, normalised, torch.from_numpy(actions))


def complete(
    partial: Path,
    folder: Path,
    processor: Processor,
    prediction: Prediction,
    summary: dict[str, Any],
    base: str | None = None,
) -> None:
    """Adds to `partial`, which holds saved weights, the processor, how they were trained and a prediction, and renames
    it to `folder`; RuntimeError if what was saved predicts something else.

    Args:
        prediction: of the trained model in memory, with which whoever loads the folder can compare.
        summary: written as training.json.
        base: folder or Hub id of the model, where the weights are those of an adapter.
    """
    processor.save_pretrained(partial)
    loaded = load_policy(str(partial if base is None else base))
    if base is not None:
        loaded.resize_heads(processor.state_dim, processor.action_dim, processor.num_turns)
        loaded = PeftModel.from_pretrained(loaded, partial)
    window = prediction.window
    again = predict_one(loaded, load_processor(str(partial)), window).normalised
    difference = float((again - prediction.normalised).abs().max())
    if not difference <= SAME_MODEL:
        raise RuntimeError(
            f"{partial} was saved, but loaded again it predicts actions that differ by {difference:.2g} (normalised; "
            f"at most {SAME_MODEL:g} is rounding) from those of the trained model; please report this"
        )
    keys = [view_key(view) for view in processor.pixel_views]
    kinds = [*(["depth"] if loaded.config.reads_depth else []), *(["calibration"] if processor.points_frame else [])]
    keys += [key for key in window if key.partition(".")[0] in kinds]
    tensors = {key: torch.as_tensor(window[key]) for key in keys if window.get(key) is not None}
    tensors |= {
        "state": torch.from_numpy(window["state_history"]),
        "noise": prediction.noise,
        "actions": prediction.actions,
    }
    prompt = {"instruction": window["task"], "embodiment": window["embodiment"]}
    write_tensors(partial / "reference_prediction.safetensors", tensors, {"prompt": json.dumps(prompt)})
    (partial / "training.json").write_text(json.dumps(summary | {"example_instruction": window["task"]}, indent=2))
    os.replace(partial, folder)
