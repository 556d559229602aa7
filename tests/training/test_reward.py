"""The reward stage: rewards against counted pixels, log-probabilities against the model's own, answers that improve."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from command_lines import pretrain as main
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from synthetic_dataset import write_training_dataset
from trl import GRPOConfig

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.questions import processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import DepthVLAConfig
from stereovla.training.models import towers_of, untrained
from stereovla.training.reward import (
    ANSWER_TOKENS,
    RewardOptions,
    RewardTrainer,
    box_tokens,
    question_inputs,
    reward_functions,
)
from stereovla.training.rewards import DEPTH_SCALE_M, INVALID, box_iou, box_reward, depth_reward
from stereovla.training.stage import trainer_arguments

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

# ---- rewards
whole_boxes = st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 6)] * 2).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@settings(max_examples=60)
@given(whole_boxes, whole_boxes)
def test_overlap_is_that_of_counted_pixels(first, second):
    filled = np.zeros((2, 16, 16), dtype=bool)
    for picture, (left, top, right, bottom) in zip(filled, (first, second), strict=True):
        picture[top:bottom, left:right] = True
    expected = (filled[0] & filled[1]).sum() / (filled[0] | filled[1]).sum()
    assert box_iou(np.array(first), np.array(second)) == pytest.approx(expected)
    assert box_iou(np.array(first), np.array(first)) == 1


def test_boxes_count_both_views_and_what_is_no_box_gets_least():
    truth = np.array([[0.0, 0, 4, 4], [2, 2, 6, 6]])
    assert box_reward(truth, True, truth) == 1
    assert box_reward(np.array([truth[0], [10.0, 10, 12, 12]]), True, truth) == 0.5
    far = np.array([[50.0, 50, 51, 51]] * 2)
    assert INVALID == box_reward(truth, False, truth) < 0 == box_reward(far, True, truth)


def test_depths_count_their_error_and_what_is_no_depth_gets_least():
    assert depth_reward([0.5], [0.5]) == 1
    assert depth_reward([0.5 + DEPTH_SCALE_M], [0.5]) == pytest.approx(np.exp(-1))
    assert depth_reward([0.5, 0.9], [0.5, 0.9 - DEPTH_SCALE_M]) == pytest.approx((1 + np.exp(-1)) / 2)
    assert depth_reward([0.53], [0.5]) == depth_reward([0.47], [0.5])
    rewards = [depth_reward([answer], [0.5]) for answer in (0.5, 0.51, 0.6, 1.0, 100.0)]
    assert all(better > worse for better, worse in zip(rewards, rewards[1:], strict=False))
    for invalid in (None, [], [0.5, 0.5]):
        assert depth_reward(invalid, [0.5]) == INVALID < rewards[-1]


# ---- answers in tokens


@pytest.fixture(autouse=True)
def no_state_left():
    """The next trainer of this process may be of another kind."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_training_dataset(tmp_path_factory.mktemp("reward") / "dataset")


@pytest.fixture(scope="module", params=["tiny", "depthvla-tiny"])
def asked(request, dataset):
    """An untrained model, its processor, and windows with three questions of each kind."""
    torch.manual_seed(0)
    model, processor = untrained(request.param, load_meta(dataset))
    views = tuple(processor.pixel_views)
    stream = WindowStream(dataset, mixture={"depth": 1, "box": 1}, depth_map_share=0.0, views=views)
    windows = list(islice(stream, 40))
    return (
        model,
        processor,
        [w for name in ("depth", "box") for w in windows if w["objective"] == name][:2]
        + [w for w in windows if w["objective"] == "box"][:2],
    )


def true_answer(processor, window: dict) -> list[int]:
    """Ids of the answer that training would teach."""
    inputs = processor(**processor_arguments([window], processor.pixel_views))
    return inputs["labels"][0][inputs["labels"][0] != -100].tolist()


def test_true_answers_get_the_best_and_broken_ones_the_lowest_reward(asked):
    _, processor, windows = asked
    box, depth = reward_functions(processor)
    assert (box.__name__, depth.__name__) == ("box", "depth")  # the names in the log
    truths = [true_answer(processor, window) for window in windows]
    boxes, depths = (reward(prompts=windows, completion_ids=truths) for reward in (box, depth))
    for window, of_box, of_depth in zip(windows, boxes, depths, strict=True):
        assert (of_box is None, of_depth is None) == (window["objective"] == "depth", window["objective"] == "box")
        # exact up to half a bin and half a centimetre
        assert max(filter(None, (of_box, of_depth))) > 0.85
    shifted = [[ids[1], *ids[1:]] if w["objective"] == "box" else ids for w, ids in zip(windows, truths, strict=True)]
    cut = [ids[:-3] for ids in truths]
    word = processor.tokenizer("red", add_special_tokens=False)["input_ids"]
    for broken in (cut, [word] * len(windows), [[processor.tokenizer.eos_token_id]] * len(windows)):
        assert {r for f in (box, depth) for r in f(prompts=windows, completion_ids=broken)} == {None, INVALID}
    moved = box(prompts=windows, completion_ids=shifted)
    assert all(b is None or b > a for a, b in zip(moved, boxes, strict=True) if a is not None)


def test_questions_hold_no_answer(asked):
    _, processor, windows = asked
    inputs = question_inputs(processor, windows)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["attention_mask"][:, -1].all()  # padded on the left
    for window, ids, mask in zip(windows, inputs["input_ids"], inputs["attention_mask"], strict=True):
        taught = processor(**processor_arguments([window], processor.pixel_views))["input_ids"][0].tolist()
        question = ids[mask.bool()].tolist()
        assert taught == question + true_answer(processor, window)


@torch.no_grad()
def next_token(model, prompt: torch.Tensor, written: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (vocabulary,) of what follows, when nothing else is written yet."""
    inputs = {"input_ids": torch.cat([prompt, written])[None], "pixel_values": pixel_values[None]}
    if model.config.model_type == "depthvla":
        inputs["token_type_ids"] = torch.cat([torch.zeros_like(prompt), torch.ones_like(written)])[None]
    return model(**inputs).logits[0, -1].log_softmax(-1)


def test_answers_are_scored_with_their_own_pictures(asked, tmp_path):
    """GRPO's log-probabilities are those of our own forward, of each sample alone, and survive its shuffling."""
    model, processor, windows = asked
    options = RewardOptions(
        dataset=["unused"], output_dir=str(tmp_path), model="unused", questions=len(windows), answers=2
    )
    trainer = RewardTrainer(
        model=model.eval(),
        reward_funcs=reward_functions(processor),
        args=GRPOConfig(**trainer_arguments(options), num_generations=2, max_completion_length=ANSWER_TOKENS),
        train_dataset=IterableDataset.from_generator(lambda: ({"prompt": window} for window in windows)),
        processing_class=processor,
    )
    model.train()
    model.freeze(*towers_of(model))
    torch.manual_seed(0)
    rows = [{"prompt": window} for window in windows for _ in range(2)]
    batch = trainer._prepare_inputs(rows)
    assert batch["pixel_values"].shape == (len(rows), len(processor.pixel_views), 3, 64, 64)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    kept = batch["completion_ids"].shape[1]
    with torch.no_grad():
        scored, _, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, kept, pixel_values=batch["pixel_values"], num_images=batch["num_images"]
        )
    questions = question_inputs(processor, windows)
    seen = []
    for row in range(len(rows)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        matches = [
            number
            for number, (i, m) in enumerate(zip(questions["input_ids"], questions["attention_mask"], strict=True))
            if torch.equal(i[m.bool()], prompt)
            and torch.equal(questions["pixel_values"][number], batch["pixel_values"][row])
        ]
        assert matches  # the question and the pair of one window
        seen.append(matches[0])
        answer = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        assert len(answer) <= (box_tokens(processor) if windows[matches[0]]["objective"] == "box" else ANSWER_TOKENS)
        own = torch.stack(
            [next_token(model, prompt, answer[:k], batch["pixel_values"][row]) for k in range(len(answer))]
        )
        own = own.gather(-1, answer[:, None])[:, 0]
        torch.testing.assert_close(scored[row, : len(answer)], own, atol=1e-4, rtol=1e-4)
    assert seen != sorted(seen)  # GRPO shuffled them


def test_options_name_what_is_wrong(capsys, tmp_path):
    data = ["reward", "--dataset", "d", "--output_dir", str(tmp_path)]
    for wrong, message in (
        ([], "--model is missing"),
        (["--model", "m", "--answers", "1"], "--answers is 1; it must be at least 2"),
        (["--model", "m", "--questions", "0"], "--questions is 0; it must be at least 1"),
    ):
        assert main([*data, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": ["left", "wrist"]}, "sees the views left, wrist, of which some may be absent"),
        ({"depth_config": {"input": "depth"}}, "is shown the true depth"),
        ({"mask": "full"}, "has the mask 'full'"),
    ],
)
def test_a_depthvla_whose_answers_cannot_be_drawn_is_refused_before_it_is_loaded(
    dataset, tmp_path, capsys, fields, message
):
    DepthVLAConfig.from_preset("depthvla-tiny", **fields).save_pretrained(tmp_path / "base")  # no weights are there
    words = ["--preset", "depthvla-tiny", "--dataset", str(dataset), "--output_dir", str(tmp_path / "run")]
    assert main(["reward", *words, "--model", str(tmp_path / "base")]) == 2
    assert f"{tmp_path / 'base'} cannot learn from rewards: it {message}" in capsys.readouterr().err


def test_a_depthvla_learns_from_rewards(dataset, tmp_path):
    for part in untrained("depthvla-tiny", load_meta(dataset)):
        part.save_pretrained(tmp_path / "base")
    own = ["--preset", "depthvla-tiny", "--model", str(tmp_path / "base"), "--steps", "2", "--questions", "2"]
    data = ["--dataset", str(dataset), "--pool_episodes", "2", "--validation_questions", "2", "--answers", "2"]
    assert main(["reward", *own, *data, "--output_dir", str(tmp_path / "run")]) == 0
    lines = log_of(tmp_path / "run")
    assert len([line for line in lines if "reward" in line]) == 2
    assert (tmp_path / "run/model/model.safetensors").exists()


# ---- the command


def run_command(*arguments: str) -> None:
    command = [sys.executable, "-m", "stereovla", "pretrain", *arguments]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_rewards_rise_and_a_killed_run_goes_on_in_the_same_bits(dataset, tmp_path):
    data = ["--preset", "tiny", "--dataset", str(dataset), "--pool_episodes", "2"]
    start = tmp_path / "grounded"
    run_command("grounding", *data, "--steps", "60", "--learning_rate", "3e-3", "--output_dir", str(start))
    own = [*data, "--model", str(start / "model"), "--steps", "40", "--learning_rate", "5e-4"]
    own += ["--checkpoint_every", "20", "--validation_questions", "32", "--output_dir"]
    run_command("reward", *own, str(tmp_path / "run"))
    lines = log_of(tmp_path / "run")
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 40
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.1
    held_out = [line["validation/reward"] for line in lines if "validation/reward" in line]
    assert len(held_out) == 3 and held_out[-1] > held_out[0] + 0.1

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run" / "checkpoint-20", again / "checkpoint-20")
    shutil.copy(tmp_path / "run" / "losses.jsonl", again)
    run_command("reward", *own, str(again))
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert log_of(again) == lines
    first = load_file(start / "model" / "model.safetensors")
    changed = {name for name, weight in first.items() if not torch.equal(weight, weights[0][name])}
    assert changed and all(
        name.startswith(("lm_head", "model.language_model", "model.visual_tokens.projector")) for name in changed
    )
