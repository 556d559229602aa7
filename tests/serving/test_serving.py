"""The policy server over real sockets: answers, errors that leave it alive, batches, limits, keys, pages."""

import os
import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from fuzzed_messages import picture
from peft import LoraConfig, get_peft_model
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving_thread import policy_server, serve_in_thread
from synthetic_dataset import write_training_dataset
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, save_tiny_depthvla, stereo_pair
from transformers import AutoModel
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.serving import wire
from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.observation_keys import Observation
from stereovla.serving.serve import ServingOptions
from stereovla.serving.serve import load as load_served
from stereovla.sources import fingerprint
from stereovla.sources import load_checkpoint as load
from stereovla.training.models import untrained

ROOT = Path(__file__).parents[2]
STATE = np.array([0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0], np.float32)
LIMIT = 2**20
ZED_MINI = ROOT.parent / "shared/data/zed_mini"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def parts(checkpoint):
    return load(str(checkpoint), "cpu")


@pytest.fixture(scope="module")
def url(parts):
    address, stop = serve_in_thread(policy_server(parts, max_batch=4, batch_wait_s=0.05, limit=LIMIT, deadline_s=300))
    yield address
    stop()


def request(**changes) -> dict:
    left, right = stereo_pair()
    values = {"left": left, "right": right, "instruction": "pick up the red cube", "state": STATE}
    return {"embodiment": EMBODIMENT, **values, **changes}


def by_hand(parts, seed: int, instruction: str = "pick up the red cube", views=None) -> np.ndarray:
    model, processor = parts
    noise = np.random.default_rng(seed).standard_normal((1, 8, 7), dtype=np.float32)
    inputs = processor(images=list(views or stereo_pair()), text=instruction, state=STATE, embodiment=EMBODIMENT)
    return processor.decode_actions(model.predict_action(**inputs, noise=torch.from_numpy(noise)), EMBODIMENT)[0]


def test_it_answers_what_the_model_answers(url, parts):
    with PolicyClient(url) as client:
        assert client.metadata["model"] == "tiny" and list(client.metadata["embodiments"]) == [EMBODIMENT]
        answer = client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT, seed=5)
        assert answer.actions.shape == (8, 7) and answer.actions.dtype == np.float32
        assert 0 < answer.timing["infer_ms"] and answer.timing["wait_ms"] >= 0 and not answer.outputs
        np.testing.assert_allclose(answer.actions, by_hand(parts, 5), atol=1e-5)
        free = [client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT).actions for _ in range(2)]
        assert np.abs(free[0] - free[1]).max() > 1e-4


def test_clients_at_the_same_time_share_batches_and_get_their_own_answers(parts):
    server = policy_server(parts, max_batch=4, batch_wait_s=60, deadline_s=300)  # until all have asked
    sizes = []
    predict = server.served.predict
    server.served.predict = lambda batch: (sizes.append(len(batch)), predict(batch))[1]
    address, stop = serve_in_thread(server)
    texts = ["pick up the red cube", "pick up the red cube", "", "pick up the red cube"]

    def ask(number: int):
        with PolicyClient(address) as client:
            ready.wait(60)
            try:
                return client.predict(*stereo_pair(), texts[number], STATE, EMBODIMENT, seed=number).actions
            except PolicyError as error:
                return error

    ready = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    stop()
    assert sizes == [3]
    for number in (0, 1, 3):
        np.testing.assert_allclose(answers[number], by_hand(parts, number, texts[number]), atol=1e-5)
    assert answers[2].kind == "invalid_input" and "text is ''" in str(answers[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": np.zeros((32, 64, 3), np.uint8)}, r"left view is \(32, 64\).*right view \(64, 64\)"),
        ({"left": np.zeros((64, 64, 3), np.float32)}, "dtype float32"),
        ({"left": None}, r"lacks left \('left' or 'observation/exterior_image_1_left' or .*views are left, right"),
        ({"left": "a path"}, "left view is a str"),
        ({"left": stereo_pair()[1], "right": stereo_pair()[0]}, "swapped"),
        ({"right": stereo_pair()[0]}, "same image"),
        ({"state": np.full(7, np.nan, np.float32)}, "nan"),
        ({"state": np.zeros(6, np.float32)}, r"state has shape \(6,\)"),
        ({"state": None}, "state"),
        ({"instruction": " "}, "instruction"),
        ({"instruction": 3}, "text is 3"),
        ({"embodiment": "aloha"}, "aloha"),
        ({"embodiment": None}, "embodiment"),
    ],
)
def test_unusable_values_are_answered_in_words(url, changes, message):
    refused(url, wire.pack(request(**changes)), "invalid_input", message)


def refused(url: str, data: bytes | str, kind: str, message: str) -> None:
    """The error is a short text, then the connection is closed with 1011, as openpi does it; the server goes on."""
    with connect(url, proxy=None) as connection:
        connection.recv()
        connection.send(data)
        answer = connection.recv(timeout=60)
        assert isinstance(answer, str) and answer.startswith(f"{kind}: ")
        assert re.search(message, answer) and "Traceback" not in answer and len(answer) < 1000
        with pytest.raises(ConnectionClosed, match="1011"):
            connection.recv(timeout=20)
    with connect(url, proxy=None) as connection:
        connection.recv()
        connection.send(wire.pack(request()))
        assert wire.unpack(connection.recv(timeout=60))["actions"].shape == (8, 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "a text message"),
        (b"", "a message is a map"),
        (b"\x82\xa4left", "no msgpack message"),
        (wire.pack(request()) + b"\x00", "no msgpack message"),
        (msgpack.packb([1, 2]), "a message is a map"),
        (msgpack.packb({"left": msgpack.ExtType(7, b"")}), "extension of type 7"),
    ],
)
def test_malformed_messages_are_answered(url, data, message):
    refused(url, data, "malformed", message)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({}, r"lacks left .*; right .*; instruction \('instruction' or 'prompt' or 'task'\); state "),
        (request(lefd=1), "unknown key 'lefd'; did you mean 'left'"),
        (request(type="predict"), "unknown key 'type'"),
        (request(seed=-1), "seed is -1"),
        (request(outputs=["depth"]), r"outputs are \['depth'\]; expected a list of keyframe, disparity"),
        (request(prompt="x"), "instruction is there as 'instruction' and as 'prompt'; send one of them"),
        (request(observation={"state": STATE}), "state is there as 'state' and as 'observation/state'"),
        (request(**{"observation/gripper_position": 1.0}), "'observation/gripper_position' is a part of state"),
        (request(embodiment={}), "unknown embodiment {}"),
        (request(endpoint="metadata"), "endpoint is 'metadata'; valid: infer, reset"),
        ({"endpoint": "reset", "state": STATE}, "a reset has state; it may have a seed alone"),
    ],
)
def test_observations_that_lack_something_or_have_too_much(url, message, words):
    refused(url, wire.pack(message), "invalid_input", words)


def test_messages_over_the_limit_are_refused_and_others_still_served(url):
    big = np.zeros((700, 700, 3), np.uint8)
    with PolicyClient(url) as client:
        with pytest.raises(PolicyError, match="the server accepts 1,048,576"):
            client.predict(big, big, "pick up the red cube", STATE, EMBODIMENT)
        assert client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT).actions.shape == (8, 7)
    with connect(url, proxy=None) as connection:
        connection.recv()
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.send(b"0" * (LIMIT + 1))
            connection.recv()
    with PolicyClient(url) as client:
        assert client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT).actions.shape == (8, 7)


def depthvla(place, views: tuple[str, ...], **fields):
    """A checkpoint of a DepthVLA, loaded."""
    dataset = write_training_dataset(place / "data")
    torch.manual_seed(0)
    for part in untrained("depthvla-tiny", load_meta(str(dataset)), views=list(views), **fields):
        part.save_pretrained(place / "model")
    return load(str(place / "model"), "cpu")


def test_a_model_gets_the_views_that_it_has(tmp_path):
    """One camera; with a further one, which may be absent, and its depth; what it does not see is refused by name."""
    rng = np.random.default_rng(0)
    left, wrist = (rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(2))
    depths = {"left": np.full((64, 64), 0.7, np.float32), "wrist": np.full((64, 64), 0.2, np.float32)}
    asked = {"text": "pick up the red cube", "state": STATE, "embodiment": EMBODIMENT}
    for name, views, fields, sent in (
        ("mono", ("left",), {}, [{}]),
        ("depth", ("left", "wrist"), {"depth_config": {"input": "depth"}}, [{"wrist": wrist}, {}]),
    ):
        model, processor = depthvla(tmp_path / name, views, **fields)
        address, stop = serve_in_thread(policy_server((model, processor), name))
        with PolicyClient(address) as client:
            assert client.metadata["views"] == list(views)
            assert client.metadata["depths"] == (list(views) if fields else [])
            arguments = (asked["text"], STATE, EMBODIMENT)
            for further in sent:
                maps = {view: depths[view] for view in ("left", *further)} if fields else None
                answer = client.predict(left, None, *arguments, seed=3, views=further, depths=maps)
                shown = {} if maps is None else {"depth_map": maps}
                inputs = processor(images={"left": left, **further}, **asked, **shown)
                noise = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 8, 7), dtype=np.float32))
                actions = processor.decode_actions(model.predict_action(**inputs, noise=noise), EMBODIMENT)[0]
                np.testing.assert_allclose(answer.actions, actions, atol=1e-5)
            for wrong, message in (
                ({"left": left, "right": left}, f"no key for right; this model's views are {', '.join(views)}"),
                ({"left": None, "right": None}, f"lacks left .*this model's views are {', '.join(views)}"),
            ):
                with pytest.raises(PolicyError, match=message):
                    client.predict(wrong["left"], wrong["right"], *arguments, depths=depths if fields else None)
            sent = {"left": left, "right": left, "prompt": "x", "state": STATE}
            with pytest.raises(PolicyError, match=f"unknown key 'right'; .*views are {', '.join(views)}"):
                client.infer(sent)
        stop()


def test_web_pages_are_refused(url):
    with pytest.raises(InvalidStatus, match="403"):
        connect(url, origin="https://example.org", proxy=None)


def test_a_client_that_leaves_does_not_stop_the_server(url):
    with connect(url, proxy=None) as connection:
        connection.recv()
        connection.send(wire.pack(request()))
        connection.socket.shutdown(socket.SHUT_RDWR)
    with PolicyClient(url) as client:
        assert client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT).actions.shape == (8, 7)


def test_a_real_pair_through_the_command(checkpoint, parts):
    """`stereovla serve` on a free port, asked with a pair of a real camera."""
    if not ZED_MINI.is_dir():
        pytest.skip("no ../shared/data/zed_mini")
    views = [Image.open(ZED_MINI / f"{side}.png").convert("RGB") for side in ("left", "right")]
    command = [sys.executable, "-m", "stereovla", "serve", "--model", str(checkpoint), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = running.stdout.readline()
        assert "ws://127.0.0.1:" in line
        with PolicyClient(line.split()[-1]) as client:
            assert client.metadata["revision"] == fingerprint(str(checkpoint))
            answer = client.predict(*views, "pick up the red cube", STATE, EMBODIMENT, seed=1)
    finally:
        running.terminate()
        running.wait(20)
    np.testing.assert_allclose(answer.actions, by_hand(parts, 1, views=views), atol=1e-5)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks processor_config.json, tokenizer.json"):
        load(str(tmp_path), "cpu")


# ------------------------------------------------------------------------------------------ openpi's wire, and beside


NAMES = {
    "openpi": {
        "left": "observation/exterior_image_1_left",
        "right": "observation/exterior_image_1_right",
        "state": "observation/state",
        "instruction": "prompt",
    },
    "lerobot": {
        "left": "observation.images.left",
        "right": "observation.images.right",
        "state": "observation.state",
        "instruction": "task",
    },
    "nested": {},
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("form", ["array", "PNG"])
def test_observations_by_the_names_of_others(url, parts, names, form):
    """The robot need not be named where the model knows one."""
    left, right = stereo_pair()
    values = {"left": left, "right": right, "instruction": "pick up the red cube", "state": STATE}
    if form == "PNG":
        values |= {side: picture(values[side], "PNG") for side in ("left", "right")}
    if names == "nested":
        message = {"instruction": values.pop("instruction"), "seed": 5, "observation": {"state": values["state"]}}
        message["observation"] |= {f"exterior_image_1_{side}": values[side] for side in ("left", "right")}
    else:
        message = {NAMES[names][name]: value for name, value in values.items()} | {"seed": 5}
    with PolicyClient(url) as client:
        answer = client.infer(message)
    np.testing.assert_allclose(answer["actions"], by_hand(parts, 5), atol=1e-5)


def test_what_is_asked_for_beside_actions(parts, tmp_path):
    """Keyframe and disparity of a StereoVLA, keyframe and depth of a DepthVLA, as the models give them."""
    model, processor = parts
    asked = {"text": "pick up the red cube", "state": STATE, "embodiment": EMBODIMENT}
    address, stop = serve_in_thread(policy_server(parts, deadline_s=300))
    with PolicyClient(address) as client:
        assert client.metadata["outputs"] == ["keyframe", "disparity"]
        found = client.predict(*stereo_pair(), *asked.values(), seed=1, outputs=("disparity", "keyframe")).outputs
    stop()
    inputs = processor(list(stereo_pair()), **asked)
    with torch.inference_mode():
        disparity = model(**inputs, output_disparity=True).disparity[0]
    np.testing.assert_allclose(found["disparity"], disparity.numpy(), atol=1e-4)
    question = processor(list(stereo_pair()), **asked, objective="pose")
    question.pop("state")
    tokens = processor.pose_dim + 1
    pad = processor.tokenizer.pad_token_id
    ids = model.generate(**question, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    poses, valid = processor.decode_poses(ids[:, question["input_ids"].shape[1] :], EMBODIMENT)
    np.testing.assert_allclose(found["keyframe"], poses[0], atol=1e-5)
    assert found["keyframe_valid"] == bool(valid[0]) and set(found) == {"disparity", "keyframe", "keyframe_valid"}

    model, processor = depthvla(tmp_path, ("left", "wrist"), depth_config={})
    left = stereo_pair()[0]
    address, stop = serve_in_thread(policy_server((model, processor), "depth", deadline_s=300))
    with PolicyClient(address) as client:
        assert client.metadata["outputs"] == ["keyframe", "depth"]
        wrist = {"wrist": np.ascontiguousarray(left[::-1])}
        found = client.predict(left, None, *asked.values(), views=wrist, outputs=("depth", "keyframe")).outputs
    stop()
    inputs = processor({"left": left, **wrist}, **asked)
    with torch.inference_mode():
        depth = model(**inputs, output_depth=True).depth[0]
    for number, name in enumerate(("left", "wrist")):
        np.testing.assert_allclose(found["depth"][name], depth[number].numpy(), atol=1e-4)
    assert found["keyframe"].shape == (7,) and isinstance(found["keyframe_valid"], bool)


def test_a_reset_makes_an_episode_repeatable(url, parts):
    """The noise of requests without a seed follows from that of the reset, one after the other."""
    asked = (*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT)
    with PolicyClient(url) as client:
        client.reset(seed=3)
        first = [client.predict(*asked).actions for _ in range(2)]
        client.reset(seed=3)
        second = [client.predict(*asked).actions for _ in range(2)]
        client.reset()
        other = client.predict(*asked).actions
    np.testing.assert_allclose(first, second, atol=1e-6)
    np.testing.assert_allclose(first[0], by_hand(parts, 3), atol=1e-5)
    assert np.abs(first[0] - first[1]).max() > 1e-4 and np.abs(first[0] - other).max() > 1e-4


def test_the_metadata_say_what_the_model_is(parts):
    model, processor = parts
    told = wire.unpack(wire.pack(policy_server(parts, limit=LIMIT).metadata()))
    robot = told["embodiments"][EMBODIMENT]
    assert (told["chunk_size"], told["state_history"], told["image_size"]) == (8, model.config.state_history, [64, 64])
    assert (
        told["max_message_bytes"] == LIMIT and told["embodiment"] == EMBODIMENT and told["views"] == ["left", "right"]
    )
    assert robot["rate_hz"] == 10.0
    assert robot["state_names"] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert robot["state_units"] == ["m"] * 3 + ["rad"] * 3 + ["1 = open"]
    assert robot["action_names"] == ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    assert robot["action_units"] == ["m"] * 3 + ["rad"] * 3 + ["-1 closes, 1 opens"]


def test_pages_and_the_key(parts):
    """/healthz needs no key, /metrics and the socket do; web pages get nothing but the two pages."""
    key = "k" * 32
    address, stop = serve_in_thread(policy_server(parts, api_key=key, deadline_s=300))
    web = address.replace("ws://", "http://")

    def get(path: str, **headers: str) -> tuple[int, str, str]:
        try:
            with urllib.request.urlopen(urllib.request.Request(web + path, headers=headers), timeout=20) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read().decode()

    try:
        assert get("/healthz")[::2] == (200, "OK\n")
        for wrong in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": f"Bearer {key}"}):
            status, _, text = get("/metrics", **wrong)
            assert status == 401 and "Authorization: Api-Key" in text and key not in text
        for wrong in ("", "wrong", key + "x"):
            with pytest.raises(PolicyError, match="denied: .*needs its key"):
                PolicyClient(address, api_key=wrong)
        with PolicyClient(address, api_key=key) as client:
            client.predict(*stereo_pair(), "pick up the red cube", STATE)
            with pytest.raises(PolicyError, match="invalid_input"):
                client.predict(*stereo_pair(), "", STATE)
            client.predict(*stereo_pair(), "pick up the red cube", STATE)  # over a new connection
            status, kind, page = get("/metrics", Authorization=f"Api-Key {key}")
        assert status == 200 and kind.startswith("text/plain; version=")
        samples = {
            sample.name + str(sample.labels.get("outcome", "")): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }
        assert samples["stereovla_answers_totalanswered"] == 2 and samples["stereovla_answers_totalinvalid_input"] == 1
        assert samples["stereovla_latency_seconds_count"] == 2 == samples["stereovla_batch_size_sum"]
        assert samples["stereovla_connections"] == 1 and samples["stereovla_requests_in_flight"] == 0
    finally:
        stop()


@pytest.mark.parametrize(
    ("host", "key", "message"),
    [
        ("0.0.0.0", "", "--host '0.0.0.0' may be reached by other machines: set the key"),
        ("", "", "may be reached by other machines"),
        ("::", "", "may be reached by other machines"),
        ("robot.lab", "", "may be reached by other machines"),
        ("127.0.0.1", "short", "at least 16 printable ASCII characters"),
        ("0.0.0.0", "with a space in it", "at least 16 printable"),
        *[(host, "", None) for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost")],
        ("0.0.0.0", "0123456789abcdef", None),
    ],
)
def test_other_machines_need_a_key(host, key, message, monkeypatch):
    monkeypatch.setenv("STEREOVLA_API_KEY", key)
    if message is None:
        assert ServingOptions(model="m", host=host).api_key() == key
        return
    with pytest.raises(ValueError, match=message) as error:
        ServingOptions(model="m", host=host)
    assert not key or key not in str(error.value)


@pytest.mark.parametrize("kind", ["stereovla", "depthvla", "adapter"])
def test_any_model_is_loaded_in_any_dtype_and_warmed_up(checkpoint, tmp_path, kind):
    folder = checkpoint
    if kind == "depthvla":
        folder = save_tiny_depthvla(tmp_path / "model")
    elif kind == "adapter":
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
        torch.manual_seed(0)  # of the adapter's weights
        config = LoraConfig(
            r=2,
            lora_alpha=1,
            target_modules=r".*language_model\.layers\.0\.self_attn\.q_proj",
            init_lora_weights=False,
        )
        get_peft_model(model, config).save_pretrained(folder := tmp_path / "adapter")
    for dtype in ("float32", "bfloat16"):
        served = load_served(ServingOptions(model=str(folder), dtype=dtype, max_batch=2))
        assert served.model.dtype == getattr(torch, dtype) and served.revision == fingerprint(str(folder))
        views = dict(zip(("left", "right"), stereo_pair(), strict=True))
        views = {name: views[name] for name in served.keys.views}
        observation = Observation(views, "pick up the red cube", STATE, EMBODIMENT, seed=1)
        (answer,) = served.predict([served.prepare(observation, np.random.default_rng())])
        if dtype == "float32":
            expected = answer["actions"]
    error = np.abs(answer["actions"] - expected)
    assert 0 < error.max() < 0.2  # bfloat16 has 3 digits, the actions' ranges are 0.08 m, 0.4 rad and 2


def test_options_that_cannot_be_served(checkpoint, tmp_path):
    (tmp_path / "keys.json").write_text('{"lefd": "camera_0"}')
    with pytest.raises(ValueError, match="entry 'lefd'; did you mean 'left'"):
        load_served(ServingOptions(model=str(checkpoint), keys=str(tmp_path / "keys.json")))
    with pytest.raises(ValueError, match="unknown embodiment 'aloha'; the model knows franka_panda"):
        load_served(ServingOptions(model=str(checkpoint), embodiment="aloha"))
    with pytest.raises(ValueError, match="dtype is 'float8'; valid: float32, bfloat16, float16"):
        load(str(checkpoint), dtype="float8")


@pytest.mark.slow
def test_a_compiled_model_answers_the_same(checkpoint, parts):
    served = load_served(ServingOptions(model=str(checkpoint), compile=True, max_batch=1))
    observation = Observation(
        dict(zip(("left", "right"), stereo_pair(), strict=True)), "pick up the red cube", STATE, EMBODIMENT, seed=1
    )
    (answer,) = served.predict([served.prepare(observation, np.random.default_rng())])
    np.testing.assert_allclose(answer["actions"], by_hand(parts, 1), atol=1e-4)


# ---- a model that sees points

CALIBRATION = {
    "focal_length_px": [80.0, 80.0],
    "principal_point_px": [32.0, 32.0],
    "baseline_m": 0.06,
    "transform_camera_to_base": [
        [0.0, -1.0, 0.0, 0.9],
        [-1.0, 0.0, 0.0, 0.1],
        [0.0, 0.0, -1.0, 0.6],
        [0.0, 0.0, 0.0, 1.0],
    ],
}


@pytest.mark.parametrize("dropout, told", [(0.0, "needed"), (0.2, "known")])
def test_a_model_that_sees_points_is_told_the_calibration(tmp_path, dropout, told):
    folder = save_tiny_checkpoint(tmp_path, points_frame="base", use_pointers=True, calibration_dropout=dropout)
    own = model, processor = load(str(folder), "cpu")
    address, stop = serve_in_thread(policy_server(own, limit=LIMIT, deadline_s=300))
    moved = {**CALIBRATION, "baseline_m": 0.12}
    question = (*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT, 5)
    with PolicyClient(address) as client:
        assert client.metadata["calibration"] == told
        answers = [client.predict(*question, calibration=given).actions for given in (CALIBRATION, moved)]
        if told == "known":
            answers.append(client.predict(*question).actions)
        else:
            with pytest.raises(
                PolicyError, match=r"lacks calibration.focal_length_px \('calibration/focal_length_px'\)"
            ):
                client.predict(*question)
    stop()
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 8, 7), dtype=np.float32))
    for given, answer in zip((CALIBRATION, moved, None), answers, strict=False):
        inputs = processor(
            images=[*stereo_pair()], text=question[2], state=STATE, embodiment=EMBODIMENT, calibration=given
        )
        direct = processor.decode_actions(model.predict_action(**inputs, noise=noise), EMBODIMENT)[0]
        np.testing.assert_allclose(answer, direct, atol=1e-5)
    assert np.abs(answers[0] - answers[1]).max() > 1e-4
