"""The folder of a training: its options, its lock, which checkpoints it goes on from and which it removes."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from accelerate import PartialState
from command_lines import COMMAND
from training_runs import ENVIRONMENT

from stereovla.__main__ import main
from stereovla.command_line import parse
from stereovla.train import TrainingOptions
from stereovla.training.checkpoint_folders import checkpoints, complete_checkpoint, last_checkpoint, remove_old
from stereovla.training.depth import DepthOptions
from stereovla.training.grounding import GroundingOptions
from stereovla.training.reward import RewardOptions
from stereovla.training.running import begin_run, own_folder
from stereovla.training.stereo import StereoOptions

COMMANDS = {
    "train": (TrainingOptions, ["train", "--tracker", "none"]),
    "stereo": (StereoOptions, ["pretrain", "stereo"]),
    "depth": (DepthOptions, ["pretrain", "depth"]),
    "grounding": (GroundingOptions, ["pretrain", "grounding"]),
    "reward": (RewardOptions, ["pretrain", "reward", "--model", "m"]),
}


@pytest.fixture(scope="module")
def state() -> PartialState:
    return PartialState(cpu=True)


def options(output: Path, *more: str) -> TrainingOptions:
    given = ["--preset", "tiny", "--dataset", "d", "--output_dir", str(output), *more]
    return parse(TrainingOptions, "train.py", given)


def write_checkpoint(output: Path, step: int) -> Path:
    partial = output / f"checkpoint-{step:07d}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(bytes(range(step)))
    (partial / "trainer.json").write_text(json.dumps({"step": step}))
    folder = partial.with_suffix("")
    complete_checkpoint(partial, folder)
    return folder


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def test_options_are_written_once_and_whole(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / ".options.json.tmp").write_text('{"dataset": [')  # as a kill leaves it
    begin_run(options(output), 1, output)
    (output / "losses.jsonl").touch()
    written = (output / "options.json").stat()
    assert json.loads((output / "options.json").read_text()) == asdict(options(output))
    begin_run(options(output), 1, output)
    again = (output / "options.json").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    with pytest.raises(ValueError, match=r"holds a run with other options \(seed, steps\)"):
        begin_run(options(output, "--seed", "1", "--steps", "7"), 1, output)
    # a version that did not know some options yet
    older = {
        name: value for name, value in asdict(options(output)).items() if name not in ("depth_points", "lora_rank")
    }
    (output / "options.json").write_text(json.dumps(older))
    begin_run(options(output), 1, output)
    with pytest.raises(ValueError, match=r"other options \(depth_points\)"):
        begin_run(options(output, "--depth_points", "off"), 1, output)
    (output / "options.json").write_text('{"dataset": [')
    with pytest.raises(ValueError, match="options.json is no valid JSON"):
        begin_run(options(output), 1, output)


@pytest.mark.parametrize("before", ['{"dataset": [', '{"steps": 3}', None])
def test_a_command_may_be_corrected_until_something_was_trained(before, tmp_path):
    """A mistyped dataset is not the run's for ever, and what is left of half-written options stands in nobody's way."""
    if before is not None:
        (tmp_path / "options.json").write_text(before)
    begin_run(options(tmp_path, "--seed", "1"), 1, tmp_path)
    begin_run(options(tmp_path), 1, tmp_path)
    assert json.loads((tmp_path / "options.json").read_text()) == asdict(options(tmp_path))
    write_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match=r"other options \(seed\)"):
        begin_run(options(tmp_path, "--seed", "1"), 1, tmp_path)


@pytest.mark.parametrize("kept", ["options.json", "model/training.json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_run_of_other_options_is_refused_by_every_command(command, kept, tmp_path, capsys):
    kind, words = COMMANDS[command]
    preset = "depthvla-tiny" if command == "depth" else "tiny"
    given = ["--dataset", "panda", "--preset", preset, "--output_dir", str(tmp_path / "run")]
    skip = words.index(command) + 1
    record = asdict(parse(kind, "", [*words[skip:], *given]))
    (tmp_path / "run/model").mkdir(parents=True)
    finished = {"options": record} if kept == "model/training.json" else {}
    (tmp_path / "run/model/training.json").write_text(json.dumps(finished))
    if kept == "options.json":
        (tmp_path / "run/options.json").write_text(json.dumps(record))
    assert main([*words, *given]) == 0
    assert "is complete" in capsys.readouterr().out
    assert main([*words, *given, "--dataset", "ur5", "--seed", "7", "--steps", "5000"]) == 2
    assert "holds a run with other options (dataset, seed, steps)" in capsys.readouterr().err


def test_what_is_in_the_way_of_the_result_is_named_before_the_first_step(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"model is in the way .*lacks training.json"):
        begin_run(options(tmp_path), 1, tmp_path)


def test_one_training_at_a_time(state, tmp_path):
    with own_folder(options(tmp_path), state):
        with pytest.raises(RuntimeError, match=f"another process is training in {tmp_path}; wait for it or end it"):
            with own_folder(options(tmp_path), state):
                pass
        told = subprocess.run(
            [*COMMAND, "train", "--preset", "tiny", "--dataset", "d", "--output_dir", str(tmp_path)],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        assert told.returncode == 2 and "error: another process is training in" in told.stderr
    with own_folder(options(tmp_path), state) as complete:
        assert complete is None


@pytest.mark.slow
def test_a_kill_frees_the_folder(state, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from accelerate import PartialState\n"
        "sys.path.insert(0, 'tests/training'); from test_run_folder import options; "
        "from stereovla.training.running import own_folder\n"
        "with own_folder(options(Path(sys.argv[1])), PartialState(cpu=True)):\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    environment = ENVIRONMENT | {"PYTHONPATH": f"{root / 'tests'}:{ENVIRONMENT.get('PYTHONPATH', '')}"}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match="another process"), own_folder(options(tmp_path), state):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with own_folder(options(tmp_path), state) as complete:
        assert complete is None


def test_only_what_the_run_wrote_is_removed(tmp_path):
    kept = ["checkpoint-0000004-keep-for-paper", "checkpoint-best", "checkpoint-0000001.notes", "my-checkpoint-3"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1")
    for step in (2, 4, 6, 8, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-0000004" / "NOTES.md").write_text("the one of figure 3")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-0000001").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-0000003").mkdir()  # no checksums: somebody else's
    remove_old(tmp_path, 2)
    left = [*kept, "elsewhere", *(f"checkpoint-000000{number}" for number in (1, 3, 4, 8)), "checkpoint-0000010"]
    assert names(tmp_path) == sorted(left)


def test_what_kills_leave_is_removed(tmp_path):
    for name in (
        "checkpoint-0000002.partial",
        "checkpoint-0000002.old",
        "checkpoint.partial",
        "checkpoint-4-a.partial",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1")
    begin_run(options(tmp_path), 1, tmp_path)
    assert names(tmp_path) == ["checkpoint-4-a.partial", "options.json"]


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (flip, r"model\.safetensors is not what was saved"),
        (cut, r"model\.safetensors is not what was saved"),
        (lambda folder: (folder / "trainer.json").unlink(), r"trainer\.json is missing"),
        (lambda folder: (folder / "checksums.json").write_text('{"model'), r"checksums\.json cannot be read"),
        (lambda folder: (folder / "checksums.json").unlink(), r"checksums\.json cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), r"checksums\.json is no table"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(harm, told, state, tmp_path, capsys):
    for step in (4, 12, 8):
        write_checkpoint(tmp_path, step)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["04", "08", "12"]
    assert last_checkpoint(tmp_path, state).name == "checkpoint-0000012"
    harm(tmp_path / "checkpoint-0000012")
    assert last_checkpoint(tmp_path, state).name == "checkpoint-0000008"
    said = capsys.readouterr().out
    assert re.search(rf"checkpoint-0000012 is damaged \(.*{told}", said)
    assert "set aside as checkpoint-0000012.damaged;" in said and "takes the steps up to 12 again" in said
    # nothing is lost, and the place is free for the same step, more than once
    assert (tmp_path / "checkpoint-0000012.damaged").is_dir()
    harm(write_checkpoint(tmp_path, 12))
    assert last_checkpoint(tmp_path, state).name == "checkpoint-0000008"
    assert (tmp_path / "checkpoint-0000012.damaged-1").is_dir()
    for step in (4, 8):
        harm(tmp_path / f"checkpoint-{step:07d}")
    assert last_checkpoint(tmp_path, state) is None
