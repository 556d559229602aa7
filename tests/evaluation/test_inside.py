"""Where the actions' attention goes, against policies that look everywhere alike; and the pictures."""

import json

import numpy as np
import pytest
import torch
from command_lines import evaluate as main
from PIL import Image
from synthetic_dataset import write_dataset
from tiny_checkpoint import save_tiny_checkpoint, save_tiny_depthvla

from stereovla.evaluation.held_out import read_rows
from stereovla.evaluation.inside import STREAMS, attention_shares
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline_geometry import observations
from stereovla.sources import load_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("data"), [3, 2], 2, split="validation", size=64))


def policy_of(folder) -> ModelPolicy:
    return ModelPolicy(*load_checkpoint(str(folder), run_code=True), "trained")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {"block": {}, "full": {"mask": "full"}, "pi0": {"depth_config": None, "depth_map_loss_weight": 0.0}}
    paths = {name: save_tiny_depthvla(folder / name, use_pointers=True, **own) for name, own in made.items()}
    return paths | {"stereovla": save_tiny_checkpoint(folder / "stereovla")}


@pytest.mark.parametrize("name", ["block", "full", "pi0", "stereovla"])
def test_queries_of_zero_attend_to_every_token_alike(checkpoints, dataset, name):
    policy, rows = policy_of(checkpoints[name]), list(read_rows(dataset, 3, 1))
    model = policy.model
    with torch.no_grad():
        for layer in model.action_expert.transformer.layers:
            layer.self_attn.q_proj.weight.zero_()
    ids = policy.inputs(observations(rows))["input_ids"]
    pictures = int((ids[0] == model.config.image_token_id).sum())
    pointers = 0 if model.pointers is None else 3  # target, gripper, displacement
    counts = {
        "pictures": pictures,
        "words": ids.shape[1] - pictures + (model.config.pose_dim + 1 if name == "stereovla" else 0),  # the keyframe
        "depth expert": model.config.depth_config.num_tokens if name in ("block", "full") else 0,
        "state": model.config.state_history + pointers,
        "chunk": model.config.chunk_size,
    }
    expected = np.array([counts[stream] for stream in STREAMS]) / sum(counts.values())
    before = model.action_expert.transformer.config._attn_implementation
    shares = attention_shares(policy, rows)
    layers = model.config.text_config.num_hidden_layers
    np.testing.assert_allclose(shares, np.tile(expected, (layers, 1)), atol=1e-6)
    assert model.action_expert.transformer.config._attn_implementation == before


def test_the_command_draws_attention_and_depth(checkpoints, dataset, tmp_path, capsys):
    arguments = ["--dataset", dataset, "--rows", "3", "--stride", "1"]
    assert main(["inside", "--model", str(checkpoints["block"]), "--out", str(tmp_path / "a"), *arguments]) == 0
    shares = json.loads((tmp_path / "a" / "attention.json").read_text())
    assert [sum(layer.values()) for layer in shares] == pytest.approx([1.0] * len(shares), abs=1e-5)
    for name in ("attention", "depth"):
        with Image.open(tmp_path / "a" / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert "layer 2: pictures" in capsys.readouterr().out
    assert main(["inside", "--model", str(checkpoints["stereovla"]), "--out", str(tmp_path / "b"), *arguments]) == 0
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"attention.png", "attention.json"}
