"""A model that is adapted to a robot of other sizes: what trains, how large it is, how it loads, what is kept."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import data as build_dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from training_runs import run_here
from transformers import AutoModel

from stereovla.benchmarks import forgetting
from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.processing import DepthVLAProcessor, StereoProcessor
from stereovla.training.adapters import LORA_HEADS, lora_config
from stereovla.training.models import POLICIES, config_of, load_policy

ROOT = Path(__file__).parents[2]
TINY = ["--preset", "tiny", "--image_size", "64", "--train_episodes", "2", "--validation_episodes", "1"]


def run(*arguments: str) -> None:
    run_here(["--preset", "tiny", "--steps", "3", "--batch_size", "4", "--pool_episodes", "2", *arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Datasets of two robots, a model of the first, an adapter for the second."""
    out = tmp_path_factory.mktemp("robots")
    worlds = {"first": '{"preset": "easy"}', "second": '{"preset": "easy", "robot": "scara"}'}
    for name, world in worlds.items():
        assert build_dataset(["build", *TINY, "--out", str(out / name), "--world", world]) == 0
    run("--dataset", str(out / "first"), "--output_dir", str(out / "base"))
    run("--dataset", str(out / "second"), "--output_dir", str(out / "adapted"), "--lora_rank", "2",
        "--model", str(out / "base" / "model"))  # fmt: skip
    return {
        "first": out / "first",
        "second": out / "second",
        "base": out / "base" / "model",
        "adapter": out / "adapted" / "model",
    }


@pytest.mark.parametrize(
    ("preset", "rank", "limit"),
    [("full", 16, 0.05), ("lab", 8, 0.25), ("depthvla-full", 16, 0.05), ("depthvla-lab", 8, 0.25)],
)
def test_adapters_are_small_and_train_where_they_should(preset, rank, limit):
    """Counted at full size, without memory for it."""
    config = config_of(preset)
    with torch.device("meta"):
        model = POLICIES[config.model_type][0](config)
        total = sum(p.numel() for p in model.parameters())
        heads = [name for name in LORA_HEADS if name in dict(model.named_modules())]
        model = get_peft_model(model, lora_config(model, rank))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    allowed = re.compile(r"(language_model|depth_expert\.decoder|action_expert\.transformer)\.layers\.\d+\..*lora_[AB]")
    assert all(allowed.search(name) or any(f"{head}." in name for head in heads) for name in trained)
    layers = model.config.text_config.num_hidden_layers
    transformers = 3 if preset.startswith("depthvla") else 2
    assert sum("lora_A" in name for name in trained) == transformers * 7 * layers  # every matrix of all
    # an adapter's float32 against weights in bfloat16
    assert sum(trained.values()) * 4 < limit * total * (2 if preset.endswith("full") else 4)


def test_the_adapter_brings_heads_of_the_robots_sizes(folders):
    saved = load_file(folders["adapter"] / "adapter_model.safetensors")
    assert saved["base_model.model.action_expert.state_proj.weight"].shape[1] == 5
    assert saved["base_model.model.action_expert.action_out_proj.weight"].shape[0] == 5
    processor = StereoProcessor.from_pretrained(folders["adapter"])
    assert (processor.state_dim, processor.action_dim) == (5, 5) and list(processor.norm_stats) == ["lift_scara"]
    assert "norm_stats" not in (folders["adapter"] / "tokenizer_config.json").read_text()
    size = sum(path.stat().st_size for path in folders["adapter"].glob("*.safetensors"))
    assert size < sum(path.stat().st_size for path in folders["base"].glob("*.safetensors"))


def loaded_ways(folders, processor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk that every way of loading the adapter gives, and that of its base with fresh heads."""
    recorded = load_file(folders["adapter"] / "reference_prediction.safetensors")
    torch.manual_seed(1)  # fresh heads would act otherwise
    base = load_policy(str(folders["base"])).eval().resize_heads(processor.state_dim, processor.action_dim)
    fresh = base.predict_action(**inputs, noise=recorded["noise"])
    loaded = {
        "auto": AutoModel.from_pretrained(folders["adapter"], trust_remote_code=True),
        "peft": PeftModel.from_pretrained(base, folders["adapter"]),
    }
    chunks = {way: model.eval().predict_action(**inputs, noise=recorded["noise"]) for way, model in loaded.items()}
    chunks["merged"] = loaded["peft"].merge_and_unload().predict_action(**inputs, noise=recorded["noise"])
    for way, chunk in chunks.items():
        torch.testing.assert_close(chunk, chunks["auto"], atol=1e-5, rtol=1e-4, msg=way)
    return chunks["auto"], fresh


def test_every_way_of_loading_acts_as_trained(folders):
    recorded = load_file(folders["adapter"] / "reference_prediction.safetensors")
    processor = StereoProcessor.from_pretrained(folders["adapter"])
    inputs = processor(
        images=[recorded["left"].numpy(), recorded["right"].numpy()],
        text="pick up the red cube",
        state=recorded["state"].numpy(),
        embodiment="lift_scara",
    )
    chunk, fresh = loaded_ways(folders, processor, inputs)
    assert chunk.shape[-1] == 5 and (chunk - fresh).abs().max() > 1e-3


@pytest.mark.parametrize("own", [["--depth_input", "stereo"], []], ids=["stereo", "one camera"])
def test_an_adapter_of_a_depthvla_is_for_another_robot(folders, tmp_path, own):
    """As its base of the first robot: vision fixed, heads of its sizes, loaded as it was trained."""
    run = ["--preset", "depthvla-tiny", "--steps", "2", "--batch_size", "4", "--pool_episodes", "2"]
    run += ["--warmup_steps", "1"]
    run_here([*run, "--dataset", str(folders["first"]), "--output_dir", str(tmp_path / "base"), *own])
    base, adapter = tmp_path / "base/model", tmp_path / "adapted/model"
    run += ["--model", str(base), "--lora_rank", "2", "--learning_rate", "0.02", "--output_dir", str(adapter.parent)]
    run_here([*run, "--dataset", str(folders["second"])])
    weights = load_file(adapter / "adapter_model.safetensors")
    assert weights["base_model.model.action_expert.state_proj.weight"].shape[1] == 5
    of_adapters = [
        name.removeprefix("base_model.model.").partition(".layers.")[0] for name in weights if "lora" in name
    ]
    assert set(of_adapters) == {"model.vlm.language_model", "model.depth_expert.decoder", "action_expert.transformer"}
    assert all(
        float(weight.abs().max()) > 0 for name, weight in weights.items() if "lora_B" in name and "expert" in name
    )
    recorded = load_file(adapter / "reference_prediction.safetensors")
    processor = DepthVLAProcessor.from_pretrained(adapter)
    inputs = processor(
        images={name: recorded[name].numpy() for name in processor.pixel_views},
        text=json.loads((adapter / "training.json").read_text())["example_instruction"],
        state=recorded["state"].numpy(),
        embodiment="lift_scara",
    )
    chunk, fresh = loaded_ways({"base": base, "adapter": adapter}, processor, inputs)
    assert chunk.shape[-1] == 5 and (chunk - fresh).abs().max() > 1e-3
    actions = processor.decode_actions(chunk, "lift_scara")
    torch.testing.assert_close(torch.from_numpy(actions), recorded["actions"], atol=1e-4, rtol=1e-3)


def test_switched_off_the_adapter_leaves_the_first_robot_as_it_was(folders, capsys):
    """The losses that `benchmarks.forgetting` prints, to all four digits; on, they differ."""
    own = ["--adapter", str(folders["adapter"]), "--batches", "1", "--dataset", str(folders["first"])]
    forgetting.main([*own, "--batch_size", "4"])
    base, off, on = (line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[-3:])
    assert base == off != on


def test_resized_heads_keep_what_fits():
    model = StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", use_pointers=True))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.resize_heads(7, 9)
    after = dict(model.named_parameters())
    changed = {name for name, p in after.items() if p.shape != before[name].shape}
    assert changed == {f"action_expert.{name}" for name in
                       ("action_in_proj.weight", "action_out_proj.weight", "action_out_proj.bias")}  # fmt: skip
    assert all(
        torch.equal(p, before[name]) for name, p in after.items() if not name.startswith("action_expert.action_")
    )
    model.resize_heads(5, 9)
    assert model.config.pose_dim == model.config.state_dim == 5 and model.config.action_dim == 9
    assert model.pointers.displacement[4].out_features == model.pointers.displacement_token[0].in_features == 5
    points = {"points_frame": "base", "use_pointers": True, "points_at_destination": True}
    model = StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", **points))
    model.resize_heads(5, 5)
    assert model.pointers.anchors.posture.in_features == model.pointers.carried_query.in_features == 5


@pytest.mark.slow
def test_an_adapter_learns_to_move_the_other_robot(folders, tmp_path):
    """The command at tiny size, as typed."""
    command = [sys.executable, "train.py", "--preset", "tiny", "--dataset", str(folders["second"]),
               "--pool_episodes", "2", "--output_dir", str(tmp_path / "run"), "--model", str(folders["base"]),
               "--lora_rank", "4", "--steps", "60", "--learning_rate", "1e-3", "--checkpoint_every", "60"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    losses = [line["loss/action"] for line in lines if "loss/action" in line]
    assert len(losses) == 60 and sum(losses[-15:]) < 0.7 * sum(losses[:15])
