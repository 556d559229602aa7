"""Says what is wrong with a folder that is no checkpoint, and what identifies one that is."""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import HfApi

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one file, or an index of shards
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
NEEDED = ("config.json", *PROCESSOR)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is allowed."""


def check_checkpoint(source: str, weights: bool = True) -> None:
    """InputError unless `source` is a folder with all that a checkpoint or an adapter needs, or has the form of a Hub
    id, owner/name.

    Args:
        weights: whether weights are needed too.
    """
    folder = Path(source)
    if not folder.exists():
        if HUB_ID.fullmatch(source):
            return
        raise InputError(f"{source!r} is neither a folder nor a Hub id such as 'owner/name'")
    if not folder.is_dir():
        raise InputError(f"{source!r} is a file; a checkpoint is a folder with {', '.join(NEEDED)} and {WEIGHTS[0]}")
    if (folder / ADAPTER).is_file():
        return _check_adapter(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if weights and not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(" or ".join(WEIGHTS))
    for name in ("config.json", "processor_config.json"):
        if name not in missing:
            missing += [file for file in _remote_code(folder / name) if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{source!r} is no checkpoint: it lacks {', '.join(dict.fromkeys(missing))}")


def adapted_model(source: str) -> str | None:
    """Folder or Hub id of the model that the adapter `source`, a folder, changes; None where it is no adapter."""
    path = Path(source) / ADAPTER
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else None


def _check_adapter(folder: Path) -> None:
    missing = [name for name in (ADAPTER_WEIGHTS, *PROCESSOR) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{str(folder)!r} is no adapter: it lacks {', '.join(missing)}")
    try:
        check_checkpoint(adapted_model(str(folder)))
    except InputError as error:
        raise InputError(f"the model that the adapter {str(folder)!r} changes is missing: {error}") from error


def _remote_code(path: Path) -> list[str]:
    """Python files in this folder that the auto_map of a JSON file names."""
    try:
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})
    except json.JSONDecodeError as error:
        raise InputError(f"{str(path)!r} is no JSON: {error}") from error
    references = [value for value in auto_map.values() if isinstance(value, str) and "--" not in value]
    return [reference.split(".")[0] + ".py" for reference in references]


def fingerprint(source: str) -> str:
    """What identifies the weights: a digest of a folder's configs and weights, or the commit of a Hub repository."""
    folder = Path(source)
    if not folder.is_dir():
        return str(HfApi().model_info(source).sha)
    digest = hashlib.sha256()
    if (base := adapted_model(source)) is not None:
        digest.update(fingerprint(base).encode())
    for path in sorted([*folder.glob("*.safetensors"), *(folder / name for name in NEEDED)]):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
