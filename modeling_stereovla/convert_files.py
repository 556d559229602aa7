"""Weight files read tensor by tensor, and what of them becomes which weight of ours, for all converters.

What is read is mapped. Every check runs on names and shapes alone, before the first tensor is read.
"""

import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

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


def converted_keys(part: Part) -> dict[str, str]:
    """Our key -> published key, of those that the part knows; `plan_conversion` lists the others."""
    found = {}
    for key, outline in part.source.outlines.items():
        with suppress(KeyError):
            found |= dict.fromkeys(part.convert(key, outline), key)
    return found


def read_description(path: str | Path) -> dict:
    """config.json of a folder; {} for a file or a folder without one."""
    description = Path(path) / "config.json"
    return json.loads(description.read_text(encoding="utf-8")) if description.is_file() else {}


def below(rule: Convert, prefix: str) -> Convert:
    """`rule` with `prefix` before its keys of ours."""
    return lambda key, tensor: {prefix + name: value for name, value in rule(key, tensor).items()}


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
