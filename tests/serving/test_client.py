"""The client: servers that come late, go away, restart, are others; every failure is a PolicyError."""

import asyncio
import socket
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair
from websockets.asyncio.server import serve

from stereovla.evaluation.policies import Observation
from stereovla.evaluation.policy_specs import make_policy, policy_identity
from stereovla.serving import wire
from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.sources import load_checkpoint as load

STATE = np.array([0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0], np.float32)
ASKED = (*stereo_pair(), "pick up the red cube", STATE, EMBODIMENT)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return load(str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))), "cpu")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_it_waits_for_a_server_that_starts(parts):
    port = free_port()
    url = f"ws://127.0.0.1:{port}"
    with pytest.raises(PolicyError, match="unreachable: no policy server answers at") as error:
        PolicyClient(url)
    assert error.value.kind == "unreachable"
    stops = []
    starting = threading.Timer(0.3, lambda: stops.append(serve_in_thread(policy_server(parts), port)[1]))
    starting.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a library that will end a way to connect says so
        with PolicyClient(url, wait_s=60) as client:
            assert client.predict(*ASKED).actions.shape == (8, 7)
    starting.join()
    stops[0]()


def test_it_goes_on_with_a_server_that_restarted(parts):
    """The same model comes back: nobody notices. Another does: the client says so and asks it nothing."""
    port = free_port()
    url, stop = serve_in_thread(policy_server(parts), port)
    client = PolicyClient(url)
    first = client.predict(*ASKED, seed=1).actions
    stop()
    with pytest.raises(PolicyError) as error:
        client.predict(*ASKED)
    assert error.value.kind == "unreachable"
    stop = serve_in_thread(policy_server(parts), port)[1]
    np.testing.assert_allclose(client.predict(*ASKED, seed=1).actions, first, atol=1e-6)
    stop()
    stop = serve_in_thread(policy_server(parts), port)[1]  # restarted between two requests
    np.testing.assert_allclose(client.predict(*ASKED, seed=1).actions, first, atol=1e-6)
    stop()
    starting = threading.Timer(0.3, lambda: stops.append(serve_in_thread(policy_server(parts), port)[1]))
    stops, client.wait_s = [], 60
    starting.start()
    np.testing.assert_allclose(client.predict(*ASKED, seed=1).actions, first, atol=1e-6)
    starting.join()
    stops[0]()
    stop = serve_in_thread(policy_server(parts, "another"), port)[1]
    with pytest.raises(PolicyError, match="changed: .*came back with other metadata"):
        client.predict(*ASKED)
    client.close()
    stop()


def answering(answer: Callable, greeting: bytes | str = wire.pack({"pi": 0})) -> tuple[str, Callable[[], None]]:
    """(url, stop function) of a server that answers every message with what `answer` makes of it."""
    started, stopping, loop, address = threading.Event(), None, None, []

    async def run():
        nonlocal stopping, loop
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()

        async def talk(connection):
            await connection.send(greeting)
            async for data in connection:
                if (found := answer(data)) is None:
                    return
                await connection.send(found)

        async with serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
            address.append(server.sockets[0].getsockname())
            started.set()
            await stopping.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(20)

    def stop():
        loop.call_soon_threadsafe(stopping.set)
        thread.join(20)

    return f"ws://127.0.0.1:{address[0][1]}", stop


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda data: "Traceback: it broke", "refused", "Traceback: it broke"),
        (lambda data: None, "lost", "1000"),
        (lambda data: b"\xc1", "answer", "no msgpack message"),
        (lambda data: wire.pack({"action": 1}), "answer", "answered without actions"),
        (lambda data: time.sleep(0.6), "timeout", "within 0.2 s"),
    ],
)
def test_every_failure_is_one_kind_of_exception(answer, kind, message):
    url, stop = answering(answer)
    with PolicyClient(url) as client:
        client.timeout_s = 0.2 if kind == "timeout" else 60
        with pytest.raises(PolicyError, match=message) as error:
            client.infer({"prompt": "x"})
        assert error.value.kind == kind
        with pytest.raises(PolicyError, match="cannot send a object") as error:
            client.infer({"prompt": object()})
        assert error.value.kind == "request"
    stop()


@pytest.mark.parametrize(
    "greeting", ["hello", b"\xc1", wire.pack({"views": ["left"], "keys": 3, "depths": [], "outputs": []})]
)
def test_a_greeting_that_is_none(greeting):
    url, stop = answering(lambda data: data, greeting)
    with pytest.raises(PolicyError) as error:
        PolicyClient(url)
    assert error.value.kind == "answer"
    stop()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ws://127.0.0.1:1", "ws://no.such.host.invalid:1", "nothing"])
def test_addresses_that_lead_nowhere(url):
    with pytest.raises(PolicyError, match="unreachable"):
        PolicyClient(url)


def test_it_measures_a_server_of_openpi(tmp_path):
    """One that is not ours: told DROID's names, or those of a file; its noise is its own."""
    told = []

    def answer(data):
        told.append(wire.unpack(data))
        return wire.pack({"actions": np.full((10, 7), 0.5), "server_timing": {"infer_ms": 1.0}})

    url, stop = answering(answer)
    left, right = stereo_pair()
    views = {"wrist": right, "behind": left}
    seen = Observation(0, 1, 2, "pick up the red cube", EMBODIMENT, np.stack([STATE - 1, STATE]), left, right, views)
    # who does not say what it is, is another policy at another address
    assert policy_identity(url) == {"kind": "served", "url": url, "metadata": '{"pi": 0}'}
    with make_policy(url) as policy:
        (chunk,) = policy.act([seen])
    assert chunk.shape == (10, 7) and chunk.dtype == np.float32
    keys = tmp_path / "keys.json"
    keys.write_text('{"left": "observation/image", "behind": "observation/back", "instruction": "task"}')
    assert "observation/image" in policy_identity(url, keys=str(keys))["keys"]
    with make_policy(url, keys=str(keys)) as policy:
        policy.act([seen])
    stop()
    droid, libero = told
    assert set(droid) == {
        "observation/exterior_image_1_left",
        "observation/exterior_image_1_right",
        "observation/wrist_image_left",
        "observation/state",
        "prompt",
    }
    np.testing.assert_array_equal(droid["observation/exterior_image_1_right"], right)
    np.testing.assert_array_equal(droid["observation/state"], STATE)
    assert set(libero) == {"observation/image", "observation/back", "observation/state", "task"}
    np.testing.assert_array_equal(libero["observation/back"], left)


def test_a_server_with_keys_of_its_own_is_told_those(parts):
    url, stop = serve_in_thread(policy_server(parts, keys={"left": "cam/0", "right": ["cam/1", "right"]}))
    with PolicyClient(url) as client:
        first = client.predict(*ASKED, seed=1).actions
        message = {"cam": {"0": ASKED[0], "1": ASKED[1]}, "prompt": ASKED[2], "state": STATE, "seed": 1}
        np.testing.assert_allclose(client.infer(message)["actions"], first, atol=1e-6)
        with pytest.raises(PolicyError, match="unknown key 'left'"):
            client.infer({"left": ASKED[0], "right": ASKED[1], "prompt": ASKED[2], "state": STATE})
    stop()


def test_a_file_of_keys_that_cannot_be_used(tmp_path, parts):
    url, stop = answering(lambda data: data)
    (tmp_path / "keys.json").write_text("[]")
    for name, message in (("keys.json", "must be an object"), ("none.json", "none.json")):
        with pytest.raises(ValueError, match=message):
            make_policy(url, keys=str(Path(tmp_path, name)))
    stop()
    for keys, message in (
        ({"left": []}, "the keys of 'left' are"),
        ({"left": [["a"], []]}, "the keys of 'left' are"),
        ({"left": 3}, "the keys of 'left' are 3"),
        ({"left": "right"}, "the key 'right' is of 'left' and of 'right'"),
        ({"ignored": "state"}, "the key 'state' is of 'ignored' and of 'state'"),
        ({"stat": "a"}, "did you mean 'state'"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_server(parts, keys=keys)
