"""Pretraining of the stereo encoder: its errors against plain loops, what it is shown, that it learns, that it resumes
in the same bits, and that its result is taken by the policy's training.
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
from command_lines import data as build_dataset
from command_lines import pretrain as main
from PIL import Image
from safetensors.torch import load_file
from stereo_sets import make_pair, write_kitti
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

from stereovla.command_line import parse
from stereovla.modeling_stereovla import (
    StereoEncoderConfig,
    StereoEncoderModel,
    StereoVLAConfig,
    StereoVLAForActionPrediction,
)
from stereovla.processing.camera_geometry import Calibration, disparity_to_depth
from stereovla.training.disparity_errors import (
    best_constant,
    border_pixels,
    error_numbers,
    error_sums,
    errors_where_it_matters,
    filled,
    semi_global_matching,
)
from stereovla.training.framing import DisparityFraming, PictureBatches
from stereovla.training.models import give_stereo_encoder, trained_stereo_encoder
from stereovla.training.stereo import StereoOptions, StereoTraining, build, train

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


# ---- errors


def test_errors_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(3, 5, 7, generator=generator) * 50 - 10).clamp(min=0)  # a fifth unknown, some beyond 32
    predicted = truth + torch.randn(3, 5, 7, generator=generator) * 2
    errors, beyond, unknown = [], 0, 0
    for b in range(3):
        for y in range(5):
            for x in range(7):
                true = float(truth[b, y, x])
                if true == 0:
                    unknown += 1
                elif true >= 32:
                    beyond += 1
                else:
                    errors.append(abs(float(predicted[b, y, x]) - true))
    assert beyond and unknown
    parts = error_sums(predicted[:1], truth[:1], 32) + error_sums(predicted[1:], truth[1:], 32)
    assert error_numbers(parts) == pytest.approx(
        {
            "end_point_px": sum(errors) / len(errors),
            "bad_2": sum(error > 2 for error in errors) / len(errors),
            "beyond_range": beyond / (beyond + len(errors)),
            "unknown": unknown / 105,
        }
    )
    with pytest.raises(ValueError, match="none of 4 pixels.*4 lie beyond it: --max_disparity may be too small"):
        error_numbers(error_sums(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 40.0), 32))


def test_no_constant_is_better_than_the_best():
    truth = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(1)) ** 2 * 40
    truth[0, :3] = 0
    best = error_numbers(error_sums(best_constant(truth, 32), truth, 32))["end_point_px"]
    others = [error_numbers(error_sums(float(value), truth, 32))["end_point_px"] for value in np.arange(0, 32, 0.1)]
    assert min(others) - 1e-3 < best <= min(others)


# ---- what is shown


def test_a_cut_keeps_disparities_and_both_views_are_cut_alike():
    left, right, disparity = make_pair(5, 96)
    pair = {"left": left, "right": right, "disparity": disparity, "seed": 3}
    framed = DisparityFraming(32, 64, "native").apply(pair, random=True)
    views, truth = framed["views"], framed["disparity"]
    places = [(y, x) for y in range(65) for x in range(33) if np.array_equal(left[y : y + 32, x : x + 64], views[0])]
    ((y, x),) = places
    assert (y, x) != (32, 16)  # not the middle
    np.testing.assert_array_equal(right[y : y + 32, x : x + 64], views[1])
    np.testing.assert_array_equal(disparity[y : y + 32, x : x + 64], truth)
    framed = DisparityFraming(32, 64, "native").apply(pair, random=False)
    views, truth = framed["views"], framed["disparity"]
    np.testing.assert_array_equal(left[32:64, 16:80], views[0])


@pytest.mark.parametrize("size, factor", [(48, 2.0), (192, 0.5)])
def test_scaling_scales_the_disparities(size, factor):
    """The true disparity explains the scaled right view better than its neighbours do."""
    # even ones, so that their halves are whole px
    left, right, disparity = next(p for p in (make_pair(n, size) for n in range(99)) if not (p[2] % 2).any())
    pair = {"left": left, "right": right, "disparity": disparity, "seed": 0}
    framed = DisparityFraming(96, 96).apply(pair, random=False)
    (left, right), truth = framed["views"], framed["disparity"]
    assert set(np.unique(truth)) == {factor * value for value in np.unique(disparity)}
    reach = int(truth.max()) + 2
    rows, columns = np.mgrid[0:96, reach:96]
    differences = []
    for wrong in (-1, 0, 1):
        matched = right[rows, columns - np.round(truth[rows, columns]).astype(int) + wrong]
        differences.append(np.abs(left[rows, columns].astype(float) - matched).mean())
    assert differences[1] < 0.7 * min(differences[0], differences[2])


def test_zoom_enlarges_by_up_to_its_factor():
    left, right, disparity = make_pair(4, 96)
    factors = set()
    for seed in range(40):
        pair = {"left": left, "right": right, "disparity": disparity, "seed": seed}
        truth = DisparityFraming(96, 96, zoom=1.5).apply(pair, random=True)["disparity"]
        factors.add(float(truth.min() / disparity.min()))
    assert 1 <= min(factors) < 1.1 and 1.4 < max(factors) <= 1.52 and len(factors) > 20
    with pytest.raises(ValueError, match="a view of 96 x 96 px .* is smaller than the 128 x 96 px"):
        DisparityFraming(128, 96, "native").geometry((96, 96))


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("windows")
    for split in ("train", "validation"):
        write_dataset(folder, [6, 5, 4, 3], 2, split=split)
    return str(folder)


def options(dataset, output, *more: str):
    own = ["--preset", "tiny", "--dataset", str(dataset), "--output_dir", str(output), *more]
    return parse(StereoOptions, "stereo", own)


def test_windows_of_our_datasets_give_disparity_from_depth(windows):
    chosen = options(windows, "", "--height", "32", "--width", "32", "--augmentation", "0", "--pool_episodes", "2")
    training = StereoTraining(chosen)
    pair = next(iter(training.stream(0, 1)))
    depth = pair["depth"]
    expected = np.where(depth > 0, 40.0 * 0.063 / np.where(depth > 0, depth, 1), 0)
    np.testing.assert_allclose(chosen.framing.true_values(pair), expected, rtol=1e-5)
    calibration = Calibration(np.array([40.0, 40.0]), np.array([16.0, 16.0]), 0.063)
    np.testing.assert_allclose(disparity_to_depth(chosen.framing.true_values(pair), calibration), depth, rtol=1e-5)
    batches = iter(PictureBatches(training.stream(0, 1), 2, chosen.framing))
    assert next(batches)[0] is None
    inputs = next(batches)[0]
    assert inputs["pixel_values"].shape == (2, 2, 3, 32, 32) and inputs["disparity"].shape == (2, 32, 32)
    np.testing.assert_array_equal(inputs["pixel_values"][0, 0].permute(1, 2, 0) * 255, pair["left"])
    held_out = training.held_out["pixel_values"][:, 0, :, 0, 0]  # its colour says which frame a row is
    assert len(held_out) == len(held_out.unique(dim=0)) == 18  # all there are, once


# ---- training


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_kitti(tmp_path_factory.mktemp("pairs"), 300)  # 50 it would learn by heart


def arguments(dataset: Path, output: Path, *more: str) -> list[str]:
    own = ["--preset", "tiny", "--format", "kitti2015", "--dataset", str(dataset), "--output_dir", str(output)]
    return [*own, "--held_out", "0.1", "--log_every", "1", "--validation_pairs", "8", *more]


def run_here(own: list[str]) -> Path:
    with one_thread():
        return train(parse(StereoOptions, "stereo", own))


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("training") / "run"
    run_here(arguments(pairs, output, "--steps", "80", "--checkpoint_every", "40", "--learning_rate", "3e-3"))
    return output


def test_it_learns_more_than_the_best_constant(trained):
    lines = losses(trained)
    steps = [line["loss/disparity"] for line in lines if "loss/disparity" in line]
    assert len(steps) == 80 and np.mean(steps[-10:]) < 0.5 * np.mean(steps[:10])
    summary = json.loads((trained / "model" / "training.json").read_text())
    assert summary["errors"]["end_point_px"] < 0.8 * summary["best_constant"]["end_point_px"]
    assert summary["held_out_pairs"] == 8
    assert lines[-1] == {"step": 80} | {f"validation/{name}": value for name, value in summary["errors"].items()}
    with Image.open(trained / "disparity.png") as picture:
        assert picture.width > 500
    assert [path.name for path in sorted(trained.glob("checkpoint-*"))] == ["checkpoint-0000040", "checkpoint-0000080"]


FRESH_LOAD = """
import sys
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
recorded = load_file(sys.argv[1] + "/reference_prediction.safetensors")
with torch.no_grad():
    disparity = model(recorded["pixel_values"]).disparity
torch.testing.assert_close(disparity, recorded["disparity"], atol=1e-4, rtol=1e-4)
assert type(model).__module__.startswith("transformers_modules")
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert processor([np.zeros((30, 40, 3), np.uint8)] * 2)["pixel_values"].shape == (1, 2, 3, 64, 64)
"""


def test_the_result_loads_where_this_project_is_not_installed(trained, fresh):
    fresh.run(FRESH_LOAD, str(trained / "model"))


def test_an_earlier_checkpoint_ends_in_the_same_bits(trained, pairs, tmp_path):
    """As after a kill between two checkpoints."""
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(trained / "checkpoint-0000040", again / "checkpoint-0000040")
    shutil.copy(trained / "losses.jsonl", again)
    run_here(arguments(pairs, again, "--steps", "80", "--checkpoint_every", "40", "--learning_rate", "3e-3"))
    assert same_bits(again, trained)


@pytest.mark.slow
def test_told_to_end_it_saves_and_goes_on_in_the_same_bits(pairs, tmp_path):
    own = ["--steps", "8", "--checkpoint_every", "100"]
    run_here(arguments(pairs, tmp_path / "whole", *own))
    told = arguments(pairs, tmp_path / "told", *own)
    assert end_after_its_first_line("stereo", told, tmp_path / "told") < 8
    run_here(told)
    assert same_bits(tmp_path / "whole", tmp_path / "told")


@pytest.fixture(scope="module")
def frozen(pairs, tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments and output of a run whose batch norm sees no batch, so that it matters not how one is divided."""
    output = tmp_path_factory.mktemp("frozen") / "run"
    own = arguments(pairs, output, "--steps", "4", "--freeze_batch_norm", "True", "--checkpoint_every", "2")
    run_here(own)
    return own, output


def test_parts_of_a_step_train_as_the_whole(frozen, tmp_path):
    own, output = frozen
    run_here([*own, "--accumulation", "2", "--output_dir", str(tmp_path / "run")])
    assert_same_part(output, tmp_path / "run")
    initial = build(parse(StereoOptions, "stereo", own)).state_dict()
    final = load_file(output / "model" / "model.safetensors")
    statistics = [name for name in final if name.endswith("running_mean")]
    assert statistics and all(torch.equal(initial[name], final[name]) for name in statistics)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(frozen, tmp_path, config):
    own, output = frozen
    printed = run_two(config, [*own, "--output_dir", str(tmp_path / "run")], "stereovla", "pretrain", "stereo")
    if config == "ddp":
        assert held_share(printed, "MULTI_CPU") == 1
    else:
        assert 0.45 < held_share(printed, "FSDP") < 0.6
    assert_same_part(output, tmp_path / "run")


def test_the_result_of_bfloat16_is_what_loads_in_float32(pairs, tmp_path):
    result = run_here(arguments(pairs, tmp_path / "run", "--steps", "2", "--mixed_precision", "bf16"))
    recorded = load_file(result / "reference_prediction.safetensors")
    with torch.no_grad():
        disparity = StereoEncoderModel.from_pretrained(result).eval()(recorded["pixel_values"]).disparity
    torch.testing.assert_close(disparity, recorded["disparity"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_commands_learn_from_recorded_episodes(tmp_path):
    """Recording and training as a user runs them, in bfloat16, with workers."""
    dataset, output = tmp_path / "dataset", tmp_path / "run"
    assert build_dataset(["build", "--preset", "tiny", "--out", str(dataset)]) == 0
    command = [sys.executable, "-m", "stereovla", "pretrain", "stereo", "--preset", "tiny", "--dataset", str(dataset)]
    command += ["--output_dir", str(output), "--log_every", "5", "--mixed_precision", "bf16", "--workers", "1"]
    command += ["--steps", "20", "--validation_pairs", "8"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [line["loss/disparity"] for line in losses(output) if "loss/disparity" in line]
    assert steps[-1] < 0.5 * steps[0]
    assert "end-point error" in done.stdout


# ---- where it goes on


def test_training_starts_from_a_given_model(trained, pairs):
    again = build(
        parse(StereoOptions, "stereo", arguments(pairs, "", "--model", str(trained / "model"), "--max_disparity", "64"))
    )
    assert again.config.max_disparity == 64 and again.dtype == torch.float32
    saved = load_file(trained / "model" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state_dict().items())


def test_the_policy_takes_the_encoders_weights(trained, tmp_path):
    policy = StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny"))
    give_stereo_encoder(policy, str(trained / "model"))
    saved = load_file(trained / "model" / "model.safetensors")
    assert all(torch.equal(t, saved[name]) for name, t in policy.model.visual_tokens.stereo.state_dict().items())
    fields = policy.config.stereo_config.to_dict() | {"max_disparity": 64, "edgenext_heads": 4}
    StereoEncoderModel(StereoEncoderConfig(**fields)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"differ in edgenext_heads \(8, 4\), max_disparity \(32, 64\)$"):
        give_stereo_encoder(policy, str(tmp_path / "other"))
    policy.config.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="is a 'stereovla'; expected a 'stereovla_stereo_encoder'"):
        trained_stereo_encoder(str(tmp_path / "policy"))


def test_pixels_beyond_the_volume_are_counted(pairs):
    chosen = parse(StereoOptions, "stereo", arguments(pairs, "", "--scale", "native"))
    training = StereoTraining(chosen)
    truth, training.max_disparity = training.held_out["disparity"], 8
    constant = best_constant(truth, 8)
    assert constant < 8
    errors = training.errors(constant)
    assert errors["beyond_range"] == pytest.approx(float((truth >= 8).double().mean()))
    assert 0.1 < errors["beyond_range"] < 0.95


def test_options_that_cannot_work_are_refused(pairs, capsys):
    for wrong, message in (
        (("--height", "40"), "--height is 40 px; it must be a multiple of 32"),
        (("--steps", "0"), "--steps is 0; it must be at least 1"),
        (("--columns", "left,right"), "--columns is 'left,right'; it needs three names"),
        (("--held_out", "1"), r"--held_out is 1.0; it must be a share in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(StereoOptions, "stereo", arguments(pairs, "", *wrong))
    with pytest.raises(ValueError, match="--preset full has FoundationStereo's frozen monocular features.*--model"):
        build(parse(StereoOptions, "stereo", arguments(pairs, "", "--preset", "full")))
    assert main(["stereoo"]) == 2 and "did you mean stereo?" in capsys.readouterr().err
    assert main([]) == 2 and "the stereo encoder alone" in capsys.readouterr().out


# ---- errors where they matter


def test_errors_at_target_and_gripper_are_those_of_the_pixel_in_their_middle():
    truth = torch.full((2, 6, 8), 10.0)
    truth[0, 2, 2] = 0  # unknown
    predicted = truth + 1
    segmentation = torch.zeros(2, 6, 8, dtype=torch.uint8)
    segmentation[0, 1:4, 1:4] = 3  # a target whose middle is unknown
    segmentation[1, 4, 6] = 2
    predicted[0, 1:4, 1:4] = 14.0
    predicted[1, 4, 6] = 8.0
    found = errors_where_it_matters(predicted, truth, segmentation, torch.tensor([5.0, 4.0]))
    assert found["target_px"] == 4 and found["target_cm"] == pytest.approx(100 * (5 / 10 - 5 / 14))
    assert found["gripper_px"] == 2 and found["gripper_cm"] == pytest.approx(100 * (4 / 8 - 4 / 10))
    assert "border_px" not in found and found["elsewhere_px"] == pytest.approx(
        (predicted - truth).abs()[truth > 0].double().mean().item()
    )
    nothing = errors_where_it_matters(predicted, truth, 0 * segmentation, torch.full((2,), torch.nan))
    assert set(nothing) == {"elsewhere_px"}


def test_borders_are_the_pixels_within_two_of_a_step():
    truth = torch.full((1, 9, 12), 10.0)
    truth[0, :, 6:] = 12.0
    truth[0, :, 11] = 12.5  # not a step
    border = border_pixels(truth)[0]
    assert border[4].nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    truth[0, :, 5] = 0  # what is unknown is no step, and hides none beside it
    assert not border_pixels(torch.where(truth == 12.0, 0.0, truth)).any()


def test_semi_global_matching_finds_planes_and_fills_what_it_does_not_see():
    pair = torch.from_numpy(np.stack(make_pair(0, 96)[:2])).permute(0, 3, 1, 2)[None] / 255
    truth = torch.from_numpy(make_pair(0, 96)[2])
    found = semi_global_matching(pair, 32)
    assert found.shape == (1, 96, 96) and found.dtype == torch.float32
    known = truth > 0
    assert (found[0] - truth).abs()[known].median() < 1
    rows = np.array([[np.nan, 3.0, np.nan, 5.0, np.nan], [np.nan] * 5])
    assert filled(rows).tolist() == [[3, 3, 3, 5, 5], [0] * 5]
