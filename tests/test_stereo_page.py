"""The code of docs/stereo_encoder.md, run from another folder on an encoder cut out of a tiny untrained policy."""

import re
from pathlib import Path

from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent


def test_the_pages_code_runs(fresh, tmp_path):
    page = (ROOT / "docs" / "stereo_encoder.md").read_text()
    save_tiny_checkpoint(tmp_path / "demo" / "training" / "model", preset="demo")  # the model that the page names
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    done = fresh.run("".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)), folder=tmp_path)
    depth, error = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"nearest point: \d+\.\d\d m", depth)
    assert re.fullmatch(r"end-point error: \d+\.\d\d px", error)
    assert Image.open(tmp_path / "disparity_of_left.png").size == (96, 96)
    assert Image.open(tmp_path / "disparity.png").size == (900, 290)
