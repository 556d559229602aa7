"""The calibration that a rig states: of a rectified pair, or of one camera, which has no baseline."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stereovla.dataset_builder.dataset.schema import CALIBRATION_KEYS
from stereovla.dataset_builder.formats import plausibility

SHAPES = {"focal_length_px": (2,), "principal_point_px": (2,), "baseline_m": (), "transform_camera_to_base": (4, 4)}
LARGEST_PX = 16384  # side of a view
_LARGEST = 1e9  # of any number in the file


def numbers(value: Any, count: int, where: str, whole: bool = False) -> tuple:
    kinds = int if whole else int | float
    good = isinstance(value, list | tuple) and len(value) == count
    good = good and all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
    if not good or not all(-_LARGEST <= item <= _LARGEST for item in value):  # NaN is neither
        raise ValueError(f"{where} is {value!r}, expected {count} {'whole ' if whole else ''}numbers")
    return tuple(value) if whole else tuple(float(item) for item in value)


def unless(check: str) -> str:
    """The end of a message about what is not plausible."""
    return f"Where it is meant so, the rig says `accept: [{check}]`"


def read_calibration(content: Any, where: str, accept: Sequence[str], is_pair: bool) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r}, expected keys and values")
    keys = [key for key in CALIBRATION_KEYS if is_pair or key != "baseline_m"]
    known = ["size_px", *keys]
    for key in content:
        if key not in known:
            if key == "baseline_m":
                raise ValueError(f"{where} has a baseline_m, but cameras names no right view")
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{where} has no key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"it has {known}")
            )
    missing = [key for key in known if content.get(key) is None]
    if missing:
        why = (
            "without a calibration a pair says nothing about depth" if is_pair else "give all of them or no calibration"
        )
        raise ValueError(f"{where} lacks {', '.join(missing)}: {why}")
    values = dict(content)
    values["size_px"] = numbers(content["size_px"], 2, f"{where}: size_px", whole=True)
    if not all(1 <= side <= LARGEST_PX for side in values["size_px"]):
        raise ValueError(f"{where}: size_px is {content['size_px']}, expected 1 ... {LARGEST_PX} px")
    for key in keys:
        if not isinstance(content[key], str):
            values[key] = check_value(key, content[key], values["size_px"], where, accept)
    return values


def check_value(key: str, value: Any, size_px: tuple[int, int], where: str, accept: Sequence[str] = ()) -> np.ndarray:
    """One value of a calibration as float64 of its shape; ValueError says what cannot be, or is not plausible and not
    named in `accept`.
    """
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {key} is {value!r}, expected {SHAPES[key]} numbers") from error
    if array.shape != SHAPES[key] and array.size == np.prod(SHAPES[key], dtype=int):
        array = array.reshape(SHAPES[key])  # columns of a table are flat
    with np.errstate(over="ignore"):  # as it is stored
        finite = np.isfinite(array.astype(np.float32)).all()
    if array.shape != SHAPES[key] or not finite:
        raise ValueError(f"{where}: {key} is {value!r}, expected {SHAPES[key]} finite numbers")
    if key == "focal_length_px" and (array < 1).any():
        raise ValueError(f"{where}: {key} is {array.tolist()}, must be at least 1 px")
    if key == "baseline_m" and not 1e-3 <= array <= 1:
        hint = ": mm or cm for m?" if array > 1 else ""
        raise ValueError(f"{where}: {key} is {array.tolist()}, must be in 0.001 ... 1 m{hint}")
    if key == "principal_point_px" and not ((array >= 0) & (array <= size_px)).all():
        raise ValueError(f"{where}: {key} {array.tolist()} lies outside the view of {list(size_px)} px")
    if key == "transform_camera_to_base":
        rotation = array[:3, :3]
        rigid = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) and np.linalg.det(rotation) > 0
        if not rigid or not np.allclose(array[3], [0, 0, 0, 1]):
            raise ValueError(f"{where}: {key} is no rigid transform: {array.tolist()}")
        u, _, v = np.linalg.svd(rotation)  # digits that were rounded by hand are made orthogonal
        array[:3, :3] = u @ v
    if key in _PLAUSIBLE:
        check, find = _PLAUSIBLE[key]
        problem = None if check in accept else find(array, size_px)
        if problem:
            raise ValueError(f"{where}: {problem} {unless(check)}")
    return array


# key of the calibration: name of its check, and what finds its problem, or None, from value and size_px
_PLAUSIBLE: dict[str, tuple[str, Callable[[np.ndarray, tuple[int, int]], str | None]]] = {
    "focal_length_px": ("field_of_view", plausibility.focal_length_problem),
    "principal_point_px": ("principal_point", plausibility.principal_point_problem),
    "transform_camera_to_base": ("units", lambda transform, _: plausibility.camera_place_problem(transform)),
}
