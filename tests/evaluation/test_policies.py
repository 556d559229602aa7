"""Policies: the interface, models loaded through the Auto classes, and folders that are no checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import evaluate as main
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import EMBODIMENT, LOW, save_tiny_checkpoint, stereo_pair

from stereovla.evaluation.model_policy import ModelPolicy, load_untrained
from stereovla.evaluation.policies import Observation, StillPolicy
from stereovla.evaluation.policy_specs import make_policy, policy_identity
from stereovla.sources import InputError, check_checkpoint, fingerprint, load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def policy(checkpoint) -> ModelPolicy:
    return make_policy(str(checkpoint))


def observation(
    slot: int, seed: int = 0, step: int = 0, states: int = 1, text: str = "pick up the red cube"
) -> Observation:
    left, right = stereo_pair(slot)
    history = np.random.default_rng(slot).uniform(0.3, 0.5, (states, 7)).astype(np.float32)
    return Observation(slot, seed, step, text, EMBODIMENT, history, left, right)


def test_a_batch_acts_as_its_members_alone(policy):
    seen = [observation(0), observation(1, seed=5, step=3, text="pick up the green ball"), observation(2, states=9)]
    together = policy.act(seen)
    for one, chunk in zip(seen, together, strict=True):
        assert chunk.shape == (8, 7) and chunk.dtype == np.float32
        np.testing.assert_allclose(chunk, policy.act([one])[0], atol=1e-5)


def test_it_is_the_model_behind_the_processor(policy, checkpoint):
    """The same chunk by hand: processor, predict_action with the noise of (seed, step), decode."""
    model, processor = load_checkpoint(str(checkpoint))
    one = observation(3, seed=11, step=6, states=7)
    noise = np.random.default_rng((11, 6)).standard_normal((1, 8, 7), dtype=np.float32)
    inputs = processor(images=[one.left, one.right], text=one.instruction, state=one.states[-4:], embodiment=EMBODIMENT)
    chunk = model.predict_action(**inputs, noise=torch.from_numpy(noise))
    np.testing.assert_allclose(policy.act([one])[0], processor.decode_actions(chunk, EMBODIMENT)[0], atol=1e-5)


def test_noise_depends_on_seed_and_step_alone(policy):
    first = policy.noise([(1, 2), (1, 3), (2, 2)])
    assert torch.equal(policy.noise([(1, 3)])[0], first[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_the_last_states_are_told_oldest_repeated(policy):
    many, one = observation(0, states=6), observation(0, states=1)
    told = policy.inputs([many, one])["state"].numpy()
    low = np.array(LOW["state"])
    span = np.array([0.4, 0.6, 0.45, 0.4, 0.4, 1.6, 1.0])
    np.testing.assert_allclose(told[0], (many.states[-4:] - low) / span * 2 - 1, atol=1e-5)
    assert np.ptp(told[1], axis=0).max() == 0


def test_disparity_has_the_size_and_sign_of_disparities(policy):
    disparity = policy.disparity([observation(0), observation(1)])
    assert disparity.shape == (2, 16, 16) and (disparity >= 0).all()


def test_untrained_weights_follow_from_their_seed(checkpoint):
    first, again, other = (load_untrained(str(checkpoint), seed)[0].state_dict() for seed in (0, 0, 1))
    trained = load_checkpoint(str(checkpoint))[0].state_dict()
    weights = [name for name, value in trained.items() if value.ndim > 1 and value.std() > 0]
    assert len(weights) > 50
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in weights)
    assert not any(torch.equal(first[name], trained[name]) for name in weights)


def test_untrained_leaves_the_global_generator_alone(checkpoint):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_untrained(str(checkpoint))
    assert torch.equal(torch.rand(2), expected)


def test_untrained_needs_no_weights(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "config")
    (tmp_path / "config/model.safetensors").unlink()
    assert policy_identity(f"untrained:{tmp_path / 'config'}") == {"kind": "untrained"}
    with pytest.raises(InputError, match="lacks model.safetensors"):
        policy_identity(str(tmp_path / "config"))


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "modeling_stereovla.py"])
def test_a_folder_that_is_no_checkpoint_says_what_is_missing(checkpoint, tmp_path, name):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"lacks .*{name}"):
        make_policy(str(folder))


def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    for source in ("nothing", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(InputError, match="neither a folder nor a Hub id"):
            check_checkpoint(source)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_checkpoint(str(tmp_path / "file"))
    check_checkpoint("owner/name")


def test_the_fingerprint_follows_the_weights(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert fingerprint(str(copy)) == fingerprint(str(checkpoint))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(str(copy)) != fingerprint(str(checkpoint))


def test_still_stays_still():
    (chunk,) = StillPolicy(5).act([observation(0)])
    assert chunk.shape == (5, 7) and not chunk.any()


def test_a_policy_behind_a_socket_is_the_same_policy(policy, checkpoint, tmp_path):
    """The same chunks as in this process: states, noise and decoding take the way over the wire."""
    url, stop = serve_in_thread(policy_server(load_checkpoint(str(checkpoint)), "someone/policy"))
    try:
        assert policy_identity(url) == {"kind": "served", "model": "someone/policy", "revision": ""}
        seen = [observation(0), observation(1, seed=2**32 - 1, step=3, states=9), observation(2, seed=7, step=60)]
        with make_policy(url) as served:
            for chunk, expected in zip(served.act(seen), policy.act(seen), strict=True):
                np.testing.assert_allclose(chunk, expected, atol=1e-5)
        # it is measured on as many episodes as in this process
        words = ["rollout", "--preset", "tiny", "--image_size", "128", "--out", str(tmp_path)]
        assert main([*words, "--policies", url, "still"]) == 0
        logs = {path.parent.name: path.read_text() for path in tmp_path.glob("rollouts/*/episodes.jsonl")}
        assert {kind: text.count("\n") for kind, text in logs.items()} == {"served": 2, "still": 1}
    finally:
        stop()
    with pytest.raises(InputError, match=r"no policy server answers at .*`stereovla serve`"):
        policy_identity(url)
