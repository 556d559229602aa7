"""Weight files read tensor by tensor and model folders written shard by shard, for all converters.

Memory: what is read is mapped, and what is converted is written as soon as a shard is full: a conversion holds one
shard. Every check runs on names and shapes alone, before the first tensor is read.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

# published key and tensor -> our keys and tensors; {} where our model does without it, KeyError where it is unknown.
# Called with tensors of the "meta" device first.
Convert = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(kw_only=True)
class Output:
    """What every converter can be told about its result."""

    out: str = field(metadata={"help": "Folder to write; it must not exist."})
    dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16 or float16; as the weights are if not given."}
    )
    max_shard_gb: float = field(default=2.0, metadata={"help": "Largest weight file, 10^9 bytes."})


@dataclass(frozen=True)
class WeightSource:
    """Named tensors that are read one at a time.

    name: what messages call it. outlines: key -> tensor of the "meta" device (shape and dtype). read: key -> tensor.
    Making one reads no tensor.
    """

    name: str
    outlines: dict[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]

    @classmethod
    def of(cls, name: str, state: dict[str, torch.Tensor]) -> "WeightSource":
        """A state dict that is in memory (or mapped into it)."""
        return cls(name, {key: tensor.to("meta") for key, tensor in state.items()}, state.__getitem__)

    def below(self, prefix: str) -> "WeightSource":
        """The tensors whose keys begin with `prefix`, under what follows it."""
        outlines = {key[len(prefix) :]: value for key, value in self.outlines.items() if key.startswith(prefix)}
        return WeightSource(self.name, outlines, lambda key: self.read(prefix + key))

    def without(self, prefix: str) -> "WeightSource":
        """The tensors whose keys do not begin with `prefix`."""
        outlines = {key: value for key, value in self.outlines.items() if not key.startswith(prefix)}
        return WeightSource(self.name, outlines, self.read)


@dataclass(frozen=True)
class Part:
    """A source with the function that turns its keys and tensors into ours."""

    source: WeightSource
    convert: Convert


@dataclass
class Plan:
    """Which keys of ours each published key becomes, in the order of the sources."""

    steps: list[tuple[Part, str, dict[str, torch.Tensor]]] = field(default_factory=list)


def _open_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
    handle = safe_open(path, "pt")
    outlines = {}
    for key in handle.keys():
        part = handle.get_slice(key)
        outlines[key] = torch.empty(part.get_shape(), dtype=SAFETENSORS_DTYPES[part.get_dtype()], device="meta")
    return outlines, handle.get_tensor


def _open_torch(path: Path) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
    """State dict of a PyTorch file, itself or under "model" or "state_dict", without unpickling objects.

    It is mapped, but for files of before PyTorch 1.6, which cannot be and are read whole.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for name in ("model", "state_dict"):
        content = content.get(name, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict, neither itself nor under 'model' or 'state_dict'")
    return {key: tensor.to("meta") for key, tensor in content.items()}, content.__getitem__


def weight_files(path: str | Path) -> list[Path]:
    """The files with the weights of `path`: itself, or those of a folder in the layout of the Hub.

    Raises:
        FileNotFoundError: there is no such file, or the folder has none of the names in `WEIGHT_FILES`.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} is no weight file and holds none of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    names = sorted(set(json.loads(found.read_text())["weight_map"].values()))
    # beside the index, as the Hub has them; elsewhere a stranger's index is not followed
    if outside := [name for name in names if Path(name).name != name or name in (".", "..")]:
        raise ValueError(f"{found} names {', '.join(outside)}; valid: names of files in {path}")
    return [path / name for name in names]


def open_weights(path: str | Path) -> WeightSource:
    """The tensors of a .safetensors or PyTorch file, or of a folder of them."""
    outlines, readers = {}, {}
    for file in weight_files(path):
        found, read = (_open_safetensors if file.suffix == ".safetensors" else _open_torch)(file)
        if twice := sorted(found.keys() & outlines.keys()):
            raise ValueError(f"{file} repeats {len(twice)} keys of its folder's other files: {', '.join(twice)}")
        outlines |= found
        readers |= dict.fromkeys(found, read)
    return WeightSource(str(path), outlines, lambda key: readers[key](key))


def plan_conversion(parts: list[Part], expected: dict[str, torch.Tensor], what: str) -> Plan:
    """Converts the outlines of all parts and checks the result against the model's keys and shapes, `expected`.

    Args:
        what: what the sources should be; ends the error's first sentence, "not a ...".

    Raises:
        ValueError: it lists every key that is unknown, superfluous, missing, of another shape or written twice.
    """
    plan, unknown, converted, twice = Plan(), [], {}, []
    for part in parts:
        for key, outline in part.source.outlines.items():
            try:
                outlines = part.convert(key, outline)
            except KeyError:
                unknown.append(key)
                continue
            twice += sorted(outlines.keys() & converted.keys())
            converted |= outlines
            if outlines:
                plan.steps.append((part, key, outlines))
    problems = {
        "unknown published keys": unknown,
        "converted keys that the model lacks": converted.keys() - expected.keys(),
        "parameters of the model that the file lacks": expected.keys() - converted.keys(),
        "keys that more than one published key becomes": twice,
        "keys of another shape": [
            f"{key} {tuple(converted[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in converted.keys() & expected.keys()
            if converted[key].shape != expected[key].shape
        ],
    }
    found = [f"{len(keys)} {problem}: {', '.join(sorted(keys))}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError(f"not a {what}; " + "; ".join(found))
    return plan


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
    plan = plan_conversion(parts, model.state_dict(), what)
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


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype named `name`; None stays None."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; valid: {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]
