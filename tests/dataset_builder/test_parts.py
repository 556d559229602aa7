"""Datasets recorded in parts: merged bytes are those of one machine, whatever was killed; datatrove runs the parts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("mujoco")

from command_lines import data as main  # noqa: E402

from stereovla.command_line import parse  # noqa: E402
from stereovla.dataset_builder.dataset import shards  # noqa: E402
from stereovla.dataset_builder.recording.parts import PLAN, merge, plan_shards  # noqa: E402

ROOT = Path(__file__).parents[2]
OPTIONS = ["--preset", "tiny", "--train-episodes", "5", "--validation-episodes", "1", "--episodes-per-shard", "1"]
OPTIONS += ["--image-size", "32", "--seed", "5"]
MACHINES = 2


def command(folder: Path, part: int | None = None) -> list[str]:
    which = [] if part is None else ["--shard-index", str(part), "--num-shards", str(MACHINES)]
    return [sys.executable, "-m", "stereovla", "data", "build", "--out", str(folder), *OPTIONS, *which]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(arguments: list[str]) -> None:
    subprocess.run(arguments, env=environment(), check=True, capture_output=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def killed_when(arguments: list[str], condition) -> None:
    """Run a command until `condition` holds, then kill -9 it."""
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one machine makes."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    run(command(folder))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two machines with folders of their own; the first is killed when its first shard is there, and goes on."""
    folder = tmp_path_factory.mktemp("parts")
    killed_when(command(folder / "0", 0), lambda: any(folder.glob("0/data/*.parquet")))
    for part in range(MACHINES):
        run(command(folder / str(part), part))
    return [folder / str(part) for part in range(MACHINES)]


def test_each_machine_records_every_nth_shard(parts, whole):
    planned = [task.path for task in plan_shards(shards.read_json(whole / PLAN))]
    assert len(planned) == 6
    for number, part in enumerate(parts):
        assert {path.relative_to(part) for path in part.glob("data/*")} == set(planned[number::MACHINES])
        assert not (part / shards.MANIFEST).exists() and not (part / ".partial").exists()


def test_merged_folders_are_the_bytes_of_one_machine(parts, whole, tmp_path):
    assert main(["merge", str(tmp_path / "all"), *map(str, parts)]) == 0
    assert contents(tmp_path / "all") == contents(whole)
    into_first = Path(shutil.copytree(parts[0], tmp_path / "first"))
    merge(into_first, [parts[1]])
    assert contents(into_first) == contents(whole)
    merge(into_first)  # a finished dataset stays as it is
    assert contents(into_first) == contents(whole)


@pytest.mark.slow
def test_merge_killed_at_any_moment_goes_on_to_the_same_bytes(parts, whole, tmp_path):
    folder = tmp_path / "dataset"
    arguments = [sys.executable, "-m", "stereovla", "data", "merge", str(folder), *map(str, parts)]
    moments = [
        lambda: (folder / PLAN).exists(),
        lambda: any(folder.glob("data/*.parquet")),
        lambda: (folder / "meta/stats.json").exists(),
        lambda: (folder / "README.md").exists(),
    ]
    for moment in moments:
        killed_when(arguments, moment)
        for path in folder.glob("data/*.parquet"):
            with shards.open_shard(path):  # what is there is whole
                pass
    run(arguments)
    assert contents(folder) == contents(whole)


@pytest.mark.slow
def test_machines_that_share_a_folder_and_are_killed_make_the_bytes_of_one(whole, tmp_path):
    folder = tmp_path / "dataset"
    running = subprocess.Popen(command(folder, 1), env=environment(), stderr=subprocess.DEVNULL, stdout=-1)
    killed_when(command(folder, 0), lambda: any(folder.glob("data/*.parquet")))
    assert running.wait(120) == 0
    with pytest.raises(RuntimeError, match=r"of 6 shards are missing in .*: data/train-0000[024]-of-00005"):
        merge(folder)
    run(command(folder, 0))
    merge(folder)
    assert contents(folder) == contents(whole)


def test_parts_that_do_not_belong_together_are_named(parts, tmp_path, capsys):
    other = Path(shutil.copytree(parts[1], tmp_path / "other"))
    plan = shards.read_json(other / PLAN)
    shards.write_json(other / PLAN, plan | {"noise_m": 0.5})
    assert main(["merge", str(tmp_path / "all"), str(parts[0]), str(other)]) == 2
    assert "parts of different datasets: noise_m was 0.012, now 0.5" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "nothing")]) == 2
    assert "holds no part of a dataset" in capsys.readouterr().err
    shards.write_json(other / PLAN, plan)
    name = next(parts[1].glob("data/*.parquet")).name
    (other / "data" / name).write_bytes(next(parts[0].glob("data/*.parquet")).read_bytes())
    with pytest.raises(ValueError, match=f"{name} have different bytes"):
        merge(tmp_path / "conflict", [parts[1], other])
    (other / "data" / name).write_bytes(b"PAR1")
    with pytest.raises(shards.ShardError, match=f"{name} .4 bytes. is truncated"):
        merge(tmp_path / "cut", [parts[0], other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--shard-index", "2", "--num-shards", "2"], r"shard_index=2 must be in \[0, num_shards=2\)"),
        (["pipeline", "--executor", "slrum"], "executor='slrum'; valid: local, slurm, ray"),
        (["pipeline", "--executor", "slurm"], "--partition is empty"),
        (["pipeline", "--num-shards", "3", "--shard-index", "1"], "the pipeline runs all parts"),
        (["pipeline", "--workers", "0"], "workers=0 must be at least 1"),
        (["pipeline"], "--out is empty"),
    ],
)
def test_wrong_options_are_named(arguments, message, capsys):
    import re

    pytest.importorskip("datatrove")
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "-1"])
def test_datatrove_builds_the_same_bytes_and_goes_on_after_a_kill(whole, tmp_path, workers):
    pytest.importorskip("datatrove")
    folder = tmp_path / "dataset"
    arguments = [sys.executable, "-m", "stereovla", "data", "pipeline", "--out", str(folder), *OPTIONS]
    arguments += ["--num-shards", str(MACHINES), "--workers", workers]
    if workers == "1":  # tasks in the process that is killed
        killed_when(arguments, lambda: any(folder.glob("data/*.parquet")))
    run(arguments)
    assert contents(folder) == contents(whole)
    logs = tmp_path / "dataset-logs"
    assert {path.name for path in logs.glob("record/completions/*")} == {"00000", "00001"}
    assert (logs / "join/stats.json").exists()
    run(arguments)  # done: nothing is recorded again
    assert contents(folder) == contents(whole)


def test_slurm_and_ray_get_the_tasks_and_their_resources(tmp_path):
    pipeline = pytest.importorskip("stereovla.dataset_builder.recording.pipeline")
    options = ["--out", str(tmp_path / "d"), *OPTIONS, "--num-shards", "64", "--processes", "8"]
    config = parse(pipeline.PipelineConfig, "pipeline", [*options, "--executor", "slurm", "--partition", "cpu"])
    join = pipeline.make_executor(config)
    record = join.depends
    assert (type(record).__name__, record.tasks, record.cpus_per_task) == ("SlurmPipelineExecutor", 64, 8)
    assert (record.partition, record.time, join.tasks) == ("cpu", "24:00:00", 1)
    script = record.get_launch_file_contents(record.get_sbatch_args(), "launch_pickled_pipeline FILE")
    assert "#SBATCH --cpus-per-task=8" in script and "#SBATCH --partition=cpu" in script
    config = parse(pipeline.PipelineConfig, "pipeline", [*options, "--executor", "ray"])
    record = pipeline.make_executor(config).depends
    assert (type(record).__name__, record.tasks, record.cpus_per_task) == ("RayPipelineExecutor", 64, 8)
