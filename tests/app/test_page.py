"""The page as it runs, asked by gradio's own client: files and fields in, answers out; words for what is wrong."""

from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from served_page import served_page
from synthetic_dataset import write_dataset
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, save_tiny_depthvla, stereo_pair

from stereovla.app.command import AppOptions, make_page
from stereovla.app.frames import Frame, read_calibration
from stereovla.app.look import look_at
from stereovla.evaluation.rollouts import Episode, RolloutConfig
from stereovla.serving.served_model import ServedModel
from stereovla.simulation import World, WorldConfig
from stereovla.sources import load_checkpoint

PATIENCE_S = 300  # a busy machine is no fault of a test
STATE = "0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0"
CALIBRATION = (
    '{"focal_length_px": [60, 60], "principal_point_px": [32, 32], "baseline_m": 0.06, "transform_camera_to_base": '
    "[[0, 0, 1, -0.3], [-1, 0, 0, 0], [0, -1, 0, 0.2], [0, 0, 0, 1]]}"
)
WORLD = '{"preset": "easy", "image_size": 96}'


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    save_tiny_checkpoint(folder / "model", preset="demo")  # with pointers
    write_dataset(folder / "data", [4, 6], 2, split="validation", size=96)
    for name, view in zip(("left", "right"), stereo_pair(size=96), strict=True):
        Image.fromarray(view).save(folder / f"{name}.png")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def client(place):
    options = AppOptions(
        str(place / "model"),
        dataset=[str(place / "data")],
        world=WORLD,
        execution_horizon=2,
        max_steps=4,
        run_code=True,
    )
    with served_page(options) as url:
        yield Client(url, verbose=False, httpx_kwargs={"timeout": PATIENCE_S})


@pytest.fixture(scope="module")
def served(place) -> ServedModel:
    return ServedModel(*load_checkpoint(str(place / "model"), run_code=True), "tiny")


def ask(client, place, **changes):
    given = {"left": "left.png", "right": "right.png", "text": "pick up the red cube", "states": STATE}
    given |= {"calibration": "", "seed": 3, **changes}
    views = [given.pop(name) for name in ("left", "right")]
    files = [name and handle_file(str(place / name)) for name in views]
    text, *rest = given.values()
    return client.predict(*files, text, EMBODIMENT, *rest, api_name="/look")


def chunk_of(answer) -> np.ndarray:
    return np.array([row[1:] for row in answer[-1]["value"]["data"] if row[0]], np.float32)


def test_a_pair_of_pictures_is_answered(client, place, served):
    answer = ask(client, place, calibration=CALIBRATION)
    chunk, pointing, disparity, space, marks, facts, table = answer
    left, right = stereo_pair(size=96)
    states = np.array([[float(value) for value in STATE.split(",")]], np.float32)
    frame = Frame(
        {"left": left, "right": right}, "pick up the red cube", EMBODIMENT, states, read_calibration(CALIBRATION)
    )
    look = look_at(served, frame, 3)
    np.testing.assert_allclose(chunk_of(answer), look.actions, atol=6e-4)
    assert table["value"]["headers"] == ["", "dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    assert table["label"] == "Chunk, in m and rad"
    for drawn in (chunk, pointing, disparity):
        with Image.open(drawn) as picture:
            assert picture.size == (560, 560) and len(np.unique(np.asarray(picture.convert("L")))) > 30
    assert space["value"]["type"] == "plotly" and '"name":"what it sees"' in space["value"]["plot"]
    assert (
        "tool now" in marks
        and f"ms** for a chunk of {len(look.actions)} actions, 0.8 s of motion at 10 Hz, on cpu" in facts
    )


def test_without_a_calibration_the_chunk_has_no_place_in_the_picture(client, place):
    _, _, _, space, marks, *_ = ask(client, place, calibration=None)  # as of a field that nobody has touched
    assert "has no place in the picture" in marks
    assert "what it sees" not in space["value"]["plot"] and '"name":"chunk"' in space["value"]["plot"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"left": None}, "the left view is missing: drop a picture there"),
        ({"right": "text.png"}, "the right view is no picture of JPEG, PNG, WEBP"),
        ({"left": "right.png", "right": "left.png"}, "swapped"),
        ({"text": "  "}, "the instruction is empty"),
        ({"text": None}, "the instruction is empty"),
        ({"states": None}, "the state is missing"),
        ({"states": "1, 2"}, "line 1 of the state has 2 numbers; this model's have 7"),
        ({"calibration": "{"}, "the calibration is no JSON"),
        ({"calibration": '{"focal_length_px": [0, 1], "principal_point_px": [1, 1]}'}, "must be positive"),
        ({"seed": -1}, "the noise seed is -1; expected a whole number, 0 or more"),
        ({"seed": None}, "the noise seed is None; expected a whole number"),
    ],
)
def test_what_is_wrong_is_told_in_words(client, place, wrong, words, capfd):
    with pytest.raises(AppError) as raised:
        ask(client, place, **wrong)
    assert words in str(raised.value) and "Traceback" not in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_dataset_s_frame_fills_the_fields(client, place):
    left, right, text, robot, states, calibration = client.predict(
        str(place / "data"), "validation", 1, 5, api_name="/take"
    )
    with Image.open(left) as picture, Image.open(right) as other:
        assert (255 - np.asarray(picture) - np.asarray(other) == 0).mean() > 0.9
    assert (text, robot) == ("pick up the red cube", EMBODIMENT)
    lines = states.splitlines()
    assert len(lines) == 1 and lines[0].startswith("0.05, ")  # as many as this model is told
    assert read_calibration(calibration).focal_length_px.tolist() == [40, 40]
    for wrong, words in (
        (("validation", 7, 0), "has no episode 7"),
        (("validation", 1, 9), "has no frame 9; it has 6"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(str(place / "data"), *wrong, api_name="/take")


def test_other_datasets_are_not_read(client, place):
    with pytest.raises(AppError, match="not in the list of choices|there are"):
        client.predict("/etc", "validation", 0, 0, api_name="/take")


def test_the_simulator_is_the_one_that_measures(client, served):
    """Two chunks of two actions each, beside the same in an episode of the evaluation."""
    task, told, *_, states, _ = client.predict(7, api_name="/begin")
    episode = Episode(0, World(WorldConfig.from_preset(preset="easy", image_size=96)), RolloutConfig())
    episode.reset(7)
    assert task["value"] == episode.world.instruction and told.startswith("0.0 s, progress")
    assert task["choices"][0][0] == task["value"] and len(task["choices"]) == 3
    np.testing.assert_array_equal(np.float32(states.split(", ")), episode.world.state())
    for seconds in ("0.2 s", "0.4 s, **failed**"):
        answer = client.predict(task["value"], 0, api_name="/step")
        seen = episode.observation(images=True)
        frame = Frame({"left": seen.left, "right": seen.right}, seen.instruction, EMBODIMENT, seen.states)
        images = [seen.left, seen.right]
        actions = chunk_of(answer)
        history = {"state": frame.states[-1:], "text": frame.instruction, "embodiment": EMBODIMENT}
        inputs = served.processor(images=images, check_stereo=False, **history)
        noise = np.random.default_rng(0).standard_normal((1, 8, 7), dtype=np.float32)
        chunk = served.model.predict_action(**inputs, noise=inputs["state"].new_tensor(noise))
        expected = served.processor.decode_actions(chunk, EMBODIMENT)[0]
        np.testing.assert_allclose(actions, expected, atol=6e-4)
        for action in expected[:2]:
            episode.world.step(action)
            episode.states.append(episode.world.state())
        assert answer[0].startswith(seconds)
        np.testing.assert_allclose(np.float32(answer[5].splitlines()[-1].split(", ")), episode.world.state(), atol=1e-4)
    with pytest.raises(AppError, match="this episode has ended; begin a new one"):
        client.predict(task["value"], 0, api_name="/step")
    client.predict(8, api_name="/begin")
    runs = client.submit("do something else", 0, api_name="/run")
    answers = list(runs)
    assert [answer[0][:5] for answer in answers] == ["0.2 s", "0.4 s"]
    assert "; success is that of “pick up" in answers[-1][0]
    episode.world.close()


def test_a_page_without_a_simulator_says_why(tmp_path, place):
    save_tiny_depthvla(tmp_path / "wrist", views=["left", "wrist"])
    page, blocks = make_page(AppOptions(str(tmp_path / "wrist"), run_code=True))
    page.close()
    texts = [block.value for block in blocks.blocks.values() if isinstance(getattr(block, "value", None), str)]
    assert "The model sees left, wrist; the simulator has the views left and right alone." in texts
    with pytest.raises(ValueError, match="--execution_horizon is 9; the model predicts 8 actions"):
        make_page(AppOptions(str(place / "model"), execution_horizon=9, run_code=True))
    labels = {getattr(block, "label", "") for block in blocks.blocks.values()}
    assert {"left view", "wrist view"} <= labels and "right view" not in labels and "Dataset" not in labels


def test_options_are_checked_before_a_model_is_loaded(tmp_path, capsys):
    from stereovla.__main__ import main

    for arguments, words in (
        ([], "--model is missing"),
        (["--model", "x", "--world", "{"], "is no JSON"),
        (["--model", "x", "--world", "[]"], "must be a JSON object"),
        (["--model", str(tmp_path)], "is no checkpoint"),
        (["--model", str(tmp_path), "--host", "203.0.113.1"], "cannot listen on 203.0.113.1, port 7860"),
        (["--model", "x/y", "--dataset", str(tmp_path / "no")], "no dataset is there"),
    ):
        assert main(["app", *arguments]) == 2
        assert words in capsys.readouterr().err
