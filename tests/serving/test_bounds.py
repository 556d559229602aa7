"""What one client may cost the others: nothing. Bounds of work, bytes and connections; leaving, and shutting down."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from serving_thread import serve_in_thread
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from stereovla.serving import protocol, server
from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.server import InternalError, PolicyServer
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
        policy = PolicyServer(*parts, "tiny", **{"limit": LIMIT, **options})
        address, stop = serve_in_thread(policy)
        stops.append(stop)
        return policy, address

    yield begin
    for stop in stops:
        stop()


def request(**changes) -> dict:
    left, right = stereo_pair()
    values = {"left": left, "right": right, "instruction": TEXT, "state": STATE, "seed": 3}
    return {"type": "predict", "embodiment": EMBODIMENT, **values, **changes}


@pytest.fixture(scope="module")
def expected(parts) -> np.ndarray:
    """The answer to `request`."""
    model, processor = parts
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 8, 7), dtype=np.float32))
    inputs = processor(images=list(stereo_pair()), text=TEXT, state=STATE, embodiment=EMBODIMENT)
    return processor.decode_actions(model.predict_action(**inputs, noise=noise), EMBODIMENT)[0]


def ask(connection, message: dict | bytes) -> dict:
    connection.send(message if isinstance(message, bytes) else protocol.pack(message))
    return protocol.unpack(connection.recv(timeout=60))


def opened(address: str):
    """A connection that was greeted."""
    connection = connect(address, proxy=None, max_size=None, compression=None)
    connection.recv(timeout=20)
    return connection


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
        self.computed: list[dict] = []
        predict = policy.predict

        def gated(requests):
            self.entered.set()
            assert self.open.wait(60)
            self.computed += requests
            return predict(requests)

        policy.predict = gated


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
    policy, address = start(limit=protocol.DEFAULT_LIMIT)
    with opened(address) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(type(policy.model), "predict_action", None)  # calling it would be an internal error
            answer = ask(connection, request(**changes))
        assert (answer["type"], answer["kind"]) == ("error", "invalid_input")
        assert message in answer["message"] and len(answer["message"]) < 500
        np.testing.assert_allclose(ask(connection, request())["actions"], expected, atol=1e-5)


HUGE = 30 * 2**20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (protocol.pack(request(type=np.zeros(3, np.uint8))), "type is array([0, 0, 0]"),
        (protocol.pack(request(type="p" * 60_000)), "...ppp"),
        (
            protocol.pack({**request(), "k" * HUGE: 1}),
            "a key of 31,457,285 bytes that is no array; at most 64 are read",
        ),
        (protocol.pack(request(state=[0] * 10**6)), "a value of 1,000,005 bytes that is no array; at most 65,536 are"),
        (b"\xdd\x00\x0f\x42\x40" + b"\x00" * 10**6, "a message is a map"),
        (b"\xdf\x00\x0f\x42\x40" + b"\x00" * 10**6, "a map of 1,000,000 keys; at most 16 are read"),
        (
            b"\x82" + 2 * (msgpack.packb("type") + msgpack.packb("predict")),
            "a map names a key twice; its keys are 'type'",
        ),
        (msgpack.packb({"left": msgpack.ExtType(1, b"\x93\xdd\x00\x0f\x42\x40" + b"\x00" * 10**6)}), "whose dtype has"),
        (
            msgpack.packb({"left": msgpack.ExtType(1, msgpack.packb(("uint8", [1], [0] * 10**6)))}),
            "an array is (dtype,",
        ),
        (msgpack.packb({"left": msgpack.ExtType(1, msgpack.packb((["uint8"], [1], b"0")))}), "an array of ['uint8']"),
        (protocol.pack(request(seed="1" * 60_000)), "seed is '1111"),
    ],
    ids="array text key list top keys twice nested bytes dtype seed".split(),
)
def test_a_message_is_measured_before_anything_is_built_of_it(start, expected, data, message):
    _, address = start(limit=protocol.DEFAULT_LIMIT)
    with opened(address) as connection:
        answer = ask(connection, data)
        assert (answer["type"], answer["kind"]) == ("error", "malformed")
        assert message in answer["message"] and len(answer["message"]) < 500
        np.testing.assert_allclose(ask(connection, request())["actions"], expected, atol=1e-5)


def test_a_malformed_message_costs_no_more_memory_than_itself():
    data = protocol.pack(request(state=[[0] * 1000] * 1000))  # a list of a million would have 8 MB of pointers alone
    tracemalloc.start()
    try:
        with pytest.raises(protocol.ProtocolError, match="a value of 1,003,003 bytes"):
            protocol.unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data)
    finally:
        tracemalloc.stop()


# -------------------------------------------------------------------------------------------------- each client alone


def test_one_request_of_a_batch_spoils_no_other(parts, expected):
    """A huge finite state made the whole batch "internal"."""
    policy = PolicyServer(*parts, "tiny", max_batch=3)
    answers = policy.predict([request(), request(state=np.full(7, 3e38, np.float32)), request(left="a path")])
    np.testing.assert_allclose(answers[0], expected, atol=1e-5)
    assert isinstance(answers[1], ValueError) and "3e+38" in str(answers[1])
    assert isinstance(answers[2], TypeError) and "a str" in str(answers[2])


def test_actions_that_are_not_finite_go_to_nobody_and_spoil_no_other(parts, expected, monkeypatch):
    model, processor = parts
    real = type(model).predict_action

    def broken(self, **inputs):
        chunks = real(self, **inputs)
        chunks[1, 2, 3] = float("nan")
        return chunks

    monkeypatch.setattr(type(model), "predict_action", broken)
    answers = PolicyServer(model, processor, "tiny", max_batch=3).predict([request()] * 3)
    assert isinstance(answers[1], InternalError) and "not finite" in str(answers[1])
    for number in (0, 2):
        np.testing.assert_allclose(answers[number], expected, atol=1e-5)


def test_a_model_that_fails_on_one_request_answers_the_others(parts, expected, monkeypatch, capfd):
    model, processor = parts
    real = type(model).predict_action

    def broken(self, **inputs):
        if (inputs["state"][:, -1, 0] > 0.9).any():
            raise ArithmeticError("it does not like that state")
        return real(self, **inputs)

    monkeypatch.setattr(type(model), "predict_action", broken)
    other = STATE + np.array([0.25, 0, 0, 0, 0, 0, 0], np.float32)
    answers = PolicyServer(model, processor, "tiny", max_batch=2).predict([request(), request(state=other)])
    np.testing.assert_allclose(answers[0], expected, atol=1e-5)
    assert isinstance(answers[1], InternalError) and "it does not like that state" in str(answers[1])
    assert "ArithmeticError" in capfd.readouterr().err  # the server's log has all of it


def test_requests_of_clients_that_have_gone_are_not_computed(start, expected):
    policy, address = start()
    gate = Gate(policy)
    with opened(address) as first, opened(address) as last:
        first.send(protocol.pack(request(seed=1)))
        assert gate.entered.wait(20)
        leaving = opened(address)
        leaving.send(protocol.pack(request(seed=2)))
        until(lambda: policy._queue.qsize() == 1)
        leaving.close()
        until(lambda: len(policy.budget.admitted) == 2)
        last.send(protocol.pack(request()))
        until(lambda: policy._queue.qsize() == 2)
        gate.open.set()
        assert protocol.unpack(first.recv(timeout=60))["type"] == "prediction"
        np.testing.assert_allclose(protocol.unpack(last.recv(timeout=60))["actions"], expected, atol=1e-5)
    assert [r["seed"] for r in gate.computed] == [1, 3]


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
        assert protocol.unpack(strangers[-1].recv(timeout=20))["kind"] == "malformed"
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
        stranger.send(protocol.pack(request(seed=1)))  # being computed while the rest comes
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
        with pytest.raises(PolicyError, match="1013.*2 connections are open; try again later"):
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
    data = protocol.pack(request())
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
    ("options", "message"), [({"max_connections": 0}, "max_connections is 0"), ({"limit": 0}, "limit")]
)
def test_bounds_that_serve_nobody(parts, options, message):
    with pytest.raises(ValueError, match=message):
        PolicyServer(*parts, "tiny", **options)


# -------------------------------------------------------------------------------------------------------- shutting down


def test_stopping_answers_what_is_in_flight_and_refuses_the_rest(parts, expected):
    policy = PolicyServer(*parts, "tiny", limit=LIMIT)
    address, stop = serve_in_thread(policy)
    gate = Gate(policy)
    with opened(address) as asking, opened(address) as late, ThreadPoolExecutor(1) as pool:
        asking.send(protocol.pack(request()))
        assert gate.entered.wait(20)
        stopped = pool.submit(stop)
        until(lambda: policy._closing)
        answer = ask(late, request())
        assert (answer["type"], answer["kind"]) == ("error", "closing") and "shutting down" in answer["message"]
        with pytest.raises(OSError):
            connect(address, proxy=None, open_timeout=5)
        gate.open.set()
        np.testing.assert_allclose(protocol.unpack(asking.recv(timeout=60))["actions"], expected, atol=1e-5)
        for connection in (asking, late):
            with pytest.raises(ConnectionClosed, match="1001 .*the server is shutting down"):
                connection.recv(timeout=20)
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
            running.send_signal(number)
            with pytest.raises(ConnectionClosed, match="1001 .*the server is shutting down"):
                connection.recv(timeout=60)
        assert running.wait(60) == 0
        assert f"{number.name}: answering what was asked" in running.stdout.read()
    finally:
        running.kill()
        running.wait()
