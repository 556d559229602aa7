"""The report: losses, success bars, film, page, and the numbers that the model card takes."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from command_lines import evaluate as main
from PIL import Image
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair

from stereovla.evaluation.episode_log import EpisodeLog, write_json
from stereovla.evaluation.film import GAP_PX, LAST_FRAME_MS, PANEL_PX, TITLE_PX, colour_disparity, write_gif
from stereovla.evaluation.plots import plot_losses, read_losses, smooth
from stereovla.evaluation.policies import Observation
from stereovla.evaluation.report import write_report
from stereovla.evaluation.rollouts import RolloutConfig, config_json
from stereovla.simulation import WorldConfig
from stereovla.sources import InputError


def record(seed: int, success: bool, instruction: str = "pick up the red cube") -> dict:
    return {
        "seed": seed,
        "success": success,
        "steps": 12 if success else 50,
        "progress": 1.0 if success else 0.25,
        "instruction": instruction,
        "target": "red cube",
        "objects": ["red cube", "blue can"],
        "wrong_object": None if success else "blue can",
        "shortened_moves": 0,
    }


def write_rollouts(out: Path, kind: str, successes: list[bool], **options) -> None:
    config = config_json(RolloutConfig(WorldConfig(image_size=64), max_steps=4))
    log = EpisodeLog(out / "rollouts" / kind, {**config, "kind": kind, "num_steps": 0, **options})
    for seed, success in enumerate(successes):
        log.append(record(seed, success))
    write_json(log.path.with_name("run.json"), {"wanted": len(successes)})


def write_offline(out: Path, split: str = "validation") -> None:
    numbers = {"mean": 1.5, "median": 1.25, "q90": 3.0, "count": 10}
    offline = {
        "options": {"split": split},
        "rows": 10,
        "action": {name: numbers for name in ("position_mm", "rotation_deg", "chunk_position_mm", "still_mm")},
        "depth": {
            "unparsable": 0.1,
            "target_cm": numbers,
            "target_constant_cm": numbers,
            "gripper_cm": None,
            "gripper_constant_cm": None,
        },
        "box": {"left_iou": numbers, "right_iou": numbers, "invalid": 0.0},
        "keyframe": {"xy_cm": None, "z_cm": None, "rotation_deg": None, "invalid": 1.0},
        "disparity": {"error_px": numbers},
        "histograms": {
            "position_mm": {"edges": [0.0, 1.0, 2.0], "counts": [3, 7]},
            "target_depth_cm": None,
            "left_iou": {"edges": [0.0, 0.5, 1.0], "counts": [1, 9]},
        },
    }
    (out / "offline.json").write_text(json.dumps(offline))


def write_losses(folder: Path, steps: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss/action": 2 / step, "loss/depth": 1 / step, "lr": 1e-3})
        if step % 20 == 0:
            lines.append({"step": step, "validation/loss/action": 3 / step})
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "losses.jsonl"


class Page(HTMLParser):
    """Images, and tags that are left open or closed without having been opened."""

    def __init__(self):
        super().__init__()
        self.images, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_says_what_was_measured(tmp_path):
    write_rollouts(tmp_path, "trained", [True] * 9 + [False], weights="w")
    write_rollouts(tmp_path, "expert", [True] * 4)
    write_rollouts(tmp_path, "untrained", [False] * 4)
    write_offline(tmp_path)
    write_losses(tmp_path / "training")
    page = write_report(tmp_path, tmp_path / "training", with_film=False)

    card = json.loads((tmp_path / "metrics.json").read_text())
    success = card["metrics"][0]
    assert success["type"] == "success_rate" and success["value"] == pytest.approx(0.9)
    assert success["text"].startswith("90 % of 10 seeds (95 % interval 60 % to 98 %)")
    assert "scripted expert: 100 % of 4" in success["text"] and "untrained: 0 % of 4" in success["text"]
    by_name = {metric["name"]: metric for metric in card["metrics"]}
    assert by_name["depth answer error at the target"]["value"] == 1.5
    assert by_name["depth answers that are no number"]["value"] == pytest.approx(0.1)
    assert by_name["keyframe answers that are no pose"]["value"] == 1.0
    assert "keyframe pose error, vertical" not in by_name
    for metric in card["metrics"]:
        assert set(metric) == {"task", "dataset", "name", "type", "value", "text"}
        assert metric["type"].replace("_", "").isalnum()
    assert card["images"] == ["success.png", "losses.png", "errors.png"]
    for name in card["images"]:
        assert min(Image.open(tmp_path / name).size) > 200

    every = json.loads((tmp_path / "report.json").read_text())
    assert [len(every["episodes"][name]) for name in ("expert", "trained", "untrained")] == [4, 10, 4]
    assert every["summaries"]["trained"]["wrong_object_rate"] == pytest.approx(0.1)

    html = Page()
    html.feed(page.read_text())
    assert not html.open and sorted(html.images) == sorted(card["images"])
    assert html.texts.count("blue can") == 5


def test_success_is_told_by_how_large_targets_are_in_the_picture(tmp_path):
    log = EpisodeLog(tmp_path / "rollouts/trained", {"world.camera_range": "small"})
    for seed, (side, success) in enumerate([(3.9, False), (4.0, True), (5.9, False), (5.0, True), (30.0, True)]):
        log.append(record(seed, success) | {"target_side_px": side})
    page = " ".join(write_report(tmp_path, None, with_film=False).read_text().split())
    cells = '{}</td> <td class="number">{}</td><td class="number">{}</td>'
    for of_size in (("0 to 4", 0, 1), ("4 to 6", 2, 3), ("24 and more", 1, 1)):
        assert cells.format(*of_size) in page, of_size
    assert "6 to 8</td>" not in page


def test_a_rate_that_is_not_finished_is_marked_and_kept_from_the_card(tmp_path, capsys):
    write_rollouts(tmp_path, "trained", [True] * 3, weights="w")
    write_rollouts(tmp_path, "expert", [True] * 3)
    write_json(tmp_path / "rollouts/trained/run.json", {"wanted": 10})
    page = " ".join(write_report(tmp_path, None, with_film=False).read_text().split())
    assert "trained: 7 episodes are not done yet" in page and "expert: 0 episodes" not in page
    assert "trained: 7 episodes are not done yet" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == []
    write_json(tmp_path / "rollouts/trained/run.json", {"wanted": 3})
    assert "not done yet" not in write_report(tmp_path, None, with_film=False).read_text()
    assert len(json.loads((tmp_path / "metrics.json").read_text())["metrics"]) == 1


def test_what_a_policy_was_told_wrongly_is_on_the_card(tmp_path):
    write_rollouts(tmp_path, "trained", [False], weights="w", shown="left_twice", calibration_error_deg=3.0)
    write_report(tmp_path, None, with_film=False)
    (success,) = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    told = "range small, its geometry shown the left view twice, told a camera turned by 3 degrees"
    assert success["dataset"].endswith(told)


@pytest.mark.parametrize(
    ("kinds", "task", "there", "not_there"),
    [
        (["pick"], "pick objects that an instruction names", "at least 5 cm above", "rests where it was to be put"),
        (["stack"], "stack objects that an instruction names", "rests where it was to be put", "at least 5 cm above"),
        (["pick", "move"], "pick, move objects", "or of what is put somewhere when the named object", "LIBERO"),
    ],
)
def test_the_criterion_is_that_of_the_tasks(kinds, task, there, not_there, tmp_path):
    write_rollouts(tmp_path, "trained", [True], weights="w", **{"world.tasks": kinds})
    write_report(tmp_path, None, with_film=False)
    card = json.loads((tmp_path / "metrics.json").read_text())
    assert card["metrics"][0]["task"].startswith(task)
    assert there in card["method"] and not_there not in card["method"] and "Errors" not in card["method"]


def test_in_libero_the_card_counts_its_steps(tmp_path):
    there = {"world.suite": "libero_object", "world.tasks": [0, 3], "world.camera_range": "large"}
    write_rollouts(tmp_path, "trained", [True] * 4, weights="w", max_steps=140, **there)
    write_report(tmp_path, None, with_film=False)
    card = json.loads((tmp_path / "metrics.json").read_text())
    (success,) = card["metrics"]
    assert success["task"] == "tasks of LIBERO"
    told = "libero_object, tasks 0, 3, 4 of 100 initial states, camera range large, at most 280 steps of 20 Hz"
    assert success["dataset"] == told
    assert "at most 280 steps of 20 Hz" in card["method"] and "camera range large" in card["method"]


@pytest.mark.parametrize(
    ("split", "words"), [("validation", "10 held-out frames"), ("train", "that it was trained on")]
)
def test_errors_say_of_which_split_they_are(split, words, tmp_path):
    write_offline(tmp_path, split)
    write_report(tmp_path, None, with_film=False)
    card = json.loads((tmp_path / "metrics.json").read_text())
    assert all(words in metric["dataset"] for metric in card["metrics"])
    assert f"of the split {split}" in card["method"] and ("never reads" in card["method"]) == (split != "train")


@pytest.mark.parametrize(("control", "seconds"), [({}, "1.2 s"), ({"world.control": "osc"}, "0.6 s")])
def test_seconds_are_those_of_the_world(tmp_path, control, seconds):
    """12 steps of 10 Hz, or of LIBERO's own 20 Hz."""
    write_rollouts(tmp_path, "expert", [True], **control)
    page = write_report(tmp_path, None, with_film=False).read_text()
    assert f"in {seconds} on average" in " ".join(page.split())


def test_instructions_are_escaped(tmp_path):
    log = EpisodeLog(tmp_path / "rollouts/expert", {"world.camera_range": "small"})
    log.append(record(0, True, "<script>alert(1)</script>"))
    page = write_report(tmp_path, None, with_film=False).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_losses_survive_a_cut_off_line_and_a_resumed_run(tmp_path):
    path = write_losses(tmp_path)
    with path.open("a") as file:
        file.write('{"step": 60, "loss/action": 9.0}\n{"step": 61, "loss/ac')
    losses = read_losses(path)
    steps, values = losses["loss/action"]
    assert steps.tolist() == list(range(1, 61)) and values[-1] == 9 and values[0] == 2
    assert losses["validation/loss/action"][0].tolist() == [20, 40, 60]
    path.write_text('{"step": 1, "loss/ac\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 1: no JSON"):
        read_losses(path)
    with pytest.raises(InputError, match="no key that begins with 'loss/'"):
        plot_losses({"lr": (np.ones(1), np.ones(1))}, tmp_path / "x.png")


def test_smoothing_is_a_mean_over_neighbours():
    values = np.random.default_rng(0).normal(size=30)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(30)]
    np.testing.assert_allclose(smooth(values, 2), expected)
    np.testing.assert_allclose(smooth(values[:2], 9), values[:2].mean())
    np.testing.assert_allclose(smooth(values, 0), values)


def test_a_missing_loss_file_is_named(tmp_path):
    write_rollouts(tmp_path, "expert", [True])
    with pytest.raises(InputError, match="no losses.jsonl"):
        write_report(tmp_path, tmp_path, with_film=False)


def test_disparity_is_coloured_from_far_to_near():
    picture = np.asarray(colour_disparity(np.array([[0.0, 5.0, 10.0]]), -2, 12)).astype(int)
    assert picture.shape == (PANEL_PX // 3, PANEL_PX, 3)
    far, near = picture[10, 10], picture[10, -10]
    assert far[2] > far[0] and near[0] > near[2]  # far blue, near red


def test_a_film_shows_three_panels_for_every_step(tmp_path):
    observations = [
        Observation(0, 0, step, "pick up the red cube", EMBODIMENT, np.zeros((step + 1, 7)), *stereo_pair(step))
        for step in range(4)
    ]
    disparities = np.random.default_rng(0).uniform(2, 9, (4, 16, 16))
    write_gif(tmp_path / "three.gif", observations, disparities, success=True, step_s=0.1)
    write_gif(tmp_path / "two.gif", observations, None, success=False, step_s=0.1)
    film = Image.open(tmp_path / "three.gif")
    assert film.n_frames == 4 and film.info["loop"] == 0
    assert film.width > Image.open(tmp_path / "two.gif").width
    film.seek(3)
    assert film.info["duration"] == LAST_FRAME_MS
    for number, view in enumerate(stereo_pair(3)):
        corner = (GAP_PX + number * (PANEL_PX + GAP_PX), TITLE_PX)
        panel = film.convert("RGB").crop((*corner, corner[0] + PANEL_PX, corner[1] + PANEL_PX)).resize((64, 64))
        assert np.corrcoef(np.asarray(panel, float).ravel(), view.ravel())[0, 1] > 0.9


def test_the_whole_command_films_the_trained_model_once(tmp_path):
    """rollout --preset tiny, then report, as `make demo` does; a second report keeps the film."""
    model = save_tiny_checkpoint(tmp_path / "model")
    out = tmp_path / "report"
    assert main(["rollout", "--preset", "tiny", "--max_steps", "3", "--model", str(model), "--out", str(out)]) == 0
    assert main(["report", "--out", str(out)]) == 0
    first = (out / "rollout.gif").stat().st_mtime_ns
    assert Image.open(out / "rollout.gif").n_frames == 4
    assert main(["report", "--out", str(out)]) == 0
    assert (out / "rollout.gif").stat().st_mtime_ns == first
    assert "rollout.gif" in json.loads((out / "metrics.json").read_text())["images"]
    every = json.loads((out / "report.json").read_text())
    assert {name: len(records) for name, records in every["episodes"].items()} == {
        "expert": 1,
        "trained": 2,
        "untrained": 1,
    }


def test_a_film_of_other_weights_is_refused(tmp_path):
    write_rollouts(tmp_path, "trained", [True], weights="other")
    model = save_tiny_checkpoint(tmp_path / "model")
    (tmp_path / "rollouts/trained/run.json").write_text(json.dumps({"policy": str(model)}))
    with pytest.raises(InputError, match="other weights than those that were rolled out"):
        write_report(tmp_path, None)
