"""Model folders written shard by shard, for all converters: what is converted is written as soon as a shard is full, so
that a conversion holds one shard.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .convert_files import Part, Plan, WeightSource, plan_conversion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class Output:
    """What every converter can be told about its result."""

    out: str = field(metadata={"help": "Folder to write; it must not exist."})
    dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16 or float16; as the weights are if not given."}
    )
    max_shard_gb: float = field(default=2.0, metadata={"help": "Largest weight file, 10^9 bytes."})


def read_overrides(text: str | None) -> dict:
    """--overrides, fields of a config to replace; ValueError for what is no JSON object."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"--overrides {text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'--overrides is {text!r}; it must be a JSON object, such as {{"chunk_size": 8}}')
    return found


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype named `name`; None stays None."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; valid: {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def common_dtype(plan: Plan) -> torch.dtype:
    """The dtype of all floating-point tensors of the plan.

    Raises:
        ValueError: there is more than one; then one must be chosen.
    """
    dtypes = {
        outline.dtype for _, _, outlines in plan.steps for outline in outlines.values() if outline.is_floating_point()
    }
    if len(dtypes) != 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"the weights are {names}; choose one dtype for all with --dtype: {', '.join(DTYPES)}")
    return dtypes.pop()


def split_shards(plan: Plan, dtype: torch.dtype, max_shard_bytes: int) -> list[list[tuple[Part, str]]]:
    """Steps of the plan in groups of at most `max_shard_bytes`; a single step that is larger has a group of its own."""
    shards, size = [[]], 0
    for part, key, outlines in plan.steps:
        needed = sum(
            outline.numel() * (dtype.itemsize if outline.is_floating_point() else outline.dtype.itemsize)
            for outline in outlines.values()
        )
        if shards[-1] and size + needed > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((part, key))
        size += needed
    return shards


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor alone in its memory, as safetensors wants it (a slice of a fused weight is not)."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_shards(folder: Path, plan: Plan, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Reads, converts and writes the planned tensors, one shard after the other, in the layout of the Hub.

    Floating-point tensors become `dtype`, integer buffers stay.
    """
    shards, weight_map, total = split_shards(plan, dtype, max_shard_bytes), {}, 0
    for number, steps in enumerate(shards, 1):
        many = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name, state = f"model{many}.safetensors", {}
        for part, key in steps:
            for ours, tensor in part.convert(key, part.source.read(key)).items():
                state[ours] = _own_storage(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        save_file(state, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(state, name)
        total += sum(tensor.nbytes for tensor in state.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def outline_model(model_class: type[PreTrainedModel], config) -> PreTrainedModel:
    """The model of `config` without memory for its weights (device "meta")."""
    with torch.device("meta"):
        return model_class(config)


def initial_weights(model: PreTrainedModel, names: Sequence[str], seed: int) -> Part:
    """Initial weights, float32, of what no part brings: the modules `names`, as far as the model has them.

    Args:
        model: of `outline_model`; these modules get memory, the others stay without.
    """
    modules = dict(model.named_modules())
    names = [name for name in names if name in modules]
    for name in names:
        modules[name].to_empty(device="cpu")
    for module in modules.values():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
    state = {key: value for key, value in model.state_dict().items() if key.startswith(tuple(f"{n}." for n in names))}
    return Part(WeightSource.of("the new parts", state), lambda key, tensor: {key: tensor})


def check_output(folder: str | Path) -> Path:
    """`folder` as a path; FileExistsError if there is something, as nothing is overwritten."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder or remove it")
    return folder


def write_model(
    output: Output,
    model: PreTrainedModel,
    parts: list[Part],
    what: str,
    documents: dict[str, dict] | None = None,
) -> Path:
    """Converts `parts` into a folder that `from_pretrained` loads. The folder appears when it is complete.

    Args:
        output: folder, dtype of the floating-point tensors (None = that of the sources, which then must have a single
            one) and limit of a weight file.
        model: of `outline_model`; gives the keys, the shapes, the config and, for our classes, the code that ships.
        what: what the sources should be, for the message of a refusal.
        documents: further JSON files, name -> content.

    Raises:
        ValueError: keys that are unknown, missing or of another shape, each listed; nothing is written then.
    """
    folder, chosen = check_output(output.out), parse_dtype(output.dtype)
    tied = model.all_tied_weights_keys  # one tensor with another, which alone is written
    plan = plan_conversion(parts, {key: t for key, t in model.state_dict().items() if key not in tied}, what)
    chosen = chosen or common_dtype(plan)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        if model._auto_class is not None:
            custom_object_save(model, unfinished, config=model.config)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = chosen
        model.config.save_pretrained(unfinished)
        if model.can_generate():
            model.generation_config.save_pretrained(unfinished)
        for name, content in (documents or {}).items():
            (unfinished / name).write_text(json.dumps(content, indent=2) + "\n")
        write_shards(unfinished, plan, chosen, int(output.max_shard_gb * 1e9))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
