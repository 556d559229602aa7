"""Nearly right messages to a running server: each gets the right answer or an error, within a bound of work."""

import io
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from fuzzed_messages import OPENPI, fuzzed, packed, valid_request
from PIL import Image
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint
from websockets.sync.client import connect

from stereovla.serving.server import PolicyServer, Refusal
from stereovla.sources import load_checkpoint as load

CLIENTS = 4
KINDS = {"malformed", "invalid_input"}  # never "internal": nothing that is sent is the server's fault
# of the calls of Python and C functions that a plain request needs up to the model's inputs, whose size is always equal
MOST_WORK = 2.0


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return load(str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))), "cpu")


def read_alone(data: bytes) -> dict[str, Any]:
    """An observation by other means than the server's: for messages that it has answered."""

    def value(found: dict) -> Any:
        if b"__ndarray__" in found:
            return np.array(np.frombuffer(found[b"data"], found[b"dtype"]), copy=True).reshape(found[b"shape"])
        if b"__npgeneric__" in found:
            return np.dtype(found[b"dtype"]).type(found[b"data"]).item()
        return found

    message = msgpack.unpackb(data, object_hook=value)
    if "actions" in message:
        return message
    message |= {f"observation/{key}": value for key, value in message.pop("observation", {}).items()}
    names = {**{key: name for name, key in OPENPI.items()}, "observation/prompt": "instruction"}
    for name in ("left", "right"):
        names[f"observation.images.{name}"] = name
    names["observation.state"], names["task"] = "state", "instruction"
    read = {names.get(key, key): value for key, value in message.items()}
    for side in ("left", "right"):
        if isinstance(read[side], bytes):
            read[side] = Image.open(io.BytesIO(read[side]))
    if isinstance(read["instruction"], bytes):
        read["instruction"] = read["instruction"].decode()
    return read


def answer_alone(parts, message: dict[str, Any]) -> np.ndarray:
    """Its actions, in a batch of one."""
    model, processor = parts
    noise = np.random.default_rng(message["seed"]).standard_normal((1, 8, 7), dtype=np.float32)
    inputs = processor(
        [message["left"], message["right"]],
        message["instruction"],
        message["state"],
        message.get("embodiment", EMBODIMENT),
    )
    chunk = model.predict_action(**inputs, noise=torch.from_numpy(noise))
    return processor.decode_actions(chunk, EMBODIMENT)[0]


def send_all(parts, address: str, seeds: range, alone: threading.Lock) -> Counter:
    """What became of the messages of `seeds`, sent one after the other; each error ends its connection."""
    found: Counter[str] = Counter()
    connection = None
    for seed in seeds:
        if connection is None:
            connection = connect(address, proxy=None, compression=None, max_size=None).__enter__()
            connection.recv(timeout=60)
        data = fuzzed(seed)
        connection.send(data)
        answer = connection.recv(timeout=300)
        if isinstance(answer, str):
            kind, _, text = answer.partition(": ")
            assert kind in KINDS and text and len(answer) < 2100, (seed, answer)
            found[kind] += 1
            connection.close()
            assert connection.close_code == 1011, seed
            connection = None
            continue
        answer = read_alone(answer) if b"actions" in answer else None
        if answer is None:
            found["reset"] += 1
            continue
        found["prediction"] += 1
        message = read_alone(data)
        assert answer["actions"].shape == (8, 7) and np.isfinite(answer["actions"]).all(), seed
        assert set(answer) - {"actions", "server_timing", "keyframe_valid"} == set(message.get("outputs") or ()), seed
        if message.get("seed") is not None:
            with alone:
                expected = answer_alone(parts, message)
            np.testing.assert_allclose(answer["actions"], expected, atol=1e-4, err_msg=f"seed {seed}")
    if connection is not None:
        connection.close()
    return found


def campaign(parts, count: int) -> Counter:
    """Messages 0 ... count - 1, from several clients at a time, to a server that puts them into batches."""
    address, stop = serve_in_thread(
        policy_server(parts, max_batch=CLIENTS, batch_wait_s=0.01, limit=2**20, deadline_s=300)
    )
    alone = threading.Lock()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            shares = [range(client, count, CLIENTS) for client in range(CLIENTS)]
            found = sum(pool.map(lambda seeds: send_all(parts, address, seeds, alone), shares), Counter())
    finally:
        stop()
    print(f"{count} messages: {dict(found)}")
    return found


def work_of(policy: PolicyServer, data: bytes | str) -> int:
    """Calls of Python and C functions for one message, up to the model's inputs."""
    count, noise = 0, [np.random.default_rng(0)]

    def watch(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        policy._read(data, noise)
    except Refusal:
        pass  # an error
    finally:
        sys.setprofile(None)
    return count


def most_work(parts, count: int) -> float:
    """Of the work of a plain request, that of the message among 0 ... count - 1 that makes most."""
    policy = policy_server(parts)
    most = max(work_of(policy, fuzzed(seed)) for seed in range(count))
    plain = work_of(policy, packed(valid_request(np.random.default_rng(0))))
    print(f"{count} messages: at most {most} calls, a plain request {plain}")
    return most / plain


def test_some_fuzzed_messages(parts):
    found = campaign(parts, 120)
    assert found.total() == 120 and min(found[kind] for kind in ("prediction", *KINDS)) >= 10


def test_the_work_of_some_fuzzed_messages_is_bounded(parts):
    assert most_work(parts, 250) <= MOST_WORK


@pytest.mark.slow
def test_ten_thousand_fuzzed_messages(parts):
    found = campaign(parts, 10_000)
    assert found.total() == 10_000


@pytest.mark.slow
def test_the_work_of_ten_thousand_fuzzed_messages_is_bounded(parts):
    assert most_work(parts, 10_000) <= MOST_WORK
