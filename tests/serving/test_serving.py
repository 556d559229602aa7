"""The policy server over real sockets: answers, errors that leave it alive, batches, limits."""

import os
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image
from serving_thread import serve_in_thread
from synthetic_dataset import write_training_dataset
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.serving import protocol
from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.server import PolicyServer
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
    address, stop = serve_in_thread(PolicyServer(*parts, "tiny", max_batch=4, batch_wait_s=0.05, limit=LIMIT))
    yield address
    stop()


def request(**changes) -> dict:
    left, right = stereo_pair()
    values = {"left": left, "right": right, "instruction": "pick up the red cube", "state": STATE}
    return {"type": "predict", "embodiment": EMBODIMENT, **values, **changes}


def by_hand(parts, seed: int, instruction: str = "pick up the red cube", views=None) -> np.ndarray:
    model, processor = parts
    noise = np.random.default_rng(seed).standard_normal((1, 8, 7), dtype=np.float32)
    inputs = processor(images=list(views or stereo_pair()), text=instruction, state=STATE, embodiment=EMBODIMENT)
    return processor.decode_actions(model.predict_action(**inputs, noise=torch.from_numpy(noise)), EMBODIMENT)[0]


def test_it_answers_what_the_model_answers(url, parts):
    with PolicyClient(url) as client:
        assert client.hello["model"] == "tiny" and client.hello["embodiments"] == [EMBODIMENT]
        answer = client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT, seed=5)
        assert answer.actions.shape == (8, 7) and answer.actions.dtype == np.float32
        assert answer.model == "tiny" and 0 < answer.latency_s < 60
        np.testing.assert_allclose(answer.actions, by_hand(parts, 5), atol=1e-5)
        free = [client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT).actions for _ in range(2)]
        assert np.abs(free[0] - free[1]).max() > 1e-4


def test_clients_at_the_same_time_share_batches_and_get_their_own_answers(parts):
    server = PolicyServer(*parts, "tiny", max_batch=4, batch_wait_s=0.3)
    sizes = []
    predict = server.predict
    server.predict = lambda requests: (sizes.append(len(requests)), predict(requests))[1]
    address, stop = serve_in_thread(server)
    texts = ["pick up the red cube", "pick up the green ball", "", "pick up the red cube"]

    def ask(number: int):
        with PolicyClient(address) as client:
            ready.wait(20)
            try:
                return client.predict(*stereo_pair(), texts[number], STATE, EMBODIMENT, seed=number).actions
            except PolicyError as error:
                return error

    ready = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    stop()
    assert max(sizes) > 1
    for number in (0, 1, 3):
        np.testing.assert_allclose(answers[number], by_hand(parts, number, texts[number]), atol=1e-5)
    assert answers[2].kind == "invalid_input" and "text is ''" in str(answers[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": np.zeros((32, 64, 3), np.uint8)}, r"left view is \(32, 64\).*right view \(64, 64\)"),
        ({"left": np.zeros((64, 64, 3), np.float32)}, "dtype float32"),
        ({"left": None}, "1 of 2 views"),
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
def test_unusable_values_are_answered_and_the_connection_goes_on(url, changes, message):
    with connect(url, proxy=None) as connection:
        connection.recv()
        connection.send(protocol.pack(request(**changes)))
        answer = protocol.unpack(connection.recv())
        assert answer["type"] == "error" and answer["kind"] == "invalid_input"
        assert re.search(message, answer["message"])
        connection.send(protocol.pack(request()))
        assert protocol.unpack(connection.recv())["type"] == "prediction"


def array(dtype, shape, content) -> bytes:
    return msgpack.packb({"type": "predict", "left": msgpack.ExtType(1, msgpack.packb((dtype, shape, content)))})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "a text message"),
        (b"", "no msgpack message"),
        (b"\xc1\x00", "no msgpack message"),
        (b"\x81" * 5000, "no msgpack message"),
        (msgpack.packb([1, 2]), "a message is a map"),
        (msgpack.packb({"type": "run"}), "type is 'run'"),
        (msgpack.packb({"type": "predict"}), "lacks left, right"),
        (protocol.pack(request(lefd=1)), "unknown key 'lefd'; did you mean 'left'"),
        (protocol.pack(request(seed=-1)), "seed is -1"),
        (msgpack.packb({"type": msgpack.ExtType(7, b"")}), "unknown extension type 7"),
        (array("object", [1], b"12345678"), "an array of 'object'"),
        (array("uint8", [2, 2], b"123"), "do not fit its shape"),
        (array("uint8", [-1], b""), "of shape"),
        (array("uint8", [1] * 9, b"1"), "of shape"),
        (array("uint8", [2**62, 4], b""), "do not fit its shape"),
    ],
)
def test_malformed_messages_are_answered_and_the_connection_goes_on(url, data, message):
    with connect(url, proxy=None) as connection:
        connection.recv()
        connection.send(data)
        answer = protocol.unpack(connection.recv())
        assert (answer["type"], answer["kind"]) == ("error", "malformed")
        assert message in answer["message"]
        connection.send(protocol.pack(request()))
        assert protocol.unpack(connection.recv())["type"] == "prediction"


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
        address, stop = serve_in_thread(PolicyServer(model, processor, name))
        with PolicyClient(address) as client:
            assert client.hello["views"] == list(views) and client.hello["reads_depth"] == bool(fields)
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
                ({"left": left, "right": left}, f"unknown key 'right'; .*this model's views are {', '.join(views)}"),
                ({"left": None, "right": None}, f"lacks left.*this model's views are {', '.join(views)}"),
            ):
                with pytest.raises(PolicyError, match=message):
                    client.predict(wrong["left"], wrong["right"], *arguments, depths=depths if fields else None)
        stop()


def test_web_pages_are_refused(url):
    with pytest.raises(InvalidStatus, match="403"):
        connect(url, origin="https://example.org", proxy=None)


def test_a_client_that_leaves_does_not_stop_the_server(url):
    with connect(url, proxy=None) as connection:
        connection.recv()
        connection.send(protocol.pack(request()))
        connection.socket.shutdown(socket.SHUT_RDWR)
    with PolicyClient(url) as client:
        assert client.predict(*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT).actions.shape == (8, 7)


@pytest.mark.parametrize("dtype", protocol.DTYPES)
def test_arrays_come_back_as_they_were(dtype):
    value = np.arange(-3, 9).reshape(2, 3, 2).astype(dtype)
    for array in (value, value.transpose(2, 0, 1), value[:0], value.astype(value.dtype.newbyteorder(">"))):
        back = protocol.unpack(protocol.pack({"a": array}))["a"]
        assert back.dtype == np.dtype(dtype) and back.shape == array.shape
        np.testing.assert_array_equal(back, array)


def test_objects_are_not_sent():
    for value in (np.array([object()]), object()):
        with pytest.raises(TypeError, match="cannot send"):
            protocol.pack({"a": value})


def test_the_client_needs_no_torch():
    code = "import sys, serving.client; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


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
            answer = client.predict(*views, "pick up the red cube", STATE, EMBODIMENT, seed=1)
    finally:
        running.terminate()
        running.wait(20)
    np.testing.assert_allclose(answer.actions, by_hand(parts, 1, views=views), atol=1e-5)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks processor_config.json, tokenizer.json"):
        load(str(tmp_path), "cpu")
