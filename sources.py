"""What commands are given by name, a folder or an id on the Hub: checked before any work, and loaded."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one file, or an index of shards
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
NEEDED = ("config.json", *PROCESSOR)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name, of datasets also owner/name@revision


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is allowed."""


@contextmanager
def source_of(source: str | Path, kind: str) -> Iterator[Path | None]:
    """The folder `source`, or None for an id on the Hub; what fails within says what was looked for.

    Args:
        kind: what the folder should be, such as "dataset", for the messages.

    Raises:
        InputError: for what has the form of neither, and where the Hub has nothing under an id.
    """
    source, folder = str(source), Path(source)
    if folder.is_dir():
        yield folder
        return
    if folder.exists():
        raise InputError(f"{source!r} is a file; give the folder of a {kind}")
    if not HUB_ID.fullmatch(source) or ("@" in source and kind != "dataset"):
        raise InputError(f"{source!r} is neither a folder nor a Hub id such as 'owner/name': no {kind} is there")
    try:
        yield None
    except OSError as error:
        raise InputError(
            f"there is no folder {source!r}, and the {kind} of this id cannot be read from the Hub: {error}"
        ) from error


def existing_folder(path: str | Path, kind: str) -> Path:
    """The folder `path`, which is to hold a `kind`; InputError where there is none, or a file."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is a file" if path.exists() else f"there is no folder {path}: no {kind} is there")
    return path


def file_of(source: str, name: str) -> Path | None:
    """A file in the folder `source` or in the repository of a model on the Hub; None where it has none."""
    with source_of(source, "checkpoint") as folder:
        if folder is not None:
            return folder / name if (folder / name).is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(source, name))
        except EntryNotFoundError:
            return None


def check_checkpoint(source: str, weights: bool = True) -> None:
    """InputError unless `source` is a folder with all that a checkpoint or an adapter needs, or has the form of a Hub
    id, owner/name.

    Args:
        weights: whether weights are needed too.
    """
    with source_of(source, "checkpoint") as folder:
        pass
    if folder is None:
        return
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
    """Folder or Hub id of the model that the adapter `source` changes; None where it is no adapter."""
    path = file_of(source, ADAPTER)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]


def _check_adapter(folder: Path) -> None:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{str(folder)!r} is no adapter: it lacks {ADAPTER_WEIGHTS}")
    present = [name for name in PROCESSOR if (folder / name).is_file()]
    if present and (missing := [name for name in PROCESSOR if name not in present]):
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


def load_processor(source: str) -> Any:
    """The processor of a checkpoint or an adapter; of an adapter that was saved without one, its model's."""
    from transformers import AutoProcessor

    if file_of(source, PROCESSOR[0]) is None and (base := adapted_model(source)) is not None:
        source = base
    with source_of(source, "checkpoint"):
        return AutoProcessor.from_pretrained(source, trust_remote_code=True)


def load_checkpoint(source: str, device: str = "cpu") -> tuple[Any, Any]:
    """The trained model in evaluation mode and its processor, from a folder or Hub id of a model or an adapter; its
    remote code is run.
    """
    check_checkpoint(source)
    from transformers import AutoModel  # takes seconds

    with source_of(source, "checkpoint"):
        model = AutoModel.from_pretrained(source, trust_remote_code=True)
    return model.to(device).eval(), load_processor(source)


def fingerprint(source: str) -> str:
    """What identifies the weights: a digest of a folder's configs and weights, or the commit of a Hub repository; of an
    adapter also those of its model.
    """
    digest, base, folder = hashlib.sha256(), adapted_model(source), Path(source)
    if base is not None:
        digest.update(fingerprint(base).encode())
    if not folder.is_dir():
        # kept in a folder of the commit's name, so that it is known without the Hub too
        path = file_of(source, NEEDED[0] if base is None else ADAPTER)
        if path is None:
            raise InputError(f"{source!r} on the Hub is no checkpoint: it lacks {NEEDED[0]} and {ADAPTER}")
        if base is None:
            return path.parent.name
        digest.update(path.parent.name.encode())
    for path in sorted([*folder.glob("*.safetensors"), *(folder / name for name in NEEDED)]):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
