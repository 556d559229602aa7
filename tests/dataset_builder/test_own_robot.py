"""docs/own_robot.md: its YAML file, its commands and its examples, run as they stand."""

import json
import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path

from command_lines import COMMAND

from stereovla.__main__ import main
from stereovla.dataset_builder.dataset.shards import read_json

ROOT = Path(__file__).parents[2]
PORT = "8765"


def test_the_recipe_runs_from_the_recording_to_the_served_policy(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/own_robot.md").read_text()
    (rig,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    look, ask = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (promised,) = re.findall(r"```\n(my_dataset has .*?)\n```", text)
    install, *commands = re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL)
    assert install == 'pip install ".[data,serve]"'  # the environment of the tests has it
    (tmp_path / "rig.yaml").write_text(rig)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    *commands, serve = [shlex.split(command)[1:] for command in commands]
    printed = {}
    for words in commands:
        assert main(words) == 0, capsys.readouterr().err
        printed[" ".join(word for word in words[:2] if "-" not in word)] = capsys.readouterr().out
    assert list(printed) == ["data import", "data check", "data export", "train", "evaluate offline"]
    assert promised in printed["train"].splitlines()
    splits = read_json(Path("my_dataset/meta/info.json"))["splits"]
    assert {split: entry["frames"] for split, entry in splits.items()} == {"train": 12, "validation": 6}
    info = read_json(Path("my_dataset_lerobot/meta/info.json"))
    assert info["codebase_version"] == "v3.0" and info["total_episodes"] == 3
    report = json.loads(Path("my_report/offline.json").read_text())
    assert report["rows"] == 6 and report["action"]["still_mm"]["mean"] > 0 and report["box"]["left_iou"] is None

    assert serve[:2] == ["serve", "--model"] and serve[-2:] == ["--port", PORT]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*COMMAND, *serve[:-1], "0"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = server.stdout.readline().split()[-1]
        Path("example.py").write_text(look + ask.replace(f"ws://127.0.0.1:{PORT}", url))
        runpy.run_path("example.py")
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()
    assert capsys.readouterr().out == "(64, 64, 3) (4, 7) (4, 7) pick up the cup\n(8, 7) True\n"
