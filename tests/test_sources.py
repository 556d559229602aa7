"""Folders and ids on the Hub that commands are given: what is not there is said in words, and every kind of folder of a
model or an adapter that the Auto classes load is served and evaluated.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_folder import write_rig
from peft import LoraConfig, get_peft_model
from serving_thread import serve_in_thread
from synthetic_dataset import write_finished_dataset
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair
from transformers import AutoModel

from stereovla.__main__ import main
from stereovla.evaluation.policy_specs import make_policy, policy_identity
from stereovla.modeling_stereovla import StereoVLAForActionPrediction
from stereovla.processing import StereoProcessor
from stereovla.serving.client import PolicyClient
from stereovla.serving.server import PolicyServer
from stereovla.sources import InputError, fingerprint, load_checkpoint, source_of

STATE = np.array([0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0], np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_finished_dataset(folder / "data")
    save_tiny_checkpoint(folder / "base")
    write_rig(folder)
    return folder


DATA, RIG, OUT = "{root}/data", "{root}/rig.yaml", "{root}/out"
TRAINED = ["--preset", "tiny", "--output_dir", "{root}/run"]
COMMANDS = {
    "import lerobot": ["data", "import", "lerobot", "--source", "{bad}", "--config", RIG, "--out", OUT],
    "export lerobot": ["data", "export", "lerobot", "--dataset", "{bad}", "--out", OUT],
    "check": ["data", "check", "{bad}"],
    "card": ["data", "card", "{bad}"],
    "merge": ["data", "merge", OUT, "{bad}"],
    "train --dataset": ["train", "--dataset", "{bad}", *TRAINED, "--tracker", "none"],
    "train --model": ["train", "--dataset", DATA, "--model", "{bad}", *TRAINED, "--tracker", "none"],
    "train --stereo_encoder": ["train", "--dataset", DATA, "--stereo_encoder", "{bad}", *TRAINED, "--tracker", "none"],
    "stereo --dataset": ["pretrain", "stereo", "--dataset", "{bad}", *TRAINED],
    "stereo columns": ["pretrain", "stereo", "--format", "columns", "--dataset", "{bad}", *TRAINED],
    "stereo kitti2015": ["pretrain", "stereo", "--format", "kitti2015", "--dataset", "{bad}", *TRAINED],
    "stereo --model": ["pretrain", "stereo", "--dataset", DATA, "--model", "{bad}", *TRAINED],
    "grounding --dataset": ["pretrain", "grounding", "--dataset", "{bad}", *TRAINED],
    "grounding --model": ["pretrain", "grounding", "--dataset", DATA, "--model", "{bad}", *TRAINED],
    "reward --model": ["pretrain", "reward", "--dataset", DATA, "--model", "{bad}", *TRAINED],
    "rollout": ["evaluate", "rollout", "--policies", "{bad}", "--out", OUT],
    "rollout untrained": ["evaluate", "rollout", "--policies", "untrained:{bad}", "--out", OUT],
    "offline --model": ["evaluate", "offline", "--model", "{bad}", "--dataset", DATA, "--out", OUT],
    "offline --dataset": ["evaluate", "offline", "--model", "{root}/base", "--dataset", "{bad}", "--out", OUT],
    "serve": ["serve", "--model", "{bad}"],
    "push": ["push", "--folder", "{bad}", "--license", "mit", "--repo_id", "owner/name"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_not_there_is_called_so(name, root, capsys):
    """By every command, in words, and with the name that was given."""
    bad = str(root / "nowhere")
    try:
        assert main([word.format(bad=bad, root=root) for word in COMMANDS[name]]) == 2
    finally:
        shutil.rmtree(root / "run", ignore_errors=True)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "folder" in said and bad in said and "Repo id must be" not in said


def test_what_the_hub_does_not_have_is_no_folder_either():
    with pytest.raises(
        InputError, match="no folder 'runs/demo', and the model of this id cannot be read from the Hub: x"
    ):
        with source_of("runs/demo", "model") as folder:
            assert folder is None
            raise OSError("x")
    for kind, allowed in {"dataset": True, "model": False}.items():  # only datasets are read at a revision
        if allowed:
            with source_of("owner/name@main", kind) as folder:
                assert folder is None
        else:
            with pytest.raises(InputError, match="neither a folder nor a Hub id"), source_of("owner/name@main", kind):
                pass


def save_adapter(root: Path, name: str, processor: bool) -> Path:
    """An adapter of `base` with weights that change what it does, saved by PEFT alone or with a processor."""
    torch.manual_seed(0)
    base = StereoVLAForActionPrediction.from_pretrained(root / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(root / name)
    if processor:
        StereoProcessor.from_pretrained(root / "base").save_pretrained(root / name)
    return root / name


@pytest.mark.parametrize("processor", [True, False])
def test_an_adapter_is_served_and_evaluated_wherever_the_auto_classes_load_it(root, processor, capsys):
    adapter = save_adapter(root, f"adapter-{processor}", processor)
    model = AutoModel.from_pretrained(adapter, trust_remote_code=True).eval()
    prepared = StereoProcessor.from_pretrained(root / "base")
    inputs = prepared(images=list(stereo_pair()), text="pick up the red cube", state=STATE, embodiment=EMBODIMENT)
    noise = np.random.default_rng(5).standard_normal((1, 8, 7), dtype=np.float32)
    chunk = model.predict_action(**inputs, noise=torch.from_numpy(noise))
    expected = prepared.decode_actions(chunk, EMBODIMENT)[0]
    plain, _ = load_checkpoint(str(root / "base"))
    assert (chunk - plain.predict_action(**inputs, noise=torch.from_numpy(noise))).abs().max() > 1e-3
    url, stop = serve_in_thread(PolicyServer(*load_checkpoint(str(adapter)), "adapter"))
    try:
        with PolicyClient(url) as client:
            answer = client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT, seed=5)
    finally:
        stop()
    np.testing.assert_allclose(answer.actions, expected, atol=1e-5)
    assert policy_identity(str(adapter)) == {"kind": "trained", "weights": fingerprint(str(adapter))}
    assert make_policy(str(adapter)).model.config.chunk_size == 8
    out = root / f"offline-{processor}"
    given = [
        "--model",
        str(adapter),
        "--dataset",
        str(root / "data"),
        "--out",
        str(out),
        "--rows",
        "2",
        "--stride",
        "1",
    ]
    assert main(["evaluate", "offline", *given]) == 0, capsys.readouterr().err
    assert json.loads((out / "offline.json").read_text())["rows"] == 2


def test_the_fingerprint_of_an_adapter_follows_its_model(root, tmp_path):
    shutil.copytree(root / "base", tmp_path / "base")
    adapter = save_adapter(tmp_path, "adapter", True)
    before = fingerprint(str(adapter))
    weights = bytearray((tmp_path / "base/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "base/model.safetensors").write_bytes(weights)
    assert fingerprint(str(adapter)) != before


def test_an_adapter_whose_model_is_gone_is_told_apart(root, tmp_path):
    shutil.copytree(root / "base", tmp_path / "base")
    adapter = save_adapter(tmp_path, "adapter", True)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match=r"the model that the adapter .* changes is missing: .*base' is neither"):
        load_checkpoint(str(adapter))
