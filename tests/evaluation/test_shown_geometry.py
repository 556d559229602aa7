"""The controls: what each kind of policy sees in them, on held-out rows and in rollouts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_lines import evaluate as main
from synthetic_dataset import write_dataset
from tiny_checkpoint import save_tiny_checkpoint, save_tiny_depthvla

from stereovla.evaluation.held_out import read_rows
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline import OfflineEvaluation
from stereovla.evaluation.offline_geometry import observations, showing, with_another_scene
from stereovla.evaluation.policies import SHOWN, Policy
from stereovla.evaluation.policy_specs import check_shown
from stereovla.evaluation.rollouts import RolloutConfig, config_json, run_episodes
from stereovla.evaluation.shown_geometry import controls
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.simulation import WorldConfig
from stereovla.sources import InputError, load_checkpoint

MONO = {"stereo_config": None}
GIVEN_DEPTH = {**MONO, "points_frame": "camera", "points_of": "given"}
PI0 = {"depth_config": None, "depth_map_loss_weight": 0.0}
# kind of policy: how it is made, and what its geometry may be shown
KINDS = {
    "stereo": (save_tiny_checkpoint, {}, ("left_twice", "swapped")),
    "mono": (save_tiny_checkpoint, MONO, ()),
    "separate": (save_tiny_checkpoint, {**MONO, "right_view": "separate"}, ("left_twice", "swapped")),
    "attention": (save_tiny_checkpoint, {**MONO, "right_view": "attention"}, ("left_twice", "swapped")),
    "rgbd": (save_tiny_checkpoint, GIVEN_DEPTH, ("null", "swapped")),
    "depthvla": (save_tiny_depthvla, {}, ("null", "swapped")),
    "two eyes": (save_tiny_depthvla, {"depth_config": stereo_encoder()}, ("null", "left_twice", "swapped")),
    "pi0": (save_tiny_depthvla, PI0, ()),
    "pi0 of a pair": (save_tiny_depthvla, {**PI0, "views": ["left", "right"]}, ("left_twice", "swapped")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: str(save(root / name, **own)) for name, (save, own, _) in KINDS.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list:
    return list(
        read_rows(str(write_dataset(tmp_path_factory.mktemp("data"), [2, 1], 1, split="validation", size=64)), 3, 1)
    )


def policy_of(folder: str) -> ModelPolicy:
    return ModelPolicy(*load_checkpoint(folder, run_code=True), "trained")


@pytest.mark.parametrize("name", KINDS)
def test_each_policy_is_shown_what_it_says(name, folders, rows):
    """The same chunks as of rows that hold what is said; but for the left view, which stays what it was."""
    policy, expected = policy_of(folders[name]), KINDS[name][2]
    assert controls(policy.model.config) == expected
    others = [other for _, other in with_another_scene(rows)]
    given = np.stack(policy.act(observations(rows)))
    for control in expected:
        with showing(policy, control):
            found = np.stack(policy.act(observations(rows, others)))
        assert np.abs(found - given).max() > 1e-4, control
        written = None
        if control == "left_twice" and name != "two eyes":
            written = [replace(row, views={**row.views, "right": row.left}) for row in rows]
        elif control == "swapped" and name in ("separate", "attention", "pi0 of a pair"):
            views = [{**row.views, "right": other.views["right"]} for row, other in zip(rows, others, strict=True)]
            written = [replace(row, views=of_row) for row, of_row in zip(rows, views, strict=True)]
        elif name == "rgbd":
            depths = [other.depths if control == "swapped" else {"left": 0 * other.depth_m} for other in others]
            written = [replace(row, depths=of_row) for row, of_row in zip(rows, depths, strict=True)]
            if control == "swapped":  # in px of the other camera
                continue
        if written is not None:
            np.testing.assert_allclose(found, np.stack(policy.act(observations(written))), atol=1e-5)
    np.testing.assert_array_equal(np.stack(policy.act(observations(rows))), given)


def test_a_stereo_encoder_sees_the_other_pair_and_the_language_model_this_left_view(folders, rows):
    policy = policy_of(folders["stereo"])
    visual, seen = policy.model.model.visual_tokens, {}
    hooks = [
        part.register_forward_hook(lambda _, given, output, name=name: seen.update({name: given[0]}))
        for name, part in (("semantic", visual.semantic), ("stereo", visual.stereo))
    ]
    others = [other for _, other in with_another_scene(rows)]
    pairs, of_others = (policy.inputs(observations(of))["pixel_values"] for of in (rows, others))
    for name, expected in (("given", pairs), ("left_twice", pairs[:, [0, 0]]), ("swapped", of_others)):
        with showing(policy, name):
            policy.act(observations(rows, others))
        assert torch.equal(seen["semantic"], pairs[:, 0]) and torch.equal(seen["stereo"], expected)
    for hook in hooks:
        hook.remove()


def test_the_report_has_them_beside_each_other(folders, rows):
    report = OfflineEvaluation(policy_of(folders["stereo"])).evaluate(rows)["geometry"]
    json.dumps(report, allow_nan=False)
    errors = [report[name]["action"]["position_mm"]["mean"] for name in ("given", "left_twice", "swapped")]
    assert len(set(errors)) == 3 and set(report) == {"given", "left_twice", "swapped"}
    assert OfflineEvaluation(policy_of(folders["mono"])).evaluate(rows)["geometry"] is None


class Watching(Policy):
    """Keeps what it is told, and stands still."""

    name, needs_images, needs_depth = "watching", True, True

    def __init__(self):
        self.told = []

    def act(self, observations):
        self.told += observations
        return [np.zeros((8, 7), np.float32) for _ in observations]


def test_in_a_rollout_another_scene_is_the_beginning_of_the_next_seeds_episode():
    world = WorldConfig.from_preset("easy", image_size=32)

    def watched(seeds, shown, environments=1):
        policy = Watching()
        records = list(run_episodes(policy, iter(seeds), RolloutConfig(world, 3, 6, shown=shown), environments))
        return {(o.seed, o.step): o for o in policy.told}, records

    plain, records = watched([3, 4], "given")
    swapped, again = watched([3], "swapped")
    assert again[0] == records[0]
    for step in (0, 3):
        told, alone, other = swapped[3, step], plain[3, step], plain[4, 0]
        np.testing.assert_array_equal(told.left, alone.left)
        np.testing.assert_array_equal(told.states, alone.states)
        for side in ("left", "right"):
            np.testing.assert_array_equal(getattr(told.another, side), getattr(other, side))
        np.testing.assert_array_equal(told.another.depths["left"], other.depths["left"])
        assert alone.another is None
    assert "shown" not in config_json(RolloutConfig(world)) and config_json(RolloutConfig(world, shown="null"))["shown"]


def test_the_disparity_of_a_film_is_that_of_what_is_shown(folders, rows):
    policy = policy_of(folders["stereo"])
    twice = [replace(row, views={**row.views, "right": row.left}) for row in rows]
    expected = policy.disparity(observations(twice))
    assert np.abs(expected - policy.disparity(observations(rows))).max() > 1e-3
    with showing(policy, "left_twice"):
        np.testing.assert_allclose(policy.disparity(observations(rows)), expected, atol=1e-5)


def test_what_cannot_be_shown_is_refused(folders, tmp_path, capsys):
    with pytest.raises(InputError, match="--shown is null, but .* can be shown given, left_twice, swapped"):
        check_shown(folders["stereo"], "null")
    with pytest.raises(InputError, match="can be shown given$"):
        check_shown(folders["mono"], "swapped")
    with pytest.raises(InputError, match="expert is none"):
        check_shown("expert", "swapped")
    check_shown("still", "given")
    own = ["--preset", "tiny", "--out", str(tmp_path), "--shown", "left_twice"]
    assert main(["rollout", *own, "--model", folders["stereo"]]) == 2
    assert "by --policies" in capsys.readouterr().err
    assert main(["rollout", *own, "--policies", folders["depthvla"]]) == 2
    assert "can be shown given, null, swapped" in capsys.readouterr().err
    assert list(SHOWN) == ["given", "null", "left_twice", "swapped"]


@pytest.mark.parametrize("name", ["stereo", "rgbd"])
def test_the_command_rolls_out_and_goes_on(name, folders, tmp_path):
    own = ["--preset", "tiny", "--out", str(tmp_path), "--shown", "swapped", "--policies", folders[name]]
    assert main(["rollout", *own]) == 0
    log = tmp_path / "rollouts" / "trained" / "episodes.jsonl"
    before = log.read_bytes()
    assert main(["rollout", *own]) == 0 and log.read_bytes() == before
    assert json.loads((log.parent / "options.json").read_text())["shown"] == "swapped"
