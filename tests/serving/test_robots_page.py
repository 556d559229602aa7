"""docs/robots.md: its program drives the simulator by a served policy, and records it."""

import json
import re
from pathlib import Path

import pytest
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import save_tiny_checkpoint

from stereovla.sources import load_checkpoint

pytest.importorskip("mujoco")
ADDRESS = "ws://127.0.0.1:8765"


def test_the_pages_program_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/robots.md").read_text()
    program, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert ADDRESS in program
    monkeypatch.chdir(tmp_path)
    url, stop = serve_in_thread(policy_server(load_checkpoint(str(save_tiny_checkpoint(tmp_path / "model")))))
    try:
        exec(compile(program.replace(ADDRESS, url), "docs/robots.md", "exec"), {})
    finally:
        stop()
    assert re.search(r"^False \{.*'commands': \d+", capsys.readouterr().out, re.MULTILINE)
    header = json.loads((tmp_path / "rollouts/episode_000000/episode.json").read_text())
    assert header["success"] is False and header["views"] == {"left": [96, 96], "right": [96, 96]}
