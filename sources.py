"""What commands are given by name, a folder or an id on the Hub: checked before any work, and loaded."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one file, or an index of shards
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
NEEDED = ("config.json", *PROCESSOR)
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = Path(__file__).parent
ROOMS_OF_CODE = ("modeling_stereovla", "processing")  # what ships with a model
DTYPES = ("float32", "bfloat16", "float16")  # of weights
# of --run_code, in words
RUN_CODE = "Run the code of a model on the Hub that an adapter names, also where it is not that of this installation."
# what commands use of a checkpoint's own code, part by part, whatever kind of policy it is
INTERFACE = {
    "config": (
        *("action_dim", "chunk_size", "image_size", "language_loss_weight", "max_delay", "pose_dim", "reads_depth"),
        *("state_dim", "state_history", "stereo_config"),
    ),
    "model": ("compile_predict_action", "pointers", "predict_action", "resize_heads"),
    "processor": (
        *("action_dim", "control_rates_hz", "decode_actions", "decode_boxes", "decode_depths", "decode_poses"),
        *("encode_running_actions", "norm_stats", "normalizer", "pixel_views", "pose_dim", "state_dim", "tokenizer"),
    ),
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name, of datasets also owner/name@revision


class InputError(ValueError):
    """What the user gave cannot be used; the message says what is allowed."""


@dataclass(frozen=True)
class Base:
    """The model on the Hub that an adapter changes, as it was looked at before any of its code runs.

    Args:
        name, commit: repository and revision.
        code: Python files that loading it runs; of another repository's "owner/name--file.py".
        changed: those of `code` that are not this installation's.
    """

    name: str
    commit: str
    code: list[str]
    changed: list[str]


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


def remote_code(folder: Path) -> list[str]:
    """The Python files that a folder's configs name as code of its own, and those that these import; those that lie in
    another repository as "owner/name--file.py".
    """
    todo: set[str] = set()
    for path in folder.glob("*config.json"):
        try:
            todo |= _modules(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    found = {f"{module}.py" for module in todo if "--" in module}
    while todo:
        module = todo.pop()
        path = folder / f"{module}.py"
        if path.is_file() and path.name not in found:
            found.add(path.name)
            todo |= set(re.findall(r"^\s*(?:from|import)\s+\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return sorted(found)


def _modules(config: Any, within: bool = False) -> set[str]:
    """Modules that the auto_maps in a config name: "module.Class" or "owner/name--module.Class", without the class."""
    if isinstance(config, dict):
        return {name for key, value in config.items() for name in _modules(value, within or key == "auto_map")}
    if isinstance(config, list):
        return {name for value in config for name in _modules(value, within)}
    if not (within and isinstance(config, str)):
        return set()
    repository, mark, name = config.rpartition("--")
    return {repository + mark + name.partition(".")[0]}


def changed_code(folder: Path) -> list[str]:
    """Of the code that loading a folder runs, what is not that of this installation."""
    here = {path.name: path for room in ROOMS_OF_CODE for path in (ROOT / room).glob("*.py")}
    return [
        name
        for name in remote_code(folder)
        if name not in here or (folder / name).read_bytes() != here[name].read_bytes()
    ]


def code_in_words(code: list[str], changed: list[str]) -> str:
    """How many files `code` names, and which of them are not those of this installation."""
    there = f"{len(code)} files"
    return f"{there}, not as in this installation: {', '.join(changed)}" if changed else f"{there} of this installation"


def look_at_base(name: str) -> Base:
    """The model `name` on the Hub, of which its configs and code are fetched and nothing is run."""
    from huggingface_hub import snapshot_download

    with source_of(name, "checkpoint"):
        folder = Path(snapshot_download(name, allow_patterns=["*.py", "*config.json"]))
    if (folder / ADAPTER).is_file():  # Auto classes would load the model that this one names
        raise InputError(f"{name}, which an adapter changes, is an adapter itself; merge it into its model first")
    return Base(name, folder.name, remote_code(folder), changed_code(folder))


def trusted_base(source: str, run_code: bool = False) -> Base | None:
    """The model on the Hub that the adapter `source` changes; None where it changes none there. InputError where the
    code of that model is not this installation's, unless `run_code`: an adapter's user has not chosen its model.
    """
    name = adapted_model(source)
    if name is None or Path(name).is_dir() or (Path(source) / NEEDED[0]).is_file():  # the last brings its model itself
        return None
    base = look_at_base(name)
    if base.changed and not run_code:
        raise InputError(
            f"the adapter {source} changes {name} on the Hub, at revision {base.commit}, whose code would run on this "
            f"machine and is not that of this installation: {', '.join(base.changed)}; read it, then say --run_code to "
            "run it"
        )
    return base


def load_processor(source: str, run_code: bool = False) -> Any:
    """The processor of a checkpoint or an adapter; of an adapter that was saved without one, its model's."""
    from transformers import AutoProcessor

    revision = None
    if file_of(source, PROCESSOR[0]) is None and (name := adapted_model(source)) is not None:
        base = trusted_base(source, run_code)
        source, revision = name, base and base.commit
    with source_of(source, "checkpoint"):
        return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=True)


def check_interface(source: str, **parts: Any) -> None:
    """InputError where the code of a checkpoint is not what commands use, as `INTERFACE` says.

    Args:
        parts: config, model and processor as they were loaded, or some of these.
    """
    lacking = [f"{part}.{name}" for part, of in parts.items() for name in INTERFACE[part] if not hasattr(of, name)]
    if lacking:
        raise InputError(
            f"the code in {source!r} is older than this installation, or of no policy of this project: it lacks "
            f"{', '.join(lacking)}; docs/hub.md, 'Checkpoints of older versions', says how to save it anew"
        )


def load_checkpoint(
    source: str, device: str = "cpu", run_code: bool = False, adapted: bool = True, dtype: str | None = None
) -> tuple[Any, Any]:
    """The trained model in evaluation mode and its processor, from a folder or Hub id of a model or an adapter; its
    remote code is run.

    Args:
        run_code: whether code also of a model on the Hub is run that an adapter names, where it is not that of this
            installation; else that is an InputError.
        adapted: False gives the model that an adapter changes, without the adapter.
        dtype: one of `DTYPES` that the weights are cast to; None = as they were saved.
    """
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {dtype!r}; valid: {', '.join(DTYPES)}, or None, as the weights were saved")
    check_checkpoint(source)
    base = trusted_base(source, run_code)
    from transformers import AutoModel  # takes seconds

    cast = {} if dtype is None else {"dtype": dtype}
    with source_of(source, "checkpoint"):
        if base is not None:
            words = code_in_words(base.code, base.changed)
            told = f"{source} changes {base.name} at revision {base.commit}, whose code runs on this machine: {words}"
            print(told, flush=True)
            # the revision that was looked at
            model = AutoModel.from_pretrained(base.name, revision=base.commit, trust_remote_code=True, **cast)
            if adapted:
                model.load_adapter(source)
        else:
            name = source if adapted else adapted_model(source) or source
            model = AutoModel.from_pretrained(name, trust_remote_code=True, **cast)
    processor = load_processor(source, run_code)
    check_interface(source, config=model.config, model=model, processor=processor)
    return model.to(device).eval(), processor


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
