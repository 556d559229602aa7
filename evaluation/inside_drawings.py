"""The pictures of a look inside a policy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.evaluation.held_out import HeldOutRow
from stereovla.evaluation.inside import STREAMS, Answer, Geometry, Looks, colours_of, pixel_of
from stereovla.evaluation.plots import ACCENT, GREY, INK, entitle, new_figure, save

COLOURS = dict(zip(STREAMS, ("#3d6b8e", "#9bbcd1", ACCENT, "#8e5a3d", GREY), strict=True))
TRUE, POINTED, WRITTEN, CHUNK = "#3fae6a", ACCENT, "#7c3aed", "#facc15"
STRIP = 6  # frames of an episode that are drawn


def draw_attention(shares: np.ndarray, rows: int, path: Path) -> None:
    """`Looks.shares`, a mean over so many rows, by layer."""
    figure, (axis,) = new_figure(1, 1, 7.0, 0.9 + 0.42 * len(shares))
    left = np.zeros(len(shares))
    for stream, values in zip(STREAMS, shares.T, strict=True):
        if not values.any():
            continue
        axis.barh(range(len(shares)), values, left=left, color=COLOURS[stream], label=stream)
        for layer, value in enumerate(values):
            if value > 0.05:
                place = left[layer] + value / 2
                axis.text(place, layer, f"{100 * value:.0f} %", ha="center", va="center", color="white", fontsize=8)
        left += values
    axis.set_yticks(range(len(shares)), [f"layer {number + 1}" for number in range(len(shares))])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.grid(False)
    axis.set_xlabel(f"share of the action tokens' attention, mean over {rows} held-out frames", color=INK)
    axis.legend(ncols=len(STREAMS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    save(figure, path)


def draw_features(rows: Sequence[HeldOutRow], looks: Looks, path: Path) -> None:
    """Beside each left view: geometric and semantic features in three colours, and where actions and pointers look."""
    columns = {"left view": [row.left for row in rows]}
    for title, features in (("geometry", looks.geometry), ("semantics", looks.semantics)):
        if features is not None:
            columns[title] = list(colours_of(features))
    columns["actions look"] = [overlaid(*pair) for pair in zip(rows, looks.on_picture, strict=True)]
    if looks.on_depth is not None:
        columns["and at depth"] = [overlaid(*pair) for pair in zip(rows, looks.on_depth, strict=True)]
    if looks.pointed is not None:
        for name, maps in looks.pointed.items():
            columns[f"{name} pointer"] = [overlaid(*pair) for pair in zip(rows, maps, strict=True)]
    figure, axes = new_figure(len(rows), len(columns), 2.0 * len(columns), 0.3 + 2.0 * len(rows))
    for number, (title, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            axis = axes[row * len(columns) + number]
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                entitle(axis, title)
    save(figure, path)


def overlaid(row: HeldOutRow, share: np.ndarray) -> np.ndarray:
    """The left view, dark but where `share` (grid, grid) is large."""
    height, width = row.left.shape[:2]
    v, u = (np.minimum((np.arange(n) * g) // n, g - 1) for n, g in zip((height, width), share.shape, strict=True))
    light = share[np.ix_(v, u)] / max(float(share.max()), 1e-9)
    return row.left / 255 * (0.2 + 0.8 * np.sqrt(light)[..., None])  # the root, so that a little is seen too


def draw_geometry(found: Sequence[Geometry], path: Path) -> None:
    """Pictures, true and predicted depth or disparity, and the error."""
    figure, axes = new_figure(len(found), 4, 8.4, 0.3 + 2.1 * len(found))
    for number, one in enumerate(found):
        known = one.true > 0
        low, high = np.quantile(one.true[known], [0.02, 0.98]) if known.any() else (0.0, 1.0)
        error = np.where(known, np.abs(one.predicted - one.true), np.nan)
        if one.unit == "m":
            error /= np.where(known, one.true, 1)
            told, worst = f"error, mean {100 * np.nanmean(error):.1f} %", 0.2
        else:
            told, worst = f"error, median {np.nanmedian(error):.2f} px", 3.0
        panels: tuple[tuple[str, np.ndarray, dict[str, Any]], ...] = (
            ("left view", one.view, {}),
            (
                f"true, {low:.2f} to {high:.2f} {one.unit}",
                np.where(known, one.true, np.nan),
                {"vmin": low, "vmax": high},
            ),
            ("predicted", one.predicted, {"vmin": low, "vmax": high}),
            (told if known.any() else "nothing known", error, {"vmax": worst, "cmap": "magma"}),
        )
        for axis, (title, picture, options) in zip(axes[4 * number : 4 * number + 4], panels, strict=True):
            axis.imshow(picture, **({"vmin": 0} | options if options else {}))
            axis.set_axis_off()
            entitle(axis, title)
    save(figure, path)


def show_view(axis: Any, row: HeldOutRow) -> None:
    """The left view, in its own pixels, whose corner is at 0."""
    height, width = row.left.shape[:2]
    axis.imshow(row.left, extent=(0, width, height, 0))
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    axis.set_axis_off()


def mark(axis: Any, position: np.ndarray | None, row: HeldOutRow, marker: str, colour: str) -> None:
    """A position (3,) m, where it is seen."""
    if position is not None and np.isfinite(pixel := pixel_of(position, row.calibration)).all():
        axis.plot(*pixel, marker, color=colour, markersize=9, markeredgecolor="white", markeredgewidth=1.2)


def draw_box(axis: Any, box: np.ndarray | None, colour: str) -> None:
    if box is not None and np.isfinite(box).all():
        left, top, right, bottom = box
        axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=colour, linewidth=1.8)


def draw_answers(rows: Sequence[HeldOutRow], answers: Sequence[Answer], path: Path) -> None:
    """Left views with boxes, keyframes and the chunk of actions, and what was answered about depth."""
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = new_figure(lines, columns, 3.4 * columns, 0.4 + 4.0 * lines)
    for axis, row, found in zip(axes, rows, answers, strict=False):
        show_view(axis, row)
        draw_box(axis, None if row.boxes_px is None else row.boxes_px[0], TRUE)
        draw_box(axis, found.box, ACCENT)
        way = np.stack([pixel_of(position, row.calibration) for position in found.chunk])
        axis.plot(*way.T, "-", color=CHUNK, linewidth=2)
        mark(axis, None if row.keyframe_pose is None else row.keyframe_pose[:3], row, "o", TRUE)
        mark(axis, found.pointed, row, "D", POINTED)
        mark(axis, found.written, row, "s", WRITTEN)
        entitle(axis, row.task)
        told = [
            f"depth of the {name}: {'no number' if np.isnan(depth) else f'{depth:.2f} m'}, true "
            f"{row.depth_at(row.points_px[name]):.2f} m"
            for name, depth in found.depths.items()
        ]
        axis.text(0, 1.01 * row.left.shape[0], "\n".join(told), fontsize=8, va="top")
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    save(figure, path)


def times_of(rows: Sequence[HeldOutRow]) -> tuple[np.ndarray, str]:
    """When they were seen in their episode, and the unit: numbers of frames where the data does not say the time."""
    if any(row.time_s is None for row in rows):
        return np.array([row.frame for row in rows]), "frames"
    return np.array([row.time_s for row in rows]), "s"


def draw_strip(rows: Sequence[HeldOutRow], answers: Sequence[Answer], path: Path) -> None:
    """Frames through an episode with the true keyframe and the one that the pointers tell."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, STRIP).round().astype(int))
    figure, axes = new_figure(1, len(chosen), 2.2 * len(chosen), 2.6)
    times, unit = times_of(rows)
    for axis, number in zip(axes, chosen, strict=True):
        row = rows[number]
        show_view(axis, row)
        mark(axis, None if row.keyframe_pose is None else row.keyframe_pose[:3], row, "o", TRUE)
        mark(axis, answers[number].pointed, row, "D", POINTED)
        entitle(axis, f"{times[number]:.4g} {unit}, {row.target}")
    save(figure, path)


def draw_keyframe(rows: Sequence[HeldOutRow], answers: Sequence[Answer], path: Path) -> None:
    """The keyframe through an episode, true and as the pointers tell it, the tool, and the error."""
    times, unit = times_of(rows)
    nowhere = np.full(3, np.nan)
    true = np.stack([nowhere if row.keyframe_pose is None else row.keyframe_pose[:3] for row in rows])
    told = np.stack([nowhere if found.pointed is None else found.pointed for found in answers])
    tool = np.stack([row.states[-1, :3] for row in rows])
    figure, axes = new_figure(1, 4, 13, 2.8)
    for number, (axis, name) in enumerate(zip(axes, "xyz", strict=False)):
        axis.plot(times, tool[:, number], color=GREY, linewidth=1.2, label="tool")
        axis.plot(times, true[:, number], color=TRUE, linewidth=2, label="keyframe")
        axis.plot(times, told[:, number], "D", color=POINTED, markersize=3.5, label="as the pointers tell it")
        entitle(axis, f"{name}, m")
        axis.set_xlabel(unit)
    error = 100 * (told - true)
    axes[3].plot(times, np.linalg.norm(error[:, :2], axis=1), color=ACCENT, label="in the plane")
    axes[3].plot(times, np.abs(error[:, 2]), color=INK, label="in height")
    axes[3].set_ylim(bottom=0)
    axes[3].set_xlabel(unit)
    entitle(axes[3], "error, cm")
    for axis in (axes[0], axes[3]):
        axis.legend(frameon=False, fontsize=8)
    save(figure, path)
