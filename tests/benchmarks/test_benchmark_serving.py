"""benchmarks.serving: a small run prints a line for each way and number of clients."""

import re

import pytest

from stereovla.benchmarks.serving import ServingBenchmark, main


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "depthvla-tiny"])
def test_a_small_run_prints_every_line(preset):
    lines: list[str] = []
    main(ServingBenchmark(preset=preset, clients=[1, 3], requests=2), lines.append)
    assert lines[0].startswith(f"preset {preset}, float32 on cpu") and len(lines) == 6
    for (way, clients), line in zip([(w, c) for w in ("directly", "served") for c in (1, 3)], lines[2:], strict=True):
        assert re.fullmatch(rf"{way} +{clients}( +\d+\.\d){{3}}", line)
