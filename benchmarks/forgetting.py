"""What a model still knows of its first robot with an adapter for another: held-out losses, before and after.

    python -m benchmarks.forgetting --adapter OUTPUT/model --dataset FIRST_ROBOT

Three ways on the same held-out windows: the base model, the base model with the adapter loaded and switched off (must
be the same to the bit), and with it switched on. Where the adapter's robot has other sizes of states and actions,
actions and poses of the first robot cannot be asked of it; depths, boxes and camera parameters can.
"""

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import StereoVLAForActionPrediction
from stereovla.processing import StereoProcessor
from stereovla.training.feed import Batches
from stereovla.training.losses import answer

LANGUAGE = ("input_ids", "attention_mask", "pixel_values", "labels")


@dataclass
class ForgettingOptions:
    """What `python -m benchmarks.forgetting` can be told."""

    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    dataset: str = field(metadata={"help": "Folder or Hub id of a dataset of the base model's robot."})
    batches: int = field(default=8, metadata={"help": "Held-out batches."})
    batch_size: int = field(default=24, metadata={"help": "Windows of a batch."})


@torch.no_grad()
def held_out_losses(model, batches: list[tuple[dict, list[str]]]) -> dict[str, float]:
    """{loss: mean over the samples}, of the answers by what they are about, and of the actions."""
    found: dict[str, list[float]] = defaultdict(list)
    for inputs, objectives in tqdm(batches, unit="batch", leave=False):
        output = model(**inputs)
        for objective, loss in zip(objectives, output.sample_language_loss.tolist(), strict=True):
            found[answer(objective)].append(loss)
        if output.sample_action_loss is not None:
            found["action"] += [loss for loss in output.sample_action_loss.tolist() if not math.isnan(loss)]
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def main(arguments: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(ForgettingOptions, description=__doc__).parse_args_into_dataclasses(arguments)
    base = PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
    model = StereoVLAForActionPrediction.from_pretrained(base).eval()
    processor, own = StereoProcessor.from_pretrained(options.adapter), StereoProcessor.from_pretrained(base)
    same = (processor.state_dim, processor.action_dim) == (own.state_dim, own.action_dim)
    mixture = {"action": 2.0, "pose": 1.0} if same else {}
    stream = WindowStream(
        options.dataset,
        split="validation",
        chunk_size=own.chunk_size,
        history=own.state_history,
        mixture={"depth": 1.0, "box": 1.0, "camera": 1.0, **mixture},
        depth_map_share=0.0,
    )
    batches = []
    for inputs, objectives, _ in Batches(stream, options.batch_size, own, model.config):
        if inputs is not None:
            kept = inputs if same else {name: inputs[name] for name in LANGUAGE}
            batches.append((kept, objectives))
        if len(batches) == options.batches:
            break
    table = {"base": held_out_losses(model, batches)}
    model.resize_heads(processor.state_dim, processor.action_dim, processor.num_turns)
    adapted = PeftModel.from_pretrained(model, options.adapter).eval()
    for name, switch in {"adapter switched off": adapted.disable_adapter(), "adapter on": nullcontext()}.items():
        with switch:
            table[name] = held_out_losses(adapted, batches)
    names = list(table["base"])
    print(f"\n{options.batches} batches of {options.batch_size} held-out windows of {options.dataset}\n")
    print("| way | " + " | ".join(names) + " |\n|" + "---|" * (1 + len(names)))
    for way, losses in table.items():
        print(f"| {way} | " + " | ".join(f"{losses[name]:.4f}" for name in names) + " |")


if __name__ == "__main__":
    main()
