"""The folders that can be published: what they must hold, and a copy in which nothing points at this machine."""

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from stereovla.dataset_builder.dataset.checking import find_problems
from stereovla.dataset_builder.dataset.folders import INFO
from stereovla.dataset_builder.formats.lerobot_metadata import check_whole
from stereovla.sources import HUB_ID, remote_code
from stereovla.untrusted import inside

REFERENCE = "reference_prediction.safetensors"
PROCESSOR = ("processor_config.json", "tokenizer.json", REFERENCE, "training.json")
NEEDED = {
    "model": ("config.json", "model.safetensors", *PROCESSOR),
    "adapter": ("adapter_config.json", "adapter_model.safetensors", *PROCESSOR),
}
# what is published without being asked for: the files that this project, transformers and PEFT write
_OF_MODELS = (
    r"README\.md|LICENSE|chat_template\.jinja|merges\.txt|tokenizer\.model|"
    r"((generation_|adapter_|processor_|preprocessor_|tokenizer_)?config|tokenizer|special_tokens_map|added_tokens|vocab|"
    r"training)\.json|(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|" + re.escape(REFERENCE) + "|"
    r"images/sample\.png|(success|losses|errors)\.png|rollout\.gif|\.eval_results/[\w-]+\.yaml"
)
WRITTEN = {
    "model": _OF_MODELS,
    "adapter": _OF_MODELS,
    "dataset": r"README\.md|LICENSE|data/[\w.]+-\d{5}-of-\d{5}\.parquet|meta/(info|stats|manifest|build)\.json|"
    r"images/samples\.png",
    "lerobot dataset": r"README\.md|LICENSE|meta/(info|stats)\.json|meta/tasks\.parquet|meta/rig\.yaml|"
    r"(data|meta/episodes)/chunk-\d{3,}/file-\d{3,}\.parquet|videos/[\w.-]+/chunk-\d{3,}/file-\d{3,}\.mp4",
}
DATASETS = ("dataset", "lerobot dataset")  # kinds that are datasets to the Hub
# pickles, or may hold one
EXECUTABLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".h5", ".hdf5", ".keras")


def kind_of(folder: Path) -> str:
    """ "model", "adapter", "dataset" or "lerobot dataset"; FileNotFoundError for anything else."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give OUTPUT/model of train.py, or a dataset's folder")
    if (folder / INFO).exists():  # LeRobot's has this name too
        return "lerobot dataset" if lerobot_version(folder) else "dataset"
    for kind, name in (("adapter", "adapter_config.json"), ("model", "config.json")):
        if (folder / name).exists():
            return kind
    raise FileNotFoundError(
        f"{folder} lacks config.json (a model), adapter_config.json (an adapter) and {INFO} (a dataset); give "
        "OUTPUT/model of train.py, or a dataset's folder"
    )


def lerobot_version(folder: Path) -> str | None:
    """The version of LeRobot's format that a dataset has; None for one of ours."""
    content = json.loads((folder / INFO).read_text(encoding="utf-8"))
    version = content.get("codebase_version") if isinstance(content, dict) else None
    return None if version is None else str(version)


def check_folder(folder: Path) -> str:
    """The kind of a folder that is whole; FileNotFoundError or ValueError that names what it lacks."""
    kind = kind_of(folder)
    if kind == "dataset":
        if problems := find_problems(folder, quick=True):
            raise ValueError(f"{folder} is no whole dataset:\n" + "\n".join(problems))
        return kind
    if kind == "lerobot dataset":
        check_whole(folder)
        return kind
    missing = [name for name in NEEDED[kind] if not (folder / name).exists()]
    missing = [name for name in missing if name != "model.safetensors" or not list(folder.glob("model-*.safetensors"))]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete {kind}: it lacks {', '.join(missing)}; train.py writes them all"
        )
    return kind


def published_files(folder: Path, include: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(names that are sent, names that are left out).

    Sent are the files that this project writes into such a folder, the code that the model and the processor name, and
    what `include` names: paths in the folder, or patterns as docs/*.md, which find no hidden files. ValueError for one
    that finds nothing or a file that may run code when it is loaded, and for links that lead out of the folder.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    # code that is named as another repository's may lie here all the same: saving copies what was loaded
    code = {name.rpartition("--")[2] for name in remote_code(folder)}
    sent = {name for name in names if re.fullmatch(WRITTEN[kind_of(folder)], name) or name in code}
    for pattern in include:
        found = {name for name in names if name == pattern}
        found |= {name for name in fnmatch.filter(names, pattern) if not re.search(r"(^|/)\.", name)}
        if not found:
            raise ValueError(f"--include {pattern!r} finds no file in {folder}; hidden files are named in full")
        sent |= found
    if refused := [name for name in sorted(sent) if name.lower().endswith(EXECUTABLE)]:
        raise ValueError(f"{folder}: {', '.join(refused)}: loading these may run code; leave them out")
    for name in sent:
        inside(folder, name)
    return sorted(sent), [name for name in names if name not in sent]


def dataset_names(options: Mapping) -> list[str]:
    """Datasets of a training without their weights: ["a=0.3", "b"] -> ["a", "b"]."""
    names = options["dataset"]
    return [name.rpartition("=")[0] if len(names) > 1 and "=" in name else name for name in names]


def public_datasets(options: Mapping, given: Sequence[str]) -> list[str]:
    """What a training's datasets are called outside of this machine: their Hub ids, else the last part of their path.

    Args:
        given: Hub ids for the datasets that are folders, in their order; none, or one for each.
    """
    names = dataset_names(options)
    local = [name for name in names if Path(name).exists() or not HUB_ID.fullmatch(name)]
    if given and len(given) != len(local):
        raise ValueError(
            f"--dataset_ids has {len(given)} ids; the model was trained on {len(local)} folders: {', '.join(local)}"
        )
    called = dict(zip(local, given or [Path(name).resolve().name for name in local], strict=True))
    return [called.get(name, name) for name in names]


def replacements(folder: Path, kind: str, base_model: str | None, dataset_ids: Sequence[str]) -> dict[str, str]:
    """{file: text that is sent in its place}: files that name folders of this machine; ValueError for an adapter whose
    base is such a folder, unless `base_model` says what it is on the Hub.
    """
    if kind in DATASETS:
        return {}
    training = json.loads((folder / "training.json").read_text())
    options = training["options"]
    options["dataset"] = public_datasets(options, dataset_ids)
    options.pop("output_dir", None)
    if options["model"] and is_local(options["model"]) and base_model:
        options["model"] = base_model
    for name, value in options.items():  # whatever else was read from a folder
        if isinstance(value, str) and "/" in value and Path(value).exists():
            options[name] = Path(value).name
    changed = {"training.json": json.dumps(training, indent=2)}
    if kind == "model":
        config = json.loads((folder / "config.json").read_text())
        source = config.get("depth_expert_source")  # of DepthVLA
        if source is not None and is_local(source):
            config["depth_expert_source"] = Path(source).name
            changed["config.json"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if kind == "adapter":
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base_of(folder, base_model)
        changed["adapter_config.json"] = json.dumps(config, indent=2)
    return {name: text for name, text in changed.items() if text != (folder / name).read_text()}


def is_local(model: str) -> bool:
    return Path(model).exists() or not HUB_ID.fullmatch(model)


def base_of(folder: Path, base_model: str | None) -> str:
    """Hub id of an adapter's base."""
    base = base_model or json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    if base is None or is_local(base):
        raise ValueError(
            f"the adapter's base is {base!r}, a folder that only this machine has; publish it and give its id as "
            "--base_model NAME/REPOSITORY"
        )
    return base


@contextmanager
def staged(folder: Path, replaced: Mapping[str, str], include: Sequence[str] = ()) -> Iterator[Path]:
    """A folder with exactly what is sent, by links, for as long as the context lasts."""
    with TemporaryDirectory() as temporary:
        for name in published_files(folder, include)[0]:
            path = Path(temporary, "staged", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in replaced:
                path.write_text(replaced[name])
            else:
                path.symlink_to((folder / name).resolve())
        yield Path(temporary, "staged")
