"""Checkpoints of a training run: whole tensors in safetensors, so that any number of processes can go on from them."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stereovla.dataset_builder.streaming.lanes import merge_states
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.training.checkpoint_folders import complete_checkpoint, remove_old
from stereovla.training.feed import Feed

# whole tensors on the main process, whatever the model is split over
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# the same, of what is trained: what is frozen comes from where it came at the start, the given model or the seed
SAVED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
# to load it, each process takes its part of the whole tensors
LOADED = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
# names alone are of interest: nothing is gathered
NAMED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Average:
    """Running mean of the trained weights (EMA)."""

    def __init__(self, model, decay: float):
        self.weights = [p for p in model.parameters() if p.requires_grad] if decay else []
        self.means = [weight.detach().clone() for weight in self.weights]
        self._step = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        if self.means:
            self._step(self.means, [weight.detach() for weight in self.weights], None)

    @contextmanager
    def in_place(self):
        """The means, if there are any, take the weights' place for a while; what is written into them then stays."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, mean in zip(self.weights, self.means, strict=True):
            kept = weight.detach().clone()
            weight.copy_(mean)
            mean.copy_(kept)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def tied_names(model) -> dict[str, str]:
    """{name: first name} of the parameters that have several, such as an output layer that is the embedding."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.removeprefix("module.").replace("_orig_mod.", "")
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def whole_tensors(model, options: StateDictOptions = WHOLE) -> dict[str, torch.Tensor]:
    """All weights and buffers, or those of `options`, whole, on the main process; each once: of weights that processes
    split between them, `save_pretrained` does not see that two are the same.
    """
    tied = tied_names(model)
    return {name: t for name, t in get_model_state_dict(model, options=options).items() if name not in tied}


def save_bad_batch(output: Path, step: int, process: int, parts: Sequence[dict[str, torch.Tensor]]) -> Path:
    """Inputs of a step that went wrong, for inspection; returns the file."""
    path = output / f"bad-batch-{step:07d}-{process}.safetensors"
    partial = path.with_suffix(".partial")
    write_tensors(partial, {f"{n}.{name}": value for n, part in enumerate(parts) for name, value in part.items()})
    os.replace(partial, path)
    return path


def save_checkpoint(
    output: Path, keep: int, accelerator: Accelerator, model, optimizer, average: Average, step: int, feed: Feed
) -> Path:
    """Weights, optimizer, running means and stream position in a folder of `output`, all of it or nothing; of the
    folders before it, `keep` - 1 stay. Returns the folder.
    """
    folder = output / f"checkpoint-{step:07d}"
    partial = folder.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    files = {"model": whole_tensors(model, SAVED)}
    files["optimizer"] = optimizer_tensors(model, optimizer)
    if average.means:
        with average.in_place():
            # of its own memory: what lies in the model is about to be swapped back
            files["average"] = {name: t.clone() for name, t in whole_tensors(model, SAVED).items()}
    write_stream(partial, accelerator.process_index, feed)
    if accelerator.is_main_process:
        for name, tensors in files.items():
            write_tensors(partial / f"{name}.safetensors", tensors)
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        (partial / "trainer.json").write_text(json.dumps({"step": step, "scaler": scaler}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        complete_checkpoint(partial, folder)
        remove_old(output, keep)
    return folder


def optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """What a prepared optimizer knows of each trained weight, whole, on the main process: {"weight/name": tensor}."""
    state = get_optimizer_state_dict(model, optimizer.optimizer, options=SAVED).get("state", {})
    return {f"{name}/{key}": value for name, entry in state.items() for key, value in entry.items()}


def load_optimizer(path: Path, model, optimizer) -> None:
    """Undoes writing `optimizer_tensors` to `path`."""
    groups = get_optimizer_state_dict(model, optimizer.optimizer, options=NAMED)["param_groups"]
    state: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in load_file(path).items():
        name, entry = key.rsplit("/", 1)
        state[name][entry] = value
    whole = {"state": dict(state), "param_groups": groups}
    set_optimizer_state_dict(model, optimizer.optimizer, whole, options=LOADED)


def load_weights(path: Path, model) -> None:
    tensors, expected = load_file(path), get_model_state_dict(model, options=NAMED)
    tensors |= {name: tensors[first] for name, first in tied_names(model).items() if first in tensors}
    if tensors.keys() != expected.keys():
        raise ValueError(f"{path} has other weights than this model: {sorted(tensors.keys() ^ expected.keys())[:5]}")
    set_model_state_dict(model, tensors, options=LOADED)


def load_checkpoint(folder: Path, accelerator: Accelerator, model, optimizer, average: Average, stream) -> int:
    """Undoes `save_checkpoint`, with any number of processes; returns the step."""
    trainer = json.loads((folder / "trainer.json").read_text())
    if average.means:
        with average.in_place():
            load_weights(folder / "average.safetensors", model)
    load_weights(folder / "model.safetensors", model)
    load_optimizer(folder / "optimizer.safetensors", model, optimizer)
    if trainer["scaler"] is not None:
        accelerator.scaler.load_state_dict(trainer["scaler"])
    load_stream(folder, stream)
    return trainer["step"]


def write_stream(folder: Path, process: int, feed: Feed) -> None:
    """Where the stream of a process stands."""
    (folder / f"stream-{process:05d}.json").write_text(json.dumps(list(feed.states.values())))


def load_stream(folder: Path, stream: WindowStream) -> None:
    """Undoes `write_stream` of all processes, with any number of them."""
    files = sorted(folder.glob("stream-*.json"))
    stream.load_state_dict(merge_states([state for file in files for state in json.loads(file.read_text())]))
