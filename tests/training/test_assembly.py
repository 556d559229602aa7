"""The folder of a DepthVLA from published parts: with its processor, from the Hub, whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import main
from gemma_tokenizer import gemma_tokenizer
from hub_client import client
from hub_server import serve
from published_pi0 import depth_anything, paligemma, pi0
from safetensors.torch import load_file, save_file

from stereovla.sources import load_checkpoint

TEXT = "pick up the red cube"
NEW = {
    "expert_hidden_size": 32,
    "expert_intermediate_size": 48,
    "num_inference_steps": 2,
    "depth_config": {"decoder_config": {"hidden_size": 16, "intermediate_size": 24}},
}
LIMITS = {"q01": [-1.0] * 7, "q99": [1.0] * 7}


@pytest.fixture(scope="module")
def tokenizer():
    return gemma_tokenizer([TEXT])


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer) -> Path:
    """PaliGemma with its tokenizer, Depth Anything, and PI0 without one."""
    folder = tmp_path_factory.mktemp("parts")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    rows = -(-len(tokenizer) // 64) * 64
    vlm = paligemma(image_token=image_token, vocab_size=rows)
    vlm.save_pretrained(folder / "vlm")
    tokenizer.save_pretrained(folder / "vlm")
    depth_anything().save_pretrained(folder / "depth")
    pi0(image_token=image_token, vocab_size=rows).save_pretrained(folder / "pi0")
    return folder


def overrides(tokenizer, **more) -> str:
    places = tokenizer.convert_tokens_to_ids("<loc1023>") + 1
    return json.dumps({"action_vocab_size": places, **more})


def convert(out: Path, *arguments) -> int:
    return main(["convert", "depthvla", *map(str, arguments), "--dtype", "float32", "--out", str(out)])


def test_a_whole_depthvla_acts_from_its_folder(parts, tokenizer, tmp_path, capsys):
    given = ["--vlm", parts / "vlm", "--depth_encoder", parts / "depth", "--views", "left", "wrist"]
    assert convert(tmp_path / "model", *given, "--overrides", overrides(tokenizer, **NEW)) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'model'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model, processor = load_checkpoint(str(tmp_path / "model"))
    assert processor.views == ["left", "wrist"] and processor.chunk_size == model.config.chunk_size
    processor.norm_stats = {"arm": {"state": LIMITS, "action": LIMITS}}
    picture = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    inputs = processor(images={"left": picture}, text=TEXT, state=[[0.0] * 7], embodiment="arm")
    chunk = model.predict_action(**inputs, generator=torch.Generator().manual_seed(0))
    assert processor.decode_actions(chunk, embodiment="arm").shape == (1, 16, 7) and chunk.isfinite().all()


def test_without_a_tokenizer_the_folder_says_what_is_missing(parts, tokenizer, tmp_path, capsys):
    given = ["--pi0", parts / "pi0", "--overrides", overrides(tokenizer)]
    assert convert(tmp_path / "model", *given) == 0
    assert "pi0 has no tokenizer.json, so the model is without its processor" in capsys.readouterr().out
    assert not (tmp_path / "model" / "processor_config.json").exists()
    assert convert(tmp_path / "whole", *given, "--tokenizer", parts / "vlm") == 0
    assert (tmp_path / "whole" / "processor_config.json").is_file()


def test_nothing_is_written_where_something_does_not_fit(parts, tokenizer, tmp_path, capsys):
    given = ["--vlm", parts / "vlm", "--overrides", overrides(tokenizer, image_token_id=5)]
    assert convert(tmp_path / "model", *given) == 2
    assert "'image_token_id': 5" in capsys.readouterr().err
    given = ["--pi0", parts / "pi0", "--overrides", overrides(tokenizer)]
    assert convert(tmp_path / "model", *given, "--tokenizer", parts / "depth") == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert convert(tmp_path / "model", "--vlm", "no folder") == 2
    assert "'no folder' is neither a folder nor a Hub id" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    assert convert(tmp_path / "model", *given) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


# the Hub is chosen when its library is imported: in a process of its own
FROM_HUB = """
import sys
from huggingface_hub import HfApi
from stereovla.__main__ import main
remote, *arguments = sys.argv[1:]
for name in ("vlm", "depth"):
    HfApi().create_repo(f"someone/{name}")
    HfApi().upload_folder(repo_id=f"someone/{name}", folder_path=f"{remote}/{name}")
assert main(["convert", "depthvla", "--vlm", "someone/vlm", *arguments]) == 0
sys.exit(main(["convert", "depthvla", "--vlm", "someone/nothing", "--out", "nothing"]))
"""


def test_parts_come_from_the_hub(parts, tokenizer, tmp_path):
    """In shards, beside a file that is not needed, in a process of its own; the same bytes as from the folders."""
    weights = load_file(parts / "vlm" / "model.safetensors")
    names = sorted(weights)
    shards = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    remote = tmp_path / "remote"
    for name in ("vlm", "depth"):
        (remote / name).mkdir(parents=True)
        for path in (parts / name).iterdir():
            (remote / name / path.name).write_bytes(path.read_bytes())
    (remote / "vlm" / "model.safetensors").unlink()
    for shard, keys in shards.items():
        save_file({key: weights[key] for key in keys}, remote / "vlm" / shard)
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (remote / "vlm" / "model.safetensors.index.json").write_text(json.dumps(index))
    (remote / "vlm" / "not_needed.bin").write_bytes(b"0" * 1000)
    words = ["--overrides", overrides(tokenizer, **NEW), "--dtype", "float32"]
    with serve() as hub, client(hub.url, tmp_path / "client", True) as process:
        given = ["--depth_encoder", "someone/depth", *words, "--out", str(tmp_path / "hub")]
        run = process.run(FROM_HUB, str(remote), *given, check=False)
    assert run.returncode == 2 and "the published model of this id cannot be read" in run.stderr, run.stderr
    assert not list((tmp_path / "client").rglob("not_needed.bin"))
    assert convert(tmp_path / "local", "--vlm", parts / "vlm", "--depth_encoder", parts / "depth", *words[:2]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("local", "hub"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["depth_expert_source"] == "someone/depth"  # not where it was downloaded to
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "hub").glob("*.json"))
