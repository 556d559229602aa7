"""Publishes a trained model: card, load in a fresh process, upload, load back from the Hub.

python push_to_hub.py --folder OUTPUT/model --report REPORT --license apache-2.0 --repo_id NAME/REPOSITORY
python push_to_hub.py --folder OUTPUT/model --report REPORT --license apache-2.0 --dry_run
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import AutoConfig, HfArgumentParser

REFERENCE = "reference_prediction.safetensors"
NEEDED = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", REFERENCE)

# Runs outside this repository: loads the folder as a stranger would and compares with the recorded prediction.
FRESH_LOAD = """
import json, sys
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor
source, reference = sys.argv[1:3]
with safe_open(reference, "pt") as file:
    recorded = {name: file.get_tensor(name) for name in file.keys()}
    prompt = json.loads(file.metadata()["prompt"])
model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
for part in (model, processor):
    assert type(part).__module__.startswith("transformers_modules"), f"not the shipped code: {type(part).__module__}"
inputs = processor(images=[recorded["left"].numpy(), recorded["right"].numpy()], text=prompt["instruction"],
                   state=recorded["state"].numpy(), embodiment=prompt["embodiment"])
chunk = model.predict_action(**inputs, noise=recorded["noise"])
actions = processor.decode_actions(chunk, embodiment=prompt["embodiment"])
difference = float(abs(actions - recorded["actions"].numpy()).max())
print(json.dumps({"difference": difference, "largest_action": float(abs(recorded["actions"].numpy()).max())}))
"""
TOLERANCE = 1e-4  # m, rad: well under what any arm can execute, well above float32 noise between machines


@dataclass
class PushOptions:
    """What `python push_to_hub.py` can be told."""

    folder: str = field(metadata={"help": "Folder of the trained model, as train.py writes it."})
    license: str = field(metadata={"help": "Licence of the weights, an identifier of the Hub such as apache-2.0."})
    repo_id: str | None = field(default=None, metadata={"help": "Repository on the Hub, NAME/REPOSITORY."})
    report: str | None = field(default=None, metadata={"help": "Folder that `python -m evaluation report` wrote."})
    public: bool = field(default=False, metadata={"help": "Make the repository public; it is private otherwise."})
    dry_run: bool = field(default=False, metadata={"help": "Write the card and check the folder, send nothing."})


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError that names what a folder lacks to be a model that this project trained."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the model folder that train.py wrote, OUTPUT/model")
    missing = [name for name in NEEDED if not (folder / name).exists()]
    missing = [name for name in missing if name != "model.safetensors" or not list(folder.glob("model-*.safetensors"))]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete model: it lacks {', '.join(missing)}; train.py writes them all"
        )


def check_fresh_load(source: str, reference: Path) -> float:
    """Loads `source` (folder or Hub id) in a new process, in an empty folder, without this repository on the path.

    Returns:
        Largest difference in m or rad to the recorded actions; RuntimeError above `TOLERANCE`.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        # -I: neither the current folder nor PYTHONPATH is on the path
        command = [sys.executable, "-I", "-c", FRESH_LOAD, source, str(reference.resolve())]
        run = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{source} does not load in a fresh process:\n{run.stderr[-3000:]}")
    measured = json.loads(run.stdout.splitlines()[-1])
    if not measured["difference"] <= TOLERANCE:
        raise RuntimeError(
            f"{source} loads, but its actions differ from the trained model's by {measured['difference']:.2e} "
            f"(allowed: {TOLERANCE:.0e}; largest action: {measured['largest_action']:.2e})"
        )
    return measured["difference"]


SNIPPET = """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{source}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{source}", trust_remote_code=True)

# left and right: a rectified pair (PIL or uint8 arrays); state: x, y, z (m), roll, pitch, yaw (rad), gripper (1 = open)
inputs = processor(images=[left, right], text="{instruction}", state=state, embodiment="{embodiment}")
chunk = model.predict_action(**inputs)
actions = processor.decode_actions(chunk, embodiment="{embodiment}")  # (1, {chunk}, {dim}): m, rad, gripper
```"""


def parameter_table(folder: Path) -> str:
    """Markdown table of the parameters of each part, counted in the weight file's headers."""
    from safetensors import safe_open

    parts = {
        "semantic encoder (left view)": "model.visual_tokens.semantic.",
        "spatial encoder (left view)": "model.visual_tokens.spatial.",
        "stereo encoder (both views)": "model.visual_tokens.stereo.",
        "projector": "model.visual_tokens.projector.",
        "language model (Llama type)": "model.language_model.",
        "language head": "lm_head.",
        "action expert": "action_expert.",
        "pointers": "pointers.",
    }
    counts = dict.fromkeys(parts, 0)
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                total += size
                for part, prefix in parts.items():
                    counts[part] += size * key.startswith(prefix)
    rows = [f"| {part} | {count:,} |" for part, count in counts.items() if count]
    return "\n".join(["| part | parameters |", "|---|---|", *rows, f"| all | {total:,} |"])


def result_rows(metrics: list[dict]) -> list[EvalResult]:
    """`metrics` of the report, each {"task", "dataset", "name", "type", "value"}, as the Hub's evaluation results."""
    return [
        EvalResult(
            task_type="robotics",
            task_name=metric["task"],
            dataset_type="simulation",
            dataset_name=metric["dataset"],
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=metric["value"],
        )
        for metric in metrics
    ]


def write_card(folder: Path, options: PushOptions) -> None:
    """README.md of the model: parts, data, embodiments, measured results, use and limits.

    Only the part between the two marks below is written anew; what a person added around it stays.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = json.loads((folder / "processor_config.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    report = json.loads((Path(options.report) / "metrics.json").read_text()) if options.report else {"metrics": []}
    stats = processor["norm_stats"]
    embodiment = next(iter(stats))
    data = ModelCardData(
        license=options.license,
        library_name="transformers",
        pipeline_tag="robotics",
        tags=["robotics", "vla", "stereo", "stereovla"],
        language="en",
        model_name=options.repo_id or folder.resolve().parent.name,
        eval_results=result_rows(report["metrics"]) or None,
    )
    instruction = training["example_instruction"]
    snippet = SNIPPET.format(
        source=options.repo_id or "PATH_OF_THIS_FOLDER",
        instruction=instruction,
        embodiment=embodiment,
        chunk=config.chunk_size,
        dim=config.action_dim,
    )
    images = "\n".join(f"![{name}]({name})" for name in report.get("images", []))
    results = "\n".join(
        ["| measured | on | value |", "|---|---|---|"]
        + [f"| {m['name']} | {m['dataset']} | {m['text']} |" for m in report["metrics"]]
    )
    embodiments = "\n".join(
        f"| {name} | {key} | {', '.join(f'{v:.3g}' for v in stats[name][key]['q01'])} | "
        f"{', '.join(f'{v:.3g}' for v in stats[name][key]['q99'])} |"
        for name in stats
        for key in ("state", "action")
    )
    body = f"""
# {data.model_name}

A small StereoVLA policy ([arXiv 2512.21970](https://arxiv.org/abs/2512.21970)) that sees with two eyes: a rectified
image pair, an instruction and the arm's state in, {config.chunk_size} delta end-effector poses out. Trained from
scratch on simulated demonstrations.

{images}

## Use

{snippet}

`{REFERENCE}` holds one input and the actions that the trained model gave for it, so that
any load can be checked.

## Parts

{parameter_table(folder)}

No weights of other models are contained; everything was trained from scratch. Licence of the weights:
{options.license}.

## Results

{results if report["metrics"] else "Not evaluated."}

{report.get("method", "")}

## Training

{training["summary"]} Objectives and their shares: {training["mixture"]}.

## Embodiments

| embodiment | quantity | 1 % quantile | 99 % quantile |
|---|---|---|---|
{embodiments}

State and action: x, y, z in m, roll, pitch, yaw in rad, gripper. Views of {config.image_size} x {config.image_size} px,
rectified.

## Limits

Made to show that the whole chain works, on the objects, colours, camera range and arm of its simulator alone. It has
never seen a real image and must not drive a real robot.
"""
    path = folder / "README.md"
    start, end = "<!-- stereovla: generated -->", "<!-- stereovla: end of the generated part -->"
    generated = f"{start}\n{body.strip()}\n{end}"
    if path.exists():
        card = ModelCard.load(path)
        before, found, rest = card.text.partition(start)
        after = rest.partition(end)[2] if found else ""
        card.text = f"{before.rstrip()}\n{generated}{after}" if found else f"{card.text.rstrip()}\n\n{generated}\n"
        for key, value in data.to_dict().items():
            card.data[key] = value
    else:
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n{generated}\n")
    card.save(path)


def push(options: PushOptions) -> str:
    """Card, check, upload, load back; returns the URL (or the folder on a dry run)."""
    folder = Path(options.folder)
    check_folder(folder)
    if options.repo_id is None and not options.dry_run:
        raise ValueError("--repo_id is needed to upload, such as NAME/REPOSITORY; --dry_run sends nothing")
    write_card(folder, options)
    if options.report:
        report = json.loads((Path(options.report) / "metrics.json").read_text())
        for name in report.get("images", []):
            (folder / name).write_bytes((Path(options.report) / name).read_bytes())
    difference = check_fresh_load(str(folder.resolve()), folder / REFERENCE)
    print(f"loads in a fresh process by the Auto classes; largest difference to the trained model {difference:.1e}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"  {path.stat().st_size:>12,} {path.relative_to(folder)}")
    if options.dry_run:
        print(f"dry run: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes, nothing sent")
        return str(folder)
    api = HfApi()
    url = api.create_repo(options.repo_id, private=not options.public, exist_ok=True)
    commit = api.upload_folder(repo_id=options.repo_id, folder_path=folder, commit_message="Upload a StereoVLA model")
    difference = check_fresh_load(options.repo_id, folder / REFERENCE)
    print(f"loads from the Hub; largest difference {difference:.1e}\n{commit.commit_url}")
    return str(url)


if __name__ == "__main__":
    (chosen,) = HfArgumentParser(PushOptions, description=__doc__).parse_args_into_dataclasses()
    push(chosen)
