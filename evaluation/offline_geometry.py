"""What a policy's geometry is good for: actions and keyframes, and of a depth expert its depth, with what it sees and
with others in its place (`shown_geometry`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from stereovla.evaluation.shown_geometry import controls, shown

ACTION_ERRORS = ("position_mm", "rotation_deg")
POINTED_ERRORS = ("pointed_xy_cm", "pointed_z_cm")


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


def observations(rows: Sequence[HeldOutRow], others: Sequence[HeldOutRow | None] | None = None) -> list[Observation]:
    """What a policy is told of rows, and of those of another scene for each."""
    seconds = [None] * len(rows) if others is None or None in others else observations(others)
    return [
        Observation(
            slot=0,
            seed=row.episode,
            step=row.frame,
            instruction=row.task,
            embodiment=row.embodiment,
            states=row.states,
            left=row.left,
            right=row.views.get("right"),
            views={name: view for name, view in row.views.items() if name not in ("left", "right")},
            depths=row.depths,
            calibration=row.calibration,
            another=second,
        )
        for row, second in zip(rows, seconds, strict=True)
    ]


def predicted_errors(
    policy: ModelPolicy, rows: Sequence[HeldOutRow], others: Sequence[HeldOutRow | None] | None = None
) -> dict[str, Any]:
    """As `metrics.action_errors`, of the policy's chunks for rows, and what its pointers tell with them, as
    `position_errors`, under POINTED_ERRORS; of one prediction.
    """
    with told_displacements(policy.model) as ways:
        predicted = np.stack(policy.act(observations(rows, others)))
    steps = min(predicted.shape[1], rows[0].plan.shape[0])
    truth = np.stack([row.plan[:steps] for row in rows])
    valid = np.arange(steps) < np.array([[row.plan_length] for row in rows])
    errors: dict[str, Any] = metrics.action_errors(predicted[:, :steps], truth, valid)
    if ways:
        told = position_errors(policy.processor, rows, ways[0])
        errors |= {f"pointed_{name}": values for name, values in told.items()}
    return errors


@contextmanager
def showing(policy: ModelPolicy, name: str) -> Iterator[None]:
    """Within, the policy's geometry is shown what `name` says."""
    before, policy.shown = policy.shown, name
    try:
        yield
    finally:
        policy.shown = before


class GeometryEvaluation:
    """Of a policy that has geometry, batch by batch."""

    def __init__(self, policy: ModelPolicy):
        self.policy, self.model, self.processor = policy, policy.model, policy.processor
        self.collected = {name: Collected() for name in ("given", *controls(policy.model.config))}

    def add(self, rows: Sequence[HeldOutRow], others: Sequence[HeldOutRow | None], given: Mapping[str, Any]) -> None:
        """Rows, another scene for each, without which nothing is swapped, and their `predicted_errors`."""
        for name, collected in self.collected.items():
            if name == "swapped" and None in others:
                continue
            errors = given
            if name != "given":
                with showing(self.policy, name):
                    errors = predicted_errors(self.policy, rows, others)
            collected.add(**{key: errors[key] for key in (*ACTION_ERRORS, *POINTED_ERRORS) if key in errors})
            if getattr(self.model.config, "depth_config", None) is not None and any(row.depths for row in rows):
                self.depth_maps(name, rows, others)

    def inputs(self, rows: Sequence[HeldOutRow]) -> Any:
        """A DepthVLA's batch for an action, with depth maps of the processed views where any row has some."""
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

    @torch.inference_mode()
    def depth_maps(self, name: str, rows: Sequence[HeldOutRow], others: Sequence[HeldOutRow | None]) -> None:
        inputs = self.inputs(rows)
        truth = inputs["depth_map"] if self.policy.needs_depth else inputs.pop("depth_map")
        with shown(self.model, name, inputs, self.inputs(others) if name == "swapped" else None) as given:
            predicted = self.model(**given, output_depth=True).depth.float().cpu().numpy()
        # a stereo depth expert gives the depth of the first view alone
        for place, view in enumerate(self.model.config.views[: predicted.shape[1]]):
            true = truth[:, place].cpu().numpy()
            sums = metrics.depth_map_sums(predicted[:, place], true, self.model.config.silog_lambda)
            self.collected[name].add(**{f"{view}/{key}": values for key, values in sums.items()})

    def report(self) -> dict[str, Any]:
        """{what was shown: {"action", "keyframe": {error: summary or None}, and of a depth expert "depth_map": {view:
        errors or None}}}.
        """
        return {name: self.of(collected) for name, collected in self.collected.items()}

    def of(self, data: Collected) -> dict[str, Any]:
        report: dict[str, Any] = {
            "action": {name: metrics.summary(data.array(name)) for name in ACTION_ERRORS},
            "keyframe": {name.removeprefix("pointed_"): metrics.summary(data.array(name)) for name in POINTED_ERRORS},
        }
        if getattr(self.model.config, "depth_config", None) is not None:
            keys = ("relative", "squared", "right", "pixels", "l_si")
            report["depth_map"] = {
                view: metrics.depth_map_errors({key: data.array(f"{view}/{key}") for key in keys})
                for view in self.model.config.views
            }
        return report
