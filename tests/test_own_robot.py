"""docs/own_robot.md: its YAML file and its commands, run as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_recipe_runs(tmp_path):
    text = (ROOT / "docs/own_robot.md").read_text()
    (rig,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    install, convert, check, export = re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL)
    assert install == 'pip install ".[data]"'  # the environment of the tests has it
    (tmp_path / "rig.yaml").write_text(rig)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for line in (convert, check, export):
        program, *arguments = shlex.split(line)
        assert program == "python"
        run([sys.executable, *arguments])
    assert run([sys.executable, "-c", example]) == "(64, 64, 3) (4, 7) (4, 7) pick up the cup\n"
    info = json.loads((tmp_path / "my_dataset/meta/info.json").read_text())
    assert {split: entry["frames"] for split, entry in info["splits"].items()} == {"train": 12, "validation": 6}
    info = json.loads((tmp_path / "my_dataset_lerobot/meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["total_episodes"] == 3
