"""The result of a training: a folder that loads by the Auto classes and that the Hub accepts."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from stereovla.modeling_stereovla import StereoVLAForActionPrediction
from stereovla.processing import StereoProcessor
from stereovla.training.checkpoints import write_tensors


def complete(
    partial: Path,
    folder: Path,
    processor: StereoProcessor,
    window: dict[str, Any],
    summary: dict[str, Any],
    base: str | None = None,
) -> None:
    """Adds to `partial`, which holds saved weights, the processor, how they were trained and one prediction, and
    renames it to `folder`.

    Args:
        window: what the prediction is made for, as in `schema.WINDOW`.
        summary: written as training.json.
        base: folder or Hub id of the model, where the weights are those of an adapter.
    """
    processor.save_pretrained(partial)
    # whoever loads the folder can compare: a load that succeeds is not yet a load of these weights
    loaded = StereoVLAForActionPrediction.from_pretrained(partial if base is None else base)
    if base is not None:
        loaded.resize_heads(processor.state_dim, processor.action_dim)
        loaded = PeftModel.from_pretrained(loaded, partial)
    config = loaded.eval().config
    inputs = processor(
        images=[window["left"], window["right"]],
        text=window["task"],
        state=window["state_history"],
        embodiment=window["embodiment"],
    )
    noise = torch.randn(1, config.chunk_size, config.action_dim, generator=torch.Generator().manual_seed(0))
    actions = processor.decode_actions(loaded.predict_action(**inputs, noise=noise), embodiment=window["embodiment"])
    tensors = {
        "left": torch.from_numpy(window["left"]),
        "right": torch.from_numpy(window["right"]),
        "state": torch.from_numpy(window["state_history"]),
        "noise": noise,
        "actions": torch.from_numpy(actions),
    }
    prompt = {"instruction": window["task"], "embodiment": window["embodiment"]}
    write_tensors(partial / "reference_prediction.safetensors", tensors, {"prompt": json.dumps(prompt)})
    (partial / "training.json").write_text(json.dumps(summary | {"example_instruction": window["task"]}, indent=2))
    os.replace(partial, folder)
