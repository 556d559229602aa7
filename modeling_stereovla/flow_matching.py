"""Flow matching: time sampling, interpolation, time embedding and Euler integration, as pure functions.

Convention (arXiv 2410.24164, section IV; StereoVLA uses it unchanged): t = 1 is noise, t = 0 is data,
x_t = t * noise + (1 - t) * data, and the velocity that the network learns is dx_t/dt = noise - data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def sample_time(
    shape: tuple[int, ...],
    alpha: float,
    beta: float,
    time_min: float,
    time_max: float,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Times of `shape`, float32 in [time_min, time_max]: Beta(alpha, beta) scaled to that interval.

    A Beta variate is G_a / (G_a + G_b) of two Gamma variates, which (unlike `torch.distributions`) accept a generator.
    """
    gamma_a = torch._standard_gamma(torch.full(shape, alpha, device=device), generator=generator)
    gamma_b = torch._standard_gamma(torch.full(shape, beta, device=device), generator=generator)
    return time_min + (time_max - time_min) * gamma_a / (gamma_a + gamma_b)


@dataclass
class Draws:
    """What is random in a training step of flow matching, one row for each sample; None = to be drawn.

    Args:
        noise: (B, K, chunk_size, action_dim), standard normal. time: (B, K).
        hide_pose: (B,) bool, the samples whose action expert does not see the keyframe pose; it stays None where
            `config.direct_probability` is 0, or where the policy writes no pose.
        delay: (B, K) int64, the first steps of the chunk that are given without noise; it stays None where
            `config.max_delay` is 0.
    """

    noise: torch.Tensor | None
    time: torch.Tensor | None
    hide_pose: torch.Tensor | None
    delay: torch.Tensor | None = None

    def completed(self, config: Any, actions: torch.Tensor, generator: torch.Generator | None) -> "Draws":
        """With what is missing drawn for `actions` (B, chunk_size, action_dim)."""
        noise, time, hide_pose, delay = self.noise, self.time, self.hide_pose, self.delay
        draws, device = (len(actions), config.flow_draws), actions.device
        hidden = config.direct_probability if config.writes_pose else 0.0
        if hide_pose is None and hidden:
            hide_pose = torch.rand(len(actions), generator=generator, device=device) < hidden
        if noise is None:
            noise = torch.randn(*draws, *actions.shape[1:], generator=generator, device=device, dtype=actions.dtype)
        if time is None:
            interval = (config.time_alpha, config.time_beta, config.time_min, config.time_max)
            time = sample_time(draws, *interval, device, generator)
        if delay is None and config.max_delay:
            delay = torch.randint(config.max_delay + 1, draws, generator=generator, device=device)
        return Draws(noise, time, hide_pose, delay)


def interpolate(noise: torch.Tensor, actions: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, velocity) of the straight path from `actions` to `noise`.

    Args:
        noise: (..., chunk, action_dim), standard normal.
        actions: same shape, normalised.
        time: (...), one time per chunk.
    """
    time = time[..., None, None].to(actions.dtype)
    return time * noise + (1 - time) * actions, noise - actions


def time_embedding(
    time: torch.Tensor, dim: int, min_period: float, max_period: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Sinusoidal embedding (..., dim) of `time` (...), [sin | cos], with periods from `min_period` to `max_period`.

    It is computed in `dtype`, the periods included, and returned in it. In bfloat16 four in ten entries differ from
    float32 by more than 0.1 (the angles reach 2 pi / 4e-3 = 1570 rad), yet released weights were trained that way:
    hence the argument.
    """
    fraction = torch.linspace(0.0, 1.0, dim // 2, dtype=dtype, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    # each step rounds in bfloat16, so their order is the published one
    frequency = 1.0 / period * 2 * math.pi
    angle = time.to(dtype)[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def euler_times(num_steps: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Times of the Euler steps from t = 1 down, (num_steps,) float32."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; flow matching needs at least 1 Euler step (the paper uses 10)")
    # made where it is needed: a copy from the host has no place in a CUDA graph
    return (num_steps - torch.arange(num_steps, dtype=torch.float32, device=device)) / num_steps


@torch.compiler.assume_constant_result
def euler_numbers(num_steps: int) -> list[float]:
    """`euler_times` as numbers, also in a compiled graph."""
    return euler_times(num_steps).tolist()


def euler_integrate(
    velocity: Callable[[torch.Tensor, int], torch.Tensor], noise: torch.Tensor, num_steps: int
) -> torch.Tensor:
    """Integrates dx/dt = velocity(x, t) from `noise` at t = 1 to t = 0 in `num_steps` equal Euler steps.

    Args:
        velocity: maps x (B, chunk, action_dim) and the index of the step in `euler_times(num_steps)` to the velocity,
            shape of x.
        noise: (B, chunk, action_dim).
    """
    x = noise
    for step in range(num_steps):
        x = torch.sub(x, velocity(x, step).to(x.dtype), alpha=1 / num_steps)
    return x
