"""A checkpoint of ours as a policy of LeRobot, and back.

A policy's folder has LeRobot's own config.json and pipelines (policy_preprocessor.json, policy_postprocessor.json), and
our checkpoint as it is in model/: both libraries read a config.json of the folder that they load. What LeRobot's files
hold is what `plugins/lerobot_policy_stereovla` writes itself when it saves; its tests compare the two.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stereovla.command_line import option
from stereovla.sources import ADAPTER, check_checkpoint, source_of

MODEL = "model"
POLICIES = ("stereovla", "depthvla")
KEYS = "observation.images."
IDENTITY = {kind: "IDENTITY" for kind in ("VISUAL", "STATE", "ACTION")}  # our processors normalise


@dataclass
class Options:
    """A checkpoint as a policy of LeRobot, or the checkpoint in such a policy.

        stereovla convert lerobot --checkpoint MODEL --out POLICY
        lerobot-train --policy.path=POLICY --policy.run_code=true --dataset.repo_id=NAME/DATASET
        stereovla convert lerobot --checkpoint OUTPUT/checkpoints/last/pretrained_model --out MODEL

    Which of the two is told by what is in the folder. Weights, config, processor and code are copied byte for byte.
    LeRobot needs the plugin lerobot_policy_stereovla.
    """

    checkpoint: str = option("", "Folder or Hub id of a model of ours, or folder of a policy of LeRobot.")
    out: str = option("", "Folder to write; it must not exist. It appears when it is whole.")
    embodiment: str | None = option(None, "The robot that the policy acts for; not given: the only one that it knows.")
    views: list[str] = field(
        default_factory=list,
        metadata={"help": "Camera keys of LeRobot's data by view, each VIEW=KEY; not given: observation.images.VIEW."},
    )
    n_action_steps: int | None = option(None, "Actions that are executed of each chunk; not given: all.")

    def __post_init__(self):
        for name in ("checkpoint", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if wrong := [entry for entry in self.views if not all(entry.partition("="))]:
            raise ValueError(f"--views {wrong[0]!r} is not of the form VIEW=KEY, such as left=observation.images.eye_a")


def convert(options: Options) -> Path:
    """Writes the folder; returns it."""
    out = Path(options.out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out")
    check = Path(options.checkpoint) / MODEL / "config.json"
    if check.is_file():
        return _back(Path(options.checkpoint), out, options)
    if (Path(options.checkpoint) / ADAPTER).is_file():
        raise ValueError(
            f"{options.checkpoint} is an adapter; merge it into its model first (PeftModel.merge_and_unload)"
        )
    check_checkpoint(options.checkpoint)
    with source_of(options.checkpoint, "checkpoint") as folder, _whole(out) as partial:
        if folder is None:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(options.checkpoint))
        config, processor = (_read(folder / name) for name in ("config.json", "processor_config.json"))
        policy = policy_config(config, processor, options)
        shutil.copytree(folder, partial / MODEL, ignore=shutil.ignore_patterns(".*"))
        _write(partial / "config.json", policy)
        for name, steps in pipelines(policy).items():
            _write(partial / f"{name}.json", {"name": name, "steps": steps})
    return out


def policy_config(config: dict[str, Any], processor: dict[str, Any], options: Options) -> dict[str, Any]:
    """What LeRobot's config.json says; the fields that are left out have the plugin's defaults."""
    kind = config.get("model_type")
    if kind not in POLICIES:
        raise ValueError(f"{options.checkpoint} is a {kind!r}; expected a policy, one of {', '.join(POLICIES)}")
    known = sorted(processor.get("norm_stats") or {})
    name = options.embodiment or (known[0] if len(known) == 1 else None)
    if name not in known:
        raise ValueError(
            f"--embodiment is {name!r}; valid: {', '.join(known) or 'none, as the processor knows no robot'}"
        )
    keys = {view: f"{KEYS}{view}" for view in views_of(kind, processor)}
    given = dict(entry.split("=", 1) for entry in options.views)
    if unknown := sorted(set(given) - set(keys)):
        raise ValueError(f"--views names {', '.join(unknown)}; the model sees {', '.join(keys)}")
    keys |= given
    chunk, size = config["chunk_size"], config["image_size"]
    steps = chunk if options.n_action_steps is None else options.n_action_steps
    if not 1 <= steps <= chunk:
        raise ValueError(f"--n_action_steps is {steps}; it must be from 1 to chunk_size ({chunk})")
    return {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": {
            **{key: {"type": "VISUAL", "shape": [3, size, size]} for key in keys.values()},
            "observation.state": {"type": "STATE", "shape": [config["state_dim"]]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [config["action_dim"]]}},
        "push_to_hub": False,  # who pushes says so, with a --policy.repo_id
        "embodiment": name,
        "views": keys,
        "chunk_size": chunk,
        "state_history": config["state_history"],
        "n_action_steps": steps,
        "normalization_mapping": IDENTITY,
    }


def views_of(kind: str, processor: dict[str, Any]) -> Sequence[str]:
    """Names of the views that a processor takes, as its `pixel_views`."""
    if kind == "stereovla":
        return ("left", "right")
    return (*processor["views"], *(["right"] if processor.get("stereo") else []))


def pipelines(policy: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{name: steps} of the pipelines around the policy."""

    def step(name: str, **config: Any) -> dict[str, Any]:
        return {"registry_name": name, "config": config}

    inputs, outputs = policy["input_features"], policy["output_features"]
    normalize = {"eps": 1e-8, "norm_map": IDENTITY}
    on_cpu = step("device_processor", device="cpu", float_dtype=None)  # LeRobot puts the device of the run in its place
    return {
        "policy_preprocessor": [
            step("rename_observations_processor", rename_map={}),
            step("to_batch_processor"),
            step("stereovla_pictures", keys=list(policy["views"].values())),
            on_cpu,
            step("normalizer_processor", features={**inputs, **outputs}, **normalize),
        ],
        "policy_postprocessor": [step("unnormalizer_processor", features=outputs, **normalize), on_cpu],
    }


def _back(policy: Path, out: Path, options: Options) -> Path:
    """The checkpoint in the folder of a policy."""
    if options.embodiment or options.views or options.n_action_steps is not None:
        raise ValueError(
            f"{policy} is a policy of LeRobot, whose model is copied as it is; give --checkpoint and --out"
        )
    check_checkpoint(str(policy / MODEL))
    with _whole(out) as partial:
        shutil.copytree(policy / MODEL, partial, dirs_exist_ok=True)
    return out


@contextmanager
def _whole(out: Path):
    """A folder beside `out` that takes its place when all went well, and is removed otherwise."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
