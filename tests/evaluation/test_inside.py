"""A look inside: attention and features against what is known of them, answers as they are measured, and the page."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_lines import evaluate as main
from PIL import Image
from synthetic_dataset import write_dataset
from tiny_checkpoint import EMBODIMENT, HIGH, LOW, save_tiny_checkpoint, save_tiny_depthvla

from stereovla.evaluation import inside
from stereovla.evaluation.held_out import read_rows
from stereovla.evaluation.inside import (
    STREAMS,
    answer,
    attention_shares,
    colours_of,
    geometries,
    keyframe_errors,
    look,
    pixel_of,
)
from stereovla.evaluation.inside_drawings import times_of
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline import OfflineEvaluation
from stereovla.evaluation.offline_geometry import observations
from stereovla.evaluation.pointed_keyframes import position_errors, told_displacements
from stereovla.sources import load_checkpoint
from stereovla.training.models import untrained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("data"), [3, 2], 2, split="validation", size=64))


def policy_of(folder) -> ModelPolicy:
    return ModelPolicy(*load_checkpoint(str(folder), run_code=True), "trained")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {"block": {}, "full": {"mask": "full"}, "pi0": {"depth_config": None, "depth_map_loss_weight": 0.0}}
    made["short"] = {"chunk_size": 4}  # as many actions as tokens before them: a state, and three of pointers
    paths = {name: save_tiny_depthvla(folder / name, use_pointers=True, **own) for name, own in made.items()}
    return paths | {"stereovla": save_tiny_checkpoint(folder / "stereovla")}


@pytest.mark.parametrize("name", ["block", "full", "pi0", "short", "stereovla"])
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
        "depth expert": model.config.depth_config.num_tokens if name in ("block", "full", "short") else 0,
        "state": model.config.state_history + pointers,
        "chunk": model.config.chunk_size,
    }
    expected = np.array([counts[stream] for stream in STREAMS]) / sum(counts.values())
    before = model.action_expert.transformer.config._attn_implementation
    shares = look(policy, rows).shares
    layers = model.config.text_config.num_hidden_layers
    np.testing.assert_allclose(shares, np.tile(expected, (layers, 1)), atol=1e-6)
    assert model.action_expert.transformer.config._attn_implementation == before


def test_shares_of_many_rows_are_those_of_their_batches(checkpoints, dataset, monkeypatch):
    policy, rows = policy_of(checkpoints["block"]), list(read_rows(dataset, 3, 1))
    monkeypatch.setattr(inside, "BATCH", 2)
    np.testing.assert_allclose(attention_shares(policy, rows), look(policy, rows).shares, atol=1e-6)


def test_times_are_those_of_the_data(dataset):
    rows = [replace(row, time_s=number / 20) for number, row in enumerate(read_rows(dataset, 3, 1))]
    times, unit = times_of(rows)
    assert unit == "s" and times.tolist() == [0, 0.05, 0.1]
    times, unit = times_of([replace(row, time_s=None) for row in rows])
    assert unit == "frames" and times.tolist() == [row.frame for row in rows]


def test_maps_are_of_the_tokens_that_lie_there(checkpoints, dataset):
    """All attention is on one token: its place is bright."""
    for name in ("block", "stereovla"):
        policy, rows = policy_of(checkpoints[name]), list(read_rows(dataset, 3, 1))
        model = policy.model
        ids = policy.inputs(observations(rows))["input_ids"]
        first = int((ids[0] == model.config.image_token_id).nonzero()[0])
        token = 6  # of 4 x 4: row 1, column 2

        def only(module, given, output, place=first + token):
            weights = torch.zeros_like(output[1])
            weights[..., place] = 1
            return output[0], weights

        for layer in model.action_expert.transformer.layers:
            layer.self_attn.register_forward_hook(only)  # before that which watches
        looks = look(policy, rows)
        expected = np.zeros((3, 4, 4))
        expected[:, 1, 2] = 1
        np.testing.assert_allclose(looks.on_picture, expected, atol=1e-6)
        assert looks.shares[:, 0] == pytest.approx(1)
        if name == "block":
            assert looks.on_depth.shape == (3, 4, 4) and not looks.on_depth.any()


def test_features_are_those_of_the_first_view(checkpoints, dataset):
    rows = list(read_rows(dataset, 3, 1))
    policy = policy_of(checkpoints["stereovla"])
    visual, pixels = policy.model.model.visual_tokens, policy.inputs(observations(rows))["pixel_values"]
    looks = look(policy, rows)
    with torch.no_grad():
        np.testing.assert_allclose(looks.semantics.reshape(3, 16, -1), visual.semantic(pixels[:, 0]), atol=1e-5)
        geometry = visual.stereo(pixels).features.unflatten(2, (4, -1)).unflatten(4, (4, -1)).mean((3, 5))
    np.testing.assert_allclose(looks.geometry, geometry.permute(0, 2, 3, 1), atol=1e-5)
    policy = policy_of(checkpoints["block"])
    expert, pixels = policy.model.model.depth_expert, policy.inputs(observations(rows))["pixel_values"]
    looks = look(policy, rows)
    with torch.no_grad():
        expected = expert.norm(expert.encoder(pixels[:, 0])).numpy()
    np.testing.assert_allclose(looks.geometry.reshape(3, 16, -1), expected, atol=1e-5)
    assert looks.semantics.shape == (3, 4, 4, policy.model.config.text_config.hidden_size)
    assert list(looks.pointed) == ["target", "gripper"]
    for maps in looks.pointed.values():
        np.testing.assert_allclose(maps.sum((1, 2)), np.ones(3), atol=1e-5)


def test_colours_are_alike_where_features_are():
    features = np.random.default_rng(0).normal(size=(2, 3, 3, 7))
    features[1, 2, 2] = features[0, 1, 0]
    colours = colours_of(features)
    assert colours.shape == (2, 3, 3, 3) and colours.min() == 0 and colours.max() == 1
    np.testing.assert_allclose(colours[1, 2, 2], colours[0, 1, 0], atol=1e-9)
    assert colours_of(features[..., :2])[..., 2].std() == 0  # two numbers have two components


def test_a_position_is_drawn_where_the_camera_sees_it():
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], [1.0, 2.0, 3.0]  # looks along x
    camera = {"transform_camera_to_base": pose, "focal_length_px": [100.0, 50.0], "principal_point_px": [32.0, 24.0]}
    # 2 m ahead, 0.2 m to the left (+y) and 0.4 m up (+z)
    np.testing.assert_allclose(pixel_of(np.array([3.0, 2.2, 3.4]), camera), [32 - 10, 24 - 10])
    assert np.isnan(pixel_of(np.array([0.0, 2.0, 3.0]), camera)).all() and np.isnan(pixel_of(np.zeros(3), None)).all()


def test_what_is_drawn_is_what_the_policy_says(checkpoints, dataset):
    """The chunk, the told keyframe and the answers, each as evaluation measures them."""
    rows = list(read_rows(dataset, 5, 1))
    policy = policy_of(checkpoints["block"])
    found, chunks = answer(policy, rows), policy.act(observations(rows))
    with told_displacements(policy.model) as ways:
        policy.act(observations(rows))
    expected = position_errors(policy.processor, rows, ways[0])
    errors = keyframe_errors(rows, found)
    for name in ("xy_cm", "z_cm"):
        assert errors[name]["mean"] == pytest.approx(np.mean(expected[name]))
    for row, one, chunk in zip(rows, found, chunks, strict=True):
        np.testing.assert_allclose(one.chunk[0], row.states[-1, :3], atol=1e-6)
        np.testing.assert_allclose(one.chunk[-1] - one.chunk[0], chunk[:, :3].sum(0), atol=1e-5)
        assert one.box is None and one.written is None and not one.depths  # it has learned no words
    words = policy_of(checkpoints["stereovla"])
    ids = []
    decode = words.processor.decode_boxes
    words.processor.decode_boxes = lambda given, **named: (ids.append(given), decode(given, **named))[1]
    spoken = answer(words, rows)
    boxes, valid = decode(ids[0], source_size=(64, 64))
    asked = [number for number, row in enumerate(rows) if row.boxes_px is not None]
    for place, number in enumerate(asked):
        assert (spoken[number].box is not None) == valid[place]
        if valid[place]:
            np.testing.assert_allclose(spoken[number].box, boxes[place, 0])
    assert all(one.pointed is None for one in spoken)  # it has no pointers


def test_geometry_is_compared_with_the_truth_of_the_same_pixel(checkpoints, dataset):
    rows = list(read_rows(dataset, 5, 1))
    for name, unit in (("block", "m"), ("stereovla", "px")):
        policy = policy_of(checkpoints[name])
        found = geometries(policy, rows)
        report = OfflineEvaluation(policy).evaluate(rows)
        assert len(found) == 5 and {one.unit for one in found} == {unit}
        if unit == "m":
            errors = [np.abs(one.predicted / one.true - 1)[one.true > 0] for one in found]
            expected = report["geometry"]["given"]["depth_map"]["left"]["abs_rel"]
            assert np.concatenate(errors).mean() == pytest.approx(expected, rel=1e-4)
        else:
            for one, row in zip(found, rows, strict=True):
                camera = row.calibration
                truth = camera["focal_length_px"][0] * camera["baseline_m"] / row.depth_m.clip(1e-6)
                known = one.true > 0
                np.testing.assert_allclose(one.true[known], truth[known], rtol=1e-3)
    assert geometries(policy_of(checkpoints["pi0"]), rows) == []


def test_the_command_writes_a_page_of_what_there_is(checkpoints, dataset, tmp_path, capsys):
    arguments = ["--dataset", dataset, "--rows", "5", "--stride", "1", "--pictures", "3"]
    pictures = {
        "block": {"attention", "features", "geometry", "answers", "strip", "keyframe"},
        "stereovla": {"attention", "features", "geometry", "answers"},  # it has no pointers
        "pi0": {"attention", "features", "answers", "strip", "keyframe"},
    }
    for name, expected in pictures.items():
        out = tmp_path / name
        assert main(["inside", "--model", str(checkpoints[name]), "--out", str(out), *arguments]) == 0
        shares = json.loads((out / "attention.json").read_text())
        assert [sum(layer.values()) for layer in shares] == pytest.approx([1.0] * len(shares), abs=1e-5)
        assert {path.stem for path in out.glob("*.png")} == expected
        page = (out / "inside.html").read_text()
        assert set(re.findall(r'src="(\w+)\.png"', page)) == expected and "5 held-out frames" in page
        for path in out.glob("*.png"):
            with Image.open(path) as picture:
                assert len(np.unique(np.asarray(picture.convert("L")))) > 40, path
    assert "layer 2: pictures" in capsys.readouterr().out
    out = tmp_path / "block"  # another model in the same folder
    assert main(["inside", "--model", str(checkpoints["stereovla"]), "--out", str(out), *arguments]) == 0
    assert {path.stem for path in out.glob("*.png")} == pictures["stereovla"]


def test_a_policy_without_our_expert_is_refused(dataset, tmp_path, capsys):
    torch.manual_seed(0)
    statistics = {
        key: {"q01": LOW[name], "q99": HIGH[name]}
        for key, name in (("state", "state"), ("action", "action"), ("keyframe_pose", "state"))
    }
    tasks = ["pick up the red cube"]
    meta = {"tasks": tasks, "stats": {EMBODIMENT: statistics}, "fps": 10.0, "state_dim": 7, "action_dim": 7}
    for part in untrained("pi0-tiny", meta):
        part.save_pretrained(tmp_path / "pi0")
    arguments = ["--model", str(tmp_path / "pi0"), "--dataset", dataset, "--out", str(tmp_path / "out")]
    assert main(["inside", *arguments]) == 2
    assert "is a 'pi0_policy'; what is inside is drawn of a 'stereovla'" in capsys.readouterr().err
