"""The folder of a model in transformers' form: found, looked at before any of its code runs, and loaded."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

MODEL = "model"  # folder of the model within that of a policy
WEIGHTS_DTYPES = ("float32", "bfloat16", "float16", "saved")
# what the policy uses of the model's own code, part by part
_INTERFACE = {
    "config": ("chunk_size", "reads_depth", "state_history"),
    "model": ("freeze", "pointers", "predict_action", "resize_heads"),
    "processor": ("control_rates_hz", "decode_actions", "norm_stats", "num_turns", "pixel_views", "state_names"),
}
_LEROBOTS = ("config.json", "train_config.json")  # files of a policy that hold its config


def model_folder(source: str | Path, revision: str | None = None, code: bool = True) -> Path:
    """The folder of the model `source`, a folder or an id on the Hub, of which the files are fetched.

    Args:
        code: False fetches the configs alone.
    """
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.json", *(["*.py", "*.safetensors", "*.jinja"] if code else [])]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    if (folder / MODEL / "config.json").is_file():
        raise ValueError(f"{source} is a policy of LeRobot; give it as --policy.path={source}")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{source} is an adapter; merge it into its model first (PeftModel.merge_and_unload)")
    if missing := [name for name in ("config.json", "processor_config.json") if not (folder / name).is_file()]:
        raise ValueError(f"{source} is no model with its processor: it lacks {', '.join(missing)}")
    return folder


def policy_folder(source: str | Path, revision: str | None = None, **of_hub: Any) -> Path:
    """The folder of the saved policy `source`, a folder or an id on the Hub; ValueError where its files say that code
    be run, which is its user's to say.
    """
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.json", f"{MODEL}/*"]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns, **of_hub))
    if not (folder / MODEL / "config.json").is_file():
        raise ValueError(
            f"{source} is no policy of this plugin: it lacks {MODEL}/config.json; "
            "`stereovla convert lerobot --checkpoint MODEL --out POLICY` makes one of a model"
        )
    for name in _LEROBOTS:
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            if config.get("run_code") or (config.get("policy") or {}).get("run_code"):
                raise ValueError(
                    f"{folder / name} says run_code itself; only who runs it may: remove it there, and say "
                    "--policy.run_code=true once you have read the code"
                )
    return folder


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """config.json of a model; ValueError where it is not of `kind`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != kind:
        raise ValueError(f"{folder} is a {config.get('model_type')!r}; --policy.type={kind} needs a {kind!r}")
    return config


def read_sizes(folder: Path, kind: str) -> dict[str, int]:
    """chunk_size and state_history of a model."""
    config = read_config(folder, kind)
    return {name: int(config[name]) for name in ("chunk_size", "state_history")}


def check_code(folder: Path, may_run: bool) -> None:
    """ValueError where loading the model in `folder` runs code and nobody has said that it may."""
    if may_run:
        return
    named = set()
    for path in folder.glob("*config.json"):
        named |= _code_of(json.loads(path.read_text(encoding="utf-8")))
    files = sorted({*(path.name for path in folder.glob("*.py")), *named})
    raise ValueError(
        f"the model in {folder} brings Python code that would run on this machine: {', '.join(files)}; read it, then "
        "say --policy.run_code=true"
    )


def _code_of(config: Any, within: bool = False) -> set[str]:
    """What an auto_map in a config refers to in other repositories, as "owner/name--file.py"."""
    if isinstance(config, dict):
        return {name for key, value in config.items() for name in _code_of(value, within or key == "auto_map")}
    if isinstance(config, list):
        return {name for value in config for name in _code_of(value, within)}
    is_elsewhere = within and isinstance(config, str) and "--" in config
    return {config.rpartition(".")[0] + ".py"} if is_elsewhere else set()


def load_model(folder: Path, kind: str, may_run_code: bool, untrained: bool, weights_dtype: str) -> tuple[Any, Any]:
    """The model in evaluation mode and its processor.

    Args:
        kind: "stereovla" or "depthvla", which it must be.
        untrained: draw fresh weights from torch's generator instead of reading them.

    Raises:
        ValueError: its code may not run, or is older than this plugin, or weights are missing or superfluous.
    """
    from transformers import AutoConfig, AutoModel, AutoProcessor  # takes seconds

    read_config(folder, kind)
    check_code(folder, may_run_code)
    has_weights = any(folder.glob("model*.safetensors*"))
    if untrained:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_config(config, trust_remote_code=True)
    elif not has_weights:
        raise ValueError(f"{folder} has no weights; say --policy.untrained=true to begin with fresh ones")
    else:
        dtype = "auto" if weights_dtype == "saved" else getattr(torch, weights_dtype)
        model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype, output_loading_info=True)
        if wrong := sorted([*report["missing_keys"], *report["unexpected_keys"]]):
            raise ValueError(
                f"the weights in {folder} are not the model's: {', '.join(wrong[:5])} ({len(wrong)} in all)"
            )
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    parts = {"config": model.config, "model": model, "processor": processor}
    used = [(part, name) for part, names in _INTERFACE.items() for name in names]
    if lacking := [f"{part}.{name}" for part, name in used if not hasattr(parts[part], name)]:
        raise ValueError(
            f"the code in {folder} is older than this plugin: it lacks {', '.join(lacking)}; save it anew, as "
            "docs/hub.md of stereovla says under 'Checkpoints of older versions'"
        )
    return model.eval(), processor


def save_model(folder: Path, model: Any, processor: Any, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Writes model, processor and their code into the new folder `folder`, which appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=state_dict)
    processor.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def save_code(folder: Path, model: Any, processor: Any) -> None:
    """Writes into `folder` the code of both, among other small files."""
    from transformers.dynamic_module_utils import custom_object_save

    custom_object_save(model, folder)
    processor.save_pretrained(folder)
