"""Errors on held-out rows: which rows are read, what is asked, and that the numbers are those of the answers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_lines import evaluate as main
from synthetic_dataset import generator_of, make_row, write_dataset
from tiny_checkpoint import save_tiny_checkpoint, save_tiny_depthvla
from views_dataset import MONO

from stereovla.evaluation import metrics
from stereovla.evaluation.held_out import count_rows, inner_point, read_rows
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline import OfflineEvaluation, histogram
from stereovla.evaluation.offline_geometry import observations
from stereovla.evaluation.report import offline_metrics
from stereovla.sources import InputError, load_checkpoint

LENGTHS = [6, 5, 4]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("data"), LENGTHS, 2, split="validation", size=64))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def policy(checkpoint) -> ModelPolicy:
    return ModelPolicy(*load_checkpoint(checkpoint), "trained")


def test_every_stride_th_row_with_its_history(dataset):
    frames = [(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    for rows, stride in ((100, 1), (100, 4), (3, 4), (1, 7)):
        read = list(read_rows(dataset, rows, stride))
        assert [(row.episode, row.frame) for row in read] == frames[::stride][:rows]
        assert count_rows(dataset, rows, stride) == len(read)
        for row in read:
            np.testing.assert_allclose(row.states[:, 0], np.arange(row.frame + 1) / 100, atol=1e-6)


def test_rows_hold_what_was_written(dataset):
    rng = generator_of("validation")
    written = [make_row(rng, e, f, 64) for e, length in enumerate(LENGTHS) for f in range(length)]
    for row, truth in zip(read_rows(dataset, 100, 1), written, strict=True):
        np.testing.assert_allclose(row.depth_m, truth["observation.depth"], atol=6e-5)
        np.testing.assert_array_equal(row.plan, truth["action_plan"])
        assert row.plan_length == truth["action_plan_length"]
        for name, value in (("target", 3), ("gripper", 2)):
            u, v = row.points_px[name]
            assert truth["observation.segmentation"][int(v), int(u)] == value
            assert row.depth_at(row.points_px[name]) == pytest.approx(
                truth["observation.depth"][int(v), int(u)], abs=1e-4
            )
        boxes = [truth[f"target.box_{side}_px"] for side in ("left", "right")]
        wanted = [np.full(4, np.nan) if box is None else box for box in boxes]
        if all(box is None for box in boxes):
            assert row.boxes_px is None
        else:
            np.testing.assert_array_equal(row.boxes_px, wanted)


def test_inner_point_lies_on_the_mask_where_depth_is_known():
    mask = np.zeros((9, 9), bool)
    mask[2:7, [2, 6]] = True  # the median column is not part of it
    depth = np.ones((9, 9))
    depth[4, 2] = 0
    u, v = inner_point(mask, depth)
    assert mask[int(v), int(u)] and depth[int(v), int(u)] > 0 and int(v) == 4
    assert inner_point(mask, np.zeros((9, 9))) is None


def test_answers_are_greedy_decoding(policy, dataset):
    """Against argmax over the logits of the whole sequence, token by token, one row at a time."""
    rows = list(read_rows(dataset, 3, 5))
    evaluation = OfflineEvaluation(policy)
    points = [row.points_px["target"] for row in rows]
    answers = {
        "depth": evaluation.answer(rows, "depth", 5, points_px=points),
        "box": evaluation.answer(rows, "box", 5, text=["red cube", "red", "red cube"]),
    }
    for number, row in enumerate(rows):
        for objective, arguments in (
            ("depth", {"points_px": points[number]}),
            ("box", {"text": ["red cube", "red", "red cube"][number]}),
        ):
            inputs = policy.processor(
                images=[row.left, row.views["right"]], objective=objective, check_stereo=False, **arguments
            )
            ids = inputs["input_ids"]
            for step in range(5):
                with torch.no_grad():
                    logits = policy.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
                token = logits[0, -1].argmax()
                assert token == answers[objective][number, step]
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
                if token == policy.processor.tokenizer.eos_token_id:
                    break


def test_action_errors_are_those_of_the_policy(policy, dataset):
    rows = list(read_rows(dataset, 100, 1))
    evaluation = OfflineEvaluation(policy)
    report = evaluation.evaluate(rows, batch_size=4)
    assert report["rows"] == sum(LENGTHS)
    distances = []
    for row in rows:
        (chunk,) = policy.act(observations([row]))
        steps = min(len(chunk), row.plan_length)
        distances += [1000 * np.linalg.norm(chunk[i, :3] - row.plan[i, :3]) for i in range(steps)]
    assert report["action"]["position_mm"]["mean"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert report["action"]["position_mm"]["count"] == len(distances)
    asked = sum(row.boxes_px is not None and np.isfinite(row.boxes_px).all() for row in rows)
    assert report["box"]["left_iou"]["count"] == asked < len(rows)
    assert 0 <= report["depth"]["unparsable"] <= 1
    truth = np.array([row.depth_at(row.points_px["target"]) for row in rows]) * 100
    constant = np.abs(truth - np.median(truth)).mean()
    assert report["depth"]["target_constant_cm"]["mean"] == pytest.approx(constant)
    assert report["disparity"]["error_px"]["count"] > 0
    json.dumps(report, allow_nan=False)


def test_right_answers_score_as_right(policy, dataset):
    """The labels that the processor writes, handed in as generated ids, give no error beyond their rounding."""
    boxes = ((row, row.boxes_px) for row in read_rows(dataset, 100, 1))
    rows = [row for row, box in boxes if box is not None and np.isfinite(box).all()]

    class Truthful(OfflineEvaluation):
        def answer(self, rows, objective, tokens, **arguments):
            truth = {
                "depth": lambda: {
                    "depths_m": [[row.depth_at(p)] for row, p in zip(rows, arguments["points_px"], strict=True)]
                },
                "box": lambda: {"boxes": [row.boxes_px for row in rows]},
                "pose": lambda: {"keyframe_pose": [row.keyframe_pose for row in rows]},
            }[objective]()
            labels = self.processor(
                images=[[row.left, row.views["right"]] for row in rows],
                embodiment=[row.embodiment for row in rows],
                objective=objective,
                return_labels=True,
                **arguments,
                **truth,
            )["labels"]
            answers = [row[row != -100] for row in labels]
            if objective == "pose":
                answers = [answer[7:14] for answer in answers]  # after the current state, before the end
            return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)

    report = Truthful(policy).evaluate(rows)
    assert report["depth"]["unparsable"] == report["box"]["invalid"] == report["keyframe"]["invalid"] == 0
    assert report["depth"]["target_cm"]["mean"] <= 0.5  # two decimals of a metre
    assert report["box"]["left_iou"]["mean"] > 0.9 and report["box"]["right_iou"]["mean"] > 0.9


def test_histogram_keeps_every_value():
    values = np.append(np.linspace(0, 1, 200), 50.0)
    data = histogram(values)
    assert sum(data["counts"]) == 201 and data["edges"][-1] < 50 and data["counts"][-1] > 1
    assert histogram(np.array([])) is None
    assert histogram(np.array([0.0, 0.0]))["counts"][0] == 2


def test_bad_data_sets_are_named(dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no parquet file"):
        list(read_rows(str(tmp_path / "empty"), 1, 1))
    with pytest.raises(InputError, match="test"):
        list(read_rows(dataset, 1, 1, split="test"))
    without = write_dataset(tmp_path / "without", [2], 1, split="validation", without=("target.name",))
    with pytest.raises(InputError, match="lacks the columns target.name"):
        list(read_rows(str(without), 1, 1))
    broken = write_dataset(tmp_path / "broken", [4, 4], 2, split="validation")
    shard = next(Path(broken).glob("data/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(InputError, match="broken"):
        list(read_rows(str(broken), 1, 1))


LABELS = ("observation.depth", "observation.segmentation", "target.box_left_px", "target.box_right_px")


def test_rows_are_not_read_of_a_file_that_declares_too_much(dataset, monkeypatch):
    monkeypatch.setattr("stereovla.untrusted.MOST_PARQUET_BYTES", 1000)
    monkeypatch.setattr("stereovla.untrusted.MOST_PARQUET_GROWTH", 0)
    with pytest.raises(InputError, match=r"parquet cannot be read: its \d+ bytes declare \d+ or more to be read"):
        list(read_rows(dataset, 1, 1))


def test_without_labels_and_plans_the_rest_is_measured(policy, tmp_path):
    """A recording of a robot: plans are the actions that follow, and nothing is asked that the data cannot answer."""
    kept = ("action_plan", "action_plan_length")
    plain = write_dataset(tmp_path / "plain", [20, 4], 2, split="validation", size=64, without=(*LABELS, *kept))
    rows = list(read_rows(str(plain), 100, 7))
    assert [(row.episode, row.frame) for row in rows] == [(0, 0), (0, 7), (0, 14), (1, 1)]
    actions = [row["action"] for row in written_rows([20, 4])]
    for row, first, length in zip(rows, (0, 7, 14, 21), (16, 13, 6, 3), strict=True):
        assert row.plan.shape == (16, 7) and row.plan_length == length
        np.testing.assert_array_equal(row.plan[:length], actions[first : first + length])
        np.testing.assert_array_equal(row.plan[length:], np.repeat(row.plan[length - 1 : length], 16 - length, 0))
        assert row.depth_m is None and row.boxes_px is None and row.points_px == {}
    assert [row.plan_length for row in read_rows(str(plain), 2, 7)] == [16, 13]  # read on behind the last row
    report = OfflineEvaluation(policy).evaluate(rows)
    valid = np.arange(8) < np.array([[16], [13], [6], [3]])
    assert report["rows"] == 4 and report["action"]["position_mm"]["count"] == valid.sum()
    assert report["keyframe"]["invalid"] is not None
    assert report["depth"]["unparsable"] is None and report["box"]["left_iou"] is None
    assert report["disparity"]["error_px"] is None and report["depth"]["target_cm"] is None


def test_one_camera_is_asked_what_its_policy_learned_and_its_data_knows(tmp_path):
    """Boxes of the left view alone; nothing in words where no answer was learned."""
    folder = str(write_dataset(tmp_path / "mono", LENGTHS, 2, split="validation", size=64, without=MONO))
    rows = list(read_rows(folder, 100, 1))
    written = [make_row(generator_of("validation"), 0, 0, 64)]
    assert rows[0].calibration is None and set(rows[0].views) == {"left"}
    np.testing.assert_array_equal(rows[0].boxes_px[0], written[0]["target.box_left_px"])
    assert np.isnan([row.boxes_px[1] for row in rows]).all()
    for weight in (0.0, 1.0):
        saved = save_tiny_depthvla(tmp_path / f"weight{weight:g}", language_loss_weight=weight)
        found = OfflineEvaluation(ModelPolicy(*load_checkpoint(str(saved), run_code=True), "trained")).evaluate(rows)
        asked = (found["box"]["invalid"], found["keyframe"]["invalid"], found["depth"]["unparsable"])
        assert all((share is not None) == bool(weight) for share in asked)
        assert (found["box"]["left_iou"] or {"count": 0})["count"] == (len(rows) if weight else 0)
        assert found["box"]["right_iou"] is None and found["disparity"]["error_px"] is None
        assert found["action"]["position_mm"] is not None and found["geometry"] is not None
        names = [metric["name"] for metric in offline_metrics({"options": {"split": "validation"}, **found})]
        assert ("box IoU of the target, left view" in names) == bool(weight) and not any("right" in n for n in names)


def written_rows(lengths: list[int]) -> list[dict]:
    rng = generator_of("validation")
    return [make_row(rng, e, f, 64) for e, length in enumerate(lengths) for f in range(length)]


def test_states_that_are_no_poses_are_refused(tmp_path):
    folder = write_dataset(tmp_path, [2], 1, split="validation", size=64)
    (path,) = (tmp_path / "data").glob("*.parquet")
    table = pq.read_table(path)
    column = table.column_names.index("state_is_pose")
    pq.write_table(table.set_column(column, "state_is_pose", pa.array([False] * len(table))), path)
    with pytest.raises(InputError, match=r"robot's own numbers \(state_is_pose is false\)"):
        list(read_rows(str(folder), 1, 1))


def test_the_command_does_its_work_once(checkpoint, dataset, tmp_path, capsys):
    command = ["offline", "--model", checkpoint, "--dataset", dataset, "--out", str(tmp_path), "--rows", "4"]
    assert main(command) == 0
    written = (tmp_path / "offline.json").read_bytes()
    assert metrics.summary(np.ones(1)) is not None and b"position_mm" in written
    assert main(command) == 0
    assert "is there for these weights" in capsys.readouterr().out
    assert (tmp_path / "offline.json").read_bytes() == written
