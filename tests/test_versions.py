"""The oldest and the newest versions that setup.py allows: a published folder loads and predicts on both."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from house import ROOT
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair

from stereovla.evaluation.model_policy import load_checkpoint

# with what they need in versions of their own; the newest is the last that was tried
VERSIONS = {
    "oldest": (
        "transformers==5.20.0 huggingface_hub==1.31.0 datasets==4.7.0 accelerate==1.10.1 peft==0.20.0 trl==1.16.0 "
        "httpx<1 httpcore<2 dill<0.4.1 multiprocess<0.70.19 fsspec<=2026.2.0"
    ),
    "newest": "transformers==5.24.0 huggingface_hub==2.4.0 datasets==5.2.0",
}
PROGRAM = """
import json, sys
import numpy as np, torch, transformers
from transformers import AutoModel, AutoProcessor
folder, views, state, embodiment = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=list(views), text="pick up the red cube", state=state, embodiment=embodiment)
found = [transformers.__version__]
for thinks in (False, True):
    noise = torch.zeros(1, model.config.chunk_size, model.config.action_dim)
    chunk = model.predict_action(**inputs, noise=noise, chain_of_thought=thinks)
    found.append(processor.decode_actions(chunk, embodiment=embodiment).tolist())
assert "stereovla" not in sys.modules
print(json.dumps(found))
"""


def test_setup_allows_the_oldest_versions_that_are_tried():
    stated = dict(re.findall(r'"(\w+)>=([\d.]+),?[^"]*"', (ROOT / "setup.py").read_text()))
    oldest = dict(re.findall(r"(\w+)==([\d.]+)", VERSIONS["oldest"]))
    for name, version in oldest.items():
        assert version.startswith(stated[name]), f"setup.py allows {name} {stated[name]}, tried is {version}"


@pytest.mark.slow
@pytest.mark.parametrize("which", VERSIONS)
def test_a_published_folder_predicts_the_same(which, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, *VERSIONS[which].split()], check=True)
    folder, views, state = save_tiny_checkpoint(tmp_path / "model"), stereo_pair(), [0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0]
    np.save(tmp_path / "views.npy", np.stack(views))
    told = [str(folder), str(tmp_path / "views.npy"), json.dumps(state), EMBODIMENT]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *told], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version, *chunks = json.loads(done.stdout.splitlines()[-1])
    assert version == re.search(r"transformers==([\d.]+)", VERSIONS[which])[1]
    model, processor = load_checkpoint(str(folder))
    inputs = processor(images=list(views), text="pick up the red cube", state=state, embodiment=EMBODIMENT)
    for thinks, chunk in zip((False, True), chunks, strict=True):
        noise = inputs["state"].new_zeros(1, model.config.chunk_size, model.config.action_dim)
        expected = model.predict_action(**inputs, noise=noise, chain_of_thought=thinks)
        np.testing.assert_allclose(chunk, processor.decode_actions(expected, embodiment=EMBODIMENT), atol=1e-4)
