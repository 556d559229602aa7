"""What one client may cost the others: nothing. Bounds of work, bytes and connections; leaving, and shutting down."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from fuzzed_messages import picture
from PIL.PngImagePlugin import PngImageFile
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from stereovla.serving import server, wire
from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.observation_keys import Observation
from stereovla.serving.served_model import InternalError, Prepared, ServedModel
from stereovla.serving.server import PolicyServer
from stereovla.sources import load_checkpoint as load

ROOT = Path(__file__).parents[2]
TEXT = "pick up the red cube"
STATE = np.array([0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0], np.float32)
LIMIT = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def parts(checkpoint):
    return load(str(checkpoint), "cpu")


@pytest.fixture
def start(parts):
    """Starts servers and stops them after the test."""
    stops = []

    def begin(**options):
        policy = policy_server(parts, **{"limit": LIMIT, "deadline_s": 300, **options})
        address, stop = serve_in_thread(policy)
        stops.append(stop)
        return policy, address

    yield begin
    for stop in stops:
        stop()


def request(**changes) -> dict:
    left, right = stereo_pair()
    values = {"left": left, "right": right, "instruction": TEXT, "state": STATE, "seed": 3}
    return {"embodiment": EMBODIMENT, **values, **changes}


@pytest.fixture(scope="module")
def expected(parts) -> np.ndarray:
    """The answer to `request`."""
    model, processor = parts
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 8, 7), dtype=np.float32))
    inputs = processor(images=list(stereo_pair()), text=TEXT, state=STATE, embodiment=EMBODIMENT)
    return processor.decode_actions(model.predict_action(**inputs, noise=noise), EMBODIMENT)[0]


def heard(answer: bytes | str) -> dict | str:
    """An answer, or the text of an error."""
    return answer if isinstance(answer, str) else wire.unpack(answer)


def ask(connection, message: dict | bytes) -> dict | str:
    connection.send(message if isinstance(message, bytes) else wire.pack(message))
    return heard(connection.recv(timeout=60))


def opened(address: str):
    """A connection that was greeted."""
    connection = connect(address, proxy=None, max_size=None, compression=None).__enter__()
    connection.recv(timeout=20)
    return connection


def asked(address: str, message: dict | bytes) -> dict | str:
    """The answer over a connection of its own; after an error it must have been closed with 1011."""
    with opened(address) as connection:
        answer = ask(connection, message)
        if isinstance(answer, str):
            with pytest.raises(ConnectionClosed, match="1011"):
                connection.recv(timeout=20)
    return answer


def until(condition) -> None:
    """Waits for what another thread brings about."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


class Gate:
    """Lets a server compute when it is opened, and counts what it computed."""

    def __init__(self, policy: PolicyServer):
        self.entered, self.open = threading.Event(), threading.Event()
        self.computed: list[Prepared] = []
        predict = policy.served.predict

        def gated(batch):
            self.entered.set()
            assert self.open.wait(60)
            self.computed += batch
            return predict(batch)

        policy.served.predict = gated


# ---------------------------------------------------------------------------------------------------------- one message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"left": np.zeros((1, 200_000, 3), np.uint8), "right": np.zeros((1, 200_000, 3), np.uint8)},
            "16,384 px a side",
        ),
        ({"state": np.full(7, 3e38, np.float32)}, r"state[0, 0] is 3e+38"),
        ({"state": [3e38] * 7}, r"state[0, 0] is 3e+38"),
        ({"state": ["0.1"] * 7}, "expected numbers"),
        ({"instruction": "cube " * 12_000}, "a text has 60,0"),
        ({"embodiment": "a" * 60_000}, "unknown embodiment"),
    ],
    ids=["wide", "huge state", "huge list", "texts", "long text", "long name"],
)
def test_what_is_too_large_is_refused_before_the_model_sees_it(start, expected, monkeypatch, changes, message):
    policy, address = start(limit=wire.DEFAULT_LIMIT)
    with monkeypatch.context() as patch:
        patch.setattr(type(policy.served.model), "predict_action", None)  # calling it would be an internal error
        answer = asked(address, request(**changes))
    assert answer.startswith("invalid_input: ") and message in answer and len(answer) < 500
    np.testing.assert_allclose(asked(address, request())["actions"], expected, atol=1e-5)


HUGE = 30 * 2**20


def array(dtype="|u1", shape=(1,), data=b"0") -> bytes:
    return msgpack.packb({"left": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wire.pack({**request(), "k" * HUGE: 1}), "a key of 31,457,285 bytes; at most 128 are read"),
        (wire.pack(request(state=[0] * 10**6)), "texts, numbers and lists of 1,000,0"),
        (wire.pack(request(state=[[0] * 9] * 9000)), "arrays apart; at most 65,536 are read"),
        (wire.pack(request(a="a" * 40_000, b="b" * 40_000)), "arrays apart; at most 65,536 are read"),
        (b"\xdd\x00\x0f\x42\x40" + b"\x00" * 10**6, "a message is a map"),
        (b"\xdf\x00\x0f\x42\x40" + b"\x00" * 10**6, "maps of 1,000,000 keys; at most 128 are read"),
        (wire.pack({"a": {str(key): 1 for key in range(200)}}), "maps of 201 keys"),
        (b"\x81\xa1a" * 2000 + b"\x80", "maps within maps; at most 4 are read"),
        (b"\x82" + 2 * (msgpack.packb("type") + msgpack.packb("predict")), "a map names a key twice; its keys are"),
        (msgpack.packb({"left": msgpack.ExtType(1, b"\x00" * 10**5)}), "texts, numbers and lists of 100,0"),
        (array(data=[0] * 10**6), "texts, numbers and lists of 1,000,0"),
        (array(data="0"), "do not fit its shape"),
        (array(dtype=["|u1"]), "an array or scalar of ['|u1']"),
        (array(shape=[0] * 10**5), "texts, numbers and lists of 100,0"),
    ],
    ids="key list lists texts top keys nested deep twice extension values str dtype shape".split(),
)
def test_a_message_is_measured_before_anything_is_built_of_it(start, expected, data, message):
    _, address = start(limit=wire.DEFAULT_LIMIT)
    answer = asked(address, data)
    assert answer.startswith("malformed: ") and message in answer and len(answer) < 500
    np.testing.assert_allclose(asked(address, request())["actions"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": np.zeros(3, np.uint8)}, "endpoint is array([0, 0, 0]"),
        ({"endpoint": "p" * 60_000}, "...ppp"),
        ({"seed": "1" * 60_000}, "seed is '1111"),
        ({"x" * 100: 1}, "unknown key 'xxx"),
        ({"outputs": ["x" * 60_000]}, "outputs are ['xxx"),
    ],
    ids="array text seed key outputs".split(),
)
def test_errors_name_what_is_long_cut(start, changes, message):
    _, address = start()
    answer = asked(address, request(**changes))
    assert answer.startswith("invalid_input: ") and message in answer and len(answer) < 900


def test_a_malformed_message_costs_no_more_memory_than_itself():
    data = wire.pack(request(state=[[0] * 1000] * 1000))  # a list of a million would have 8 MB of pointers alone
    tracemalloc.start()
    try:
        with pytest.raises(wire.WireError, match="lists of 1,003,"):
            wire.unpack_bounded(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data)
    finally:
        tracemalloc.stop()


def test_pictures_are_bounded_before_they_are_decoded(parts, monkeypatch):
    """Black ones of any size are small as files; what they declare counts as their bytes decoded."""
    served = ServedModel(*parts, "tiny", limit=LIMIT)
    small = {side: picture(view, "PNG") for side, view in zip(("left", "right"), stereo_pair(), strict=True)}

    def prepared(images):
        return served.prepare(Observation(images, TEXT, STATE, EMBODIMENT), np.random.default_rng(0))

    assert torch.equal(
        prepared(small).inputs["pixel_values"],
        prepared(dict(zip(("left", "right"), stereo_pair(), strict=True))).inputs["pixel_values"],
    )
    black = picture(np.zeros((600, 600, 3), np.uint8), "PNG")
    with monkeypatch.context() as patch:
        patch.setattr(PngImageFile, "load", None)  # decoding would be an error of another kind
        for bomb, message in (
            (black, r"left 600x600 px.* have 1,092,288 bytes decoded; at most 1,048,576"),
            (_declared(9000), "the left view is no picture.*9000x9000 px"),
            (_declared(2**30), "the left view is no picture.*too large"),
        ):
            with pytest.raises(ValueError, match=message):
                prepared({**small, "left": bomb})
    for wrong, message in (
        (small["left"][:-40], "the left view cannot be decoded"),
        (b"GIF89a" + bytes(20), "the left view is no picture of JPEG or PNG"),
        (b"", "the left view is no picture of JPEG or PNG"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared({**small, "left": wrong})


def _declared(size: int) -> bytes:
    """A PNG that says that it has `size` px a side, and is a few bytes long."""
    data = bytearray(picture(np.zeros((1, 1, 3), np.uint8), "PNG"))
    data[16:24] = struct.pack("!II", size, size)
    data[29:33] = struct.pack("!I", zlib.crc32(data[12:29]))
    return bytes(data)


# -------------------------------------------------------------------------------------------------- each client alone


def prepared(served: ServedModel, **changes) -> Prepared:
    return served.prepare(served.keys.read(request(**changes)), np.random.default_rng(0))


def test_actions_that_are_not_finite_go_to_nobody_and_spoil_no_other(parts, expected, monkeypatch):
    model, processor = parts
    real = type(model).predict_action

    def broken(self, **inputs):
        chunks = real(self, **inputs)
        chunks[1, 2, 3] = float("nan")
        return chunks

    monkeypatch.setattr(type(model), "predict_action", broken)
    served = ServedModel(model, processor, "tiny")
    answers = served.predict([prepared(served)] * 3)
    assert isinstance(answers[1], InternalError) and "not finite" in str(answers[1])
    for number in (0, 2):
        np.testing.assert_allclose(answers[number]["actions"], expected, atol=1e-5)


def test_a_model_that_fails_on_one_request_answers_the_others(parts, expected, monkeypatch, capfd):
    model, processor = parts
    real = type(model).predict_action

    def broken(self, **inputs):
        if (inputs["state"][:, -1, 0] > 0.9).any():
            raise ArithmeticError("it does not like that state")
        return real(self, **inputs)

    monkeypatch.setattr(type(model), "predict_action", broken)
    other = STATE + np.array([0.25, 0, 0, 0, 0, 0, 0], np.float32)
    served = ServedModel(model, processor, "tiny")
    answers = served.predict([prepared(served), prepared(served, state=other)])
    np.testing.assert_allclose(answers[0]["actions"], expected, atol=1e-5)
    assert isinstance(answers[1], InternalError) and "it does not like that state" in str(answers[1])
    assert "ArithmeticError" in capfd.readouterr().err  # the server's log has all of it


def test_an_answer_does_not_depend_on_what_others_ask(start, parts):
    """Requests of other lengths, sizes and outputs are in other batches; those of one shape share one."""
    policy, address = start(max_batch=8)
    gate = Gate(policy)
    sizes, gated = [], policy.served.predict

    def counted(batch):
        sizes.append(len(batch))
        return gated(batch)

    policy.served.predict = counted
    large = dict(zip(("left", "right"), stereo_pair(size=96), strict=True))  # the processor makes them equal
    messages = [
        request(),
        *[request(seed=number) for number in (4, 5)],
        request(seed=6, **large),
        request(seed=7, instruction="pick up the green ball on the red cube"),
        request(seed=8, outputs=["disparity"]),
    ]
    connections = [opened(address) for _ in messages]
    for number, (connection, message) in enumerate(zip(connections, messages, strict=True)):
        connection.send(wire.pack(message))
        if not number:
            assert gate.entered.wait(20)
    until(lambda: len(policy._waiting) == 5)
    gate.open.set()
    answers = [heard(connection.recv(timeout=60)) for connection in connections]
    for connection in connections:
        connection.close()
    assert sizes == [1, 3, 1, 1]
    served = ServedModel(*parts, "alone")
    for message, answer in zip(messages, answers, strict=True):
        (alone,) = served.predict([served.prepare(served.keys.read(message), np.random.default_rng())])
        np.testing.assert_allclose(answer["actions"], alone["actions"], atol=1e-5)
        assert ("disparity" in answer) == ("outputs" in message)


def test_requests_of_clients_that_have_gone_are_not_computed(start, expected):
    policy, address = start()
    gate = Gate(policy)
    with opened(address) as first, opened(address) as last:
        first.send(wire.pack(request(seed=1)))
        assert gate.entered.wait(20)
        leaving = opened(address)
        leaving.send(wire.pack(request(seed=2)))
        until(lambda: len(policy._waiting) == 1)
        leaving.close()
        until(lambda: len(policy.budget.admitted) == 2)
        last.send(wire.pack(request()))
        until(lambda: len(policy._waiting) == 2)
        gate.open.set()
        assert heard(first.recv(timeout=60))["actions"].shape == (8, 7)
        np.testing.assert_allclose(heard(last.recv(timeout=60))["actions"], expected, atol=1e-5)
    noise = [np.random.default_rng(seed).standard_normal((1, 8, 7), dtype=np.float32) for seed in (1, 3)]
    np.testing.assert_array_equal([one.noise.numpy() for one in gate.computed], noise)


def test_what_takes_too_long_is_refused_and_not_computed(start, expected):
    policy, address = start()
    gate = Gate(policy)
    with opened(address) as first:
        first.send(wire.pack(request()))
        assert gate.entered.wait(20)
        policy.deadline_s = 0.2
        assert asked(address, request()) == "late: no answer within 0.2 s; the server is too slow for it"
        policy.deadline_s = 300
        gate.open.set()
        np.testing.assert_allclose(heard(first.recv(timeout=60))["actions"], expected, atol=1e-5)
    np.testing.assert_allclose(asked(address, request())["actions"], expected, atol=1e-5)
    assert len(gate.computed) == 2  # the first and the last


def test_one_request_too_many_is_refused_in_words(start, expected):
    policy, address = start(max_requests=2)
    gate = Gate(policy)
    with opened(address) as first, opened(address) as second, opened(address) as third:
        first.send(wire.pack(request()))
        assert gate.entered.wait(20)
        second.send(wire.pack(request()))
        until(lambda: len(policy._waiting) == 1)
        assert ask(third, request()) == "busy: 2 requests wait or are computed; try again later"
        with pytest.raises(ConnectionClosed, match="1013"):
            third.recv(timeout=20)
        gate.open.set()
        for connection in (first, second):
            np.testing.assert_allclose(heard(connection.recv(timeout=60))["actions"], expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------ bytes and connections


def frame_start(length: int, opcode: int = 0x82) -> bytes:
    """Head of a client's frame of so many bytes, masked with zeros; 0x82 = binary, the last of its message."""
    return struct.pack("!BBQ4x", opcode, 0xFF, length)


def test_unfinished_messages_hold_no_more_than_the_budget(start, expected):
    """40 clients that send nine tenths of a message; the oldest are sent away, and who asks meanwhile is answered."""
    policy, address = start(max_connections=100)
    most, slack = server.HELD_MESSAGES * LIMIT, 2**18
    held = []
    with opened(address) as robot:
        strangers = [opened(address) for _ in range(40)]
        for stranger in strangers:
            stranger.socket.sendall(frame_start(LIMIT) + bytes(int(0.9 * LIMIT)))
            held.append(policy.budget.held)
            np.testing.assert_allclose(ask(robot, request())["actions"], expected, atol=1e-5)
        assert max(held) <= most + slack
        until(lambda: policy.budget.held <= most)
        told = []
        for stranger in strangers[:30]:  # at most 8 messages of 0.9 fit
            with pytest.raises(ConnectionClosed) as error:
                stranger.recv(timeout=20)
            told.append(error.value.rcvd and error.value.rcvd.code)
        assert 1013 in told and set(told) <= {1013, None}
        # those that are left may finish: their bytes were no message, and that is what they hear
        strangers[-1].socket.sendall(bytes(LIMIT - int(0.9 * LIMIT)))
        assert strangers[-1].recv(timeout=20).startswith("malformed: ")
        np.testing.assert_allclose(ask(robot, request())["actions"], expected, atol=1e-5)
        for stranger in strangers:
            stranger.socket.close()
    until(lambda: not policy.budget.held)


@pytest.mark.parametrize(
    "data",
    [
        frame_start(0, 0x02) + frame_start(0, 0x00) * 100_000,  # a message of empty fragments
        b"".join(
            frame_start(LIMIT // 2) + bytes(LIMIT // 2) for _ in range(30)
        ),  # whole messages, not waiting for answers
    ],
    ids=["fragments", "pipelined"],
)
def test_one_connection_holds_no_more_than_the_budget(start, expected, data):
    policy, address = start()
    gate = Gate(policy)
    most = server.HELD_MESSAGES * LIMIT
    held = []
    with opened(address) as robot, opened(address) as stranger:
        stranger.send(wire.pack(request(seed=1)))  # being computed while the rest comes
        assert gate.entered.wait(20)
        stop = threading.Event()

        def watch():
            while not stop.is_set():
                held.append(policy.budget.held)
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            stranger.socket.settimeout(1)  # a server that reads no further is one way to hold no more
            stranger.socket.sendall(data)
        except OSError:
            pass
        stop.set()
        watcher.join()
        gate.open.set()
        np.testing.assert_allclose(ask(robot, request())["actions"], expected, atol=1e-5)
        stranger.socket.close()
    # one read of a socket brings 256 KiB, which are 18,724 of the smallest frames
    assert max(held) <= most + 2**18 + 2**18 // 14 * 256


def test_one_connection_too_many_is_told_so(start, expected):
    _, address = start(max_connections=2)
    with opened(address) as first, opened(address):
        with pytest.raises(PolicyError, match="lost: .*1013.*2 connections are open; try again later"):
            PolicyClient(address)
        np.testing.assert_allclose(ask(first, request())["actions"], expected, atol=1e-5)
    until(lambda: _opens(address))


def _opens(address: str) -> bool:
    try:
        PolicyClient(address).close()
    except PolicyError:
        return False
    return True


def test_a_message_and_a_close_at_once_break_nothing(start, expected, caplog):
    _, address = start()
    data = wire.pack(request())
    for _ in range(5):
        connection = opened(address)
        connection.socket.sendall(frame_start(len(data)) + data + b"\x88\x80" + bytes(4))
        with pytest.raises(ConnectionClosed):
            while True:
                connection.recv(timeout=20)
    with opened(address) as connection:
        np.testing.assert_allclose(ask(connection, request())["actions"], expected, atol=1e-5)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_connections": 0}, "max_connections is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"max_requests": 0}, "max_requests is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"deadline_s": 0.0}, "deadline_s is 0"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"),
    ],
)
def test_bounds_that_serve_nobody(parts, options, message):
    with pytest.raises(ValueError, match=message):
        PolicyServer(ServedModel(*parts, "tiny"), **options)


# -------------------------------------------------------------------------------------------------------- shutting down


def test_stopping_answers_what_is_in_flight_and_refuses_the_rest(parts, expected):
    policy = policy_server(parts, limit=LIMIT, deadline_s=300)
    address, stop = serve_in_thread(policy)
    gate = Gate(policy)
    with opened(address) as asking, opened(address) as late, ThreadPoolExecutor(1) as pool:
        asking.send(wire.pack(request()))
        assert gate.entered.wait(20)
        stopped = pool.submit(stop)
        until(lambda: policy._closing)
        assert ask(late, request()) == "closing: the server is shutting down and takes no more requests"
        with pytest.raises(ConnectionClosed, match="1001"):
            late.recv(timeout=20)
        with pytest.raises(OSError):
            connect(address, proxy=None, open_timeout=5)
        gate.open.set()
        np.testing.assert_allclose(heard(asking.recv(timeout=60))["actions"], expected, atol=1e-5)
        with pytest.raises(ConnectionClosed, match="1001 .*the server is shutting down"):
            asking.recv(timeout=20)
        stopped.result(20)
    assert len(gate.computed) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_command_ends_with_a_reason(checkpoint, expected, number):
    command = [sys.executable, "-m", "stereovla", "serve", "--model", str(checkpoint), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        with opened(running.stdout.readline().split()[-1]) as connection:
            np.testing.assert_allclose(ask(connection, request())["actions"], expected, atol=1e-5)
            gone = number == signal.SIGINT  # nobody reads any more what the server says
            if gone:
                running.stdout.close()
            running.send_signal(number)
            with pytest.raises(ConnectionClosed, match="1001 .*the server is shutting down"):
                connection.recv(timeout=60)
        assert running.wait(60) == 0
        assert gone or f"{number.name}: answering what was asked" in running.stdout.read()
    finally:
        running.kill()
        running.wait()
