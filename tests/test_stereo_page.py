"""The code of docs/stereo_encoder.md, run from another folder on an encoder cut out of a tiny untrained policy."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent


def test_the_pages_code_runs(tmp_path):
    page = (ROOT / "docs" / "stereo_encoder.md").read_text()
    save_tiny_checkpoint(tmp_path / "demo" / "training" / "model", preset="demo")  # the model that the page names
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "page.py").write_text("".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, tmp_path / "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    depth, error = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"nearest point: \d+\.\d\d m", depth)
    assert re.fullmatch(r"end-point error: \d+\.\d\d px", error)
    assert Image.open(tmp_path / "disparity_of_left.png").size == (96, 96)
    assert Image.open(tmp_path / "disparity.png").size == (900, 290)
