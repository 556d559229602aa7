"""The card of a model or an adapter: what it is, of what parts, from what data, how well it does, how to use it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, HfApi, ModelCard, ModelCardData, eval_result_entries_to_yaml
from PIL import Image
from safetensors import safe_open

from stereovla.dataset_builder.dataset.card_edits import update_card
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.sharing.folders import REFERENCE, base_of, dataset_names, is_local, public_datasets
from stereovla.sources import HUB_ID
from stereovla.untrusted import inside

PICTURE = Path("images/sample.png")
FILM = "rollout.gif"  # of a report: shown first, before its plots
EVAL_RESULTS = Path(".eval_results/stereovla.yaml")
PARTS = {
    "semantic encoder (left view)": "model.visual_tokens.semantic.",
    "spatial encoder (left view)": "model.visual_tokens.spatial.",
    "stereo encoder (both views)": "model.visual_tokens.stereo.",
    "projector": "model.visual_tokens.projector.",
    "language model (Llama type)": "model.language_model.",
    "language head": "lm_head.",
    "action expert": "action_expert.",
    "pointers": "pointers.",
}

BODY = """
# {name}

{what} ([arXiv 2512.21970](https://arxiv.org/abs/2512.21970)): a rectified image pair, an instruction and the arm's
state in, {chunk} {actions} out.

{images}

## Use

```python
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

name = "{source}"
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

# one recorded input: a rectified pair (uint8 arrays or PIL), left first; x, y, z (m), roll, pitch, yaw (rad), gripper
sample = load_file(hf_hub_download(name, "{reference}"))
left, right, state = (sample[key].numpy() for key in ("left", "right", "state"))
inputs = processor(images=[left, right], text={instruction}, state=state, embodiment="{embodiment}")
actions = processor.decode_actions(model.predict_action(**inputs), embodiment="{embodiment}")  # (1, {chunk}, {dim})
```

It needs torch, transformers, numpy{needs} and pillow, nothing else. `{reference}` also holds the actions that the
trained model gave for this input, so that any load can be checked; each upload was. For use beyond a try, pin what you
have read: `{pin}`.

## Architecture and parts

{architecture}

{parts}

Licence of these weights: {license}. {contained}

## Results

{results}

{plots}

## Training data

{data}

{training}

## Embodiments

{embodiments}

State and action: x, y, z in m, roll, pitch, yaw in rad, gripper (1 = open). `embodiment` names the statistics to use.

{cameras}

## Intended use and limits

For research on manipulation with rectified stereo pairs: with the embodiments above, their cameras, and instructions
like those of the training data. Another robot needs its own demonstrations. {limits}
"""


@dataclass
class CardOptions:
    """What only the person who publishes knows.

    repo_id: on the Hub, or None. weights: {name: licence} of weights of others that are contained. dataset_ids: Hub
    ids of datasets that were folders. base_model: Hub id of what was a folder. report: folder that `python -m
    evaluation report` wrote.
    """

    license: str
    repo_id: str | None
    weights: Mapping[str, str]
    dataset_ids: Sequence[str]
    base_model: str | None
    report: Path | None


def write_model_card(folder: Path, kind: str, options: CardOptions, published: str | None) -> Path:
    """README.md with its pictures, and the results for the Hub's leaderboards; what a person wrote around stays."""
    training = read(folder / "training.json")
    processor = read(folder / "processor_config.json")
    report = read(options.report / "metrics.json") if options.report else {"metrics": [], "images": []}
    names = public_datasets(training["options"], options.dataset_ids)
    metas = {name: load_meta(path) for name, path in zip(names, dataset_names(training["options"]), strict=True)}
    base = training["options"]["model"]
    if kind == "adapter":
        base_id = base_of(folder, options.base_model)
    else:
        base_id = options.base_model or (None if base is None or is_local(base) else base)
    contained = dict(options.weights)
    if kind == "model" and base is not None and not contained:
        contained[base_id or Path(base).name] = licence_of(base)
    with safe_open(folder / REFERENCE, "pt") as file:
        prompt = json.loads(file.metadata()["prompt"])
        views = [file.get_tensor(side).numpy() for side in ("left", "right")]
    write_pictures(folder, views, report["images"], options.report)
    write_eval_results(folder / EVAL_RESULTS, report["metrics"], evaluated_on(options, training["options"], names))
    data = ModelCardData(
        license=options.license,
        library_name="transformers" if kind == "model" else "peft",
        pipeline_tag="robotics",
        tags=["robotics", "vla", "stereo", "stereovla"] + (["lora"] if kind == "adapter" else []),
        language="en",
        datasets=[name for name in names if HUB_ID.fullmatch(name)] or None,
        base_model=base_id,
        base_model_relation=(kind if kind == "adapter" else "finetune") if base_id else None,
        model_name=options.repo_id or folder.resolve().parent.name,
        eval_results=result_rows(report["metrics"]) or None,
    )
    # everything that was recorded in a simulator says so by how it was built
    simulated = all("build" in meta for meta in metas.values()) if metas else False
    body = BODY.format(
        name=data.model_name,
        what=(f"A LoRA adapter of {link(base_id)}, a" if kind == "adapter" else "A")
        + " StereoVLA policy that sees with two eyes",
        chunk=processor["chunk_size"],
        dim=processor["action_dim"],
        actions="delta end-effector poses",
        images=shown([name for name in report["images"] if name == FILM] + [PICTURE.as_posix()]),
        source=options.repo_id or "NAME/REPOSITORY",
        reference=REFERENCE,
        instruction=json.dumps(prompt["instruction"]),
        embodiment=prompt["embodiment"],
        needs=", peft" if kind == "adapter" else "",
        pin='adapter_kwargs={"revision": "..."}' if kind == "adapter" else 'revision="..."',
        architecture=architecture(folder, kind, processor),
        parts=parameter_table(folder, kind),
        license=options.license,
        contained=contained_text(kind, base_id, contained),
        results=results_text(report),
        plots=shown([name for name in report["images"] if name != FILM]),
        data=table(["dataset", "episodes", "frames"], [data_row(name, meta) for name, meta in metas.items()]),
        training=training["summary"]
        + (f" Objectives and their shares: {training['mixture']}." if "mixture" in training else ""),
        embodiments=embodiment_table(processor),
        cameras=camera_tables(metas.values()),
        limits="It has seen the objects, colours, camera range and arm of a simulator alone, and no real image: it "
        "must not drive a real robot."
        if simulated
        else "It stops for nothing: run it only where a person can, and where it can hurt nobody.",
    )
    return update_card(folder / "README.md", data.to_dict(), body, published)


def shown(images: Sequence[str]) -> str:
    """Markdown of pictures."""
    return "\n".join(f"![{name}]({name})" for name in images)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def licence_of(model: str) -> str:
    """Licence in the card of a model, folder or Hub id; ValueError where there is none."""
    if Path(model).is_dir():
        card = Path(model, "README.md")
        found = ModelCard.load(card).data.license if card.exists() else None
    else:
        data = HfApi().model_info(model).card_data
        found = data.license if data else None
    if not found:
        raise ValueError(
            f"the training began with {model}, whose card names no licence; give the licences of the weights that the "
            'model contains: --weights "NAME=LICENCE" ...'
        )
    return found


def write_pictures(folder: Path, views: list, images: Sequence[str], report: Path | None) -> None:
    """The pair of the recorded prediction side by side, and the report's pictures."""
    pair = [Image.fromarray(view) for view in views]
    width, height = pair[0].size
    both = Image.new("RGB", (2 * width + 4, height), "white")
    for number, view in enumerate(pair):
        both.paste(view, (number * (width + 4), 0))
    (folder / PICTURE).parent.mkdir(exist_ok=True)
    both.save(folder / PICTURE)
    for name in images:
        inside(folder, name).write_bytes(inside(report, name).read_bytes())


def evaluated_on(options: CardOptions, training: Mapping, names: Sequence[str]) -> str | None:
    """Hub id of the dataset that the errors were measured on; None where it has none, or nothing was measured."""
    if options.report is None:
        return None
    offline = read(options.report / "report.json")["offline"]
    if offline is None:
        return None
    used = offline["options"]["dataset"]
    called = dict(zip(dataset_names(training), names, strict=True)).get(used, used)
    return called.partition("@")[0] if HUB_ID.fullmatch(called) and not Path(called).exists() else None


def write_eval_results(path: Path, metrics: Sequence[Mapping], dataset: str | None) -> None:
    """Errors on held-out frames of a dataset on the Hub, in the Hub's own format; none = no such file."""
    entries = [
        EvalResultEntry(dataset_id=dataset, task_id=metric["type"], value=metric["value"], notes=metric["text"])
        for metric in metrics
        if dataset and metric["type"] != "success_rate"  # rollouts run in the simulator, on no dataset
    ]
    path.unlink(missing_ok=True)
    if entries:
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def result_rows(metrics: Sequence[Mapping]) -> list[EvalResult]:
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


def results_text(report: Mapping) -> str:
    if not report["metrics"]:
        return "Not evaluated."
    rows = [[metric["name"], metric["dataset"], metric["text"]] for metric in report["metrics"]]
    return f"{table(['measured', 'on', 'value'], rows)}\n\n{report.get('method', '')}".strip()


def architecture(folder: Path, kind: str, processor: Mapping) -> str:
    views = processor["image_processor"]["size"]
    seen = f"Views of {views['width']} x {views['height']} px become {processor['num_visual_tokens']} visual tokens"
    if kind == "adapter":
        config = read(folder / "adapter_config.json")
        return (
            f"{seen} of the base. Low-rank adapters (rank {config['r']}, alpha {config['lora_alpha']}) on the "
            "attention and MLP layers of language model and action expert; trained whole: what reads states and reads "
            "and writes actions."
        )
    config = read(folder / "config.json")
    text = config["text_config"]
    towers = [config[f"{name}_config"] for name in ("semantic", "spatial")]
    names = [tower["model_type"] for tower in towers if tower] + (
        ["stereo cost volume"] if config["stereo_config"] else []
    )
    return (
        f"{seen}, fused by an MLP from {', '.join(names)}. A Llama-type language model ({text['num_hidden_layers']} "
        f"layers, {text['hidden_size']} wide) reads them with the text; an action expert "
        f"({config['expert_hidden_size']} wide) reads its keys and values at every layer and denoises the chunk in "
        f"{config['num_inference_steps']} steps of flow matching."
    )


def parameter_table(folder: Path, kind: str) -> str:
    """The parameters of each part, counted in the headers of the weight files."""
    parts = PARTS if kind == "model" else {name: f"base_model.model.{prefix}" for name, prefix in PARTS.items()}
    counts, total = dict.fromkeys(parts, 0), 0
    for path in sorted(folder.glob("model*.safetensors" if kind == "model" else "adapter_model.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                size = prod(file.get_slice(key).get_shape())
                total += size
                for part, prefix in parts.items():
                    counts[part] += size * key.startswith(prefix)
    rows = [[part, f"{count:,}"] for part, count in counts.items() if count]
    return table(["part", "parameters"], [*rows, ["all", f"{total:,}"]])


def link(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})"


def contained_text(kind: str, base: str | None, contained: Mapping[str, str]) -> str:
    if kind == "adapter":
        return f"The base, {link(base)}, is not contained and has its own licence."
    if not contained:
        return "No weights of other models are contained; everything was trained from scratch."
    rows = [[name, licence] for name, licence in contained.items()]
    return f"They contain, or were trained from, weights of others:\n\n{table(['weights', 'licence'], rows)}"


def data_row(name: str, meta: Mapping) -> list[Any]:
    label = f"[{name}](https://huggingface.co/datasets/{name.partition('@')[0]})" if HUB_ID.fullmatch(name) else name
    counts = meta["splits"]["train"]
    return [label, counts.get("episodes", ""), f"{counts['frames']:,}"]


def embodiment_table(processor: Mapping) -> str:
    rows = []
    rates = processor["control_rates_hz"] or {}
    for name, entries in processor["norm_stats"].items():
        for key in ("state", "action"):
            low, high = next(
                pair for pair in (("q01", "q99"), ("min", "max"), ("mean", "std")) if pair[0] in entries[key]
            )
            values = [", ".join(f"{value:.3g}" for value in entries[key][bound]) for bound in (low, high)]
            rows.append([name, rates.get(name, ""), key, f"{low}: {values[0]}", f"{high}: {values[1]}"])
    return table(["embodiment", "rate, Hz", "quantity", "from", "to"], rows)


def camera_tables(metas) -> str:
    """Smallest and largest calibration of each embodiment in the training data, where the data say so."""
    rows = [
        [embodiment, name, f"{low:.4g}", f"{high:.4g}"]
        for meta in metas
        for embodiment, ranges in meta.get("cameras", {}).items()
        for name, (low, high) in ranges.items()
    ]
    if not rows:
        return "Cameras: see the training data."
    return "Left camera, in the robot base, over all training frames:\n\n" + table(
        ["embodiment", "camera", "from", "to"], rows
    )
