"""One episode of a dataset in the Rerun viewer: what the cameras saw, where they and the tool were, what was done.

Poses are drawn in the base frame under /world, z up; where the calibration is known, pictures, boxes and depth hang at
their camera, so that depth is a cloud of points. Pictures and depth are the files of the dataset as they are.
"""

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.shards import decode_image
from stereovla.dataset_builder.streaming.episodes import read_episode
from stereovla.extras import extra
from stereovla.processing.rotations import rpy_to_matrix
from stereovla.processing.state_entries import POSES
from stereovla.untrusted import open_image

with extra("app"):
    import rerun as rr
    import rerun.blueprint as rrb

FRAME, TIME = "frame", "time"
TARGET, DONE, PLAN, KEYFRAME = (230, 80, 60), (40, 110, 160), (240, 170, 50), (150, 90, 190)
CLASSES = {number: name for name, number in schema.SEGMENTATION.items()}
AXIS_M, FRUSTUM_M, LINE_M, POINT_M = 0.05, 0.12, 0.002, 0.008  # as drawn


@dataclass
class ViewOptions:
    """Shows an episode in the Rerun viewer: views, depth, cameras, the tool's path, actions, boxes, keyframes and the
    instruction.

    stereovla data view DATASET --split validation --episode 3
    stereovla data view DATASET --save episode.rrd

    --save needs no screen; `rerun episode.rrd` shows the file on a machine that has one.
    """

    dataset: str = option("", "Folder or Hub id of a dataset; the first argument.")
    split: str = option("train", "Split of the episode.")
    episode: int = option(0, "Its number, the column episode_index.")
    save: str = option("", "Write this file, which ends in .rrd, and open no viewer.")

    def __post_init__(self):
        if not self.dataset:
            raise ValueError("DATASET is missing: folder or Hub id of a dataset")
        if self.save and not self.save.endswith(".rrd"):
            raise ValueError(f"--save is {self.save!r}; the viewer opens files whose names end in .rrd")
        screens = ("DISPLAY", "WAYLAND_DISPLAY")
        if not self.save and sys.platform == "linux" and not any(map(os.getenv, screens)):
            raise ValueError(
                f"there is no screen ({' and '.join(screens)} are not set): say --save FILE.rrd; on a machine that has "
                "one, `rerun FILE.rrd` shows it"
            )


def view(options: ViewOptions) -> str:
    """Opens the viewer, or writes the file; says what it shows."""
    rows = read_episode(options.dataset, options.split, options.episode)
    folder = Path(options.dataset)  # of which the file says no more than its name
    name = folder.resolve().name if folder.is_dir() else options.dataset
    layout, what = blueprint(rows), f"{name}/{options.split}/{options.episode}"
    recording = rr.RecordingStream("stereovla", recording_id=what)
    told = f"{what}: {len(rows)} frames, {rows[0]['task']!r}"
    if not options.save:
        recording.spawn(default_blueprint=layout)
        log_episode(recording, rows)
        recording.flush()
        return told
    path = Path(options.save)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    recording.save(temporary, default_blueprint=layout)
    log_episode(recording, rows)
    recording.disconnect()
    os.replace(temporary, path)
    return f"{told}, in {path}"


def log_episode(recording: rr.RecordingStream, rows: Sequence[Mapping[str, Any]]) -> None:
    """Sends an episode, rows as of `read_episode`, to the viewer or file that `recording` goes to."""
    recording.log("world", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    posed, names, entities = is_pose(rows), names_of(rows), places(rows)
    columns = {key for row in rows for key in row}
    if "left" in entities:
        recording.log(entities["left"], rr.AnnotationContext(list(CLASSES.items())), static=True)
    for key, of in names.items():
        for name in of:
            recording.log(f"{key}/{name}", rr.SeriesLines(names=name), static=True)
    if posed:
        path = np.stack([row["observation.state"][:3] for row in rows])
        recording.log("world/path", rr.LineStrips3D([path], radii=LINE_M, colors=DONE), static=True)
        recording.log("world/tool", rr.TransformAxes3D(AXIS_M), static=True)
    for row in rows:
        recording.set_time(FRAME, sequence=row["frame_index"])
        recording.set_time(TIME, duration=float(row["timestamp"]))
        for entity, value in [*_seen(row, entities, columns), *_told(row, names), *(_done(row) if posed else ())]:
            recording.log(entity, value)


def _seen(row: Mapping[str, Any], entities: Mapping[str, str], columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Cameras, pictures, depth, segmentation and boxes of a frame; what it lacks of `columns` is cleared."""
    for view, entity in entities.items():
        picture = row.get(schema.image_key(view))
        if picture is not None and entity.startswith("world/"):
            yield from _camera(row, view, entity, open_image(picture).size)
        shown = {
            "picture": (schema.image_key(view), _picture),
            "depth": (schema.depth_key(view), _depth),
            "target": (f"target.box_{view}_px", lambda box: _box(box, row["target.name"])),
        }
        if view == "left":
            shown["segmentation"] = ("observation.segmentation", _labels)
        for name, (key, drawn) in shown.items():
            if key in columns:
                yield f"{entity}/{name}", drawn(row[key]) if key in row else rr.Clear(recursive=False)


def _picture(data: bytes) -> rr.EncodedImage:
    return rr.EncodedImage(contents=data, media_type=f"image/{open_image(data).format.lower()}")


def _depth(data: bytes) -> rr.EncodedDepthImage:
    return rr.EncodedDepthImage(data, media_type="image/png", meter=1 / schema.DEPTH_UNIT_M)


def _box(box: np.ndarray, name: str) -> rr.Boxes2D:
    return rr.Boxes2D(array=box[None], array_format=rr.Box2DFormat.XYXY, colors=TARGET, labels=name)


def _labels(data: bytes) -> rr.SegmentationImage:
    return rr.SegmentationImage(decode_image("observation.segmentation", data), opacity=0.0)  # the viewer can raise it


def _camera(row: Mapping[str, Any], view: str, entity: str, size: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    """Pose and lens of the left or right view, (width, height) px."""
    pose = row["calibration.transform_camera_to_base"]
    shift = row["calibration.baseline_m"] * pose[:3, 0] if view == "right" else 0.0
    yield entity, rr.Transform3D(translation=pose[:3, 3] + shift, mat3x3=pose[:3, :3])
    yield (
        entity,
        rr.Pinhole(
            focal_length=row["calibration.focal_length_px"],
            principal_point=row["calibration.principal_point_px"],
            resolution=size,
            image_plane_distance=FRUSTUM_M,
        ),
    )


def _told(row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Any]]:
    """State and action number by number, and the instruction."""
    for key, of in names.items():
        for name, value in zip(of, row["observation.state" if key == "state" else "action"], strict=True):
            yield f"{key}/{name}", rr.Scalars(float(value))
    yield "instruction", rr.TextDocument(f"{row['task']}\n\ntarget: {row['target.name']}")


def _done(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tool's pose, what it shall do next, and the keyframe that it is on its way to."""
    state = row["observation.state"]
    yield "world/tool", rr.Transform3D(translation=state[:3], mat3x3=rpy_to_matrix(angles_of(state)))
    plan = row.get("action_plan")
    plan = row["action"][None] if plan is None else plan[: row["action_plan_length"]]
    steps = np.concatenate([state[None, :3], state[:3] + np.cumsum(plan[:, :3], axis=0)])
    yield "world/plan", rr.LineStrips3D([steps], radii=LINE_M, colors=PLAN)
    keyframe = row.get("keyframe_pose")
    if keyframe is None:
        yield "world/keyframe", rr.Clear(recursive=False)
    else:
        yield "world/keyframe", rr.Points3D(keyframe[None, :3], radii=POINT_M, colors=KEYFRAME, labels="keyframe")


def is_pose(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether states are poses of the tool."""
    return rows[0].get("state_is_pose") is not False and len(rows[0]["observation.state"]) in POSES


def angles_of(state: np.ndarray) -> np.ndarray:
    """(3,) roll, pitch, yaw of a state that is a pose; an arm that always points down has yaw alone."""
    values = dict(zip(POSES[len(state)], state, strict=True))
    return np.array([values.get("roll", 0.0), values.get("pitch", 0.0), values["yaw"]])


def names_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """{"state": names of its numbers, "action": ...}; numbered where they are the robot's own."""
    state, action = rows[0]["observation.state"], rows[0]["action"]
    if is_pose(rows):
        names = POSES[len(state)]
        return {"state": list(names), "action": [name if name == "gripper" else f"d{name}" for name in names]}
    return {"state": [f"{n}" for n in range(len(state))], "action": [f"{n}" for n in range(len(action))]}


def places(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{view: where it is in the viewer}: under /world where every frame says where its camera is."""
    views = schema.views_of({key for row in rows for key in row})
    known = {key for key in schema.CALIBRATION if all(key in row for row in rows)}
    needed = {"left": {*schema.CALIBRATION} - {schema.BASELINE}, "right": {*schema.CALIBRATION}}
    return {view: f"world/{view}" if needed.get(view, {""}) <= known else f"views/{view}" for view in views}


def _eye(rows: Sequence[Mapping[str, Any]], entities: Mapping[str, str]) -> rrb.EyeControls3D | None:
    """From behind and beside the camera at the tool's path; else a wall that depth shows makes all else small."""
    if not is_pose(rows) or not entities.get("left", "").startswith("world/"):
        return None
    target = np.mean([row["observation.state"][:3] for row in rows], axis=0)
    pose = rows[0]["calibration.transform_camera_to_base"]
    position = target + 1.4 * (pose[:3, 3] - target) + 0.3 * pose[:3, 0]
    return rrb.EyeControls3D(position=position, look_target=target, eye_up=(0.0, 0.0, 1.0))


def blueprint(rows: Sequence[Mapping[str, Any]]) -> rrb.Blueprint:
    """What is where on the screen: the space, the views under it, numbers and instruction beside them."""
    entities = places(rows)
    pictures = [rrb.Spatial2DView(name=view, origin=entity) for view, entity in entities.items()]
    depths = [
        rrb.Spatial2DView(name=f"depth, {view}", origin=entity, contents="$origin/depth")
        for view, entity in entities.items()
        if any(schema.depth_key(view) in row for row in rows)
    ]
    seen = rrb.Horizontal(*pictures, *depths)
    space = rrb.Spatial3DView(name="base frame", origin="world", eye_controls=_eye(rows, entities))
    in_space = is_pose(rows) or any(entity.startswith("world/") for entity in entities.values())
    numbers = [rrb.TimeSeriesView(name=key, origin=key) for key in ("action", "state")]
    return rrb.Blueprint(
        rrb.Horizontal(
            rrb.Vertical(space, seen, row_shares=[3, 2]) if in_space else seen,
            rrb.Vertical(
                rrb.TextDocumentView(name="instruction", origin="instruction"), *numbers, row_shares=[1, 3, 3]
            ),
            column_shares=[3, 1],
        ),
        rrb.BlueprintPanel(state="collapsed"),
        rrb.SelectionPanel(state="collapsed"),
        rrb.TimePanel(state="expanded", timeline=FRAME),
    )
