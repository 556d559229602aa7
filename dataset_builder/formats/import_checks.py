"""Everything that is wrong with an episode that is to be imported, each problem named with its frame."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.episode_checks import (
    chosen_frames,
    pair_problems,
    timestamp_problems,
    view_problems,
)
from stereovla.dataset_builder.formats import plausibility
from stereovla.dataset_builder.formats.rig import Rig
from stereovla.dataset_builder.formats.rig_calibration import SHAPES, check_value
from stereovla.dataset_builder.formats.robot_mapping import Motion, map_motion
from stereovla.dataset_builder.formats.source import EpisodeError, Source, SourceEpisode
from stereovla.dataset_builder.formats.video import VideoError


@dataclass(frozen=True)
class Finding:
    """What the check of one episode found."""

    episode: str
    problems: list[str]
    state_dim: int = 0
    action_dim: int = 0
    judged: bool = True  # False: no pair has enough structure to be matched
    cut: int = 0  # frames at the end that were left out, as was asked
    sizes_px: dict[str, list[int]] = field(default_factory=dict)  # of the views, [width, height] before crop and resize


def check_episode(source: Source, rig: Rig, name: str) -> Finding:
    """Read and decode one episode, and name everything that is wrong with it."""
    try:
        episode = source.read(name)
    except EpisodeError as error:
        return Finding(name, [str(error)])
    times = np.asarray(episode.timestamps_s, dtype=np.float32)  # as they are stored
    problems = [*episode.problems, *timestamp_problems(times, source.fps)]
    if times[0] < 0:
        problems.append(f"frame 0: the timestamp is {times[0]:.4f} s, expected 0 or more: from the episode's start")
    problems += [f"frame {frame}: there is no instruction" for frame, t in enumerate(episode.tasks) if not t.strip()]
    calibration = _calibration_problems(rig, episode)
    motion = map_motion(rig, episode.states, episode.actions)
    problems += calibration + motion.problems
    if not calibration and not motion.problems:
        problems += _motion_problems(rig, episode, motion, source.fps)
    found, judged, sizes_px = _picture_problems(source, rig, name, episode)
    sizes = (motion.states.shape[1], motion.actions.shape[1])
    return Finding(name, problems + found, *sizes, judged, episode.cut, sizes_px)


def _motion_problems(rig: Rig, episode: SourceEpisode, motion: Motion, fps: float) -> list[str]:
    """What is not plausible of poses and actions: units, kinds, and a tool that the camera does not see."""
    if not rig.is_pose:
        return []
    problems: list[str] = []
    if "units" not in rig.accept:
        vectors = [("state", rig.state, episode.states)]
        if rig.action.kind == "absolute":
            vectors.append(("action", rig.action, episode.actions))
        for name, vector, values in vectors:
            positions, angles = values[:, vector.position], values[:, vector.rpy]
            problems += plausibility.pose_problems(name, positions, angles)
        problems = problems or plausibility.step_problems(motion.actions[:, :6])
        if rig.action.kind == "delta":
            problems = problems or plausibility.delta_problems(motion.states[:, :6], motion.actions[:, :6], fps)
    if rig.calibration and "camera_pose" not in rig.accept and not problems:
        calibration = {
            key: np.reshape(episode.calibration[key], (len(motion.states), *shape))
            for key, shape in SHAPES.items()
            if key != "baseline_m"
        }
        problems += filter(None, [plausibility.view_of_tool_problem(motion.states[:, :3], calibration, rig.size_px)])
    return problems


def _calibration_problems(rig: Rig, episode: SourceEpisode) -> list[str]:
    """Problems of those calibrations that differ from the frame before."""
    if not rig.calibration:
        return []
    problems, before = [], None
    for frame in range(len(episode.timestamps_s)):
        given = {key: values[frame] for key, values in episode.calibration.items()}
        if before is not None and all(np.array_equal(given[key], before[key]) for key in given):
            continue
        before, where = given, f"frame {frame}"
        try:
            checked = {key: check_value(key, value, rig.size_px, where, rig.accept) for key, value in given.items()}
        except ValueError as error:
            problems.append(str(error))
            continue
        point = rig.moved(checked)["principal_point_px"]
        if not ((point >= 0) & (point <= rig.stored_size_px)).all():
            problems.append(
                f"{where}: after crop_px and resize_px, the principal point {point.tolist()} lies outside the view of "
                f"{list(rig.stored_size_px)} px"
            )
    return problems


def _picture_problems(
    source: Source, rig: Rig, name: str, episode: SourceEpisode
) -> tuple[list[str], bool, dict[str, list[int]]]:
    """Problems of the pictures, all of which are decoded; whether a pair could be judged, or there is none; and the
    sizes of the views.
    """
    problems: list[str] = []
    sizes_px: dict[str, list[int]] = {}
    taken, stored = {}, {}  # some pairs as they were taken, and as the files that will be written
    length = len(episode.timestamps_s)
    chosen = chosen_frames(length)
    try:
        for frame, images in enumerate(source.pictures(name, episode)):
            try:
                views = {view: rig.part(image, view) for view, image in images.items() if image is not None}
                if found := _size_problems(rig, views, sizes_px):
                    problems += [f"frame {frame}: {problem}" for problem in found]
                elif frame in chosen:
                    made = {view: rig.stored(part, view) for view, part in views.items()}
                    if rig.is_pair:
                        taken[frame] = [views[side] for side in ("left", "right")]
                        stored[frame] = [shards.encode_image(schema.LEFT, made[side]) for side in ("left", "right")]
            except ValueError as error:  # a part or crop that does not lie within
                problems.append(f"frame {frame}: {error}")
    except VideoError as error:
        return [*problems, str(error)], True, sizes_px
    if not rig.is_pair:
        return problems, True, sizes_px
    found, judged = view_problems(stored, rig.stored_misalignment_px)
    if (rig.crop_px or rig.resize_px) and not found:  # the whole views show more
        found, more = pair_problems(taken, rig.vertical_misalignment_px)
        found, judged = [f"{line}, before crop and resize" for line in found], judged or more
    return problems + found, judged or not stored, sizes_px


def _size_problems(rig: Rig, views: Mapping[str, np.ndarray], sizes_px: dict[str, list[int]]) -> list[str]:
    """Of the views of a frame beside the calibration's size, or else that of the first frame; adds to `sizes_px`."""
    problems = []
    for view, part in views.items():
        width, height = part.shape[1], part.shape[0]
        calibrated = rig.size_px if view in ("left", "right") else None
        first = sizes_px.setdefault(view, [width, height])
        expected = calibrated or tuple(first)
        if (width, height) != expected:
            of = "the calibration is of" if calibrated else "before it was"
            problems.append(f"the {view} view is {width}x{height} px, {of} {expected[0]}x{expected[1]} px")
    return problems


def equal_sizes(findings: dict[str, Finding]) -> dict[str, Finding]:
    """A problem for every episode whose vectors or views have other sizes than those of the first good one."""
    first = next((f for f in findings.values() if not f.problems), None)
    seen: dict[str, tuple[list[int], str]] = {}
    for name, finding in findings.items():
        if finding.problems:
            continue
        sizes, expected = (finding.state_dim, finding.action_dim), (first.state_dim, first.action_dim)
        problems = []
        if sizes != expected:
            problems.append(f"state and action have {sizes} numbers, those of {first.episode} {expected}")
        for view, size in finding.sizes_px.items():
            known, episode = seen.setdefault(view, (size, name))
            if size != known:
                problems.append(
                    f"the {view} view is {size[0]}x{size[1]} px, that of {episode} {known[0]}x{known[1]} px"
                )
        if problems:
            findings[name] = replace(finding, problems=problems)
    return findings
