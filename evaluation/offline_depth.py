"""What a DepthVLA's depth expert sees, and what it is good for: its depth maps, and actions and keyframes, with its own
pictures and with others in their place.

A depth expert that the policy makes use of matters: actions get worse where it is shown grey (null) or another scene
(swapped), while the language model sees what it saw.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stereovla.evaluation import metrics
from stereovla.evaluation.held_out import HeldOutRow
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.pointed_keyframes import position_errors, told_displacements
from stereovla.evaluation.policies import Observation

SHOWN = ("given", "null", "swapped")
GREY = 0.5
ACTION_ERRORS = ("position_mm", "rotation_deg")


@dataclass
class Collected:
    """Raw numbers over all rows seen so far, by name; lists of arrays and of scalars."""

    values: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def add(self, **named: Any) -> None:
        for name, value in named.items():
            self.values[name].extend(np.asarray(value).reshape(-1).tolist())

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self.values[name], dtype=np.float64)


def with_another_scene(rows: Iterable[HeldOutRow]) -> Iterator[tuple[HeldOutRow, HeldOutRow | None]]:
    """Each row with the first one of the episode after it, after the last one with the first of all; None where there
    is but one episode. Frames of one episode would be no other scene: they look alike.
    """
    first, waiting = None, []
    for row in rows:
        first = row if first is None else first
        if waiting and row.episode != waiting[0].episode:
            yield from ((held, row) for held in waiting)
            waiting = []
        waiting.append(row)
    for held in waiting:
        yield held, first if first.episode != held.episode else None


def observations(rows: Sequence[HeldOutRow]) -> list[Observation]:
    return [
        Observation(
            0,
            row.episode,
            row.frame,
            row.task,
            row.embodiment,
            row.states,
            row.left,
            row.views.get("right"),
            {name: view for name, view in row.views.items() if name not in ("left", "right")},
            row.depths,
            row.calibration,
        )
        for row in rows
    ]


def action_errors(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> dict[str, np.ndarray]:
    """As `metrics.action_errors`, of the policy's chunks for rows."""
    predicted = np.stack(policy.act(observations(rows)))
    steps = min(predicted.shape[1], rows[0].plan.shape[0])
    truth = np.stack([row.plan[:steps] for row in rows])
    valid = np.arange(steps) < np.array([[row.plan_length] for row in rows])
    return metrics.action_errors(predicted[:, :steps], truth, valid)


@contextmanager
def shown(model: Any, pixel_values: torch.Tensor | None, depth_map: torch.Tensor | None) -> Iterator[None]:
    """Within, the depth expert of a DepthVLA is shown these pictures (B, P, 3, H, W), and this depth (B, V, H, W) where
    it reads depth, in the place of those that the model is given; None = those.
    """
    if pixel_values is None:
        yield
        return
    expert = model.model.depth_expert
    embed = expert.embed

    def other(given: torch.Tensor, view_mask: torch.Tensor | None, _: torch.Tensor | None = None) -> torch.Tensor:
        return embed(pixel_values.to(given), view_mask, depth_map)

    expert.embed = other
    try:
        yield
    finally:
        del expert.embed


class DepthExpertEvaluation:
    """Of a DepthVLA with a depth expert, batch by batch."""

    def __init__(self, policy: ModelPolicy):
        self.policy, self.model, self.processor = policy, policy.model, policy.processor
        self.collected = {name: Collected() for name in SHOWN}

    def add(self, rows: Sequence[HeldOutRow], others: Sequence[HeldOutRow | None]) -> None:
        """Rows, and another scene for each; without one nothing is swapped."""
        for name in SHOWN:
            if name == "swapped" and None in others:
                continue
            pictures = self.pictures(name, rows, others)
            with shown(self.model, *pictures), told_displacements(self.model) as ways:
                errors = action_errors(self.policy, rows)
            self.collected[name].add(**{key: errors[key] for key in ACTION_ERRORS})
            if ways:
                told = position_errors(self.processor, rows, ways[0])
                self.collected[name].add(**{f"keyframe_{key}": values for key, values in told.items()})
            if any(row.depths for row in rows):
                with shown(self.model, *pictures):
                    self.depth_maps(name, rows)

    def inputs(self, rows: Sequence[HeldOutRow]) -> Any:
        """The processor's batch for an action, with depth maps of the processed views where any row has some."""
        config = self.model.config
        known = self.policy.depth_maps([row.depths for row in rows])
        return self.processor(
            images=self.policy.images([row.views for row in rows]),
            text=[row.task for row in rows],
            state=[row.states[-config.state_history :] for row in rows],
            embodiment=[row.embodiment for row in rows],
            objective="action",
            check_stereo=False,
            **(self.policy.shown_beside(rows) | ({"depth_map": known} if any(known) else {})),
        ).to(self.model.device)

    def pictures(
        self, name: str, rows: Sequence[HeldOutRow], others: Sequence[HeldOutRow | None]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `shown` takes; unknown depth is null."""
        if name == "given":
            return None, None
        inputs = self.inputs(rows if name == "null" else others)
        pixel_values = inputs["pixel_values"]
        depth = inputs["depth_map"] if self.policy.needs_depth else None
        if name == "swapped":
            return pixel_values, depth
        return torch.full_like(pixel_values, GREY), None if depth is None else torch.zeros_like(depth)

    @torch.inference_mode()
    def depth_maps(self, name: str, rows: Sequence[HeldOutRow]) -> None:
        inputs = self.inputs(rows)
        truth = inputs["depth_map"] if self.policy.needs_depth else inputs.pop("depth_map")
        predicted = self.model(**inputs, output_depth=True).depth.float().cpu().numpy()
        # a stereo depth expert gives the depth of the first view alone
        for place, view in enumerate(self.model.config.views[: predicted.shape[1]]):
            true = truth[:, place].cpu().numpy()
            sums = metrics.depth_map_sums(predicted[:, place], true, self.model.config.silog_lambda)
            self.collected[name].add(**{f"{view}/{key}": values for key, values in sums.items()})

    def report(self) -> dict[str, Any]:
        """{what was shown: {"depth_map": {view: errors or None}, "action", "keyframe": {error: summary or None}}}."""
        return {name: self.of(self.collected[name]) for name in SHOWN}

    def of(self, data: Collected) -> dict[str, Any]:
        keys = ("relative", "squared", "right", "pixels", "l_si")
        maps = {
            view: metrics.depth_map_errors({key: data.array(f"{view}/{key}") for key in keys})
            for view in self.model.config.views
        }
        return {
            "depth_map": maps,
            "action": {name: metrics.summary(data.array(name)) for name in ACTION_ERRORS},
            "keyframe": {name: metrics.summary(data.array(f"keyframe_{name}")) for name in ("xy_cm", "z_cm")},
        }
