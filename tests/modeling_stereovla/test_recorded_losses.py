"""Losses, counts and gradients are those that were recorded before the losses became objects."""

import json

import pytest
from recorded_losses.make import CASES, FILE, compute

# the last step of a loss is float32 (2**-24 of it is 6e-8); two orders of summation differ by a few of these
ROUNDING = 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_recorded_ones(case):
    found, recorded = compute(case), json.loads(FILE.read_text())[case]
    assert found.keys() == recorded.keys()
    for name, numbers in recorded.items():
        assert found[name] == pytest.approx(numbers, rel=ROUNDING, abs=ROUNDING, nan_ok=True), name
