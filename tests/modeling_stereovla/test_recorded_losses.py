"""Losses, counts and gradients are those that were recorded before the losses became objects."""

import json

import pytest
from recorded_losses.make import CASES, FILE, compute

# the time embedding and the last step of a loss are float32: AVX-512 on one thread and plain code on two differ by 9e-7
# of a number
ROUNDING = 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_recorded_ones(case):
    found, recorded = compute(case), json.loads(FILE.read_text())[case]
    assert found.keys() == recorded.keys()
    for name, numbers in recorded.items():
        assert found[name] == pytest.approx(numbers, rel=ROUNDING, abs=ROUNDING, nan_ok=True), name
