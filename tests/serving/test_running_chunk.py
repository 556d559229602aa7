"""What a server makes of the rest of a running chunk: the model's own answer, apart from others; what it refuses."""

import numpy as np
import pytest
import torch
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, save_tiny_depthvla, stereo_pair

from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.observation_keys import Observation
from stereovla.serving.served_model import ServedModel
from stereovla.sources import load_checkpoint
from stereovla.training.models import untrained

STATE = np.array([0.5, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0], np.float32)
RUNNING = np.random.default_rng(0).uniform(-0.03, 0.03, (5, 7)).astype(np.float32)
WORDS = "pick up the red cube"


@pytest.fixture(scope="module", params=["stereovla", "depthvla"])
def parts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save = save_tiny_checkpoint if request.param == "stereovla" else save_tiny_depthvla
    return load_checkpoint(str(save(folder)))


@pytest.fixture(scope="module")
def served(parts):
    url, stop = serve_in_thread(policy_server(parts, max_batch=4))
    with PolicyClient(url) as client:
        yield client
    stop()


def views(client) -> tuple:
    left, right = stereo_pair()
    return left, right if "right" in client.metadata["views"] else None


def test_the_answer_is_the_model_s_for_what_runs(parts, served):
    model, processor = parts
    left, right = views(served)
    found = served.predict(left, right, WORDS, STATE, EMBODIMENT, seed=3, running_actions=RUNNING, delay=2).actions
    images = {"left": left} if right is None else [left, right]
    inputs = dict(processor(images, WORDS, STATE, EMBODIMENT))
    noise = np.random.default_rng(3).standard_normal((1, 8, 7), dtype=np.float32)
    statistics = processor.norm_stats[EMBODIMENT]["action"]
    low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
    normalised = np.full((1, 8, 7), np.nan, np.float32)
    normalised[0, :5] = 2 * (RUNNING - low) / (high - low) - 1
    chunk = model.predict_action(
        **inputs, noise=torch.from_numpy(noise), running_actions=torch.from_numpy(normalised), delay=2
    )
    np.testing.assert_allclose(found, processor.decode_actions(chunk, EMBODIMENT)[0], atol=1e-5)
    np.testing.assert_allclose(found[:2], RUNNING[:2], atol=1e-6)
    plain = served.predict(left, right, WORDS, STATE, EMBODIMENT, seed=3).actions
    assert np.abs(plain[2:5] - found[2:5]).max() > 1e-4
    assert served.metadata["max_delay"] == 0


def test_only_requests_that_are_continued_alike_share_a_batch(parts):
    model = ServedModel(*parts, "tiny")
    random, (left, right) = np.random.default_rng(0), stereo_pair()
    images = {"left": left, "right": right} if "right" in model.keys.views else {"left": left}

    def prepared(delay: int | None):
        running = {} if delay is None else {"running_actions": RUNNING, "delay": delay}
        return model.prepare(Observation(images, WORDS, STATE, EMBODIMENT, seed=1, **running), random)

    kinds = [prepared(delay).kind for delay in (None, 0, 1, 1)]
    assert kinds[2] == kinds[3] and len(set(kinds)) == 3
    alone, together = model.predict([prepared(1)])[0], model.predict([prepared(1), prepared(1)])[1]
    np.testing.assert_allclose(together["actions"], alone["actions"], atol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"running_actions": RUNNING}, "running_actions and delay belong together"),
        ({"delay": 1}, "belong together"),
        ({"running_actions": RUNNING, "delay": 6}, "delay is 6; it must be at most 5, the steps of running_actions"),
        ({"running_actions": RUNNING, "delay": -1}, "delay is -1; it must be an integer of at least 0"),
        ({"running_actions": RUNNING[:, :6], "delay": 1}, r"shape \(5, 6\); expected \(n, 7\), n from 1 to 8"),
        ({"running_actions": np.zeros((9, 7)), "delay": 1}, r"shape \(9, 7\)"),
        ({"running_actions": np.zeros((0, 7)), "delay": 0}, r"shape \(0, 7\)"),
        ({"running_actions": RUNNING * np.nan, "delay": 1}, "must be finite"),
        ({"running_actions": RUNNING * 1e9, "delay": 1}, "is the unit another one"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_words(served, given, words):
    with pytest.raises(PolicyError, match=words) as error:
        served.predict(*views(served), WORDS, STATE, EMBODIMENT, **given)
    assert error.value.kind == "invalid_input"


def test_a_pi0_is_served_and_continues_nothing():
    statistics = {
        name: {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mean": [0.0] * 7, "std": [1.0] * 7}
        for name in ("state", "action", "keyframe_pose")
    }
    meta = {"tasks": [WORDS], "stats": {EMBODIMENT: statistics}, "fps": 10.0, "state_dim": 7, "action_dim": 7}
    served = ServedModel(*untrained("pi0-tiny", meta), "pi0")
    served.warm_up([1])
    assert served.metadata()["max_delay"] is None and served.metadata()["outputs"] == []
    images, random = {"left": stereo_pair()[0]}, np.random.default_rng(0)
    (answer,) = served.predict([served.prepare(Observation(images, WORDS, STATE, EMBODIMENT), random)])
    assert answer["actions"].shape == (8, 7)
    with pytest.raises(ValueError, match="pi0 is transformers' PI0 and begins every chunk anew; send no running_act"):
        served.prepare(Observation(images, WORDS, STATE, EMBODIMENT, running_actions=RUNNING, delay=1), random)
    with pytest.raises(ValueError, match="PI0 is not compiled as a whole; a DepthVLA without depth expert"):
        served.model.compile_predict_action()
