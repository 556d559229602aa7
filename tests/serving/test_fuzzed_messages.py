"""Nearly right messages to a running server: each gets the right answer or an error, within a bound of work."""

import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from fuzzed_messages import KEYS, fuzzed, valid_request
from serving_thread import serve_in_thread
from tiny_checkpoint import save_tiny_checkpoint
from websockets.sync.client import connect

from stereovla.serving import protocol
from stereovla.serving.server import PolicyServer
from stereovla.sources import load_checkpoint as load

CLIENTS = 4
KINDS = {"malformed", "invalid_input"}  # never "internal": nothing that is sent is the server's fault
# of the calls of Python and C functions that a plain request needs up to the model's inputs, whose size is always equal
MOST_WORK = 2.0


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return load(str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))), "cpu")


def read_alone(data: bytes) -> dict[str, Any]:
    """A request by other means than the server's: for messages that it has answered."""

    def array(code: int, content: bytes) -> np.ndarray:
        dtype, shape, values = msgpack.unpackb(content)
        return np.array(np.frombuffer(values, dtype), copy=True).reshape(shape)

    message = msgpack.unpackb(data, ext_hook=array)
    assert message["type"] == "predict" and set(message) <= set(KEYS)
    return message


def answer_alone(parts, message: dict[str, Any]) -> np.ndarray:
    """Its actions, in a batch of one."""
    model, processor = parts
    noise = np.random.default_rng(message["seed"]).standard_normal((1, 8, 7), dtype=np.float32)
    inputs = processor(
        [message["left"], message["right"]], message["instruction"], message["state"], message["embodiment"]
    )
    chunk = model.predict_action(**inputs, noise=torch.from_numpy(noise))
    return processor.decode_actions(chunk, message["embodiment"])[0]


def send_all(parts, address: str, seeds: range, alone: threading.Lock) -> Counter:
    """What became of the messages of `seeds`, sent one after the other over one connection."""
    found: Counter[str] = Counter()
    with connect(address, proxy=None, compression=None, max_size=None) as connection:
        connection.recv(timeout=60)
        for seed in seeds:
            data = fuzzed(seed)
            connection.send(data)
            answer = protocol.unpack(connection.recv(timeout=300))
            if answer["type"] == "prediction":
                found["prediction"] += 1
                message = read_alone(data)
                assert answer["actions"].shape == (8, 7) and np.isfinite(answer["actions"]).all(), seed
                if message.get("seed") is not None:
                    with alone:
                        expected = answer_alone(parts, message)
                    np.testing.assert_allclose(answer["actions"], expected, atol=1e-4, err_msg=f"seed {seed}")
            else:
                assert answer["type"] == "error" and answer["kind"] in KINDS, (seed, answer)
                assert len(answer["message"]) < 2100, seed
                found[answer["kind"]] += 1
    return found


def campaign(parts, count: int) -> Counter:
    """Messages 0 ... count - 1, from several clients at a time, to a server that puts them into batches."""
    address, stop = serve_in_thread(PolicyServer(*parts, "tiny", max_batch=CLIENTS, batch_wait_s=0.01, limit=2**20))
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
    count = 0

    def watch(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        policy.prepare([policy.keys.check(protocol.unpack(data))])
    except (ValueError, TypeError):
        pass  # an error
    finally:
        sys.setprofile(None)
    return count


def most_work(parts, count: int) -> float:
    """Of the work of a plain request, that of the message among 0 ... count - 1 that makes most."""
    policy = PolicyServer(*parts, "tiny")
    most = max(work_of(policy, fuzzed(seed)) for seed in range(count))
    plain = work_of(policy, protocol.pack(valid_request(np.random.default_rng(0))))
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
