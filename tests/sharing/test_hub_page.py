"""docs/hub.md: its help text is that of the command, and all its commands and programs run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import COMMAND, push
from hub_client import client, environment
from hub_server import serve
from huggingface_hub import DatasetCard, ModelCard
from synthetic_dataset import write_finished_dataset

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/hub.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_help_is_that_of_the_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        push(["--help"])
    assert capsys.readouterr().out == blocks("text")[1]


def shape(text: str) -> list[str]:
    """Lines without what differs from run to run."""
    text = re.sub(r"(now at|revision) \w+", r"\1", text)
    return [re.sub(r"[\d,.]+(e-\d+)?", "0", line).strip() for line in text.splitlines()]


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    """From recorded frames to an adapter on the Hub, and everything used by strangers."""
    pytest.importorskip("mujoco")
    write_finished_dataset(tmp_path / "other", "other_arm")
    with serve() as hub, client(hub.url, tmp_path / "stranger", ours=False) as stranger:
        hub.add("dataset", "you/other_arm", tmp_path / "other")
        known = environment(hub.url, tmp_path / "home")
        own = ["--steps", "2", "--batch_size", "2", "--validation_batches", "0", "--pool_episodes", "1"]
        shown = ""
        for line in "".join(blocks("sh")).strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "stereovla"
            if words[1] == "push" and "you/policy-other-arm" in line:
                dry = subprocess.run(
                    [*COMMAND, *words[1:], "--dry-run"],
                    cwd=tmp_path, env=known, capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert dry.returncode == 0, dry.stderr
                shown = dry.stdout
            words += own if words[1] == "train" else []
            done = subprocess.run(
                [*COMMAND, *words[1:]], cwd=tmp_path, env=known, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert shape(shown) == shape(blocks("text")[0]), shown
        printed = []
        for program in blocks("python"):
            mine = "from stereovla.modeling_stereovla" in program
            if mine:
                run = subprocess.run(
                    [sys.executable, "-c", program],
                    cwd=tmp_path,
                    env=known,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert run.returncode == 0, run.stderr
                printed.append(run.stdout.splitlines()[-1])
            else:
                printed.append(stranger.run(program).stdout.splitlines()[-1])
        model = "StereoVLAForActionPrediction"
        assert printed[:2] == [f"{model} ['franka_panda']"] * 2
        assert printed[2] == f"{model} ['franka_panda', 'other_arm']" and printed[3].endswith("(64, 64) 7")
        cards = {name: repo.files()["README.md"].decode() for (_, name), repo in hub.repos.items()}
        for name, kind in (
            ("you/policy", ModelCard),
            ("you/policy-other-arm", ModelCard),
            ("you/demonstrations", DatasetCard),
        ):
            card = kind(cards[name])
            (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
            stranger.run(snippet + ("\nassert actions.shape == (1, 8, 7)" if kind is ModelCard else ""))
        assert ModelCard(cards["you/policy"]).data.datasets == ["you/demonstrations@v1"]
        assert ModelCard(cards["you/policy-other-arm"]).data.base_model == "you/policy"
