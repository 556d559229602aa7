"""How a chunk continues the one that is executed while it is computed (real-time chunking).

Guided, for any checkpoint (arXiv 2506.07339): the actions that will have been executed when the chunk is there, and
with less and less weight the ones after them, pull each denoising step towards themselves. Given, for a model that was
trained with delays (arXiv 2512.05964): these actions enter as clean ones, which costs nothing.

In the paper t = 0 is noise; here, as everywhere in this package, t = 1 is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .values import require

MAX_GUIDANCE = 5.0  # beta of arXiv 2506.07339, section IV


@dataclass
class RunningChunk:
    """What is left of the chunk that is executed.

    actions: (B, chunk_size, action_dim), normalised, the present step first; 0 where there is none.
    known: (B, chunk_size) bool, the steps that are there, the first ones.
    delay: (B,) int64, how many of them will have been executed when the new chunk is there.
    """

    actions: torch.Tensor
    known: torch.Tensor
    delay: torch.Tensor

    @classmethod
    def checked(cls, actions: torch.Tensor, delay: torch.Tensor | int, shape: tuple[int, int, int]) -> "RunningChunk":
        """Of inputs of `predict_action`; ValueError for those that cannot be."""
        if tuple(actions.shape) != shape:
            raise ValueError(
                f"running_actions has shape {tuple(actions.shape)}; it must be {shape}, NaN = no such step"
            )
        known = ~actions.isnan().any(-1)
        lengths = known.sum(-1)
        steps = torch.arange(shape[1], device=actions.device)
        first = "running_actions has a step behind one that is NaN; the steps that are there come first"
        require(known == (steps < lengths[:, None]), first, lambda: first)
        delay = delay if isinstance(delay, torch.Tensor) else torch.full((), delay, device=actions.device)
        delay = delay.to(actions.device).expand(shape[0])
        whole = "it must be whole steps from 0 to those that running_actions has"
        if delay.is_floating_point():
            raise ValueError(f"delay is {delay.tolist()}; {whole}")
        require(
            (delay >= 0) & (delay <= lengths),
            f"delay is wrong; {whole}",
            lambda: f"delay is {delay.tolist()}; {whole}, {lengths.tolist()}",
        )
        return cls(torch.where(known[..., None], actions.float(), 0.0), known, delay.long())

    @property
    def frozen(self) -> torch.Tensor:
        """(B, chunk_size) bool: the steps that will have been executed."""
        return torch.arange(self.known.shape[1], device=self.known.device) < self.delay[:, None]

    def kept(self, chunk: torch.Tensor) -> torch.Tensor:
        """`chunk` (B, chunk_size, action_dim), in which the frozen steps are what they were."""
        return torch.where(self.frozen[..., None], self.actions.to(chunk.dtype), chunk)


def guidance_weights(running: RunningChunk) -> torch.Tensor:
    """(B, chunk_size) float32: 1 for the frozen steps, then falling towards 0 at the end of the running chunk, 0 behind
    it (arXiv 2506.07339, equation 5).
    """
    length, delay = running.known.sum(-1, keepdim=True), running.delay[:, None]
    steps = torch.arange(running.known.shape[1], device=running.known.device)
    left = (length - steps) / (length - delay + 1)
    decay = left * torch.expm1(left) / (torch.e - 1)
    return torch.where(running.frozen, 1.0, torch.where(running.known, decay, 0.0))


def guidance_scale(time: float) -> float:
    """How strongly the step at `time`, 0 to 1, is pulled: the variance of what is predicted, at most `MAX_GUIDANCE`."""
    limit = time * (1 - time)
    return min(MAX_GUIDANCE, ((1 - time) ** 2 + time**2) / limit) if limit else MAX_GUIDANCE


def guided(
    velocity: Callable[[torch.Tensor, int], torch.Tensor], running: RunningChunk, times: list[float]
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """`velocity(x, step)` of the flow, pulled towards the running chunk by pseudo-inverse guidance: the error of the
    data that a step predicts, weighted, through the derivative of that prediction.
    """
    weights = guidance_weights(running)[..., None]

    def pulled(x: torch.Tensor, step: int) -> torch.Tensor:
        def predicted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            flow = velocity(x, step).to(x.dtype)
            return x - times[step] * flow, flow

        data, flow, pull_back = with_pullback(predicted, x)
        pull = pull_back(weights * (running.actions - data))
        return flow - guidance_scale(times[step]) * pull

    return pulled


def with_pullback(function: Callable, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Callable]:
    """Both values of `function(x)`, without gradients, and what takes a vector (of the first one's shape) times the
    derivative of the first.
    """
    if torch.compiler.is_compiling():  # a graph takes no torch.autograd.grad, and quantised layers nothing else
        value, pull_back, beside = torch.func.vjp(function, x, has_aux=True)
        return value, beside, lambda vector: pull_back(vector)[0]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value, beside = function(x)
    return value.detach(), beside.detach(), lambda vector: torch.autograd.grad(value, x, vector)[0]
