"""Closed-loop rollouts: the expert picks, the log survives kills, results do not depend on how the work is shared."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_lines import evaluate as main
from tiny_checkpoint import save_tiny_checkpoint

from stereovla.command_line import parse
from stereovla.evaluation.episode_log import EpisodeLog
from stereovla.evaluation.options import RolloutOptions
from stereovla.evaluation.policies import ExpertPolicy, Policy, StillPolicy
from stereovla.evaluation.policy_specs import make_policy
from stereovla.evaluation.rollouts import RolloutConfig, film, run_episodes, summarise
from stereovla.evaluation.workers import roll_out
from stereovla.simulation import Expert, WorldConfig
from stereovla.sources import InputError

ROOT = Path(__file__).parents[2]
SMALL = WorldConfig(image_size=64)
ONE_STEP = ["--policies", "still", "--max_steps", "1", "--processes", "1"]


def by_seed(records) -> dict:
    return {record["seed"]: record for record in records}


@pytest.fixture(scope="module")
def expert_records() -> dict:
    """Six episodes, one world at a time, in this process."""
    return by_seed(run_episodes(ExpertPolicy(), iter(range(6)), RolloutConfig(SMALL, max_steps=50), environments=1))


def test_the_expert_picks_up_and_an_arm_that_stays_still_does_not(expert_records):
    assert all(record["success"] and record["progress"] == 1 for record in expert_records.values())
    assert all(5 < record["steps"] <= 50 for record in expert_records.values())
    config = RolloutConfig(SMALL, max_steps=5)
    for record in run_episodes(StillPolicy(), iter(range(2)), config, 2):
        assert not record["success"] and record["steps"] == 5 and record["progress"] < 0.5


def test_results_do_not_depend_on_lockstep_or_processes(expert_records, tmp_path):
    config = RolloutConfig(SMALL, max_steps=50)
    assert by_seed(run_episodes(ExpertPolicy(), iter(range(6)), config, environments=4)) == expert_records
    log = EpisodeLog(tmp_path, {})
    records = roll_out("expert", range(4), config, log, processes=2, environments=2)
    assert records == [expert_records[seed] for seed in range(4)]
    assert roll_out("expert", range(6), config, log, processes=1) == [expert_records[seed] for seed in range(6)]
    assert by_seed(json.loads(line) for line in log.path.read_text().splitlines()) == expert_records


class WrongExpert(Policy):
    """Picks another object than the one it is told."""

    name = "wrong"

    def reset(self, slot, world):
        self.world, self.expert = world, Expert(world)
        self.other = next(item.name for item in world.objects if item.name != world.target_name)

    def act(self, observations):
        told = self.world.target_name
        self.world.choose_target(self.other)
        plan = self.expert.plan(3)[0]
        self.world.choose_target(told)
        return [plan]


def test_lifting_another_object_is_no_success():
    policy = WrongExpert()
    (record,) = run_episodes(policy, iter([1]), RolloutConfig(SMALL, max_steps=40), 1)
    assert not record["success"] and record["wrong_object"] == policy.other != record["target"]
    assert summarise([record])["wrong_object_rate"] == 1


class Recorder(Policy):
    """Keeps what it is shown; its actions say which of the chunk they are."""

    name = "recorder"
    needs_images = True

    def __init__(self):
        self.seen = []

    def act(self, observations):
        self.seen += observations
        chunk = np.zeros((8, 7), np.float32)
        chunk[:, 2] = 0.01
        return [chunk for _ in observations]


def test_a_policy_sees_every_state_and_looks_once_per_chunk():
    policy = Recorder()
    list(run_episodes(policy, iter([3]), RolloutConfig(SMALL, execution_horizon=3, max_steps=7), 1))
    assert [seen.step for seen in policy.seen] == [0, 3, 6]
    assert [len(seen.states) for seen in policy.seen] == [1, 4, 7]
    np.testing.assert_array_equal(policy.seen[2].states[:4], policy.seen[1].states)
    # 1 cm per step, one step late at most
    np.testing.assert_allclose(policy.seen[2].states[-1, 2] - policy.seen[1].states[-1, 2], 0.03, atol=0.005)
    assert policy.seen[0].left.shape == (64, 64, 3) and (policy.seen[0].left != policy.seen[0].right).any()


def test_a_film_is_the_same_episode_seen_at_every_step(expert_records):
    frames, record = film(ExpertPolicy(), 2, RolloutConfig(SMALL, max_steps=50))
    assert record == expert_records[2]
    assert [frame.step for frame in frames] == list(range(record["steps"] + 1))


def test_a_film_shows_depth_to_a_policy_that_needs_it():
    policy = StillPolicy()
    policy.needs_depth = True
    frames, _ = film(policy, 2, RolloutConfig(SMALL, max_steps=1))
    assert all(
        frame.depths["left"].shape == frame.left.shape[:2] and frame.depths["left"].max() > 0 for frame in frames
    )


def test_too_short_chunks_are_refused():
    with pytest.raises(ValueError, match="execution_horizon is 3, but the policy predicts 2"):
        list(run_episodes(StillPolicy(2), iter([0]), RolloutConfig(SMALL, execution_horizon=3), 1))


def test_a_model_rolls_out_the_same_alone_and_in_company(tmp_path):
    policy = make_policy(str(save_tiny_checkpoint(tmp_path / "model")))
    config = RolloutConfig(SMALL, max_steps=4)
    alone = by_seed(run_episodes(policy, iter(range(3)), config, 1))
    together = by_seed(run_episodes(policy, iter(range(3)), config, 3))
    for seed, record in alone.items():
        assert together[seed]["progress"] == pytest.approx(record["progress"], abs=0.02)


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_cut_off_line_is_done_again_and_damage_elsewhere_is_an_error(tmp_path):
    log = EpisodeLog(tmp_path, {"a": 1})
    for seed in range(3):
        log.append({"seed": seed})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-4])
    assert list(EpisodeLog(tmp_path, {"a": 1}).records) == [0, 1]
    assert log.path.read_bytes() == whole[: whole[:-1].rfind(b"\n") + 1]
    log.path.write_bytes(b"x" + whole)
    with pytest.raises(InputError, match="line 1: no JSON"):
        EpisodeLog(tmp_path, {"a": 1})


def test_other_options_do_not_mix(tmp_path):
    EpisodeLog(tmp_path, {"max_steps": 50, "kind": "expert"}).append({"seed": 0})
    with pytest.raises(InputError, match="max_steps was 50 and is now 40"):
        EpisodeLog(tmp_path, {"max_steps": 40, "kind": "expert"})
    assert not EpisodeLog(tmp_path, {"max_steps": 40, "kind": "expert"}, restart=True).records


def test_killed_at_any_moment_the_same_command_goes_on(expert_records, tmp_path):
    command = [
        sys.executable,
        "-m",
        "stereovla",
        "evaluate",
        "rollout",
        "--policies",
        "expert",
        "--baseline_seeds",
        "6",
    ]
    command += ["--image_size", "64", "--processes", "2", "--environments", "1", "--out", str(tmp_path)]
    log = tmp_path / "rollouts/expert/episodes.jsonl"
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while not (log.is_file() and log.read_bytes().count(b"\n") >= 1):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGSTOP)  # on a busy machine the workers would be done before the kill arrives
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
        os.killpg(running.pid, signal.SIGCONT)
    worker_gone = time.monotonic() + 600  # the worker notices that its parent is gone
    while children_of_group(running.pid) and time.monotonic() < worker_gone:
        time.sleep(0.1)
    assert not children_of_group(running.pid)
    kept = log.read_bytes()
    assert 1 <= kept.count(b"\n") < 6
    with log.open("ab") as file:
        file.write(b'{"seed": 5, "succ')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "expert: 6 of 6 succeeded, 100.0 %" in done.stdout
    assert log.read_bytes().startswith(kept)
    assert by_seed(json.loads(line) for line in log.read_text().splitlines()) == expert_records


def children_of_group(group: int) -> list[str]:
    """Process ids of a process group that are still running."""
    alive = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            alive.append(entry.name)
    return alive


def test_two_processes_never_write_one_log(tmp_path):
    hold = (
        "import sys; from pathlib import Path; from stereovla.evaluation.episode_log import EpisodeLog;"
        "log = EpisodeLog(Path(sys.argv[1]), {}); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process rolls out there"):
            EpisodeLog(tmp_path, {})
        other.kill()
        other.wait()
    EpisodeLog(tmp_path, {})


def test_an_error_in_a_worker_is_told_and_the_environment_restored(tmp_path):
    before = dict(os.environ)
    config = RolloutConfig(SMALL, execution_horizon=9)
    with pytest.raises(RuntimeError, match="^execution_horizon is 9, but the policy predicts 8"):
        roll_out("still", range(2), config, EpisodeLog(tmp_path, {}), processes=2)
    assert dict(os.environ) == before


# ---- command line ----------------------------------------------------------------------------------------------------


def test_presets_give_defaults_that_options_replace():
    options = parse(RolloutOptions, "rollout", ["--out", "x", "--model", "y", "--preset", "tiny", "--seeds", "7"])
    assert (options.seeds, options.baseline_seeds, options.image_size) == (7, 1, 64)
    assert options.specs() == ["expert", "y", "untrained:y"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rollin"], "unknown command stereovla evaluate rollin; did you mean rollout?"),
        (["rollout", "--model", "x"], "--out is missing"),
        (["rollout", "--out", "OUT"], "give --model CHECKPOINT, or --policies"),
        (["rollout", "--out", "OUT", "--model", "x", "--policies", "still"], "and not both"),
        (["rollout", "--out", "OUT", "--policies", "nothing"], "'nothing' is neither a folder nor a Hub id"),
        (["rollout", "--out", "OUT", *ONE_STEP, "--seedz", "3"], "unknown option --seedz; did you mean --seeds?"),
        (["rollout", "--out", "OUT", *ONE_STEP, "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["rollout", "--out", "OUT", *ONE_STEP, "--first_seed", str(2**32 - 5)], "seeds from 2\\*\\*32 on belong to"),
        (["rollout", "--out", "OUT", *ONE_STEP, "--camera_range", "smal"], "did you mean 'small'"),
        (["rollout", "--out", "OUT", *ONE_STEP, "--world", "{"], "is no JSON"),
        (["rollout", "--out", "OUT", *ONE_STEP, "--world", '{"tabel": 1}'], "tabel"),
        (["offline", "--out", "OUT", "--model", "x", "--dataset", "y"], "neither a folder nor a Hub id"),
        (["offline", "--out", "OUT", "--model", "x"], "--dataset is missing"),
        (["report", "--out", "OUT"], "holds neither rollouts nor offline.json"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments, message, tmp_path, capsys):
    assert main([str(tmp_path) if argument == "OUT" else argument for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_names_the_commands_and_options(capsys):
    assert main(["--help"]) == 0
    assert "rollout" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["rollout", "--help"])
    assert "--execution_horizon" in capsys.readouterr().out
