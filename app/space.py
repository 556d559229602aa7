"""A look in space: the points that the model sees, the camera, the tool's way and the keyframe, in the base frame."""

import numpy as np
import plotly.graph_objects as go

from stereovla.app.drawing import ANSWERED, INK, POINTED, ramp
from stereovla.app.frames import Frame
from stereovla.app.look import Look, depth_seen, path_of
from stereovla.processing.camera_geometry import Calibration, unproject_points

MOST_POINTS = 6000  # of the cloud; more make the page slow
MOST_M = 3.0  # of depth; where the tool is known, this many times its own: a wall behind makes all else small
MOST_TIMES = 1.6
FRUSTUM_M = 0.08
HEIGHT_PX = 460


def draw_space(frame: Frame, look: Look, posed: bool) -> go.Figure | None:
    """None where nothing has a place: states that are no poses, and no calibration."""
    known = frame.calibration
    placed = known is not None and known.transform_camera_to_base is not None
    parts: list[go.Scatter3d] = []
    if placed and (depth := depth_seen(look, frame)) is not None:
        parts.append(_cloud(frame, look, depth, _reach(known, frame.states[-1]) if posed else MOST_M))
    if placed:
        parts.append(_camera(known, frame.views["left"].shape[:2]))
    if posed:
        parts += _way(frame, look)
    if not parts:
        return None
    figure = go.Figure(parts)
    axis = {"backgroundcolor": "rgba(0,0,0,0)", "gridcolor": "rgba(120,130,145,0.25)", "zeroline": False}
    figure.update_layout(
        height=HEIGHT_PX,
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        font={"color": "#64748b"},
        showlegend=False,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#94a3b8", "activecolor": "#0d9488"},
        scene={
            **{f"{name}axis": {**axis, "title": f"{name} (m)"} for name in "xyz"},
            "aspectmode": "data",
            "camera": {"eye": _eye(frame), "center": {"x": 0, "y": 0, "z": -0.15}},
            "dragmode": "turntable",
        },
        uirevision="kept",  # the reader's point of view stays where the next look is drawn
    )
    return figure


def _reach(calibration: Calibration, state: np.ndarray) -> float:
    """Depth in m up to which points are shown."""
    pose = calibration.transform_camera_to_base
    return min(MOST_M, MOST_TIMES * max(0.1, float((state[:3] - pose[:3, 3]) @ pose[:3, 2])))


def _eye(frame: Frame) -> dict[str, float]:
    """Where the reader looks from, in plotly's units: beside the camera, at the middle of the scene."""
    known = frame.calibration
    if known is None or known.transform_camera_to_base is None:
        return {"x": 1.1, "y": -1.1, "z": 0.9}
    pose = known.transform_camera_to_base
    way = -pose[:3, 2] + 0.55 * pose[:3, 0]
    return dict(zip("xyz", (1.15 * way / np.linalg.norm(way)).tolist(), strict=True))


def _cloud(frame: Frame, look: Look, depth: np.ndarray, most_m: float) -> go.Scatter3d:
    """Points of the processed left view in the colours of the source view."""
    geometry, rng = look.geometry, np.random.default_rng(0)
    v, u = np.indices(depth.shape)
    pixels = np.stack([u, v], axis=-1).reshape(-1, 2) + 0.5
    good = (depth.ravel() > 0) & (depth.ravel() < most_m) & geometry.shows(pixels)
    chosen = np.flatnonzero(good)
    if len(chosen) > MOST_POINTS:
        chosen = np.sort(rng.choice(chosen, MOST_POINTS, replace=False))
    seen = geometry.calibration(frame.calibration)
    points = unproject_points(pixels[chosen], depth.ravel()[chosen], seen)
    view = frame.views["left"]
    source = geometry.source_points(pixels[chosen]).astype(int).clip(0, [view.shape[1] - 1, view.shape[0] - 1])
    colours = [f"rgb({r},{g},{b})" for r, g, b in view[source[:, 1], source[:, 0]].tolist()]
    return _scatter(points, "what it sees", mode="markers", marker={"size": 2.2, "color": colours}, hoverinfo="skip")


def _camera(calibration: Calibration, size: tuple[int, int]) -> go.Scatter3d:
    """The left camera's frustum."""
    height, width = size
    corners = unproject_points([[0, 0], [width, 0], [width, height], [0, height]], [FRUSTUM_M] * 4, calibration)
    eye, gap = calibration.transform_camera_to_base[:3, 3], np.full(3, np.nan)
    lines = [point for corner in corners for point in (eye, corner, gap)] + [*corners, corners[0]]
    return _scatter(
        np.array(lines), "left camera", mode="lines", line={"color": "#64748b", "width": 3}, hoverinfo="skip"
    )


def _way(frame: Frame, look: Look) -> list[go.Scatter3d]:
    """The tool now, its way, and the keyframe."""
    path = path_of(frame.states[-1], look.actions)
    colours = [_css(colour) for colour in (INK, *ramp(len(path) - 1))]
    steps = [f"action {number}" if number else "now" for number in range(len(path))]
    found = [
        _scatter(
            path,
            "chunk",
            mode="lines+markers",
            line={"color": colours, "width": 6},
            marker={"size": 3.5, "color": colours},
            text=steps,
        ),
        _scatter(path[:1], "tool now", mode="markers", marker={"size": 7, "color": _css(INK)}),
    ]
    for place, name, colour in (
        (look.answered, "keyframe answered", ANSWERED),
        (look.pointed, "keyframe pointed at", POINTED),
    ):
        if place is not None:
            marker = {"size": 7, "color": _css(colour), "symbol": "diamond"}
            found.append(_scatter(np.asarray(place)[None, :3], name, mode="markers", marker=marker))
    return found


def _scatter(points: np.ndarray, name: str, **style) -> go.Scatter3d:
    x, y, z = np.round(points, 4).T
    return go.Scatter3d(x=x, y=y, z=z, name=name, **style)


def _css(colour: tuple[int, ...]) -> str:
    return f"rgb{tuple(colour)}"
