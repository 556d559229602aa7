"""Pretraining of the depth expert: its errors against plain loops, what it is shown, that it learns, that it resumes in
the same bits, and that its result, an encoder's and a VLM's weights go where they belong.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import pretrain as main
from depth_sets import make_picture, write_folders
from PIL import Image
from safetensors.torch import load_file
from synthetic_dataset import write_dataset
from training_runs import (
    ROOT,
    assert_same_part,
    end_after_its_first_line,
    held_share,
    losses,
    one_thread,
    run_two,
    same_bits,
)
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Model,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0ForConditionalGeneration,
)

from stereovla.command_line import parse
from stereovla.modeling_stereovla import (
    DepthExpertConfig,
    DepthExpertModel,
    DepthVLAConfig,
    DepthVLAForActionPrediction,
    StereoEncoderModel,
)
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.processing import ViewImageProcessorPil
from stereovla.training.depth import DepthOptions, DepthTraining, build, train
from stereovla.training.depth_errors import BestConstants, depth_errors
from stereovla.training.framing import DepthFraming, PictureBatches
from stereovla.training.models import give_depth_expert, give_encoder, give_vlm, trained_depth_expert

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


# ---- errors


def some_depths(count: int = 3) -> torch.Tensor:
    """(count, 6, 7) m from 0.2 to 4, a fifth unknown in three ways, the last picture all unknown."""
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(count, 6, 7, generator=generator) ** 2 * 3.8 + 0.2
    for number, value in enumerate((0.0, -1.0, torch.inf)):
        depth[torch.rand(depth.shape, generator=generator) < 0.07] = value if number else torch.nan
    depth[-1] = 0
    return depth


def test_errors_are_those_of_a_plain_loop():
    truth = some_depths()
    predicted = truth.nan_to_num(1, 1, 1).abs().clamp(min=0.3) * torch.exp(
        0.3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    )
    relative, squares, right, pictures, unknown = [], [], [], [], 0
    for b in range(3):
        logs = []
        for y in range(6):
            for x in range(7):
                true, mine = float(truth[b, y, x]), float(predicted[b, y, x])
                if not (0 < true < float("inf")):
                    unknown += 1
                    continue
                relative.append(abs(mine - true) / true)
                squares.append((mine - true) ** 2)
                right.append(max(mine / true, true / mine) < 1.25)
                logs.append(np.log(mine) - np.log(true))
        if logs:
            pictures.append(np.sqrt(np.mean(np.square(logs)) - 0.5 * np.mean(logs) ** 2))
    assert len(pictures) == 2 and unknown > 42
    assert depth_errors(predicted, truth, 0.5) == pytest.approx(
        {
            "abs_rel": np.mean(relative),
            "rmse_m": np.sqrt(np.mean(squares)),
            "delta_1_25": np.mean(right),
            "l_si": np.mean(pictures),
            "unknown": unknown / truth.numel(),
        },
        rel=1e-4,
    )
    with pytest.raises(ValueError, match="none of 4 pixels has a known depth"):
        depth_errors(1.0, torch.zeros(1, 2, 2), 0.5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_constant_is_better_than_the_best_of_its_measure(share):
    truth = some_depths()
    best = BestConstants.of(truth, share).errors(truth, share)
    others = [depth_errors(float(value), truth, share) for value in np.arange(0.2, 4, 0.01)]
    for name, sign in (("abs_rel", 1), ("rmse_m", 1), ("delta_1_25", -1), ("l_si", 1)):
        found = min(sign * other[name] for other in others)
        assert sign * best[name] <= found + 1e-5, name
        assert sign * best[name] > found - 0.02, name  # the grid comes near it
    with pytest.raises(ValueError, match="none of 42 pixels of the training data"):
        BestConstants.of(truth[2:], share)


# ---- what is shown


def test_a_cut_and_scaling_leave_depths_as_they_are():
    picture, depth = make_picture(3, 96)
    sample = {"left": picture, "depth": depth, "seed": 5}
    framed = DepthFraming(32, 32, "native", views=("left",)).apply(sample, random=True)
    views, truth = framed["views"], framed["depth"]
    places = [(y, x) for y in range(65) for x in range(65) if np.array_equal(picture[y : y + 32, x : x + 32], views[0])]
    assert [(y, x) for y, x in places if np.array_equal(depth[y : y + 32, x : x + 32], truth)]
    framed = DepthFraming(192, 192, views=("left",)).apply(sample, random=False)
    views, truth = framed["views"], framed["depth"]
    np.testing.assert_array_equal(truth, np.kron(depth, np.ones((2, 2), np.float32)))
    assert views.shape == (1, 192, 192, 3)


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("windows")
    for split in ("train", "validation"):
        write_dataset(folder, [6, 5, 4, 3], 2, split=split)
    return str(folder)


def options(dataset, output="", *more: str) -> DepthOptions:
    own = ["--preset", "depthvla-tiny", "--dataset", str(dataset), "--output_dir", str(output), *more]
    return parse(DepthOptions, "depth", own)


@pytest.mark.parametrize("stereo", [False, True])
def test_windows_of_our_datasets_give_their_depth(windows, stereo):
    chosen = options(windows, "", "--pool_episodes", "2", "--stereo", str(stereo))
    training = DepthTraining(chosen)
    window = next(iter(training.stream(0, 1)))
    batches = iter(PictureBatches(training.stream(0, 1), 2, training.framing))
    assert next(batches)[0] is None
    inputs = next(batches)[0]
    assert inputs["pixel_values"].shape == (2, 1 + stereo, 3, 64, 64)
    shown = [window[view] for view in ("left", "right")[: 1 + stereo]]
    for view, picture in zip(inputs["pixel_values"][0], shown, strict=True):
        np.testing.assert_array_equal(view[:, 0, 0] * 255, picture[0, 0])  # each is of one colour
    np.testing.assert_array_equal(inputs["depth"][0], np.kron(window["depth"], np.ones((2, 2))))
    held_out = training.held_out["pixel_values"][:, 0, :, 0, 0]
    assert len(held_out) == len(held_out.unique(dim=0)) == 18  # all there are, once
    assert training.pixels(inputs["depth"])[0] == 2 * 8 * 64  # the four upper rows, twice as large


def test_datasets_of_one_camera_are_enough(tmp_path):
    for split in ("train", "validation"):
        write_dataset(tmp_path, [6, 5], 2, split=split, without=("observation.images.right", "calibration.baseline_m"))
    training = DepthTraining(options(tmp_path, "", "--pool_episodes", "2"))
    assert training.held_out["pixel_values"].shape == (11, 1, 3, 64, 64)
    with pytest.raises(ValueError, match="right"):
        DepthTraining(options(tmp_path, "", "--stereo", "True"))


def test_the_loss_is_the_mean_over_pictures_with_any_known_pixel(windows):
    training = DepthTraining(options(windows, "", "--silog_lambda", "0.3"))
    inputs = {name: tensor[:4].clone() for name, tensor in training.held_out.items()}
    inputs["depth"][2] = 0
    with torch.no_grad():
        log_depth = training.model(inputs["pixel_values"]).log_depth[:, 0]
        loss = training.loss(training.model, inputs) / training.counted(inputs["depth"])
    errors = []
    for number in (0, 1, 3):
        known = inputs["depth"][number] > 0
        y = (log_depth[number] - inputs["depth"][number].log())[known].double()
        errors.append(float((y.square().mean() - 0.3 * y.mean() ** 2).sqrt()))
    assert float(loss) == pytest.approx(np.mean(errors), rel=1e-4)


# ---- training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("pictures"), 120)


def arguments(dataset: Path, output: Path | str, *more: str) -> list[str]:
    own = ["--preset", "depthvla-tiny", "--format", "folders", "--depth_unit_m", "0.001", "--dataset", str(dataset)]
    own += ["--output_dir", str(output), "--held_out", "0.1", "--log_every", "1", "--validation_pictures", "8"]
    return [*own, *more]


def run_here(own: list[str]) -> Path:
    with one_thread():
        return train(parse(DepthOptions, "depth", own))


LONG = ["--steps", "60", "--checkpoint_every", "30", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("training") / "run"
    run_here(arguments(pictures, output, *LONG))
    return output


def test_it_learns_more_than_the_best_constants(trained):
    lines = losses(trained)
    steps = [line["loss/depth"] for line in lines if "loss/depth" in line]
    assert len(steps) == 60 and np.mean(steps[-10:]) < 0.5 * np.mean(steps[:10])
    summary = json.loads((trained / "model" / "training.json").read_text())
    for name, sign in (("abs_rel", 1), ("rmse_m", 1), ("l_si", 1), ("delta_1_25", -1)):
        assert sign * summary["errors"][name] < sign * summary["best_constant"][name]["error"], name
    assert summary["held_out_pictures"] == 8
    assert lines[-1] == {"step": 60} | {f"validation/{name}": value for name, value in summary["errors"].items()}
    with Image.open(trained / "depth.png") as picture:
        assert picture.width > 500
    card = (trained / "model" / "README.md").read_text()
    assert f"| {summary['errors']['abs_rel']:.4f} | {summary['best_constant']['abs_rel']['error']:.4f} (" in card
    assert str(trained) not in card


FRESH_LOAD = """
import sys
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
recorded = load_file(sys.argv[1] + "/reference_prediction.safetensors")
with torch.no_grad():
    depth = model(recorded["pixel_values"]).depth[:, 0]
torch.testing.assert_close(depth, recorded["depth"], atol=1e-4, rtol=1e-4)
assert type(model).__module__.startswith("transformers_modules")
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert processor(np.zeros((30, 40, 3), np.uint8))["pixel_values"].shape == (1, 1, 3, 64, 64)
"""


def test_the_result_loads_where_this_project_is_not_installed(trained, fresh):
    fresh.run(FRESH_LOAD, str(trained / "model"))


def test_an_earlier_checkpoint_ends_in_the_same_bits(trained, pictures, tmp_path):
    """As after a kill between two checkpoints."""
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(trained / "checkpoint-0000030", again / "checkpoint-0000030")
    shutil.copy(trained / "losses.jsonl", again)
    run_here(arguments(pictures, again, *LONG))
    assert same_bits(again, trained)


def test_single_views_are_processed_as_one_of_a_pair():
    pictures = [make_picture(0, 48)[0], make_picture(1, 64)[0]]
    processor = ViewImageProcessorPil(size={"height": 64, "width": 64})
    pixel_values = processor(pictures)["pixel_values"]
    assert pixel_values.shape == (2, 1, 3, 64, 64)
    np.testing.assert_array_equal((pixel_values[1, 0].permute(1, 2, 0) * 255).round(), pictures[1])
    assert torch.equal(processor(Image.fromarray(pictures[0]))["pixel_values"], pixel_values[:1])
    with pytest.raises(ValueError, match="images is empty"):
        processor([])


@pytest.mark.slow
def test_told_to_end_it_saves_and_goes_on_in_the_same_bits(pictures, tmp_path):
    own = ["--steps", "30", "--checkpoint_every", "100"]
    run_here(arguments(pictures, tmp_path / "whole", *own))
    told = arguments(pictures, tmp_path / "told", *own)
    assert end_after_its_first_line("depth", told, tmp_path / "told") < 30
    run_here(told)
    assert same_bits(tmp_path / "whole", tmp_path / "told")


SHORT = ["--steps", "4", "--checkpoint_every", "2"]


def test_parts_of_a_step_train_as_the_whole(pictures, tmp_path):
    run_here(arguments(pictures, tmp_path / "whole", *SHORT))
    run_here(arguments(pictures, tmp_path / "parts", *SHORT, "--accumulation", "2"))
    assert_same_part(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("config, precision", [("ddp", "no"), ("fsdp2", "no"), ("fsdp2", "bf16")])
def test_two_processes_train_as_one(pictures, tmp_path, config, precision):
    own = [*SHORT, "--mixed_precision", precision]
    printed = run_two(config, arguments(pictures, tmp_path / "two", *own), "stereovla", "pretrain", "depth")
    if config == "ddp":
        assert held_share(printed, "MULTI_CPU") == 1
    else:
        assert 0.45 < held_share(printed, "FSDP") < 0.6
    if precision == "no":
        run_here(arguments(pictures, tmp_path / "one", *own))
        assert_same_part(tmp_path / "one", tmp_path / "two")
    # whatever the arithmetic of the training was, the result predicts in float32 what it predicts when it is loaded
    recorded = load_file(tmp_path / "two" / "model" / "reference_prediction.safetensors")
    with torch.no_grad():
        depth = trained_depth_expert(str(tmp_path / "two" / "model")).eval()(recorded["pixel_values"]).depth[:, 0]
    torch.testing.assert_close(depth, recorded["depth"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_command_trains_a_stereo_depth_expert_in_bfloat16(windows, tmp_path, fresh):
    command = [sys.executable, "-m", "stereovla", "pretrain", "depth", "--preset", "depthvla-tiny", "--stereo", "True"]
    command += ["--dataset", windows, "--output_dir", str(tmp_path / "run"), "--steps", "6", "--workers", "1"]
    command += ["--mixed_precision", "bf16", "--validation_pictures", "8", "--pool_episodes", "2"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "abs rel" in done.stdout
    model = trained_depth_expert(str(tmp_path / "run" / "model"))
    assert model.stereo is not None
    recorded = load_file(tmp_path / "run" / "model" / "reference_prediction.safetensors")
    assert recorded["pixel_values"].shape == (1, 2, 3, 64, 64)


# ---- where weights go


def policy(**overrides) -> DepthVLAForActionPrediction:
    torch.manual_seed(1)
    return DepthVLAForActionPrediction(DepthVLAConfig.from_preset("depthvla-tiny", **overrides))


def test_training_starts_from_a_given_model(trained, pictures):
    again = build(parse(DepthOptions, "depth", arguments(pictures, "", "--model", str(trained / "model"))))
    saved = DepthExpertModel.from_pretrained(trained / "model").state_dict()
    assert again.dtype == torch.float32
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state_dict().items())


def test_the_policy_takes_the_depth_experts_weights(trained, tmp_path):
    model = policy()
    give_depth_expert(model, str(trained / "model"))
    recorded = load_file(trained / "model" / "reference_prediction.safetensors")
    with torch.no_grad():
        depth = model.eval().model.depth_expert(recorded["pixel_values"]).depth[:, 0]
    torch.testing.assert_close(depth, recorded["depth"], atol=1e-4, rtol=1e-4)
    assert model.config.depth_expert_source == str(trained / "model")
    wider = DepthExpertConfig.from_preset("depthvla-tiny", decoder_config={"hidden_size": 48})
    DepthExpertModel(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"differ in decoder_config.hidden_size \(32, 48\)$"):
        give_depth_expert(model, str(tmp_path / "wider"))
    assert model.config.depth_expert_source == str(trained / "model")
    with pytest.raises(ValueError, match="has nowhere to go: this model has no depth expert"):
        give_depth_expert(policy(depth_expert=False), str(trained / "model"))
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="is a 'depthvla'; expected a 'depthvla_depth_expert', a DepthExpertModel"):
        give_depth_expert(model, str(tmp_path / "policy"))


def depth_anything(**sizes) -> DepthAnythingForDepthEstimation:
    """A small one, around the encoder of the preset tiny."""
    encoder = DepthExpertConfig.from_preset("depthvla-tiny").encoder_config.to_dict() | sizes
    encoder = {name: value for name, value in encoder.items() if name != "out_indices"}
    backbone = {**encoder, "out_features": ["stage1", "stage2"], "reshape_hidden_states": False}
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=encoder["hidden_size"],
        neck_hidden_sizes=[8, 8],
        reassemble_factors=[1, 1],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=16,
    )
    torch.manual_seed(3)
    return DepthAnythingForDepthEstimation(config)


def test_the_encoder_comes_from_depth_anything_or_from_a_plain_model(tmp_path, windows):
    source = depth_anything().eval()
    source.save_pretrained(tmp_path / "depth_anything")
    model = build(options(windows, "", "--encoder", str(tmp_path / "depth_anything"))).eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        expected = source.backbone.forward_with_filtered_kwargs((pixels - mean) / std).feature_maps[-1][:, 1:]
        torch.testing.assert_close(model.encoder(pixels), expected, atol=1e-5, rtol=1e-5)
    plain = Dinov2Model(model.config.encoder_config)
    plain.save_pretrained(tmp_path / "plain")
    give_encoder(model, str(tmp_path / "plain"))
    given = plain.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.encoder.tower.state_dict().items())
    depth_anything(hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"differ in hidden_size \(32, 64\), num_attention_heads \(1, 2\)$"):
        give_encoder(model, str(tmp_path / "wide"))
    lacking = load_file(tmp_path / "plain" / "model.safetensors")
    del lacking["layernorm.weight"]
    plain.save_pretrained(tmp_path / "lacking", state_dict=lacking)
    with pytest.raises(ValueError, match="lacks 1 weights of a 'dinov2' encoder: layernorm.weight$"):
        give_encoder(model, str(tmp_path / "lacking"))
    more = load_file(tmp_path / "plain" / "model.safetensors") | {"head.weight": torch.zeros(2)}
    plain.save_pretrained(tmp_path / "more", state_dict=more)
    with pytest.raises(ValueError, match="has 1 weights that a 'dinov2' encoder has not: head.weight$"):
        give_encoder(model, str(tmp_path / "more"))
    demo = DepthExpertModel(DepthExpertConfig.from_preset("depthvla-demo"))
    with pytest.raises(ValueError, match="is a 'dinov2'; expected a 'resnet', or a 'depth_anything' with one"):
        give_encoder(demo, str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="differ: a 'resnet', a 'dinov2'"):
        give_encoder(demo, str(tmp_path / "depth_anything"))


def test_a_stereo_encoder_goes_into_the_depth_expert(tmp_path, windows):
    config = DepthExpertConfig.from_preset("depthvla-tiny", **stereo_encoder()).stereo_config
    torch.manual_seed(4)
    source = StereoEncoderModel(config)
    source.save_pretrained(tmp_path / "stereo")
    model = build(options(windows, "", "--stereo", "True", "--encoder", str(tmp_path / "stereo")))
    given = source.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.stereo.state_dict().items())


def test_the_policy_takes_a_vlm_from_each_kind_of_folder(tmp_path):
    torch.manual_seed(5)
    config = policy().config
    paligemma = PaliGemmaForConditionalGeneration(config.vlm_config)
    dit = {**config.depth_config.decoder_config.to_dict(), "vocab_size": 64}
    pi0 = PI0ForConditionalGeneration(PI0Config(vlm_config=config.vlm_config, dit_config=dit))
    torch.manual_seed(6)
    other = policy(depth_expert=False)
    for source, vlm in ((paligemma, paligemma.model), (pi0, pi0.model.vlm), (other, other.model.vlm)):
        folder = tmp_path / type(source).__name__
        source.save_pretrained(folder)
        model = policy()
        before = model.state_dict()["model.vlm.multi_modal_projector.linear.weight"].clone()
        give_vlm(model, str(folder))
        given = vlm.state_dict()
        assert all(torch.equal(tensor, given[name]) for name, tensor in model.model.vlm.state_dict().items())
        assert source is other or not torch.equal(before, given["multi_modal_projector.linear.weight"])
        assert torch.equal(model.lm_head.weight, given["language_model.embed_tokens.weight"])  # tied
    with pytest.raises(ValueError, match=r"differ in .*text_config.hidden_size \(96, 64\)"):
        give_vlm(
            DepthVLAForActionPrediction(DepthVLAConfig.from_preset("depthvla-demo")),
            str(tmp_path / "PaliGemmaForConditionalGeneration"),
        )
    lacking = load_file(tmp_path / "PaliGemmaForConditionalGeneration" / "model.safetensors")
    name = next(name for name in lacking if name.endswith("projector.linear.bias"))
    del lacking[name]
    paligemma.save_pretrained(tmp_path / "lacking", state_dict=lacking)
    with pytest.raises(ValueError, match="lacks 1 weights of a 'paligemma' model: .*linear.bias"):
        give_vlm(policy(), str(tmp_path / "lacking"))
    DepthExpertModel(config.depth_config).save_pretrained(tmp_path / "expert")
    with pytest.raises(ValueError, match="is a 'depthvla_depth_expert'; expected one of paligemma, depthvla, pi0"):
        give_vlm(policy(), str(tmp_path / "expert"))


def test_options_that_cannot_work_are_refused(pictures, windows, trained, tmp_path, capsys):
    for wrong, message in (
        (("--steps", "0"), "--steps is 0; it must be at least 1"),
        (("--silog_lambda", "1.5"), r"--silog_lambda is 1.5; it must be in \[0, 1\]"),
        (("--depth_unit_m", "0"), "--depth_unit_m is 0.0; it must be above 0"),
        (("--columns", "image"), "--columns is 'image'; it needs two names"),
        (("--model", "a/b", "--stereo", "True"), "--model a/b has its own encoder"),
        (
            ("--preset", "depthvla-full", "--stereo", "True"),
            "valid with it: depthvla-tiny, depthvla-demo",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parse(DepthOptions, "depth", arguments(pictures, "", *wrong))
    with pytest.raises(ValueError, match="--format folders needs --depth_unit_m: 0.001 for mm"):
        options(pictures, "", "--format", "folders")
    with pytest.raises(ValueError, match="--depth_unit_m is 0.001, but datasets of this project state theirs"):
        options(windows, "", "--depth_unit_m", "0.001")
    with pytest.raises(ValueError, match="--format folders has one view of each scene"):
        DepthTraining(parse(DepthOptions, "depth", arguments(pictures, "", "--stereo", "True")))
    DepthExpertModel(DepthExpertConfig.from_preset("depthvla-tiny", input="depth")).save_pretrained(tmp_path / "shown")
    with pytest.raises(ValueError, match="shown is shown depth .*nothing to learn"):
        build(parse(DepthOptions, "depth", arguments(pictures, "", "--model", str(tmp_path / "shown"))))
    assert main(["depthh"]) == 2 and "did you mean depth?" in capsys.readouterr().err
