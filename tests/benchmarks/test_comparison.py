"""benchmarks.comparison: every policy of the list trains and is measured, and a comparison that is killed goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mujoco")

from training_runs import one_thread, recorded  # noqa: E402

from stereovla.__main__ import main as stereovla  # noqa: E402
from stereovla.benchmarks import comparison  # noqa: E402
from stereovla.benchmarks.comparison import (  # noqa: E402
    ComparisonOptions,
    Runner,
    compare,
    rollout_arguments,
    training_arguments,
)
from stereovla.benchmarks.comparison_policies import SIZES, entries  # noqa: E402
from stereovla.benchmarks.comparison_table import result_of, write_table  # noqa: E402
from stereovla.command_line import parse  # noqa: E402
from stereovla.dataset_builder.streaming.mixture import load_meta  # noqa: E402
from stereovla.evaluation.options import LiberoOptions  # noqa: E402
from stereovla.train import TrainingOptions, build  # noqa: E402

LIBERO = {"suite": "libero_object", "tasks": [0, 3], "camera_range": "stock", "image_size": 192, "wrist": False}
LIBERO |= {"baseline_m": [0.12, 0.12], "control": "pose", "keyframes": ["grasp", "lift", "place"]}
SCRIPT = Path(__file__).parents[2] / "benchmarks/comparison.sh"
RECIPE = '{"batch_size": 4, "warmup_steps": 1, "checkpoint_every": 2, "pool_episodes": 2, "validation_batches": 0}'


class Here(Runner):
    """Runs the same commands in this process, which saves their start."""

    def run(self, arguments, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with one_thread():
            assert stereovla(list(arguments)) == 0, arguments
        with (folder / "costs.jsonl").open("a") as costs:
            costs.write(json.dumps({"stage": arguments[0], "seconds": 2.0, "core_seconds": 1.0}) + "\n")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return recorded(tmp_path_factory.mktemp("recorded") / "dataset")


def options_of(dataset: str, out: Path, **more) -> ComparisonOptions:
    own = {"steps": 2, "training": RECIPE, "rows": 4, "stride": 1, "episodes": 1, "control_episodes": 1, "max_steps": 3}
    return ComparisonOptions(dataset=dataset, out=str(out), size="tiny", **own | more)


def said(folder: Path, world: dict) -> str:
    """A folder whose meta/info.json says that it was recorded in this world."""
    (folder / "meta").mkdir(exist_ok=True)
    (folder / "meta/info.json").write_text(json.dumps({"build": {"world": world}}))
    return str(folder)


def check(out: Path, names: list[str]) -> None:
    """Every policy has its row, with what it is and what its controls gave."""
    results = json.loads((out / "results.json").read_text())["policies"]
    assert list(results) == ["expert", "still", *(name for name in entries("tiny") if name in names)]
    table = (out / "table.md").read_text().splitlines()
    for name in names:
        result, entry = results[name], entries("tiny")[name]
        (row,) = [line for line in table if line.startswith(f"| {name} |")]
        sees_more = name not in ("mono", "pi0", "pi0-transformers")
        assert set(result["success"]) > {"given"} if sees_more else set(result["success"]) == {"given"}
        assert ("another scene: 0 of" in row) == sees_more
        assert all(rate["episodes"] == 1 for rate in result["success"].values())
        assert result["offline"][0]["rows"] == 4 and result["parameters"] > 100_000
        assert entry.sees in row and result["core_seconds"]["train"] == 1.0


def test_one_of_the_list_is_trained_and_measured_and_nothing_twice(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "Runner", Here)
    compare(options_of(dataset, tmp_path, policies=["attention"]))
    check(tmp_path, ["attention"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    compare(options_of(dataset, tmp_path, policies=["attention"]))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")} == before
    compare(options_of(dataset, tmp_path, policies=["attention"], episodes=2))  # more of the same
    assert result_of(tmp_path / "attention")["success"]["given"]["episodes"] == 2
    with pytest.raises(ValueError, match=r"other options \(steps\)"):
        compare(options_of(dataset, tmp_path, steps=3))


@pytest.mark.slow
def test_the_whole_list_trains_and_is_measured(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "Runner", Here)
    compare(options_of(dataset, tmp_path))
    check(tmp_path, list(entries("tiny")))


@pytest.mark.slow
def test_parts_are_processes_whose_cost_and_whose_failure_is_told(dataset, tmp_path):
    compare(options_of(dataset, tmp_path, policies=["mono"], episodes=0, cores="0"))
    stages = [json.loads(line) for line in (tmp_path / "mono/seed-0/costs.jsonl").read_text().splitlines()]
    assert [stage["stage"] for stage in stages] == ["train", "evaluate-offline"]
    assert all(stage["status"] == 0 and 0 < stage["core_seconds"] for stage in stages)
    bad = options_of(dataset, tmp_path / "bad", policies=["lookup"], stereo_encoder=str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match="(?s)stereovla train failed.*nothing"):
        compare(bad)


@pytest.mark.slow
def test_one_script_records_trains_and_compares(tmp_path):
    numbers = {"seeds": 1, "steps": 2, "rows": 4, "stride": 1, "episodes": 1, "control_episodes": 1, "max_steps": 3}
    words = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    command = ["bash", str(SCRIPT), str(tmp_path), "--policies", "points-base", "--training", RECIPE, *words]
    environment = os.environ | {"PYTHON": sys.executable, "SIZE": "tiny"}
    for _ in range(2):  # what is done is not done again
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert any(line.startswith("| points-base |") for line in done.stdout.splitlines())
    costs = (tmp_path / "comparison/points-base/seed-0/costs.jsonl").read_text().splitlines()
    assert len(costs) == 5  # training, held-out rows, rollouts as they are and in two controls
    trained = json.loads((tmp_path / "comparison/points-base/seed-0/training/options.json").read_text())
    assert trained["stereo_encoder"] == str(tmp_path / "encoder/model")


def test_all_parts_end_with_the_command(tmp_path, monkeypatch):
    """On whichever core they run: who stops the command does not wait for what runs on the others."""
    started = []

    class Sleeping(Runner):
        def run(self, arguments, folder):
            started.append(self.processes.start(["sleep", "600"]))
            if len(started) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            self.processes.wait(started[-1])
            raise RuntimeError("ended")

    monkeypatch.setattr(comparison, "Runner", Sleeping)
    world = {"camera_range": "small", "image_size": 64, "num_objects": 3}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        compare(options_of(said(tmp_path, world), tmp_path / "out", cores="0,0", policies=["mono"]))
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert [process.wait() for process in started] == [-signal.SIGTERM] * 2


SLOW = ("demo", "lab")


@pytest.mark.parametrize("size", [pytest.param(size, marks=[pytest.mark.slow] * (size in SLOW)) for size in SIZES])
def test_every_policy_of_every_size_is_built_with_the_same_trunk(size, dataset, tmp_path):
    """By the options of `stereovla train` that the list gives."""
    options = ComparisonOptions(dataset=dataset, out=str(tmp_path), size=size)
    meta, trunks, taught = load_meta(dataset), set(), set()
    for name, entry in options.chosen.items():
        arguments = training_arguments(entry, 0, tmp_path / name, options)[1:]
        parsed = parse(TrainingOptions, "train", arguments)
        for option in ("steps", "batch_size", "learning_rate", "warmup_steps", "mixture", "mixed_precision"):
            if option in options.recipe:
                assert getattr(parsed, option) == options.recipe[option], (name, option)
        model, _ = build(parsed, meta)
        text, config = model.config.text_config, model.config
        trunk = [text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.head_dim]
        trunk += [config.expert_hidden_size, config.chunk_size, config.image_size, config.patch_size]
        trunks.add(tuple(trunk))
        if not entry.preset.startswith("pi0-"):
            losses = ("action", "pointing", "keyframe", "naming")
            weights = {name: getattr(config, f"{name}_loss_weight") for name in losses}
            taught.add((*weights.items(), config.num_pointers, config.state_history, config.flow_draws))
    assert len(trunks) == 1, trunks
    assert len(taught) == 1, taught


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution_horizon": 9}, "--execution_horizon is 9; policies predict 8 actions"),
        ({"stride": 0}, "--stride is 0; it must be at least 1"),
        ({"cores": "0,a"}, "--cores has 'a'"),
        ({"training": '{"config": "{}", "seed": 3}'}, "--training has config, seed, which the policies and options"),
        ({"training": '{"batchsize": 4}'}, "unknown option --batchsize; did you mean --batch_size"),
        ({"training": '{"batch_size": 0}'}, "batch_size is 0"),
        ({"max_steps": -1}, "--max_steps is -1"),
    ],
)
def test_mistakes_are_told_before_anything_runs_and_can_be_mended(options, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(options_of(dataset, tmp_path / "out", policies=["mono"], **options))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="--policies has stereo; there are correlation, correlation-alone"):
        options_of(dataset, tmp_path, policies=["stereo"])
    with pytest.raises(ValueError, match="--size is 'large'; it must be one of tiny, demo"):
        entries("large")
    with pytest.raises(ValueError, match="meta/info.json names no camera_range, image_size, num_objects"):
        options_of(said(tmp_path, {}), tmp_path).evaluation(1)


def test_rollouts_are_in_the_suite_of_libero_that_a_dataset_was_recorded_in(tmp_path):
    def parsed(**options):
        counts = {"episodes": 6, "control_episodes": 2, "max_steps": 0}
        own = options_of(said(tmp_path, LIBERO), tmp_path, **counts | options)
        evaluate, libero, *words = rollout_arguments("MODEL", tmp_path / "given", "given", own)
        assert (evaluate, libero) == ("evaluate", "libero")
        return parse(LiberoOptions, "libero", words)

    told = parsed()
    assert (told.suite, told.tasks, told.image_size, told.baseline_m) == ("libero_object", [0, 3], 192, 0.12)
    assert (told.policies, told.camera_range, told.episodes, told.max_steps) == (["MODEL"], "stock", 3, 0)
    other = parsed(world='{"suite": "libero_object_swap", "camera_range": "large", "baseline_m": 0.063}', max_steps=40)
    assert (other.suite, other.camera_range, other.baseline_m) == ("libero_object_swap", "large", 0.063)
    assert (other.max_steps, other.tasks) == (40, [0, 3])
    for options, words in (
        ({"episodes": 5}, "5 episodes of 2 tasks: there must be as many of each, and at most 50"),
        ({"episodes": 102}, "102 episodes of 2 tasks"),
        ({"world": '{"num_objects": 3}'}, "--world names num_objects; of LIBERO's there are suite, tasks"),
    ):
        with pytest.raises(ValueError, match=words):
            parsed(**options)
    said(tmp_path, LIBERO | {"baseline_m": [0.06, 0.2]})
    with pytest.raises(ValueError, match="--world names no baseline_m, and .* has all from 0.06 to 0.2 m"):
        options_of(str(tmp_path), tmp_path).evaluation(2)


def test_numbers_of_the_table_are_those_of_the_logs(tmp_path):
    (tmp_path / "comparison.json").write_text("{}")
    for seed, wins in enumerate((3, 1)):
        folder = tmp_path / f"mono/seed-{seed}/given/rollouts/trained"
        folder.mkdir(parents=True)
        lines = [json.dumps({"seed": number, "success": number < wins}) + "\n" for number in range(4)]
        # cut off by a kill, and once more what a second process had done too
        (folder / "episodes.jsonl").write_text("".join([*lines, lines[0]]) + '{"seed": 9, "succ')
        (folder / "run.json").write_text(json.dumps({"wanted": 4 + seed}))
        twice = tmp_path / f"mono/seed-{seed}/left_twice/rollouts/trained"
        twice.mkdir(parents=True)
        (twice / "episodes.jsonl").write_text("".join(line.replace("true", "false") for line in lines[:2]))
        cost = {"stage": "train", "seconds": 900, "core_seconds": 1800}
        (tmp_path / f"mono/seed-{seed}/costs.jsonl").write_text(json.dumps(cost) + "\n")
    row = write_table(tmp_path, entries("tiny")).read_text().splitlines()[2]
    assert row.startswith("| mono | left view |  | 4 of 8 (22 to 78 %), 1 still to do | 3, 1 |")
    assert "the left view twice: 0 of 4 (0 to 49 %), as it is 3 of these" in row and row.endswith("| 1.00 |")
