"""docs/own_robot.md: its YAML file, its commands and its example, run as they stand."""

import re
import runpy
import shlex
from pathlib import Path

from command_lines import data as main

from stereovla.dataset_builder.dataset.shards import read_json

ROOT = Path(__file__).parents[2]


def test_the_recipe_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/own_robot.md").read_text()
    (rig,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    install, *commands = re.findall(r"```bash\n(.*?)\n```", text, flags=re.DOTALL)
    assert install == 'pip install ".[data]"'  # the environment of the tests has it
    (tmp_path / "rig.yaml").write_text(rig)
    (tmp_path / "example.py").write_text(example)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names = []
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["stereovla", "data"]
        assert main(words[2:]) == 0, capsys.readouterr()
        names.append(words[2])
    assert names == ["import", "check", "export"]
    capsys.readouterr()
    runpy.run_path("example.py")
    assert capsys.readouterr().out == "(64, 64, 3) (4, 7) (4, 7) pick up the cup\n"
    splits = read_json(Path("my_dataset/meta/info.json"))["splits"]
    assert {split: entry["frames"] for split, entry in splits.items()} == {"train": 12, "validation": 6}
    info = read_json(Path("my_dataset_lerobot/meta/info.json"))
    assert info["codebase_version"] == "v3.0" and info["total_episodes"] == 3
