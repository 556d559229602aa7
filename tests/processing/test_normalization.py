"""Normalisation against the recorded official numbers and as exact inverse pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stereovla.processing import normalization as nm

GOLDENS = Path(__file__).parents[2] / ".." / "shared" / "goldens" / "stereovla_miniature"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="recorded reference tensors are not here")
MODES = sorted(nm.STATISTICS_OF_MODE)
numbers = st.floats(-1e3, 1e3, allow_nan=False, width=64)


def statistics(low, high, **more):
    low, high = np.asarray(low, float), np.asarray(high, float)
    names = {"min": low - 0.1, "max": high + 0.1, "q01": low, "q99": high, "mean": (low + high) / 2, "std": high - low}
    return {name: np.broadcast_to(value, low.shape).tolist() for name, value in (names | more).items()}


def normalizer(mode="quantiles", low=(-1.0, 0.0, 5.0), high=(1.0, 0.5, 9.0), **more):
    return nm.Normalizer({"arm": {"state": statistics(low, high, **more)}}, mode)


@needs_goldens
def test_matches_the_released_normaliser():
    case = json.loads((GOLDENS / "case.json").read_text())["normaliser"]
    ours = {"proprio": "state", "action": "action", "goal": "keyframe_pose"}
    stats = {ours[key]: {"q01": s["min"], "q99": s["max"]} for key, s in case["stats"].items()}
    norm = nm.Normalizer({"arm": stats})
    for key in ours:
        got = norm.normalize(case[f"{key}_in"], "arm", ours[key])
        np.testing.assert_allclose(got, case[f"{key}_normed"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(norm.unnormalize(case["inverse_in"], "arm", "action"), case["inverse_out"], atol=1e-12)


@settings(max_examples=60)
@given(
    mode=st.sampled_from(MODES),
    low=numbers,
    span=st.floats(1e-3, 1e3),
    values=st.lists(numbers, min_size=1, max_size=5),
)
def test_inverse_pairs(mode, low, span, values):
    norm = normalizer(mode, [low], [low + span])
    values = np.array(values)[:, None]
    there = norm.normalize(values, "arm", "state")
    back = norm.unnormalize(there, "arm", "state")
    np.testing.assert_allclose(back, values, rtol=0, atol=1e-12 * (abs(low) + span + np.abs(values).max()))
    again = norm.normalize(back, "arm", "state")
    np.testing.assert_allclose(again, there, rtol=1e-9, atol=1e-9 * (1 + (abs(low) + 1e3) / span))


@pytest.mark.parametrize("mode, ends", [("quantiles", ("q01", "q99")), ("min_max", ("min", "max"))])
def test_range_maps_to_one(mode, ends):
    norm = normalizer(mode)
    stats = norm.norm_stats["arm"]["state"]
    np.testing.assert_allclose(
        norm.normalize([stats[e] for e in ends], "arm", "state"), [[-1] * 3, [1] * 3], atol=1e-12
    )
    # Nothing is clipped.
    assert (norm.normalize(np.add(stats[ends[1]], 1.0), "arm", "state") > 1).all()


def test_mean_std():
    norm = normalizer("mean_std")
    stats = norm.norm_stats["arm"]["state"]
    assert norm.normalize(stats["mean"], "arm", "state").tolist() == [0, 0, 0]
    one_above = np.add(stats["mean"], stats["std"])
    np.testing.assert_allclose(norm.normalize(one_above, "arm", "state"), [1, 1, 1], atol=1e-12)


@pytest.mark.parametrize("mode, fixed", [("quantiles", -1.0), ("min_max", -1.0), ("mean_std", 0.0)])
def test_constant_dimensions_carry_nothing(mode, fixed):
    flat = {"min": [0.3, 0.0], "max": [0.3, 1.0]}
    norm = normalizer(mode, [0.3, 0.0], [0.3, 1.0], **flat)
    assert norm.normalize([[0.3, 0.5], [0.31, 0.5]], "arm", "state")[:, 0].tolist() == [fixed, fixed]
    assert norm.unnormalize([[fixed, 0.0], [0.7, 0.0]], "arm", "state")[:, 0].tolist() == [0.3, 0.3]


def test_collapsed_quantiles_keep_rare_values():
    """A gripper that closes in fewer than 1 % of the frames has both quantiles at 1."""
    norm = nm.Normalizer({"arm": {"action": {"q01": [1.0], "q99": [1.0], "min": [-1.0], "max": [1.0]}}})
    assert norm.normalize([[-1.0], [1.0]], "arm", "action").tolist() == [[-1.0], [1.0]]
    assert norm.unnormalize([[-1.0], [1.0]], "arm", "action").tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("mode", MODES)
def test_quantiles_that_nearly_touch_keep_rare_values(mode):
    """A gripper that is open in 99.5 % of the frames, with 0.3 % of noise: closed was -649."""
    rng = np.random.default_rng(0)
    values = np.where(np.arange(4000) % 200 == 0, 0.0, 1 - 0.003 * rng.random(4000))
    names = {"min": values.min(), "max": values.max(), "mean": values.mean(), "std": values.std()}
    names |= {"q01": np.quantile(values, 0.01), "q99": np.quantile(values, 0.99)}
    norm = nm.Normalizer({"arm": {"state": {name: [float(value)] for name, value in names.items()}}}, mode)
    normalised = norm.normalize([[0.0], [names["max"]]], "arm", "state")
    np.testing.assert_allclose(normalised, [[-1.0], [1.0]], atol=1e-12)
    np.testing.assert_allclose(norm.unnormalize(normalised, "arm", "state")[:, 0], [0.0, names["max"]], atol=1e-12)


def test_ranges_with_usual_extremes_stay_as_they_are():
    """A million values of a normal and of a Laplace distribution: the quantiles count, to the last bit."""
    for furthest in (4.9, 9.0):  # over 2.33 and 3.9 deviations
        stats = {"q01": [-2.33], "q99": [2.33], "min": [-furthest], "max": [furthest], "mean": [0.0], "std": [1.0]}
        for mode, expected in (("quantiles", 1 / 2.33), ("mean_std", 1.0)):
            assert nm.Normalizer({"arm": {"state": stats}}, mode).normalize([1.0], "arm", "state") == pytest.approx(
                expected, rel=1e-12
            )


def test_angles_are_brought_to_the_turn_of_their_statistics():
    """Only where these go on beyond pi: the released model's, which do not, leave every number as it is."""
    stats = {"q01": [np.pi - 0.1, -1.0], "q99": [np.pi + 0.1, 1.0]}
    norm = nm.Normalizer({"arm": {"state": stats}}, angles=lambda embodiment, key: [0, 1])
    np.testing.assert_allclose(norm.normalize([-np.pi + 0.05, 3.0], "arm", "state"), [0.5, 3.0], atol=1e-12)
    np.testing.assert_allclose(norm.normalize([np.pi - 0.05, -4.0], "arm", "state"), [-0.5, -4.0], atol=1e-12)
    np.testing.assert_allclose(norm.unnormalize([0.5, -4.0], "arm", "state"), [-np.pi + 0.05, -4.0], atol=1e-12)
    plain = nm.Normalizer({"arm": {"state": stats}})  # no angles: a joint that turns on
    np.testing.assert_allclose(plain.unnormalize([0.5, 0.0], "arm", "state"), [np.pi + 0.05, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda n: n.normalize([[0, 0, 0], [0, np.nan, 0]], "arm", "state"), r"state\[1, 1\] is nan"),
        (lambda n: n.unnormalize([0, 0, np.inf], "arm", "state"), r"normalised state\[2\] is inf"),
        (lambda n: n.normalize([0, 0], "arm", "state"), r"shape \(2,\); the last dimension must be 3"),
        (lambda n: n.normalize([0, 0, 0], "leg", "state"), r"unknown embodiment 'leg'; valid embodiments: \['arm'\]"),
        (lambda n: n.normalize([0, 0, 0], "arm", "action"), r"no 'action'; it has \['state'\]"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call(normalizer())


def test_missing_statistics():
    with pytest.raises(ValueError, match="no statistics: pass norm_stats"):
        nm.Normalizer(None).normalize([0.0], "arm", "state")


@pytest.mark.parametrize(
    "stats, mode, message",
    [
        (
            {"arm": {"state": {"q01": [0.0], "q99": [1.0]}}},
            "quantile",
            r"valid modes: \['mean_std', 'min_max', 'quantiles'\]",
        ),
        ({"arm": {"state": {"q01": [0.0]}}}, "quantiles", r"lacks \['q99'\].*it has \['q01'\]"),
        ({"arm": {"state": {"q01": [0.0], "q99": [1.0, 2.0]}}}, "quantiles", r"\['q99'\] has shape \(2,\)"),
        (
            {"arm": {"state": {"q01": [0.0, 2.0], "q99": [1.0, 1.0]}}},
            "quantiles",
            r"\['q99'\]\[1\] = 1.0 is below q01\[1\] = 2.0",
        ),
        ({"arm": {"state": {"mean": [0.0], "std": [-1.0]}}}, "mean_std", r"\['std'\]\[0\] = -1.0 is below 0"),
        ({"arm": {"state": {"q01": [0.0], "q99": [float("nan")]}}}, "quantiles", r"\['q99'\]\[0\] is nan"),
        ({"arm": [1]}, "quantiles", r"norm_stats\['arm'\] must map"),
    ],
)
def test_statistics_are_checked(stats, mode, message):
    with pytest.raises(ValueError, match=message):
        nm.Normalizer(stats, mode)
