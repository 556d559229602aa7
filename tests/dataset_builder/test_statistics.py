"""dataset_builder.dataset.statistics: one pass gives what numpy gives on everything at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_dataset import make_row, write_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.statistics import (
    RunningStatistics,
    camera_ranges,
    compute_statistics,
    mix_statistics,
    smallest_arc,
)
from stereovla.processing.normalization import Normalizer
from stereovla.processing.state_entries import POSES


def _assert_equal(result, values):
    expected = {
        "min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0),
        "q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0),
    }  # fmt: skip
    assert set(result) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(result[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 500), max_size=6), seed=st.integers(0, 1000), offset=st.sampled_from([0.0, 1000.0]))
def test_parts_give_the_result_of_the_whole(cuts, seed, offset):
    values = np.random.default_rng(seed).normal(offset, [0.1, 5.0, 0.0], (500, 3))
    running = RunningStatistics(3)
    for part in np.split(values, sorted(cuts)):
        running.add(part)
    _assert_equal(running.result(), values)


def test_quantiles_of_a_reservoir_are_close():
    values = np.random.default_rng(0).normal(size=(200_000, 2))
    running = RunningStatistics(2, sample=20_000)
    for part in np.array_split(values, 37):
        running.add(part)
    result = running.result()
    np.testing.assert_allclose(result["mean"], values.mean(0), atol=1e-6)
    # 1 % quantile of 20,000 normal values: standard error about 0.026
    np.testing.assert_allclose(result["q01"], np.quantile(values, 0.01, axis=0), atol=0.12)
    np.testing.assert_allclose(result["q99"], np.quantile(values, 0.99, axis=0), atol=0.12)


def test_nothing_and_nan_are_errors():
    with pytest.raises(ValueError, match="no values"):
        RunningStatistics(2).result()
    with pytest.raises(ValueError, match="NaN"):
        RunningStatistics(2).add(np.array([[0.0, np.nan]]))


@pytest.mark.parametrize("plans", [True, False])
def test_dataset_statistics_use_valid_steps_only(tmp_path, plans):
    write_dataset(tmp_path, [4, 5, 3], 2, without=() if plans else ("action_plan", "action_plan_length"))
    paths = sorted((tmp_path / "data").iterdir())
    rows = [row for path in paths for row in shards.read_rows(path)]
    stats = compute_statistics(paths)
    assert list(stats) == ["franka_panda"]
    entry = stats["franka_panda"]
    _assert_equal(entry["state"], np.stack([row["observation.state"] for row in rows]).astype(float))
    _assert_equal(entry["keyframe_pose"], np.stack([row["keyframe_pose"] for row in rows]).astype(float))
    if plans:
        actions = np.concatenate([row["action_plan"][: row["action_plan_length"]] for row in rows])
    else:
        actions = np.stack([row["action"] for row in rows])
    _assert_equal(entry["action"], actions.astype(float))


def test_camera_ranges_are_those_of_the_frames(tmp_path):
    """Three cameras whose angles are set by hand: straight along base x, then turned left, then tilted down."""
    rng, rows = np.random.default_rng(0), []
    turn, tilt = np.radians(30), np.radians(20)
    forwards = [[1, 0, 0], [np.cos(turn), np.sin(turn), 0], [np.cos(tilt), 0, -np.sin(tilt)]]
    for frame, forward in enumerate(forwards):
        row = make_row(rng, 0, frame)
        pose = np.eye(4)
        right = np.cross(forward, [0, 0, 1]) / np.linalg.norm(np.cross(forward, [0, 0, 1]))
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        pose[:3, 3] = [-0.8, 0.1 * frame, 0.4]
        row |= {
            "calibration.transform_camera_to_base": pose.astype(np.float32),
            "calibration.baseline_m": 0.06 + frame / 1000,
        }
        rows.append(row)
    for index in range(2):  # over two shards
        encoded = [shards.encode_row(row) for row in rows[index::2]]
        shards.write_shard(tmp_path / f"{index}.parquet", encoded, temporary=tmp_path / "t")
    ranges = camera_ranges([tmp_path / "0.parquet", tmp_path / "1.parquet"])["franka_panda"]
    wanted = {
        "azimuth, deg": [0, 30],
        "elevation, deg": [-20, 0],
        "baseline, m": [0.06, 0.062],
        "position y, m": [0, 0.2],
    }
    wanted |= {"position x, m": [-0.8, -0.8], "focal length x, px": [40, 40], "principal point y, px": [16, 16]}
    for name, pair in wanted.items():
        np.testing.assert_allclose(ranges[name], pair, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("angles", "arc"),
    [
        ([0.0, 30.0, 12.5], [0, 30]),
        ([179.0, -178.5, 180.0], [179, 181.5]),
        ([-90.0, 90.0, 170.0], [90, 270]),
        ([45.0], [45, 45]),
        ([-180.0, 180.0], [-180, -180]),
    ],
)
def test_azimuths_go_on_beyond_180(angles, arc):
    assert smallest_arc(angles) == pytest.approx(arc)


def write_states(folder, states, **columns):
    """One shard of one episode with these states (n, S) and keyframes; returns its path."""
    rng = np.random.default_rng(0)
    rows = []
    for frame, state in enumerate(np.asarray(states, np.float32)):
        row = make_row(rng, 0, frame) | {"observation.state": state, "keyframe_pose": state} | columns
        rows.append(shards.encode_row(row))
    path = folder / shards.shard_path("train", 0, 1)
    shards.write_shard(path, rows, temporary=folder / ".temporary")
    return path


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_angles_around_pi_span_what_they_turn(tmp_path, share):
    """A flange that looks down: its roll is pi +- 0.05, written with either sign, the rarer one below the quantiles."""
    rng = np.random.default_rng(1)
    states = rng.uniform(-0.3, 0.3, (200, 7))
    around = np.quantile(rng.uniform(-0.05, 0.05, 200), rng.permutation(200) / 199)
    around += 0.05 * (1 - 2 * share)  # so that this share of the frames has the positive sign
    states[:, 3] = (2 * np.pi + around) % (2 * np.pi) - np.pi
    states[:, 6] = 1.0
    stats = compute_statistics([write_states(tmp_path, states)])["franka_panda"]["state"]
    written = np.asarray(states, np.float32)[:, 3].astype(np.float64) % (2 * np.pi)
    assert stats["min"][3] == pytest.approx(written.min(), abs=1e-6) and stats["min"][3] < np.pi
    assert stats["max"][3] == pytest.approx(written.max(), abs=1e-6) and stats["max"][3] > np.pi
    assert stats["q99"][3] - stats["q01"][3] < 0.11
    normalizer = Normalizer({"arm": {"state": stats}}, angles=lambda embodiment, key: [3, 4, 5])
    normalised = normalizer.normalize(states, "arm", "state")
    assert np.abs(normalised[:, 3]).max() < 1.1  # was 60 where the sign flips rarely, and +-1 in turn where often
    np.testing.assert_allclose(normalizer.unnormalize(normalised, "arm", "state"), states, atol=1e-9)


@pytest.mark.parametrize(
    ("low", "high"), [(-2.0, -1.0), (0.5, 3.0), (-0.4, 0.4), (-np.pi, np.pi), (-3.1, 0.2)], ids=str
)
def test_angles_that_do_not_cross_pi_stay_as_they_are(tmp_path, low, high):
    states = np.zeros((50, 7))
    states[:, 5] = np.linspace(low, high, 50)
    stats = compute_statistics([write_states(tmp_path, states)])["franka_panda"]["state"]
    assert (stats["min"][5], stats["max"][5]) == pytest.approx((low, high), abs=1e-6)


def test_numbers_of_a_state_that_is_no_pose_are_no_angles(tmp_path):
    states = np.zeros((40, 7))
    states[:, 3] = np.where(np.arange(40) % 2, 3.1, -3.1)
    path = write_states(tmp_path, states, state_is_pose=False)
    stats = compute_statistics([path])["franka_panda"]["state"]
    assert (stats["min"][3], stats["max"][3]) == pytest.approx((-3.1, 3.1))


def around(middle: float, half: float) -> dict[str, list[float]]:
    """Statistics of a state of 5 numbers whose yaw is spread evenly around `middle`."""
    one = {"min": -half, "max": half, "q01": -0.98 * half, "q99": 0.98 * half, "mean": 0.0}
    rest = {"min": -1.0, "max": 1.0, "q01": -0.98, "q99": 0.98, "mean": 0.0}
    numbers = {name: [rest[name]] * 3 + [middle + one[name], rest[name]] for name in one}
    return numbers | {"std": [0.58] * 3 + [half / np.sqrt(3), 0.58]}


def test_angles_of_a_mixture_are_brought_to_one_turn():
    """One dataset wrote a yaw around pi as 3.1 ... 3.2, the other, which never crosses, as -3.14 ... -3.04."""
    names = {"arm": POSES[5]}
    parts = [({"arm": {"state": around(3.15, 0.05)}}, 1.0), ({"arm": {"state": around(-3.09, 0.05)}}, 1.0)]
    for order in (parts, parts[::-1]):
        mixed = mix_statistics(order, names)["arm"]["state"]
        assert mixed["max"][3] - mixed["min"][3] == pytest.approx(2 * np.pi - 6.24 + 0.1, abs=1e-6)
        assert mixed["std"][3] < 0.05 and mixed["min"][:3] == [-1.0] * 3
    plain = mix_statistics(parts)["arm"]["state"]  # of numbers that nobody calls angles, both ends count
    assert (plain["min"][3], plain["max"][3]) == pytest.approx((-3.14, 3.2))
    wide = [({"arm": {"state": around(1.0, 2.0)}}, 1.0), ({"arm": {"state": around(-1.5, 1.5)}}, 1.0)]
    assert mix_statistics(wide, names) == mix_statistics(wide)
