"""What must be true of an episode of any origin: its timestamps, its views, and that these are a rectified pair.

Every function returns the problems that it finds as lines of text that name the frame.

Imports and `check` judge the same data by the same functions: the episode as a dataset of ours stores it, timestamps in
float32 and views as they come out of their files, the one before it is written, the other after. So what an import
accepts, `check` accepts. An import that crops or resizes judges the whole views too: nobody can do so later.

Views may be misaligned on purpose (`simulation.WorldConfig`) or be known to be. A dataset says so in meta/info.json,
`vertical_misalignment_px`, and offsets are judged beyond that. The unit is one row of the views, whatever their height:
offsets cannot be measured to less. Renderings without anti-aliasing, drawn half a row apart, measure anything between 0
and 1 row, at 64 px and at 128 px alike.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.folders import INFO
from stereovla.dataset_builder.dataset.manifest import read_manifest
from stereovla.dataset_builder.dataset.schema import PAIR
from stereovla.processing.camera_geometry import StereoReport, measure_stereo_pair
from stereovla.untrusted import inside

# A step of two frame durations or more means that a frame is missing between; recorders jitter by less.
_GAP = 2.0
_RATE = 0.1  # the mean rate may be off by that share
PAIRS_PER_EPISODE = 3  # pairs that are matched: each takes 0.1 s at 960x540
# Matching runs twice: on small views, where offsets of dozens of rows are found, and on ones of up to this width, where
# a row is a row. A pair of a real ZED Mini of 960x540 px measures 0.15 rows there, and 2.15 shifted by two.
_FINE_WIDTH = 1280


def timestamp_problems(timestamps_s: np.ndarray, fps: float) -> list[str]:
    """Timestamps (n,) s, float32, that do not rise, leave out frames, or have another mean rate than `fps`."""
    bad = np.flatnonzero(~np.isfinite(timestamps_s))
    if len(bad):
        return [f"frame {frame}: the timestamp is {timestamps_s[frame]}" for frame in bad]
    steps = np.diff(np.asarray(timestamps_s, dtype=np.float64))
    problems = []
    for frame in np.flatnonzero((steps <= 0) | (steps >= _GAP / fps)):
        what = "does not rise" if steps[frame] <= 0 else f"leaps {steps[frame] * fps:.1f} frames ahead"
        before, after = timestamps_s[frame], timestamps_s[frame + 1]
        problems.append(f"frame {frame + 1}: the timestamp {what}, {before:.4f} s to {after:.4f} s")
    if len(steps) and not problems and abs(steps.mean() * fps - 1) > _RATE:
        problems.append(f"the timestamps run at {1 / steps.mean():.2f} Hz, expected {fps:g} Hz")
    return problems


def measure_pair(left: np.ndarray, right: np.ndarray, misalignment_px: float = 0.0) -> StereoReport:
    """The verdict on one pair of views, uint8 (h, w, 3) each, by matched patches: first coarse, then fine."""
    coarse = measure_stereo_pair(left, right, misalignment_px=misalignment_px)
    if coarse.status in ("identical", "swapped", "unrectified") or left.shape[1] <= 160:
        return coarse
    fine = measure_stereo_pair(left, right, working_width=_FINE_WIDTH, misalignment_px=misalignment_px)
    return coarse if fine.status == "unknown" else fine


def pair_problems(pairs: Mapping[int, Sequence[np.ndarray]], misalignment_px: float = 0.0) -> tuple[list[str], bool]:
    """Problems of some pairs {frame: (left, right)} of one episode, and whether any of them could be judged. The views
    of a pair may lie `misalignment_px` rows apart.

    A single pair can mislead (a mirror, a hand before one lens), so a verdict counts where at least half of the pairs
    that can be judged agree on it.
    """
    reports = {frame: measure_pair(*pair, misalignment_px) for frame, pair in pairs.items()}
    judged = {frame: report for frame, report in reports.items() if report.status != "unknown"}
    problems = []
    for status in ("identical", "swapped", "unrectified"):
        frames = [frame for frame, report in judged.items() if report.status == status]
        if 2 * len(frames) >= len(judged):
            problems += [f"frame {frame}: {_words(judged[frame])}" for frame in frames]
    return problems, bool(judged)


def _words(report: StereoReport) -> str:
    if report.status == "identical":
        return "the left and the right view are the same image"
    if report.status == "swapped":
        return (
            f"left and right are swapped: {report.negative_disparities:.0%} of {report.matches} matches have a "
            f"negative disparity (median {report.disparity_px:.1f} px)"
        )
    return (
        f"the views are not rectified: matching points lie {report.vertical_offset_px:.1f} rows apart "
        f"(median of {report.matches} matches), at most {report.vertical_limit_px:.1f} are allowed"
    )


def chosen_frames(length: int) -> list[int]:
    """The frames of an episode whose pairs are matched: first, middle, last."""
    return sorted(set(np.linspace(0, length - 1, PAIRS_PER_EPISODE).round().astype(int).tolist()))


def view_problems(images: Mapping[int, Sequence[bytes]], misalignment_px: float) -> tuple[list[str], bool]:
    """`pair_problems` of stored views: {frame: files of left and right} of `chosen_frames`."""
    problems, pairs = [], {}
    for frame, files in images.items():
        views = [shards.decode_image(key, data) for key, data in zip(PAIR, files, strict=True)]
        if views[0].shape != views[1].shape:
            problems.append(f"frame {frame}: the left view is {views[0].shape}, the right one {views[1].shape}")
        else:
            pairs[frame] = views
    found, judged = pair_problems(pairs, misalignment_px)
    return problems + found, judged


def dataset_problems(folder: Path) -> list[str]:
    """Problems of all episodes of a dataset folder of ours, whose shards can be read: one line each."""
    info = shards.read_json(folder / INFO)
    problems = []
    for entry in read_manifest(folder):
        table = shards.read_table(inside(folder, entry["path"]))
        episodes, times = shards.numbers(table, "episode_index"), shards.numbers(table, "timestamp")
        for start in np.flatnonzero(np.diff(episodes, prepend=-1)):
            part = times[start : start + (episodes == episodes[start]).sum()]
            rows = {frame: table.slice(int(start) + frame, 1).to_pylist()[0] for frame in chosen_frames(len(part))}
            found = timestamp_problems(part, info["fps"])
            if PAIR[1] in table.column_names:
                images = {frame: [row[key]["bytes"] for key in PAIR] for frame, row in rows.items()}
                found += view_problems(images, info["vertical_misalignment_px"])[0]
            problems += [f"{entry['path']}: episode {episodes[start]}, {problem}" for problem in found]
    return problems
