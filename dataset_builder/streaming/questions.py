"""What a training window is asked: action, depth, box, pose or camera, and the answers that need the ground truth.

Everything is drawn from a generator that is a function of (seed, epoch, episode, frame), so a resumed stream asks what
an uninterrupted one would have asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from stereovla.dataset_builder.dataset.schema import BASELINE, CALIBRATION_KEYS, SEGMENTATION

OBJECTIVES = ("action", "depth", "box", "pose", "camera")
PAPER_MIXTURE = {"action": 5.0, "depth": 2.0, "box": 2.0, "pose": 1.0}
# boxes and depths need their object in view, camera parameters a calibrated pair
ALWAYS_POSSIBLE = ("action", "pose")
_CANDIDATES = 32  # pixels of a region tried before it counts as having no depth


@dataclass(frozen=True)
class QuestionConfig:
    """Mixture of objectives; its weights need not sum to 1.

    Args:
        mixture: relative frequency per objective; an objective that is not named has weight 0.
        depth_points: where depth is asked: "interaction" = at what is seen of the target and the gripper (the paper's
            IRDE; a twelfth of the pixels one beside a gripper are not of it, and 25 cm behind), "uniform" = anywhere
            (its ablation), "off" = nowhere, whatever the mixture says.
        points_per_question: points per depth question.
        detection_failures: chance that a region is taken to be where it is not, as a detector of target and gripper
            can fail on real data: its point then lies anywhere with a depth. Each point draws anew.
    """

    mixture: Mapping[str, float] = field(default_factory=lambda: dict(PAPER_MIXTURE))
    depth_points: Literal["interaction", "uniform", "off"] = "interaction"
    points_per_question: int = 1
    detection_failures: float = 0.0

    def __post_init__(self):
        unknown = sorted(set(self.mixture) - set(OBJECTIVES))
        if unknown:
            raise ValueError(f"mixture names unknown objectives {unknown}; valid: {list(OBJECTIVES)}")
        if self.depth_points not in ("interaction", "uniform", "off"):
            raise ValueError(f"depth_points={self.depth_points!r}; valid: 'interaction', 'uniform', 'off'")
        if min(self.mixture.values(), default=0) < 0 or not any(self.asks(objective) for objective in OBJECTIVES):
            raise ValueError(
                f"mixture must be >= 0 with some > 0, got {dict(self.mixture)}; depth_points={self.depth_points!r}"
            )
        if self.points_per_question < 1:
            raise ValueError(f"points_per_question={self.points_per_question} must be at least 1")
        if not 0 <= self.detection_failures <= 1:
            raise ValueError(f"detection_failures={self.detection_failures} must be in [0, 1]")

    def asks(self, objective: str) -> bool:
        """Whether the mixture contains `objective`."""
        return self.mixture.get(objective, 0) > 0 and not (objective == "depth" and self.depth_points == "off")

    @property
    def only(self) -> str | None:
        """The single objective that is asked and that every window can answer, if so."""
        asked = [objective for objective in OBJECTIVES if self.asks(objective)]
        return asked[0] if len(asked) == 1 and asked[0] in ALWAYS_POSSIBLE else None


def window_generator(seed: int, epoch: int, episode_index: int, frame_index: int) -> np.random.Generator:
    """Generator of one window in one epoch; nothing else decides what it is asked."""
    return np.random.default_rng((seed, epoch, episode_index, frame_index))


def draw_objectives(config: QuestionConfig, rng: np.random.Generator, possible: Sequence[str], count: int) -> list[str]:
    """`count` objectives to ask about one frame, each with the weights of the mixture, and as different as these allow:
    they are drawn at equal distances (systematic sampling). None at all where the mixture has none of the `possible`.
    """
    names = [name for name in OBJECTIVES if name in possible and config.asks(name)]
    if not names:
        return []
    ends = np.cumsum([config.mixture[name] for name in names])
    places = (rng.random() + np.arange(count) / count) % 1.0
    return [names[int(number)] for number in np.searchsorted(ends, places * ends[-1], side="right")]


def depth_points(
    depth_m: np.ndarray,
    segmentation: np.ndarray | None,
    tool_px: np.ndarray,
    config: QuestionConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Points of a depth question, at pixels with known depth only.

    In the interaction region, each point first chooses among what is in view of target and gripper, then one of its
    pixels.

    Args:
        depth_m: (H, W) of the left view, 0 = unknown.
        segmentation: (H, W) uint8, only used for the interaction region.
        tool_px: (2,) projected tool centre in the left view, NaN = not in view; where nothing of the gripper is seen,
            or no mask says what, it stands for it. Between open fingers it is of what is behind them.

    Returns:
        Pixel centres (n, 2) (u, v) and depths (n,) m, float32; None when no pixel asked for has a depth.
    """
    # looking for all pixels with a depth costs more than the question itself
    known = np.argwhere(depth_m > 0) if config.depth_points == "uniform" or config.detection_failures else []
    if config.depth_points == "uniform":
        if not len(known):
            return None
        rows, columns = known[rng.integers(len(known), size=config.points_per_question)].T
        return _answers(depth_m, rows, columns)
    regions = _regions(segmentation, tool_px)
    rows, columns = [], []
    for _ in range(config.points_per_question):
        for number in rng.permutation(len(regions)):
            if len(known) and rng.random() < config.detection_failures:
                pixel = known[rng.integers(len(known))]
            else:
                pixel = _one_of(regions[number], depth_m, rng)
            if pixel is not None:
                rows.append(pixel[0])
                columns.append(pixel[1])
                break
        else:
            return None
    return _answers(depth_m, np.array(rows), np.array(columns))


def _regions(segmentation: np.ndarray, tool_px: np.ndarray) -> list[np.ndarray]:
    """Pixels (n, 2) (row, column) of what is seen of target and gripper; the tool centre's where nothing of the gripper
    is.
    """
    height, width = segmentation.shape
    target = np.argwhere(segmentation == SEGMENTATION["target"])
    gripper = np.argwhere(segmentation == SEGMENTATION["gripper"])
    if not len(gripper) and np.isfinite(tool_px).all():
        cell = np.floor(tool_px[::-1]).astype(int)
        gripper = np.clip(cell, 0, [height - 1, width - 1])[None]
    return [region for region in (target, gripper) if len(region)]


def _one_of(pixels: np.ndarray, depth_m: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    tried = pixels[rng.integers(len(pixels), size=_CANDIDATES)]
    tried = tried[depth_m[tried[:, 0], tried[:, 1]] > 0]
    return tried[0] if len(tried) else None


def _answers(depth_m: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = np.stack([columns, rows], axis=1).astype(np.float32) + np.float32(0.5)
    return points, depth_m[rows, columns].astype(np.float32)


def view_pixels(
    positions_m: np.ndarray,
    transforms: np.ndarray,
    focal_px: np.ndarray,
    principal_px: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    """Positions projected into the left views of their frames.

    Args:
        positions_m: (n, 3) in the base frame. transforms: (n, 4, 4) camera to base. focal_px, principal_px: (n, 2).
        size: (H, W) of the views.

    Returns:
        (n, 2) float32 (u, v), NaN where the point is behind the camera or outside of the view.
    """
    camera = np.einsum("nji,nj->ni", transforms[:, :3, :3], positions_m - transforms[:, :3, 3])
    z = np.where(camera[:, 2:] > 1e-6, camera[:, 2:], np.nan)
    pixels = camera[:, :2] / z * focal_px + principal_px
    inside = (pixels >= 0).all(axis=1) & (pixels < np.array(size[::-1])).all(axis=1)
    return np.where(inside[:, None], pixels, np.nan).astype(np.float32)


def possible_objectives(window: Mapping[str, Any]) -> list[str]:
    """What can be asked about a window, but for depth."""
    sides = [side for side in ("left", "right") if side in window]
    possible = [*ALWAYS_POSSIBLE]
    if np.isfinite(window["boxes"][: len(sides)]).all():
        possible.append("box")
    if "right" in sides and BASELINE in window:
        possible.append("camera")
    return possible


def called(names: Sequence[str], rng: np.random.Generator) -> list[str | None]:
    """What each of the objects `names` of a scene is called, at random its whole name or the fewest of its last words
    that no other one ends with: "cube" where there is one cube, as instructions do; None for names that several have.
    """
    words = [name.split() for name in names]
    chosen: list[str | None] = []
    for number, own in enumerate(words):
        others = words[:number] + words[number + 1 :]
        alone = [
            " ".join(own[-count:])
            for count in range(1, len(own) + 1)
            if not any(other[-count:] == own[-count:] for other in others)
        ]
        chosen.append((alone[0] if rng.random() < 0.5 else names[number]) if alone else None)
    return chosen


def questions_of(window: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A window for each question that is asked about its frame; depth map and names are carried by the first."""
    first = {key: value for key, value in window.items() if key != "further"}
    once = ("points_px", "depths_m", "depth", "names", "names_px")
    kept = {key: value for key, value in first.items() if key not in once}
    kept = {key: value for key, value in kept.items() if not key.startswith("depth.")}
    return [first, *({**kept, **question} for question in window.get("further", ()))]


def processor_arguments(windows: Sequence[Mapping[str, Any]], views: Sequence[str]) -> dict[str, Any]:
    """Windows -> keyword arguments of a processor's `__call__` for a training batch: `processor(**arguments)`.

    The window's text is the instruction for actions and poses and the object's name for boxes. Points and depth maps
    are handed on where the windows carry them.

    Args:
        views: `pixel_views` of the processor. Where "right" is not among them, `boxes` are those of the left view
            (1, 4).
    """
    sides = 2 if "right" in views else 1
    per_window = [
        {
            "images": views_of(window, views),
            "text": window["target"] if window["objective"] == "box" else window["task"],
            "state": window["state_history"],
            "embodiment": window["embodiment"],
            "objective": window["objective"],
            "actions": window["actions"],
            "action_mask": window["action_mask"],
            "keyframe_pose": window.get("keyframe_pose"),
            "keyframe_symmetry": window.get("keyframe_symmetry"),
            "boxes": window["boxes"][:sides],
            "points_px": window.get("points_px"),
            "depths_m": window.get("depths_m"),
            "calibration": calibration_of(window),
            # depth and camera questions do not say which object is the target
            "target_px": None if window["objective"] in ("depth", "camera") else window["points"][0],
            "gripper_px": window["points"][1],
            "destination_px": None if window["objective"] in ("box", "depth", "camera") else window["points"][2],
            "target_name": window["target"],
        }
        for window in windows
    ]
    arguments: dict[str, Any] = {key: [values[key] for values in per_window] for key in per_window[0]}
    for name in ("names", "names_px"):
        if any(name in window for window in windows):
            arguments[name] = [window.get(name) for window in windows]
    if any("depth" in window for window in windows):
        arguments["depth_map"] = [depth_of(window) for window in windows]
    return arguments | {"return_labels": True}


def views_of(window: Mapping[str, Any], views: Sequence[str]) -> dict[str, np.ndarray | None]:
    """Pictures of a window by the names of their views, None where one is absent."""
    return {view: window.get(view_key(view)) for view in views}


def view_key(view: str) -> str:
    """Key of a window that a view's picture has."""
    return view if view in ("left", "right") else f"view.{view}"


def depth_of(window: Mapping[str, Any]) -> np.ndarray | dict[str, np.ndarray | None] | None:
    """Depth of a window as processors take it: of the left view, or of several by their names; None = none."""
    others = {key.removeprefix("depth."): window[key] for key in window if key.startswith("depth.")}
    return {"left": window.get("depth"), **others} if others else window.get("depth")


def calibration_of(window: Mapping[str, Any]) -> dict[str, Any] | None:
    """The calibration of a window as processors take it; None where it has none."""
    return {key: window[f"calibration.{key}"] for key in CALIBRATION_KEYS if f"calibration.{key}" in window} or None
