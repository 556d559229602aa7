"""benchmarks.on_gpu: the script that waits for a GPU, on a CPU with the smallest presets."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stereovla.benchmarks.on_gpu import Bench, GpuOptions, OutOfTime, Results, limit, main, parts_of

SMALL = ["--device", "cpu", "--stereovla", "tiny", "--depthvla", "depthvla-tiny", "--repeats", "1", "--batch_size", "2"]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "on_gpu.sh"


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    table = (folder / "table.md").read_text().splitlines()
    assert " Euler steps; no CUDA graphs here: " in table[0]
    assert table[2] == "| part | way | what | value | unit |" and len(table) == 4 + len(rows)
    return rows


def measured(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """{(part, way): {what: value}}, of parts that went well."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows_of(folder):
        assert row["value"] != "" and not row["what"].startswith(("failed", "given up", "left out")), row
        found.setdefault((row["part"], row["way"]), {})[row["what"]] = row["value"]
    return found


def test_chunks_stages_and_training_have_their_rows(tmp_path):
    parts = ["StereoVLA", "PI0", "DepthVLA, adapters", "StereoVLA, 16 bit"]
    main(["--out", str(tmp_path), *SMALL, "--minutes", "60", "--parts", *parts])
    found = measured(tmp_path)
    assert {part for part, _ in found} == set(parts)
    plain = found["StereoVLA", "plain"]
    stages = {"stereo encoder", "semantic encoders", "prefill", "action expert, 10 steps"}
    assert {"chunk", "chunk, pose tokens", "chain of thought, 8 tokens", *stages} < plain.keys()
    assert all(value > 0 for name, value in plain.items() if "memory" not in name)
    rate = found["DepthVLA, adapters", "adapters of rank 32"]
    assert rate["training, batches of 2"] > 0 and rate["training: most memory held"] > 0
    errors = [found["StereoVLA, 16 bit", name]["chunk: mean error"] for name in ("bfloat16", "float16")]
    assert 0 < errors[1] < errors[0] < 0.1  # 11 digits of the mantissa against 8


def test_a_part_beyond_its_time_is_given_up_and_one_that_fails_is_told(tmp_path, monkeypatch):
    def broken(bench, name, part):
        bench.results.add(part, "plain", "something", 1.0)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Bench, "plain", broken)
    main(["--out", str(tmp_path), *SMALL, "--minutes", "0.01", "--parts", "StereoVLA", "StereoVLA, compiled"])
    told = [(row["part"], row["what"]) for row in rows_of(tmp_path)]
    assert told[:2] == [("StereoVLA", "something"), ("StereoVLA", "failed: RuntimeError: no such kernel")]
    assert told[2] in [("StereoVLA, compiled", what) for what in ("given up after", "left out: no time left")]


class LastsLong:
    """Its finalizer takes longer than it is allowed to; what is raised in one is dropped."""

    def __del__(self):
        time.sleep(0.2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_time_runs_out_in_a_finalizer():
    with pytest.raises(OutOfTime):
        with limit(0.1):
            one = LastsLong()
            del one
            time.sleep(600)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_parts_and_devices_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match="--parts PI1: there are StereoVLA; DepthVLA; PI0; "):
        main(["--out", str(tmp_path), *SMALL, "--parts", "PI1"])


@pytest.mark.slow
def test_the_whole_script_runs(tmp_path):
    """Every part, compiled ones included, by the script itself; it is told to take its time. A graph unrolls the Euler
    steps, so there are 2.
    """
    results = Results(tmp_path / "names", "")
    names = parts_of(Bench(GpuOptions(out=str(tmp_path)), results))
    python = os.environ | {"PYTHON": sys.executable, "ON_GPU_SECONDS": "7200"}
    command = ["bash", str(SCRIPT), str(tmp_path / "out"), *SMALL, "--num_steps", "2", "--minutes", "120"]
    subprocess.run(command, check=True, env=python, timeout=7300)
    found = measured(tmp_path / "out")
    assert {part for part, _ in found} == set(names)
    ways = {way for _, way in found}
    assert {"plain", "graphs", "compiled", "compiled, graphs", "bfloat16", "float16"} < ways
