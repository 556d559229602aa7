"""formats.plausibility: wrong units, intrinsics of another size and extrinsics the wrong way round are refused with
their cause; what real rigs have is not.
"""

import copy
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folder import RIG, TRANSFORM, WRITTEN, import_config, import_folder

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.formats import plausibility
from stereovla.dataset_builder.formats.importing import ProblemsFound
from stereovla.dataset_builder.formats.rig import make_rig


def rig_of(accept=(), **calibration):
    content = copy.deepcopy(RIG) | {"accept": list(accept)}
    content["calibration"] |= calibration
    return make_rig(content, "rig.yaml")


@pytest.mark.parametrize(
    ("check", "calibration", "message"),
    [
        (
            "principal_point",
            {"size_px": [640, 360], "focal_length_px": [700.0, 700.0], "principal_point_px": [640.0, 360.0]},
            r"lies at 100% of the width and 100% of the height of a view of \[640, 360\] px, expected 35% ... 65%: are "
            "these intrinsics of another image size, such as 1280x720",
        ),
        (
            "principal_point",
            {"size_px": [640, 360], "focal_length_px": [700.0, 700.0], "principal_point_px": [628.3, 351.9]},
            "98% of the width and 98% of the height .* such as 1257x704",
        ),
        (
            "principal_point",
            {"size_px": [1280, 720], "focal_length_px": [500.0, 500.0], "principal_point_px": [336.0, 188.0]},
            "26% of the width and 26% of the height .* such as 672x376",
        ),
        (
            "principal_point",
            {"size_px": [640, 480], "focal_length_px": [600.0, 600.0], "principal_point_px": [424.0, 240.0]},
            "66% of the width and 50% of the height",
        ),
        ("field_of_view", {"focal_length_px": [2.1, 2.1]}, r"sees? 175 degrees, expected 19.2 ... 576 px: is it in mm"),
        ("field_of_view", {"focal_length_px": [1400.0, 1400.0]}, "see 4 degrees"),
        (
            "units",
            {"transform_camera_to_base": [[0, 0, 1, -800], [-1, 0, 0, 0], [0, -1, 0, 100], [0, 0, 0, 1]]},
            "places the camera 806 m away, expected up to 10 m: mm for m",
        ),
        (
            "units",
            {"transform_camera_to_base": [[0, 0, 1, -80], [-1, 0, 0, 0], [0, -1, 0, 10], [0, 0, 0, 1]]},
            "places the camera 80.6 m away, expected up to 10 m: cm or mm for m",
        ),
    ],
)
def test_calibrations_that_no_rig_has_are_refused_unless_accepted(check, calibration, message):
    with pytest.raises(ValueError, match=rf"rig.yaml: calibration: .*{message}.*`accept: \[{check}\]`"):
        rig_of(**calibration)
    assert rig_of(accept=[check], **calibration).accept == (check,)


@pytest.mark.parametrize(
    ("size", "focal", "point"),
    [
        ([1280, 720], 528.4, [639.2, 360.6]),  # ZED 2i, HD720
        ([672, 376], 264.5, [345.1, 184.0]),  # ZED Mini, VGA
        ([848, 480], 423.9, [425.8, 238.0]),  # RealSense D435
        ([1280, 800], 799.9, [652.5, 398.0]),  # OAK-D
        ([96, 96], 100.0, [48.0, 48.0]),
        ([1280, 720], 900.0, [741.0, 300.0]),  # CALIB_ZERO_DISPARITY moves the point by up to a tenth
    ],
)
def test_cameras_that_there_are_pass(size, focal, point):
    rig_of(size_px=size, focal_length_px=[focal, focal], principal_point_px=point)


def test_units_of_the_rest_of_the_rig():
    with pytest.raises(ValueError, match="baseline_m is 63.0, must be in 0.001 ... 1 m: mm or cm for m"):
        rig_of(baseline_m=63)
    for tool, message in (
        ([0, 0, 120.0, 0, 0, 0], "tool lies 120 m away, expected up to 1 m: cm or mm for m"),
        ([0, 0, 0.12, 180.0, 0, 0], r"tool is turned by \[180.0, 0.0, 0.0\], expected up to 2 pi rad: degrees for rad"),
    ):
        with pytest.raises(ValueError, match=message):
            make_rig({**RIG, "tool": tool}, "rig.yaml")
        make_rig({**RIG, "tool": tool, "accept": ["units"]}, "rig.yaml")
    with pytest.raises(
        ValueError, match="accept is .*'unit'.*, expected a list of field_of_view, principal_point, units"
    ):
        rig_of(accept=["unit"])


def moved(folder, change):
    """What lerobot wrote, with state and action as `change` (of a copy of both, (n, 7)) leaves them."""
    source = shutil.copytree(WRITTEN, folder / "source")
    path = source / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    values = [shards.numbers(table, key) for key in ("observation.state", "action")]
    change(*values)
    for key, array in zip(("observation.state", "action"), values, strict=True):
        column = pa.array(list(array), table.schema.field(key).type)
        table = table.set_column(table.column_names.index(key), table.schema.field(key), column)
    pq.write_table(table, path)
    return source


def degrees(state, action):
    for values in (state, action):
        values[:, 3:6] = np.degrees(values[:, 3:6])


def millimetres(state, action):
    for values in (state, action):
        values[:, :3] *= 1000


def centimetres(state, action):
    for values in (state, action):
        values[:, :3] *= 100


def action_in_millimetres(state, action):
    action[:, :3] *= 1000


def other_frame(state, action):
    action[:, 0] -= 1.0  # of a base that stands a metre away


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (degrees, r"episode 0: frame 0: the state is turned by \[.*\], expected up to 2 pi rad: degrees for rad\?"),
        (millimetres, "episode 0: frame 0: the state is 510 m away, expected up to 5 m: mm for m"),
        (centimetres, "episode 1: frame 0: the state is 54.* m away, expected up to 5 m: cm or mm for m"),
        (action_in_millimetres, "episode 2: frame 0: the action is .* m away, expected up to 5 m: mm for m"),
        (
            other_frame,
            "episode 0: in half of the frames the action asks for 0.995 m or more, expected up to 0.5 m within",
        ),
    ],
)
def test_vectors_in_wrong_units_are_refused_with_the_cause(tmp_path, change, message):
    source = moved(tmp_path, change)
    with pytest.raises(ProblemsFound, match=message):
        import_folder(import_config(source, tmp_path))
    if change in (millimetres, other_frame):
        import_folder(import_config(source, tmp_path, rig={"accept": ["units", "camera_pose"]}))


@pytest.mark.parametrize(
    ("scale", "turn", "message"),
    [
        (1000, 1, r"the actions ask for [\d.]+ m in all, the states move by [\d.]+ m: mm for m\?"),
        (12, 1, r"the states move by [\d.]+ m: velocities \(m/s\) for changes\?"),
        (40, 1, r"the states move by [\d.]+ m: normalised commands, or another unit\?"),
        (0.05, 1, r"the states move by [\d.]+ m: normalised commands, or another unit\?"),
        (1, 57.3, r"the states move by [\d.]+ rad: degrees for rad\?"),
        (1.8, 1, None),
        (1, 1, None),
    ],
)
def test_changes_must_add_up_to_what_the_arm_moves(scale, turn, message):
    times = np.linspace(0, 3, 37)
    poses = np.stack([0.4 + 0.1 * np.sin(times), 0 * times, 0.2 + 0.02 * times, 0.1 * times, 0 * times, 0.2 * times], 1)
    changes = np.diff(poses, axis=0, append=poses[-1:])
    changes = np.concatenate([changes[:, :3] * scale, changes[:, 3:] * turn], axis=1)
    problems = plausibility.delta_problems(poses, changes, 12.0)
    if message is None:
        assert problems == []
    else:
        (problem,) = problems
        assert re.search(message, problem), problem


INVERSE = np.linalg.inv(np.array(TRANSFORM, dtype=float))
OPENGL = np.array(TRANSFORM, dtype=float) @ np.diag([1.0, -1.0, -1.0, 1.0])
BODY = np.array([[1.0, 0, 0, -0.8], [0, 1, 0, 0], [0, 0, 1, 0.1], [0, 0, 0, 1]])  # x forward, z up, at the same place
AWAY = np.array([[1.0, 0, 0, 5], [0, 1, 0, 5], [0, 0, 1, 3], [0, 0, 0, 1]])  # up there, looking into the sky


@pytest.mark.parametrize(
    ("transform", "cause"),
    [
        (INVERSE, r"probably the wrong way round \(base to camera\): taken so, the tool is in view in 7"),
        (OPENGL, r"probably the pose of a camera frame with y up and z backward \(OpenGL\): .* in view in 7"),
        (BODY, r"probably the pose of a body frame with x forward and z up \(ROS\): .* in view in 7"),
        (AWAY, "is it the pose of the left camera's optical frame"),
    ],
)
def test_a_camera_that_never_sees_the_tool_is_refused_with_the_likely_cause(tmp_path, transform, cause):
    calibration = {**RIG["calibration"], "transform_camera_to_base": transform.tolist()}
    with pytest.raises(
        ProblemsFound, match="episode 0: transform_camera_to_base: the tool is in view in 0 of 7"
    ) as error:
        import_folder(import_config(WRITTEN, tmp_path, rig={"calibration": calibration}))
    assert re.search(cause, str(error.value)), error.value
    accepted = {"calibration": calibration, "accept": ["camera_pose"]}
    import_folder(import_config(WRITTEN, tmp_path, rig=accepted))
