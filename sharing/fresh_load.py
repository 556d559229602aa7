"""Loads what is published as a stranger would, in a new process without this project, and compares what it gives."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOLERANCE = 1e-4  # m, rad: well under what any arm can execute, well above float32 noise between machines

# Each is told {"source": folder or Hub id, "revision", "reference", "base": revision of the model that an adapter
# changes} and prints one JSON line.
MODEL = """
import json, sys
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor
told = json.loads(sys.argv[1])
source, revision = told["source"], told["revision"]
with safe_open(told["reference"], "pt") as file:
    recorded = {name: file.get_tensor(name) for name in file.keys()}
    prompt = json.loads(file.metadata()["prompt"])
# of an adapter `revision` is that of its base
pin = {"adapter_kwargs": {"revision": revision}, "revision": told["base"]} if told["base"] else {"revision": revision}
model = AutoModel.from_pretrained(source, trust_remote_code=True, **pin).eval()
processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=True)
for part in (model, processor):
    assert type(part).__module__.startswith("transformers_modules"), f"not the shipped code: {type(part).__module__}"
# pictures are left, right, view.NAME, depth maps depth, depth.NAME; folders of earlier versions take a pair alone
views = {key.removeprefix("view."): value.numpy() for key, value in recorded.items()
         if key in ("left", "right") or key.startswith("view.")}
depths = {key.removeprefix("depth").removeprefix(".") or "left": value.numpy() for key, value in recorded.items()
          if key.startswith("depth")}
camera = {key.removeprefix("calibration."): value.numpy() for key, value in recorded.items()
          if key.startswith("calibration.")}
more = {"depth_map": depths if hasattr(processor, "views") else depths["left"]} if depths else {}
if camera:
    more["calibration"] = camera
inputs = processor(images=views if hasattr(processor, "views") else [views["left"], views["right"]],
                   text=prompt["instruction"], state=recorded["state"].numpy(), embodiment=prompt["embodiment"],
                   **more)
chunk = model.predict_action(**inputs, noise=recorded["noise"])
actions = processor.decode_actions(chunk, embodiment=prompt["embodiment"])
difference = float(abs(actions - recorded["actions"].numpy()).max())
print(json.dumps({"difference": difference, "largest_action": float(abs(recorded["actions"].numpy()).max())}))
"""
DATASET = """
import hashlib, json, sys
from datasets import Image, load_dataset
told = json.loads(sys.argv[1])
first = {}
for split, rows in load_dataset(told["source"], revision=told["revision"], streaming=True).items():
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    row = next(iter(rows))
    for name, value in row.items():
        if isinstance(value, dict) and "bytes" in value:
            row[name] = hashlib.sha256(value["bytes"]).hexdigest()
    text = json.dumps([str(rows.features), row], sort_keys=True, default=str)
    first[split] = hashlib.sha256(text.encode()).hexdigest()
print(json.dumps(first))
"""

# Streaming leaves threads of libraries behind that now and then abort the interpreter's end ("terminate called without
# an active exception"); what was to be said is said by then.
END = """
import os, sys
sys.stdout.flush()
os._exit(0)
"""


def run_fresh(program: str, told: dict) -> dict:
    """What the program prints, run in an empty folder, without this repository on the path."""
    with tempfile.TemporaryDirectory() as elsewhere:
        # -I: neither the current folder nor PYTHONPATH is on the path
        command = [sys.executable, "-I", "-c", program + END, json.dumps(told)]
        run = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    if run.returncode:
        where = told["source"] + (f" at {told['revision']}" if told["revision"] else "")
        raise RuntimeError(f"{where} does not load in a fresh process:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def check_fresh_load(source: str, reference: Path, revision: str | None = None, base: str | None = None) -> float:
    """Loads a model, or an adapter on this revision of its `base`, and compares with the recorded prediction.

    Args:
        source: folder or Hub id.

    Returns:
        Largest difference in m or rad to the recorded actions; RuntimeError above `TOLERANCE`.
    """
    told = {"source": source, "revision": revision, "base": base, "reference": str(reference.resolve())}
    measured = run_fresh(MODEL, told)
    if not measured["difference"] <= TOLERANCE:
        raise RuntimeError(
            f"{source} loads, but its actions differ from the trained model's by {measured['difference']:.2e} "
            f"(allowed: {TOLERANCE:.0e}; largest action: {measured['largest_action']:.2e})"
        )
    return measured["difference"]


def first_rows(source: str, revision: str | None = None) -> dict[str, str]:
    """{split: digest of its columns and first row} of a dataset (folder or Hub id), streamed."""
    return run_fresh(DATASET, {"source": source, "revision": revision})
