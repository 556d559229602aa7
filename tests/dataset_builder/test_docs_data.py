"""The commands and the program of docs/data.md run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mujoco")
pytest.importorskip("datatrove")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "sh", "python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kind, text in blocks:
        if kind == "sh":
            for line in text.strip().splitlines():
                assert line.startswith("stereovla data ")
                command = [sys.executable, *line.split()[1:], *(["--image-size", "32"] if "--preset" in line else [])]
                subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        else:
            (tmp_path / "program.py").write_text(text)
            command = [sys.executable, "program.py"]
            done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
            count, skipped = done.stdout.split(maxsplit=1)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "dataset/data").iterdir()}
    for name in ("merged", "piped"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name / "data").iterdir()} == whole
    assert int(count) > 50 and skipped.strip() == "{}"
