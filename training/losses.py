"""Losses of a step over its parts and all processes: what they are divided by, and their means for the log."""

import math
from collections import defaultdict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stereovla.modeling_stereovla.objectives import IGNORED, OBJECTIVES
from stereovla.training.feed import Batches

LOSSES = tuple(objective.name for objective in OBJECTIVES)
ANSWERS = ("depth", "box", "pose", "camera")  # what language losses are about


def answer(objective: str) -> str:
    """What a sample's language loss is about: action samples are taught the keyframe pose (the released rule)."""
    return "pose" if objective == "action" else objective


def answer_counts(labels: torch.Tensor, objectives: list[str]) -> dict[str, torch.Tensor]:
    """Labelled tokens of each of `ANSWERS` in a batch of labels (B, L)."""
    tokens = (labels[:, 1:] != IGNORED).sum(-1)
    return {
        name: tokens[[number for number, other in enumerate(objectives) if answer(other) == name]].sum()
        for name in ANSWERS
    }


def answer_weights(shares: dict[str, float], objectives: list[str], counts: dict[str, float]) -> list[float]:
    """Factors on the samples' language losses that make their sum over `counts["language"]` the sum of the means of
    each of `ANSWERS`, times its share relative to the action's.

    Args:
        shares: of the objectives. counts: labelled tokens, in all ("language") and of each answer.
    """
    scale = shares["action"] or max(shares.values())
    return [shares[answer(name)] / scale * counts["language"] / counts[answer(name)] for name in objectives]


def agree(accelerator: Accelerator, counts: list[dict[str, torch.Tensor]], stop: bool) -> tuple[dict, set[str], bool]:
    """What a step's losses are divided by, in one exchange between the processes.

    Returns:
        counts of the whole step, over its parts and all processes, divided by the number of processes, as gradients
        are averaged over these; the names of the losses that the step has; whether any process was told to `stop`.
    """
    zero = torch.zeros((), device=accelerator.device)
    names = (*LOSSES, *ANSWERS)
    mine = [sum((part[name].float() for part in counts if name in part), start=zero) for name in names]
    *whole, stops = accelerator.reduce(torch.stack([*mine, zero + stop]), reduction="sum").tolist()
    totals = dict(zip(names, whole, strict=True))
    share = {name: max(count, 1.0) / accelerator.num_processes for name, count in totals.items()}
    return share, {name for name in LOSSES if totals[name]}, stops > 0


class LossMeans:
    """Means of each loss since the last `pop`, over all processes; language losses are kept apart by objective."""

    def __init__(self):
        self.steps: list[dict] = []
        self.samples: list[tuple[list[str], torch.Tensor, torch.Tensor]] = []

    def add(self, outputs: list, objectives: list[list[str]], names: set[str]) -> None:
        """The parts of one step, and the losses that it has on any process. Nothing is read from the device here."""
        zero = outputs[0].loss.new_zeros(())
        step = {"loss/total": sum(output.loss.detach() for output in outputs)}
        for objective in OBJECTIVES:
            name = objective.name
            if name not in names or name == "language":  # which is told by answer, below
                continue
            told = {f"loss/{name}": f"{name}_loss"}
            if objective.accuracy is not None:
                told[f"accuracy/{name}"] = objective.accuracy
            for key, output_name in told.items():
                values = [output.get(output_name) for output in outputs]
                step[key] = sum((value.detach() for value in values if value is not None), start=zero)
        self.steps.append(step)
        for output, of_samples in zip(outputs, objectives, strict=True):
            self.samples.append((of_samples, output.sample_language_loss, output.sample_token_accuracy))

    def pop(self) -> dict[str, float]:
        sums: dict[str, list[float]] = defaultdict(list)
        for step in self.steps:
            for name, value in step.items():
                sums[name].append(value.item())
        for names, losses, accuracies in self.samples:
            for objective, loss, accuracy in zip(names, losses.tolist(), accuracies.tolist(), strict=True):
                if not math.isnan(loss):
                    sums[f"loss/{answer(objective)}"].append(loss)
                    sums[f"accuracy/{answer(objective)}"].append(accuracy)
        self.steps, self.samples = [], []
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for part in gather_object([{name: (sum(values), len(values)) for name, values in sums.items()}]):
            for name, (value, count) in part.items():
                totals[name][0] += value
                totals[name][1] += count
        return {name: value / count for name, (value, count) in sorted(totals.items())}


def validate(accelerator: Accelerator, model, batches: Batches, count: int) -> dict[str, float]:
    """Mean losses on the first batches of the held-out episodes, with fixed noise; the same on every process."""
    means, unwrapped = LossMeans(), accelerator.unwrap_model(model)
    model.eval()
    taken = ((inputs, names) for inputs, names, _ in batches if inputs is not None)
    with torch.no_grad():
        for _, (inputs, names) in zip(range(count), taken, strict=False):
            inputs = to_device(inputs, accelerator)
            present = {name for name, count in unwrapped.loss_counts(**inputs).items() if count}
            means.add([unwrapped(**inputs)], [names], present)
    model.train()
    return {f"validation/{name}": value for name, value in means.pop().items()}


def to_device(inputs: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    return {name: value.to(accelerator.device, non_blocking=True) for name, value in inputs.items()}
