"""Where a policy's pointers look, and where they say that the next keyframe is: what its action expert is told, beside
what it answers in words.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from stereovla.evaluation.held_out import HeldOutRow


@contextmanager
def noted(module: Any, noting: Callable[[Any], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Within, what `noting` makes of each output of the module is kept, on the CPU; nothing where there is none."""
    kept: list[torch.Tensor] = []
    if module is None:
        yield kept
        return
    hook = module.register_forward_hook(lambda _, inputs, output: kept.append(noting(output).cpu()))
    try:
        yield kept
    finally:
        hook.remove()


def told_displacements(model: Any) -> AbstractContextManager[list[torch.Tensor]]:
    """Within, what the pointers tell the action expert of the way to the keyframe is noted, (B, pose_dim) each time;
    nothing where the model has none.
    """
    return noted(model.pointers, lambda said: said.displacement.float())


def pointing_maps(model: Any) -> AbstractContextManager[list[torch.Tensor]]:
    """Within, where the pointers look is noted: (B, P, grid, grid) each time, for each of `Pointers.names` the shares
    of the visual tokens of the processed left view, which sum to 1; nothing where the model has none.
    """
    pointers = model.pointers
    return noted(pointers, lambda said: said.logits.float().softmax(-1).unflatten(-1, (pointers.grid, pointers.grid)))


def way_in_metres(processor: Any, way: np.ndarray, embodiment: str) -> np.ndarray:
    """(3,) m from the tool to the keyframe that the pointers tell, (pose_dim,) of `told_displacements`."""
    # differences of normalised values are those of robot units times this
    scale = processor.normalizer.scale(np.ones(processor.state_dim), embodiment, "state")[:3]
    return np.divide(way[:3], scale, out=np.zeros(3), where=scale > 0)


def position_errors(processor: Any, rows: Sequence[HeldOutRow], ways: torch.Tensor) -> dict[str, list[float]]:
    """{"xy_cm", "z_cm"}: errors of the keyframe's position of the rows that have one.

    Args:
        ways: (B, pose_dim) of `told_displacements`.
    """
    errors: dict[str, list[float]] = {"xy_cm": [], "z_cm": []}
    for row, way in zip(rows, ways.double().numpy(), strict=True):
        if row.keyframe_pose is None:
            continue
        metres = way_in_metres(processor, way, row.embodiment)
        error = 100 * (metres - (row.keyframe_pose[:3] - row.states[-1, :3]))
        errors["xy_cm"].append(float(np.linalg.norm(error[:2])))
        errors["z_cm"].append(abs(float(error[2])))
    return errors
