"""dataset_builder.checks: what must be true of every episode, on textured pairs and on a real camera's."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stereo_scene import textured_pair

from stereovla.dataset_builder.dataset.episode_checks import (
    chosen_frames,
    measure_pair,
    pair_problems,
    timestamp_problems,
)

ZED = Path(__file__).parents[2] / ".." / "shared" / "data" / "zed_mini"


@given(
    st.floats(1, 60),
    st.integers(1, 50),
    st.floats(0, 100),
    st.integers(0, 2**32 - 1),
)
def test_jittering_timestamps_pass_and_every_bad_one_is_named(fps, length, start, seed):
    rng = np.random.default_rng(seed)
    times = start + (np.arange(length) + rng.uniform(-0.04, 0.04, length)) / fps
    assert timestamp_problems(times, fps) == []
    if length > 4:
        repeated, lost = (int(frame) for frame in rng.choice(np.arange(1, length), 2, replace=False))
        times[repeated] = times[repeated - 1]
        found = timestamp_problems(times, fps)
        assert any(line.startswith(f"frame {repeated}: the timestamp does not rise") for line in found)
        steps = np.diff(np.arange(length) / fps)
        steps[lost - 1] *= 3
        found = timestamp_problems(np.append(0, np.cumsum(steps)), fps)
        assert [line.split(":")[0] for line in found] == [f"frame {lost}"] and "leaps 3.0 frames ahead" in found[0]


def test_wrong_rates_and_broken_timestamps_are_named():
    times = np.arange(20) / 15
    assert timestamp_problems(times, 10) == ["the timestamps run at 15.00 Hz, expected 10 Hz"]
    times[3] = np.nan
    assert timestamp_problems(times, 15) == ["frame 3: the timestamp is nan"]


def test_chosen_frames_cover_the_episode():
    assert chosen_frames(1) == [0] and chosen_frames(2) == [0, 1] and chosen_frames(101) == [0, 50, 100]


@pytest.mark.parametrize("width", [128, 224, 640])
def test_pairs_of_any_size(width):
    height = width * 3 // 4
    left, right = textured_pair(0, width, height, disparity=width // 20)
    assert measure_pair(left, right).status == "ok"
    assert measure_pair(right, left).status == "swapped"
    assert measure_pair(left, left).status == "identical"
    for rows in (2, -2):
        report = measure_pair(*textured_pair(0, width, height, disparity=width // 20, rows=rows))
        assert report.status == "unrectified" and abs(report.vertical_offset_px - 2) < 0.3, report
    flat = np.full_like(left, 80)
    assert measure_pair(flat, flat + 1).status == "unknown"


def test_a_verdict_needs_half_of_the_pairs():
    good = textured_pair(0, 160, 120)
    bad = good[::-1]
    assert pair_problems({0: good, 5: bad, 9: good}) == ([], True)
    found, judged = pair_problems({0: bad, 5: bad, 9: good})
    assert judged and [line.split(":")[0] for line in found] == ["frame 0", "frame 5"]
    assert "left and right are swapped" in found[0]
    flat = [np.zeros((120, 160, 3), np.uint8), np.ones((120, 160, 3), np.uint8)]
    assert pair_problems({0: flat}) == ([], False)
    assert pair_problems({0: flat, 1: bad})[0][0].startswith("frame 1: left and right are swapped")


@pytest.mark.skipif(not ZED.is_dir(), reason="the real pair is not here")
def test_real_pair():
    left, right = (np.array(Image.open(ZED / f"{side}.png").convert("RGB")) for side in ("left", "right"))
    report = measure_pair(left, right)
    assert report.status == "ok" and report.vertical_offset_px < 0.5 and 40 < report.disparity_px < 160
    assert measure_pair(right, left).status == "swapped"
    for a, b in ((left[2:], right[:-2]), (left[:-2], right[2:])):
        report = measure_pair(a, b)
        assert report.status == "unrectified" and abs(report.vertical_offset_px - 2) < 0.5
    # far off, too: the coarse pass sees what lies beyond the rows that the fine one searches
    assert measure_pair(left[40:], right[:-40]).status == "unrectified"
