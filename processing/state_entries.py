"""What the numbers of a robot's state are, which of them make up a rotation, and the way from one state to another."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from .rotations import matrix_to_quaternion, matrix_to_rotation_vector, rpy_to_matrix, wrap_angle

# the numbers of a state that is a pose of the tool (m, rad, gripper opening), by how many they are
POSES = {7: ("x", "y", "z", "roll", "pitch", "yaw", "gripper"), 5: ("x", "y", "z", "yaw", "gripper")}
_ANGLES = ("roll", "pitch", "yaw")
_ANGLE = re.compile(rf"(?:(.*)[_.])?({'|'.join(_ANGLES)})")  # "left_yaw" is the yaw of "left"


def rotations_in(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Indices of the numbers that are a rotation: (roll, pitch, yaw) of each body, or (yaw,) of one that only turns
    about the vertical. Other angles, such as a joint's, are numbers: between two of them there is only one way.
    """
    bodies: dict[str, dict[str, int]] = {}
    for index, name in enumerate(names):
        if match := _ANGLE.fullmatch(name.lower()):
            bodies.setdefault(match[1] or "", {})[match[2]] = index
    groups = [tuple(body[angle] for angle in _ANGLES if angle in body) for body in bodies.values()]
    alone = {body["yaw"] for body in bodies.values() if len(body) == 1 and "yaw" in body}
    return tuple(group for group in groups if len(group) == 3 or group[0] in alone)


def rotations_of_states(
    state_names: Mapping[str, Sequence[str]] | None, embodiment: str, size: int
) -> tuple[tuple[int, ...], ...]:
    """`rotations_in` the state of a robot, `size` numbers: by its names, or as a pose where none are given for it."""
    names = (state_names or {}).get(embodiment)
    return rotations_in(POSES.get(size, ()) if names is None else names)


def begins_with_position(state_names: Mapping[str, Sequence[str]] | None, embodiment: str, size: int) -> bool:
    """Whether the first three numbers of a robot's state are the tool's x, y, z."""
    names = (state_names or {}).get(embodiment)
    return [name.lower() for name in (POSES.get(size, ()) if names is None else names)][:3] == ["x", "y", "z"]


def check_state_names(state_names: Mapping[str, Sequence[str]] | None, size: int) -> None:
    """ValueError if `state_names` are not {embodiment: as many different names as a state has numbers, or none}."""
    for embodiment, names in (state_names or {}).items():
        where = f"state_names[{embodiment!r}]"
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{where} is {names!r}; expected a list of names such as {list(POSES[7])}")
        if names and (len(names) != size or len(set(names)) != size):
            raise ValueError(
                f"{where} are {list(names)}; a state has {size} numbers, each needs a name of its own, or none has one "
                "([], a state without rotations)"
            )


def differences(targets: np.ndarray, states: np.ndarray, rotations: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The way from `states` to `targets`, both (..., D) in robot units: float64 (..., D).

    Numbers are subtracted. A rotation's three are the rotation vector d (rad, axis times angle, at most pi long, in the
    base frame) with R_target = R(d) R_state, as in an action; a single yaw's is the shorter way round.
    """
    way = np.asarray(targets, dtype=np.float64) - np.asarray(states, dtype=np.float64)
    for group in rotations:
        if len(group) == 1:
            way[..., group] = wrap_angle(way[..., group])
        else:
            now, then = (rpy_to_matrix(np.asarray(values)[..., group]) for values in (states, targets))
            way[..., group] = matrix_to_rotation_vector(then @ np.swapaxes(now, -1, -2))
    return way


def differences_and_turns(
    targets: np.ndarray, states: np.ndarray, rotations: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """`differences` (..., D) without the turns of the tool about its own axis, and these: float64 (..., rotations), rad
    in [-pi, pi).

    The turn d of a single yaw is all of its way. Of a rotation it is that of R_target = R(t) R_state Rz(d) whose rest,
    the rotation vector t (in the base frame), only tilts the tool: the tool's axis is z of its own frame. So a tool
    that is turned on by any angle about its axis has another d and the same t.
    """
    way = np.asarray(targets, dtype=np.float64) - np.asarray(states, dtype=np.float64)
    turns = []
    for group in rotations:
        if len(group) == 1:
            turns.append(wrap_angle(way[..., group[0]]))
            way[..., group] = 0.0
            continue
        now, then = (rpy_to_matrix(np.asarray(values)[..., group]) for values in (states, targets))
        relative = np.swapaxes(now, -1, -2) @ then
        quaternion = matrix_to_quaternion(relative)
        # the part of a rotation about z: its quaternion without x and y
        turn = wrap_angle(2 * np.arctan2(quaternion[..., 3], quaternion[..., 0]))
        back = rpy_to_matrix(np.stack([np.zeros_like(turn), np.zeros_like(turn), -turn], axis=-1))
        tilt = matrix_to_rotation_vector(relative @ back)
        way[..., group] = (now @ tilt[..., None])[..., 0]
        turns.append(turn)
    shape = (*way.shape[:-1], len(rotations))
    return way, np.stack(turns, axis=-1) if turns else np.zeros(shape)


def written_alike(poses: np.ndarray, rotations: Sequence[tuple[int, ...]], symmetry: int) -> np.ndarray:
    """Poses (..., D) as they are written where a tool turned by a `symmetry`-th (1 or 2) of a turn about its own axis
    is the same: of the equal ones that with the yaw in [-pi / symmetry, pi / symmetry), float64 (..., D).
    """
    poses = np.array(poses, dtype=np.float64)
    for group in rotations:
        yaw = poses[..., group[-1]]
        if symmetry == 1:
            poses[..., group[-1]] = wrap_angle(yaw)
            continue
        near = wrap_angle(2 * yaw) / 2
        if len(group) == 3:
            # Rz(yaw) Ry(pitch) Rx(roll) Rz(pi) = Rz(yaw + pi) Ry(-pitch) Rx(-roll)
            half_turns = np.round((near - yaw) / math.pi) % 2 == 1
            tilt = list(group[:-1])
            poses[..., tilt] = np.where(half_turns[..., None], -poses[..., tilt], poses[..., tilt])
        poses[..., group[-1]] = near
    return poses
