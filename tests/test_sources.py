"""Folders and ids on the Hub that commands are given: what is not there is said in words, and every kind of folder of a
model or an adapter that the Auto classes load is served and evaluated.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import client
from hub_server import serve
from lerobot_folder import write_rig
from peft import LoraConfig, get_peft_model
from serving_thread import policy_server, serve_in_thread
from synthetic_dataset import write_finished_dataset
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair
from transformers import AutoModel

from stereovla.__main__ import main
from stereovla.evaluation.policy_specs import make_policy, policy_identity
from stereovla.modeling_stereovla import StereoVLAForActionPrediction
from stereovla.processing import StereoProcessor
from stereovla.serving.client import PolicyClient
from stereovla.sources import InputError, changed_code, fingerprint, load_checkpoint, remote_code, source_of

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
    url, stop = serve_in_thread(policy_server(load_checkpoint(str(adapter)), "adapter"))
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


LOADS = """
import json, sys
import numpy as np, torch
from stereovla.sources import adapted_model, fingerprint, load_checkpoint
pair, state, embodiment = np.load(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for source in sys.argv[4:]:
    model, processor = load_checkpoint(source)
    inputs = processor(images=list(pair), text="pick up the red cube", state=state, embodiment=embodiment)
    chunk = model.predict_action(**inputs, noise=torch.zeros(1, 8, 7))
    assert type(model).__module__.startswith("transformers_modules")
    print("LOADED", json.dumps([chunk.tolist(), adapted_model(source), fingerprint(source)]))
"""
REFUSED = """
import sys
from stereovla.__main__ import main
from stereovla.evaluation.policy_specs import make_policy, policy_identity
from stereovla.sources import InputError, load_processor
adapter, data, out = sys.argv[1:]
for command in (
    ["serve", "--model", adapter],
    ["evaluate", "offline", "--model", adapter, "--dataset", data, "--out", out],
    ["evaluate", "rollout", "--model", adapter, "--out", out],
    ["evaluate", "rollout", "--policies", f"untrained:{adapter}", "--out", out],
):
    assert main(command) == 2, command
for refused in (load_processor, make_policy, lambda source: make_policy(f"untrained:{source}")):
    try:
        refused(adapter)
    except InputError as error:
        print(error, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def hub(root, tmp_path_factory):
    """Its address, a process that has it for the Hub, and {name: repository}: `them/base`, as it was saved here,
    `them/changed` with code of its own, and adapters of the former.
    """
    home = tmp_path_factory.mktemp("hub")
    with serve() as server, client(server.url, home, ours=True) as process:
        repositories = {"them/base": server.add("model", "them/base", root / "base")}
        changed = Path(shutil.copytree(root / "base", home / "changed"))
        code = changed / "robot_heads.py"  # which the model's file imports
        code.write_text(code.read_text() + f"\nopen({str(home / 'ran')!r}, 'w').close()\n")
        repositories["them/changed"] = server.add("model", "them/changed", changed)
        for name, processor in (("whole", True), ("bare", False)):
            folder = adapter_of(root, home / name, "them/base", processor)
            repositories[f"someone/{name}"] = server.add("model", f"someone/{name}", folder, private=True)
        yield process, repositories


def adapter_of(root: Path, folder: Path, base: str, processor: bool = False) -> Path:
    """`save_adapter` with the name of another base."""
    shutil.move(save_adapter(root, "made", processor), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


def test_an_adapter_loads_on_its_model_on_the_hub(root, hub):
    """From a folder and from the Hub, with a processor and without; what runs is told before."""
    process, repositories = hub
    sources = [str(process.folder / "whole"), "someone/whole", "someone/bare"]
    np.save(process.folder / "pair.npy", stereo_pair())
    done = process.run(LOADS, str(process.folder / "pair.npy"), json.dumps(STATE.tolist()), EMBODIMENT, *sources)
    (commit,) = repositories["them/base"].commits
    told = [line for line in done.stdout.splitlines() if "changes" in line]
    for line, source in zip(told, sources, strict=True):
        count = len(remote_code(root / "base"))
        assert line == (
            f"{source} changes them/base at revision {commit}, whose code runs on this machine: {count} files of this "
            "installation"
        )
    model, processor = load_checkpoint(str(save_adapter(root, "here", True)))
    inputs = processor(images=list(stereo_pair()), text="pick up the red cube", state=STATE, embodiment=EMBODIMENT)
    expected = model.predict_action(**inputs, noise=torch.zeros(1, 8, 7))
    found = [json.loads(line.removeprefix("LOADED")) for line in done.stdout.splitlines() if line.startswith("LOADED")]
    for chunk, base, _ in found:
        assert base == "them/base"
        torch.testing.assert_close(torch.tensor(chunk), expected, atol=1e-5, rtol=0)
    assert len({identity for *_, identity in found}) == 3


def test_other_code_of_an_adapters_model_on_the_hub_is_not_run(root, hub):
    process, repositories = hub
    adapter = adapter_of(root, process.folder / "of-changed", "them/changed")
    done = process.run(REFUSED, str(adapter), str(root / "data"), str(process.folder / "out"))
    (commit,) = repositories["them/changed"].commits
    refusal = (
        f"the adapter {adapter} changes them/changed on the Hub, at revision {commit}, whose code would run on this "
        "machine and is not that of this installation: robot_heads.py; read it, then say --run_code to run it"
    )
    assert done.stderr.count(refusal) == 7 and not (process.folder / "ran").exists()
    program = "import sys; from stereovla.sources import load_checkpoint; load_checkpoint(sys.argv[1], run_code=True)"
    process.run(program, str(adapter))
    assert (process.folder / "ran").exists()


def test_an_adapter_of_an_adapter_on_the_hub_is_refused(root, hub):
    """Whose model the Auto classes would load in turn, unseen."""
    process, _ = hub
    adapter = adapter_of(root, process.folder / "of-adapter", "someone/whole")
    program = "import sys; from stereovla.sources import load_checkpoint; load_checkpoint(sys.argv[1])"
    done = process.run(program, str(adapter), check=False)
    assert "InputError: someone/whole, which an adapter changes, is an adapter itself" in done.stderr


def test_code_in_another_repository_counts_as_changed(root, tmp_path):
    folder = Path(shutil.copytree(root / "base", tmp_path / "base"))
    assert changed_code(folder) == [] and len(remote_code(folder)) > 10
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["they/code--tokens.Tokens", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert changed_code(folder) == ["they/code--tokens.py"]


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
