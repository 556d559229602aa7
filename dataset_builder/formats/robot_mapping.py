"""A robot's own state and action vectors -> ours (see `schema`), and keyframes that the data does not name."""

from dataclasses import dataclass

import numpy as np

from stereovla.dataset_builder.formats.rig import Rig, Vector
from stereovla.processing.rotations import matrix_to_rpy, rpy_to_matrix

# Gripper readings overshoot their range a little (an encoder, a calibration): that much of the range is cut off, more
# is reported.
_GRIPPER_SLACK = 0.05


@dataclass(frozen=True)
class Motion:
    """One episode in our convention, float32: states (n, S), actions (n, A), keyframes (n, S); and what is wrong."""

    states: np.ndarray
    actions: np.ndarray
    keyframes: np.ndarray
    problems: list[str]


def map_motion(rig: Rig, states: np.ndarray, actions: np.ndarray | None) -> Motion:
    """The source's vectors (n, ...) -> `Motion`. `actions` is None where they follow from the states."""
    problems = _not_finite(states, "state") + ([] if actions is None else _not_finite(actions, "action"))
    if problems:
        return Motion(states, states if actions is None else actions, states, problems)
    if not rig.is_pose:
        last = np.repeat(states[-1:], len(states), axis=0)
        return Motion(*(array.astype(np.float32) for array in (states, actions, last)), [])
    problems += _indices(rig.state, states, "state")
    if actions is not None:
        problems += _indices(rig.action, actions, "action")
    if problems:
        return Motion(states, states, states, problems)
    tool = _transforms(np.array(rig.tool[:3])[None], np.array(rig.tool[3:])[None])[0]
    reported = _transforms(states[:, rig.state.position], states[:, rig.state.rpy])
    poses = reported @ tool
    opening, wrong = _gripper(rig.state, states)
    problems += [f"frame {frame}: the state's gripper is {value}" for frame, value in wrong]
    if rig.action.kind == "from_states":
        following = np.append(np.arange(1, len(states)), len(states) - 1)
        targets, command = poses[following], opening[following]
    else:
        change = _transforms(actions[:, rig.action.position], actions[:, rig.action.rpy])
        if rig.action.kind == "delta":  # of the reported frame: its origin moves by d, its axes turn by R(d)
            targets = reported.copy()
            targets[:, :3, :3] = change[:, :3, :3] @ reported[:, :3, :3]
            targets[:, :3, 3] += change[:, :3, 3]
            targets = targets @ tool
        else:
            targets = change @ tool
    if actions is not None:
        command, wrong = _gripper(rig.action, actions)
        problems += [f"frame {frame}: the action's gripper is {value}" for frame, value in wrong]
    turn = matrix_to_rpy(targets[:, :3, :3] @ np.swapaxes(poses[:, :3, :3], 1, 2))
    ours = np.concatenate([poses[:, :3, 3], matrix_to_rpy(poses[:, :3, :3]), opening[:, None]], axis=1)
    moves = np.concatenate([targets[:, :3, 3] - poses[:, :3, 3], turn, 2 * command[:, None] - 1], axis=1)
    ours, moves = ours.astype(np.float32), moves.astype(np.float32)
    return Motion(ours, moves, ours[next_keyframes(moves[:, 6])], problems)


def next_keyframes(command: np.ndarray) -> np.ndarray:
    """Frame of the next keyframe of every frame (n,): where the gripper's command (n,) next changes between open (above
    0.5) and closed (below -0.5), or else the last frame. A frame whose own command changes looks beyond it.
    """
    said = np.where(command > 0.5, 1, np.where(command < -0.5, -1, 0))
    held = said[np.maximum.accumulate(np.where(said != 0, np.arange(len(said)), 0))]  # 0 keeps what was said last
    changes = np.flatnonzero((held[1:] != held[:-1]) & (held[:-1] != 0)) + 1
    places = np.append(changes, len(command) - 1)
    return places[np.minimum(np.searchsorted(changes, np.arange(len(command)), side="right"), len(places) - 1)]


def _transforms(positions: np.ndarray, rpy: np.ndarray) -> np.ndarray:
    transforms = np.tile(np.eye(4), (len(positions), 1, 1))
    transforms[:, :3, :3] = rpy_to_matrix(rpy)
    transforms[:, :3, 3] = positions
    return transforms


def _gripper(vector: Vector, values: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """(opening (n,), 0 closed to 1 open; [(frame, what is wrong with it)])."""
    closed, opened = vector.gripper_closed_open
    raw = values[:, vector.gripper]
    opening = (raw.astype(np.float64) - closed) / (opened - closed)
    outside = np.flatnonzero((opening < -_GRIPPER_SLACK) | (opening > 1 + _GRIPPER_SLACK))
    text = f"outside of closed = {closed:g} ... open = {opened:g}"
    return np.clip(opening, 0, 1), [(int(frame), f"{raw[frame]:g}, {text}") for frame in outside]


def _not_finite(values: np.ndarray, name: str) -> list[str]:
    with np.errstate(over="ignore"):  # as they are stored
        bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(axis=1))
    return [f"frame {frame}: the {name} is {values[frame].tolist()}" for frame in bad]


def _indices(vector: Vector, values: np.ndarray, name: str) -> list[str]:
    highest = max([*(vector.position or ()), *(vector.rpy or ()), vector.gripper])
    if highest < values.shape[1]:
        return []
    return [f"the {name} has {values.shape[1]} numbers, index {highest} is asked for"]
