"""A checkpoint as a policy of LeRobot and back. That LeRobot loads it is tested beside the plugin, where LeRobot is."""

import json
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint, save_tiny_depthvla

from stereovla.__main__ import main

REGISTERED = {  # of LeRobot 0.6, and of the plugin
    "policy_preprocessor": [
        "rename_observations_processor",
        "to_batch_processor",
        "stereovla_pictures",
        "device_processor",
        "normalizer_processor",
    ],
    "policy_postprocessor": ["unnormalizer_processor", "device_processor"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    views = ["left", "wrist"]
    return {
        "stereovla": save_tiny_checkpoint(folder / "stereovla"),
        "depthvla": save_tiny_depthvla(folder / "depthvla", views=views),
    }


def convert(**options) -> int:
    words = ["convert", "lerobot"]
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return main(words)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["stereovla", "depthvla"])
def test_there_and_back_byte_for_byte(kind, models, tmp_path):
    assert convert(checkpoint=models[kind], out=tmp_path / "policy") == 0
    policy = contents(tmp_path / "policy")
    assert {name for name in policy if not name.startswith("model/")} == {
        "config.json",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
    }
    config, ours = json.loads(policy["config.json"]), json.loads((models[kind] / "config.json").read_text())
    views = ["left", "right"] if kind == "stereovla" else ["left", "wrist"]
    assert config["type"] == kind and config["embodiment"] == "franka_panda"
    assert config["views"] == {view: f"observation.images.{view}" for view in views}
    for name in ("chunk_size", "state_history"):
        assert config[name] == ours[name]
    assert config["input_features"]["observation.state"] == {"type": "STATE", "shape": [7]}
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [7]}}
    for name, steps in REGISTERED.items():
        assert [step["registry_name"] for step in json.loads(policy[f"{name}.json"])["steps"]] == steps
    assert convert(checkpoint=tmp_path / "policy", out=tmp_path / "back") == 0
    assert contents(tmp_path / "back") == contents(models[kind])


def test_keys_and_steps_are_chosen(models, tmp_path):
    keys = ["left=observation.images.eye_a", "right=observation.images.eye_b"]
    assert convert(checkpoint=models["stereovla"], out=tmp_path / "policy", views=keys, n_action_steps=3) == 0
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert config["views"] == dict(key.split("=") for key in keys) and config["n_action_steps"] == 3
    steps = json.loads((tmp_path / "policy/policy_preprocessor.json").read_text())["steps"]
    assert steps[2]["config"] == {"keys": list(config["views"].values())}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embodiment": "ur5"}, "--embodiment is 'ur5'; valid: franka_panda"),
        ({"views": ["wrist=observation.images.wrist"]}, "--views names wrist; the model sees left, right"),
        ({"views": ["left"]}, "--views 'left' is not of the form VIEW=KEY"),
        ({"n_action_steps": 9}, "--n_action_steps is 9; it must be from 1 to chunk_size (8)"),
        ({"checkpoint": "nowhere"}, "'nowhere' is neither a folder nor a Hub id"),
    ],
)
def test_what_cannot_be_is_refused(options, message, models, tmp_path, capsys):
    assert convert(**{"checkpoint": models["stereovla"], "out": tmp_path / "policy", **options}) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_refused(models, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert convert(checkpoint=tmp_path / "adapter", out=tmp_path / "policy") == 2
    assert "is an adapter; merge it into its model first" in capsys.readouterr().err
    assert convert(checkpoint=models["stereovla"], out=tmp_path / "adapter") == 2
    assert "exists; choose another --out" in capsys.readouterr().err
