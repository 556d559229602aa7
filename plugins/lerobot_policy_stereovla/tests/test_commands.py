"""LeRobot's own commands with a policy of the plugin: train, go on, adapt, save, load."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.scripts import lerobot_train
from safetensors.torch import load_file
from written_data import ID, VIEWS, WRITTEN, batch_of, dataset_for

from stereovla.__main__ import main as stereovla
from stereovla.modeling_stereovla import StereoVLAForActionPrediction
from stereovla.processing import StereoProcessor

EYES = "{" + ", ".join(f"{view}: {key}" for view, key in VIEWS.items()) + "}"


@pytest.fixture
def train(monkeypatch, tmp_path):
    """lerobot-train on what lerobot wrote, two samples a step; returns the folder of the last policy."""

    def run(*arguments: str, out: str = "run") -> Path:
        common = [f"--dataset.repo_id={ID}", f"--dataset.root={WRITTEN}", "--batch_size=2", "--num_workers=0"]
        common += ["--log_freq=1", "--env_eval_freq=0", "--wandb.enable=false", f"--output_dir={tmp_path / out}"]
        monkeypatch.setattr(sys, "argv", ["lerobot-train", *common, *arguments])
        lerobot_train.main()
        return (tmp_path / out / "checkpoints/last/pretrained_model").resolve()

    return run


def new_model(kind, folder):
    options = [f"--policy.type={kind}", f"--policy.pretrained_model={folder}", "--policy.run_code=true"]
    options += [f"--policy.views={EYES}", "--policy.device=cpu", "--policy.push_to_hub=false"]
    return [*options, "--policy.chain_of_thought=false", "--steps=2"]


def loaded(folder, *overrides, **more):
    """(policy, preprocessor, dataset) of a saved policy."""
    config = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--run_code=true", "--device=cpu", *overrides])
    config.pretrained_path = folder
    dataset = dataset_for(config)
    policy = make_policy(config, ds_meta=dataset.meta)
    return policy, make_pre_post_processors(config, pretrained_path=str(folder))[0], dataset


def test_what_was_trained_is_saved_and_acts_alike_in_both_libraries(models, train, tmp_path):
    saved = train(*new_model("stereovla", models["stereovla"]))
    before, after = (load_file(folder / "model.safetensors") for folder in (models["stereovla"], saved / "model"))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("action_expert" in name for name in changed) and any("language_model" in name for name in changed)

    policy, preprocessor, dataset = loaded(saved)
    noise = torch.randn(2, 8, 7)
    batch = preprocessor(batch_of(dataset, [1, 9]))
    actions = policy.predict_action_chunk(batch, noise=noise)

    # back to ours, which knows nothing of LeRobot
    assert stereovla(["convert", "lerobot", "--checkpoint", str(saved), "--out", str(tmp_path / "ours")]) == 0
    model = StereoVLAForActionPrediction.from_pretrained(tmp_path / "ours").eval()
    processor = StereoProcessor.from_pretrained(tmp_path / "ours")
    assert model.config.chain_of_thought is False  # as it was trained
    inputs = processor(
        images=[[batch[key][row].permute(1, 2, 0).numpy() for key in VIEWS.values()] for row in range(2)],
        text=list(batch["task"]),
        state=list(batch["observation.state"].numpy()),
        embodiment="franka_panda",
        check_stereo=False,
    )
    wanted = processor.decode_actions(model.predict_action(**inputs, noise=noise), "franka_panda")
    np.testing.assert_array_equal(actions.numpy(), wanted)


def test_training_goes_on(models, train, tmp_path):
    """From the checkpoint after two of four steps; the code is run because it is said again. Not to the same weights:
    LeRobot's own generator of noise is ahead by one number after it went on.
    """
    first = train(*new_model("stereovla", models["stereovla"])[:-1], "--steps=4", "--save_freq=2", out="whole")
    halfway = shutil.copytree(first.parents[1] / "000002", tmp_path / "parts/checkpoints/000002")
    config = halfway / "pretrained_model/train_config.json"
    again = train(f"--config_path={config}", "--resume=true", "--policy.run_code=true", out="parts")
    assert again.parent.name == "000004"
    folders = (halfway / "pretrained_model", first, again)
    before, wanted, found = (load_file(folder / "model/model.safetensors") for folder in folders)
    name = "action_expert.action_out_proj.weight"
    # one step of Adam moves a number by less than about its learning rate, 1e-4 at most here
    assert 0 < (found[name] - before[name]).abs().max() < 4e-4
    assert (found[name] - wanted[name]).abs().max() < 4e-4


def test_a_converted_model_is_adapted_to_a_new_robot(models, train, tmp_path):
    """LoRA as LeRobot has it, on the folder that `stereovla convert lerobot` writes."""
    start = tmp_path / "policy"
    views = [f"{view}={key}" for view, key in VIEWS.items()]
    assert (
        stereovla(
            ["convert", "lerobot", "--checkpoint", str(models["stereovla"]), "--out", str(start), "--views", *views]
        )
        == 0
    )
    saved = train(
        f"--policy.path={start}",
        "--policy.run_code=true",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--policy.chain_of_thought=false",
        "--policy.embodiment=test_arm",
        "--peft.method_type=LORA",
        "--peft.r=4",
        "--steps=2",
    )
    tensors = load_file(saved / "adapter_model.safetensors")
    trained = {name.removeprefix("base_model.model.model.") for name in tensors}
    assert {name.rpartition(".lora_")[0] for name in trained if ".lora_" in name} >= {
        "action_expert.transformer.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.mlp.up_proj",
    }
    assert "action_expert.state_proj.weight" in trained
    assert not any("visual_tokens" in name for name in trained)
    policy, preprocessor, dataset = loaded(saved)
    assert policy.base_model.model.processor.norm_stats.keys() == {"franka_panda", "test_arm"}
    actions = policy.predict_action_chunk(preprocessor(batch_of(dataset, [1, 9])))
    assert actions.shape == (2, 8, 7) and actions.isfinite().all()


def test_depthvla_trains(models, train):
    saved = train(*new_model("depthvla", models["depthvla"]))
    policy, preprocessor, dataset = loaded(saved)
    assert policy.name == "depthvla"
    assert policy.predict_action_chunk(preprocessor(batch_of(dataset, [0]))).isfinite().all()


def test_what_the_converter_writes_is_what_the_plugin_writes(models, tmp_path):
    for kind, model in models.items():
        converted, saved = tmp_path / kind, tmp_path / f"{kind}_saved"
        arguments = ["convert", "lerobot", "--checkpoint", str(model), "--out", str(converted)]
        assert stereovla([*arguments, "--views", *(f"{view}={key}" for view, key in VIEWS.items())]) == 0
        policy, preprocessor, _ = loaded(converted, "--push_to_hub=false")
        policy.save_pretrained(saved)
        for pipeline in make_pre_post_processors(policy.config):
            pipeline.save_pretrained(saved)
        ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (converted, saved))
        assert ours.items() <= theirs.items()
        for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
            ours, theirs = (json.loads((folder / name).read_text()) for folder in (converted, saved))
            assert ours == theirs
