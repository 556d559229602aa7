"""Chunks that continue the running one: guidance against a dense Jacobian in float64, prefixes against the training
pass, and what must not change anything.
"""

import math

import pytest
import torch
from tiny_depthvla import float64_throughout, prompts, training_batch
from tiny_depthvla import tiny as tiny_depthvla

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.flow_matching import Draws
from stereovla.modeling_stereovla.real_time_chunking import RunningChunk, guidance_scale, guidance_weights

CHUNK, DIM = 8, 7


def running(rows: int, length: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    actions = torch.randn(rows, CHUNK, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    actions[:, length:] = float("nan")
    return actions


def noise_of(rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, CHUNK, DIM, generator=torch.Generator().manual_seed(5), dtype=dtype)


def tiny_stereovla(dtype: torch.dtype = torch.float32, **overrides) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", **overrides)).to(dtype).eval()


def stereo_inputs(config, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(10, 500, (3, 6), generator=generator)
    return {
        "input_ids": torch.cat([torch.full((3, config.num_visual_tokens), config.image_token_id), words], 1),
        "pixel_values": torch.rand(3, 2, 3, config.image_size, config.image_size, generator=generator, dtype=dtype),
        "state": torch.randn(3, config.state_history, config.state_dim, generator=generator, dtype=dtype),
        "chain_of_thought": False,
    }


def test_weights_and_scale_are_the_papers():
    known = RunningChunk.checked(running(2, 6), torch.tensor([2, 0]), (2, CHUNK, DIM))
    for row, delay in enumerate((2, 0)):
        for i, weight in enumerate(guidance_weights(known)[row].tolist()):
            c = (6 - i) / (6 - delay + 1)
            wanted = 1.0 if i < delay else c * (math.exp(c) - 1) / (math.e - 1) if i < 6 else 0.0
            assert weight == pytest.approx(wanted, abs=1e-6)
    # arXiv 2506.07339: min(beta, (1 - tau) / (tau r^2)) with r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2), tau = 1 - t
    for time in (0.9, 0.5, 0.1):
        tau = 1 - time
        squared = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        assert guidance_scale(time) == pytest.approx(min(5.0, (1 - tau) / (tau * squared)))
    assert guidance_scale(1.0) == 5.0


@pytest.mark.parametrize(("mask", "side"), [("block", "left"), ("full", "none")])
def test_guidance_equals_a_dense_jacobian(mask, side):
    """Every step anew: the training pass's velocity, its whole Jacobian, and the update written out."""
    model = tiny_depthvla(mask=mask)
    inputs, steps = prompts(model.config, side), 2
    noise, actions, delay = noise_of(3), running(3, 6), torch.tensor([2, 0, 3])
    with float64_throughout():
        found = model.predict_action(**inputs, noise=noise, num_steps=steps, running_actions=actions, delay=delay)
        target = actions.nan_to_num(0.0)
        weights = guidance_weights(RunningChunk.checked(actions, delay, (3, CHUNK, DIM))).double()[..., None]
        x = noise
        for step in range(steps):
            time = torch.tensor(1 - step / steps, dtype=torch.float32).double()

            def velocity(x, time=time):
                given = {"actions": torch.zeros_like(x), "noise": (x / time)[:, None], "time": time.expand(3, 1)}
                return model(**inputs, **given).velocity[:, 0]

            at, now = velocity(x).detach(), time.item()
            jacobian = torch.autograd.functional.jacobian(lambda x, f=velocity, now=now: x - now * f(x), x)
            error = (weights * (target - (x - now * at))).flatten()
            pull = (error @ jacobian.reshape(error.numel(), -1)).view_as(x)
            x = x - (at - guidance_scale(now) * pull) / steps
    frozen = torch.arange(CHUNK) < delay[:, None]
    assert torch.equal(found[frozen], actions[frozen])
    torch.testing.assert_close(found[~frozen], x.detach()[~frozen], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_chunk_that_continues_nothing_is_the_plain_one_to_the_bit(dtype, implementation):
    """An all-free mask: of one running step with no delay, whose weight is made 0."""
    model = tiny_stereovla(dtype)
    model.set_attn_implementation(implementation)
    inputs, noise = stereo_inputs(model.config, dtype), noise_of(3, torch.float32)
    plain = model.predict_action(**inputs, noise=noise)
    nothing = torch.full((3, CHUNK, DIM), float("nan"))
    assert torch.equal(model.predict_action(**inputs, noise=noise, running_actions=nothing, delay=0), plain)
    assert not plain.requires_grad and all(weight.grad is None for weight in model.parameters())


def test_guidance_pulls_frozen_steps_and_their_neighbours_towards_what_runs():
    """Before the frozen steps are put in: the error of what the flow itself makes of them falls by far."""
    model, kept = tiny_stereovla(), RunningChunk.kept
    inputs, noise = stereo_inputs(model.config), noise_of(3, torch.float32)
    actions = 0.5 * running(3, 7, dtype=torch.float32)
    plain = model.predict_action(**inputs, noise=noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningChunk, "kept", lambda self, chunk: chunk)
        guided = model.predict_action(**inputs, noise=noise, running_actions=actions, delay=3)
    whole = model.predict_action(**inputs, noise=noise, running_actions=actions, delay=3)
    assert RunningChunk.kept is kept and torch.equal(whole[:, 3:], guided[:, 3:])
    assert torch.equal(whole[:, :3], actions[:, :3])
    errors = [(chunk - actions).abs().nanmean((0, 2)) for chunk in (plain, guided)]
    assert (errors[1][:3] < 0.35 * errors[0][:3]).all() and errors[1][3] < 0.7 * errors[0][3]


def test_rows_do_not_see_each_other():
    model = tiny_stereovla()
    inputs, noise, actions = stereo_inputs(model.config), noise_of(3, torch.float32), running(3, 6, dtype=torch.float32)
    actions[1, 2:] = float("nan")
    delay = torch.tensor([2, 1, 4])
    together = model.predict_action(**inputs, noise=noise, running_actions=actions, delay=delay)
    for row in range(3):
        one = {name: value if isinstance(value, bool) else value[row : row + 1] for name, value in inputs.items()}
        alone = model.predict_action(
            **one, noise=noise[row : row + 1], running_actions=actions[row : row + 1], delay=int(delay[row])
        )
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


# ---- prefixes that training gives


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "none"])
def test_a_given_prefix_is_the_training_pass_s(side):
    """Integrated with the velocities of `forward`, in which the same steps are given."""
    model = tiny_depthvla(max_delay=4)
    inputs, steps = prompts(model.config, side), 3
    noise, actions, delay = noise_of(3), running(3, 6), torch.tensor([2, 0, 4])
    frozen = (torch.arange(CHUNK) < delay[:, None])[..., None]
    with float64_throughout():
        found = model.predict_action(**inputs, noise=noise, num_steps=steps, running_actions=actions, delay=delay)
        x, target = noise, actions.nan_to_num(0.0)
        for step in range(steps):
            time = torch.tensor(1 - step / steps, dtype=torch.float32).double().expand(3, 1)
            # noisy = time * noise + (1 - time) * actions, but for the given steps, which are the actions
            given = torch.where(frozen, target, 0.0)
            made = torch.where(frozen, 0.0, x / time[..., None])
            velocity = model(**inputs, actions=given, noise=made[:, None], time=time, delay=delay[:, None]).velocity
            x = torch.where(frozen, target, x - velocity[:, 0] / steps)
    torch.testing.assert_close(found, x, atol=1e-11, rtol=1e-11)
    assert torch.equal(found[frozen.expand_as(found)], actions[frozen.expand_as(found)])


def test_a_prefix_costs_no_backward_pass_and_a_longer_delay_is_guided():
    model = tiny_stereovla(max_delay=3)
    inputs, noise, actions = stereo_inputs(model.config), noise_of(3, torch.float32), running(3, 6, dtype=torch.float32)
    with torch.inference_mode():
        given = model.predict_action(**inputs, noise=noise, running_actions=actions, delay=3)
        with pytest.raises(ValueError, match="through gradients, which torch.inference_mode has not"):
            model.predict_action(**inputs, noise=noise, running_actions=actions, delay=4)
    longer = model.predict_action(**inputs, noise=noise, running_actions=actions, delay=4)
    plain = model.predict_action(**inputs, noise=noise)
    assert (given[:, 3:] - plain[:, 3:]).abs().mean() > 1e-4 and (longer[:, 4:] - plain[:, 4:]).abs().mean() > 1e-4
    # no delay, no prefix: the plain chunk
    at_once = model.predict_action(**inputs, noise=noise, running_actions=actions, delay=0)
    torch.testing.assert_close(at_once, plain, atol=1e-6, rtol=1e-5)


def test_given_steps_enter_without_noise_and_teach_nothing():
    """The loss is the mean over the other valid steps; a noise in the given ones changes nothing."""
    model = tiny_depthvla(max_delay=4, flow_draws=2)
    batch = training_batch(model.config)
    mask = torch.ones(3, CHUNK, dtype=torch.bool)
    mask[1, 3:] = False  # all valid steps of its second draw are given
    delay = torch.tensor([[0, 2], [1, 4], [3, 4]])
    batch |= {"action_mask": mask, "delay": delay, "is_action": torch.ones(3, dtype=torch.bool)}
    with float64_throughout():
        first = model(**batch)
        given = torch.arange(CHUNK) < delay[..., None]
        other = batch["noise"] + 9.0 * given[..., None]
        second = model(**batch | {"noise": other})
    torch.testing.assert_close(first.velocity[~given], second.velocity[~given], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(first.action_loss, second.action_loss, atol=1e-12, rtol=1e-12)
    flow = batch["noise"] - batch["actions"][:, None]
    learned = (~given & mask[:, None]).double()
    errors = (first.velocity - flow).square().mean(-1)
    losses = (errors * learned).sum((1, 2)) / learned.sum((1, 2))
    torch.testing.assert_close(first.action_loss, losses.mean(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(first.sample_action_loss.double(), losses, atol=1e-6, rtol=1e-6)


def test_delays_are_drawn_evenly_and_only_where_the_config_says_so():
    model = tiny_depthvla(max_delay=4)
    batch = training_batch(model.config)
    assert "delay" not in batch
    losses = [model(**batch, generator=torch.Generator().manual_seed(seed)).action_loss.item() for seed in (0, 0, 1, 2)]
    assert losses[0] == losses[1] and len(set(losses)) > 1
    plain = tiny_depthvla()
    assert plain(**batch).action_loss == plain(**batch).action_loss
    drawn = Draws(None, None, None).completed(model.config, torch.zeros(5000, CHUNK, DIM), torch.Generator())
    counts = torch.bincount(drawn.delay.flatten(), minlength=5)
    assert len(counts) == 5 and (counts / counts.sum() - 0.2).abs().max() < 0.02
    assert Draws(None, None, None).completed(plain.config, torch.zeros(5, CHUNK, DIM), None).delay is None


def test_a_config_says_how_it_was_trained(tmp_path):
    tiny_stereovla(max_delay=5).save_pretrained(tmp_path)
    assert StereoVLAConfig.from_pretrained(tmp_path).max_delay == 5
    for wrong in (-1, 8):
        with pytest.raises(Exception, match=f"max_delay is {wrong}; it must be at least 0 and below chunk_size"):
            StereoVLAConfig.from_preset("tiny", max_delay=wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delay": None}, "belong together"),
        ({"running_actions": torch.zeros(3, CHUNK, 6)}, r"shape \(3, 8, 6\); it must be \(3, 8, 7\)"),
        ({"delay": 7}, r"delay is \[7, 7, 7\]; it must be whole steps from 0 to .* \[6, 6, 6\]"),
        ({"delay": -1}, "from 0"),
        ({"delay": torch.tensor([1.0, 1.0, 1.0])}, "whole steps"),
        ({"running_actions": torch.tensor([float("nan")] + [0.0] * 7)[None, :, None].expand(3, -1, DIM)}, "come first"),
    ],
)
def test_what_cannot_be_continued_is_refused(change, words):
    model = tiny_stereovla()
    given = {"running_actions": running(3, 6, dtype=torch.float32), "delay": 2, **change}
    with pytest.raises(ValueError, match=words):
        model.predict_action(**stereo_inputs(model.config), **given)
