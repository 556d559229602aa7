"""Flow matching against closed forms, SciPy-free references and the recorded time embedding of the published code."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stereovla.modeling_stereovla.flow_matching import (
    euler_integrate,
    euler_times,
    interpolate,
    sample_time,
    time_embedding,
)

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens" / "stereovla_miniature"


def test_interpolation_ends_at_data_and_noise():
    noise, actions = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    at_data, velocity = interpolate(noise, actions, torch.zeros(3, 2))
    at_noise, _ = interpolate(noise, actions, torch.ones(3, 2))
    assert torch.equal(at_data, actions) and torch.equal(at_noise, noise)
    # the velocity is the derivative of the path
    near, _ = interpolate(noise.double(), actions.double(), torch.full((3, 2), 0.5 + 1e-6))
    middle, _ = interpolate(noise.double(), actions.double(), torch.full((3, 2), 0.5))
    torch.testing.assert_close((near - middle) / 1e-6, velocity.double(), atol=0.2, rtol=0.05)


def test_euler_is_exact_for_a_constant_velocity_and_first_order_for_an_exponential():
    noise = torch.randn(2, 4, 3, dtype=torch.float64)
    constant = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(euler_integrate(lambda x, step: constant, noise, 7), noise - constant)
    # dx/dt = x from t = 1 to 0 has the solution noise / e; Euler's error halves with the step
    errors = [(euler_integrate(lambda x, step: x, noise, n) - noise / math.e).abs().max() for n in (100, 200)]
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_euler_visits_the_published_times():
    assert euler_times(10).tolist() == pytest.approx([1.0 - i / 10 for i in range(10)])
    steps = []
    euler_integrate(lambda x, step: steps.append(step) or torch.zeros_like(x), torch.zeros(1, 1, 1), 10)
    assert steps == list(range(10))


def test_euler_refuses_no_steps():
    with pytest.raises(ValueError, match="num_steps is 0"):
        euler_times(0)


def test_times_follow_the_scaled_beta_distribution():
    generator = torch.Generator().manual_seed(0)
    times = sample_time((200_000,), 1.5, 1.0, 0.001, 1.0, generator=generator)
    assert 0.001 <= times.min() and times.max() <= 1.0
    # mean and variance of Beta(a, b): a / (a + b) and ab / ((a + b)^2 (a + b + 1)); its distribution function is t^1.5
    assert times.mean().item() == pytest.approx(0.001 + 0.999 * 0.6, abs=2e-3)
    assert times.var().item() == pytest.approx(0.999**2 * 1.5 / (2.5**2 * 3.5), abs=1e-3)
    for t in (0.25, 0.5, 0.75):
        assert (times < 0.001 + 0.999 * t).float().mean().item() == pytest.approx(t**1.5, abs=5e-3)
    again = sample_time((200_000,), 1.5, 1.0, 0.001, 1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(times, again)


def test_time_embedding_equals_its_definition():
    time = torch.tensor([0.0, 0.3, 1.0])
    embedding = time_embedding(time, 8, 4e-3, 4.0)
    for row, t in enumerate(time.tolist()):
        for i in range(4):
            angle = 2 * math.pi * t / (4e-3 * 1000 ** (i / 3))
            assert embedding[row, i].item() == pytest.approx(math.sin(angle), abs=3e-4)
            assert embedding[row, 4 + i].item() == pytest.approx(math.cos(angle), abs=3e-4)


@pytest.mark.skipif(not GOLDENS.exists(), reason="the recorded tensors are not here")
def test_time_embedding_equals_the_published_one():
    tensors = load_file(GOLDENS / "tensors.safetensors")
    std = json.loads((GOLDENS / "case.json").read_text())["tensors"]["time_embedding"]["std"]
    mine = time_embedding(tensors["time_embedding_times"], tensors["time_embedding"].shape[-1], 4e-3, 4.0)
    # 5e-4 of a standard deviation: float32 angles of up to 1570 rad are no better
    assert (mine - tensors["time_embedding"]).abs().max() <= 5e-4 * std
