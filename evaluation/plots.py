"""Plots of the report: loss curves, success bars with their intervals, error histograms."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.extras import extra
from stereovla.sources import InputError

with extra("report"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

INK, GREY, ACCENT = "#22303c", "#9aa5ae", "#d1495b"
POLICY_COLOURS = {"expert": "#3d6b8e", "trained": ACCENT, "served": "#8e5a3d", "untrained": GREY}
STYLE = {
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaed",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "figure.dpi": 130,
}
ERROR_TITLES = {
    "position_mm": "Action: position error of a step, mm",
    "target_depth_cm": "Depth answer at the target: error, cm",
    "left_iou": "Target box, left view: IoU",
    "keyframe_xy_cm": "Keyframe pose: horizontal error, cm",
    "disparity_px": "Disparity error, px",
}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """Figure in the house's style with rows * columns axes, in inches; nothing global is changed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.reshape(-1))


def entitle(axis: Any, title: str) -> None:
    """Bold, over the left end."""
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def read_losses(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{key: (steps, values)} of a training log with one JSON object per line: "step" and numbers such as "loss/action".

    A last line that was cut off is left out; a step that a resumed run repeats counts as it was logged last.
    """
    series: dict[str, dict[int, float]] = {}
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise InputError(f"{str(path)!r}, line {number}: no JSON ({error})") from error
        for key, value in entry.items():
            if key != "step" and isinstance(value, int | float) and np.isfinite(value):
                series.setdefault(key, {})[int(entry["step"])] = float(value)
    return {
        key: (np.array(sorted(points)), np.array([points[s] for s in sorted(points)])) for key, points in series.items()
    }


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and up to `reach` neighbours on either side; (N,) -> (N,)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def plot_losses(losses: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """One logarithmic panel per objective: raw values pale, smoothed strong, held-out dotted; then lr."""
    keys = sorted(key for key in losses if key.startswith("loss/"))
    if not keys:
        raise InputError(f"the training log has no key that begins with 'loss/'; it has {', '.join(sorted(losses))}")
    keys += [key for key in ("lr",) if key in losses]
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = new_figure(rows, columns, 3.6 * columns, 2.5 * rows)
    for axis, key in zip(axes, keys, strict=False):
        steps, values = losses[key]
        name = key.removeprefix("loss/")
        colour = GREY if key == "lr" else ACCENT
        if key == "lr":
            axis.plot(steps, values, color=colour, linewidth=1.8)
        else:
            axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            axis.plot(steps, smooth(values, len(values) // 50), color=colour, linewidth=1.8, label="training")
            if (held_out := losses.get(f"validation/{key}")) is not None:
                axis.plot(*held_out, "o-", color=INK, markersize=3, linewidth=1, label="held out")
            if (values > 0).all():
                axis.set_yscale("log")
                for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    formatted(lambda value, _: f"{value:g}")
                axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        entitle(axis, "learning rate" if key == "lr" else f"{name} loss")
        axis.set_xlabel("step")
    if f"validation/{keys[0]}" in losses:
        axes[0].legend(frameon=False, fontsize=8)
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    save(figure, path)


def plot_success(summaries: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Success rate of each policy in per cent with its 95 % interval."""
    figure, (axis,) = new_figure(1, 1, 1.6 + 1.5 * len(summaries), 3.4)
    for place, (name, summary) in enumerate(summaries.items()):
        rate, low, high = (100 * summary[key] for key in ("success_rate", "interval_low", "interval_high"))
        axis.bar(place, rate, width=0.6, color=POLICY_COLOURS.get(name, INK))
        axis.errorbar(place, rate, [[rate - low], [high - rate]], color=INK, capsize=4, linewidth=1.2)
        axis.annotate(f"{rate:.0f} %", (place, high), (0, 3), textcoords="offset points", ha="center", weight="bold")
    axis.set_xticks(
        range(len(summaries)), [f"{name}\n{summary['episodes']} seeds" for name, summary in summaries.items()]
    )
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("succeeded, %")
    entitle(axis, title)
    save(figure, path)


def plot_errors(histograms: Mapping[str, Mapping[str, Sequence[float]] | None], path: Path) -> None:
    """Histograms of the errors on held-out rows."""
    shown = {name: data for name, data in histograms.items() if data is not None}
    columns = min(3, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure, axes = new_figure(rows, columns, 3.6 * columns, 2.5 * rows)
    for axis, (name, data) in zip(axes, shown.items(), strict=False):
        counts = np.asarray(data["counts"])
        axis.stairs(100 * counts / counts.sum(), data["edges"], fill=True, color=ACCENT, alpha=0.85)
        entitle(axis, ERROR_TITLES[name])
        axis.set_ylabel("share, %")
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    save(figure, path)


def draw_delays(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Success and time to it against the latency, and success under disturbances, of the rows of delays.json."""
    figure, (over, time, bars) = new_figure(1, 3, 13, 3.6)
    series: dict[str, list[Mapping[str, Any]]] = {}
    first = rows[0]["model"]
    for row in rows:
        name = row["mode"].replace("_", "-") + ("" if row["model"] == first else f", {row['model']}")
        series.setdefault(name, []).append(row)
    colours = (GREY, "#3d6b8e", ACCENT, "#8e5a3d", "#5a8e3d")
    kinds = [row["delivery"].partition("-")[2] for row in next(iter(series.values()))]
    disturbed = [kind for kind in kinds if not kind.endswith("ms")]
    for number, (name, found) in enumerate(series.items()):
        colour = colours[number % len(colours)]
        late = [row for row in found if row["delivery"].endswith("ms")]
        places = [1000 * row["latency_s"] for row in late]
        over.plot(places, [100 * row["success_rate"] for row in late], "o-", color=colour, label=name)
        steps = [np.nan if row["mean_steps_to_success"] is None else row["mean_steps_to_success"] for row in late]
        time.plot(places, 0.1 * np.array(steps, float), "o-", color=colour)
        by_kind = {row["delivery"].partition("-")[2]: 100 * row["success_rate"] for row in found}
        width = 0.8 / len(series)
        shift = (number - (len(series) - 1) / 2) * width
        bars.bar(np.arange(len(disturbed)) + shift, [by_kind[kind] for kind in disturbed], width, color=colour)
    entitle(over, "Success, %")
    entitle(time, "Time to success, s")
    entitle(bars, "Success under disturbance, %")
    for axis in (over, time):
        axis.set_xlabel("latency, ms")
    for axis in (over, bars):
        axis.set_ylim(0, 100)
    time.set_ylim(bottom=0)
    bars.set_xticks(np.arange(len(disturbed)), disturbed)
    over.legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, path)
