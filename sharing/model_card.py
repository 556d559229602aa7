"""The card of a model or an adapter: what it is, of what parts, from what data, how well it does, how to use it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, HfApi, ModelCard, ModelCardData, eval_result_entries_to_yaml
from PIL import Image
from safetensors import safe_open

from stereovla.dataset_builder.dataset.card_edits import update_card
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.sharing.architecture import ARXIV, Architecture
from stereovla.sharing.folders import REFERENCE, base_of, dataset_names, is_local, public_datasets
from stereovla.sources import HUB_ID
from stereovla.untrusted import inside

PICTURE = Path("images/sample.png")
GAP = 4  # px between the views in it
BEGUN_WITH = ("model", "vlm", "depth_expert", "stereo_encoder", "encoder")  # options of trainings that name weights
FILM = "rollout.gif"  # of a report: shown first, before its plots
EVAL_RESULTS = Path(".eval_results/stereovla.yaml")
BODY = """
# {name}

{what} ([arXiv {arxiv}](https://arxiv.org/abs/{arxiv})):
{inputs}, an instruction and the arm's state in, {chunk} {actions} out.

{pictures}

## Use

```python
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

name = "{source}"
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

# one recorded input: {recorded}; x, y, z (m), roll, pitch, yaw (rad), gripper
recorded = load_file(hf_hub_download(name, "{reference}"))
sample = {{key: tensor.numpy() for key, tensor in recorded.items()}}
images = {images}{depth}
inputs = processor(images=images, text={instruction}, state=sample["state"], embodiment="{embodiment}"{also})
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

For research on manipulation{pairs}: with the embodiments above, their cameras, and instructions like those of the
training data. Another robot needs its own demonstrations. {limits}
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
    base_id = base_of(folder, options.base_model) if kind == "adapter" else options.base_model
    contained = dict(options.weights)
    if kind == "model":
        base_id = base_id or hub_ids(training["options"])
        contained = contained or licences_of(training["options"], options.base_model)
    with safe_open(folder / REFERENCE, "pt") as file:
        prompt, recorded = json.loads(file.metadata()["prompt"]), {key: file.get_tensor(key) for key in file.keys()}
    config = read(folder / "config.json") if kind == "model" else None
    policy = Architecture.of(folder, config, processor, reads_depth="depth" in recorded)
    views, depths = recorded_views(recorded, policy.views)
    camera = {key.removeprefix("calibration."): key for key in recorded if key.startswith("calibration.")}
    write_pictures(folder, [recorded[key].numpy() for key in views.values()], report["images"], options.report)
    write_eval_results(folder / EVAL_RESULTS, report["metrics"], evaluated_on(options, training["options"], names))
    data = ModelCardData(
        license=options.license,
        library_name="transformers" if kind == "model" else "peft",
        pipeline_tag="robotics",
        tags=policy.tags + (["lora"] if kind == "adapter" else []),
        language="en",
        datasets=[name for name in names if HUB_ID.fullmatch(name)] or None,
        base_model=base_id,
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if base_id else None,
        model_name=options.repo_id or folder.resolve().parent.name,
        eval_results=result_rows(report["metrics"]) or None,
    )
    # everything that was recorded in a simulator says so by how it was built
    simulated = all("build" in meta for meta in metas.values()) if metas else False
    body = BODY.format(
        name=data.model_name,
        what=(f"A LoRA adapter of {link(base_id)}, a" if kind == "adapter" else "A")
        + f" {policy.name} policy that sees {policy.sees}",
        arxiv=ARXIV[policy.name],
        inputs=policy.inputs,
        chunk=processor["chunk_size"],
        dim=processor["action_dim"],
        actions="delta end-effector poses",
        pictures=shown([name for name in report["images"] if name == FILM] + [PICTURE.as_posix()]),
        source=options.repo_id or "NAME/REPOSITORY",
        reference=REFERENCE,
        recorded=in_words(policy),
        images=snippet(views, policy.name == "StereoVLA"),
        depth=(f"\ndepth_map = {depth_snippet(depths, policy)}" if depths else "")
        + (f"\ncalibration = {snippet(camera)}  # of the left view and the pair; px, m" if camera else ""),
        also=(", depth_map=depth_map" if depths else "") + (", calibration=calibration" if camera else ""),
        instruction=json.dumps(prompt["instruction"]),
        embodiment=prompt["embodiment"],
        needs=", peft" if kind == "adapter" else "",
        pin='adapter_kwargs={"revision": "..."}' if kind == "adapter" else 'revision="..."',
        architecture=policy.in_words() if kind == "model" else adapter(folder, policy),
        parts=table(["part", "parameters"], parameter_rows(policy.counts)),
        license=options.license,
        contained=contained_text(kind, base_id, contained),
        results=results_text(report),
        plots=shown([name for name in report["images"] if name != FILM]),
        data=table(["dataset", "episodes", "frames"], [data_row(name, meta) for name, meta in metas.items()]),
        training=training["summary"]
        + (f" Objectives and their shares: {training['mixture']}." if "mixture" in training else ""),
        embodiments=embodiment_table(processor),
        cameras=camera_tables(metas.values()),
        pairs=" with rectified stereo pairs" if policy.stereo else "",
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


def begun_with(options: Mapping) -> list[str]:
    """Folders and Hub ids of the weights that a training began with."""
    return [options[name] for name in BEGUN_WITH if options.get(name)]


def hub_ids(options: Mapping) -> str | list[str] | None:
    """Those of them that others can find: the one, or all."""
    found = [source for source in begun_with(options) if not is_local(source)]
    return found[0] if len(found) == 1 else found or None


def licences_of(options: Mapping, base_model: str | None = None) -> dict[str, str]:
    """{Hub id or name of a folder: licence} of the weights that a training began with, from their cards; of what was
    trained here and has no licence yet, of those that its own training began with. ValueError where nothing says it.

    Args:
        base_model: what the model is called on the Hub, if it was a folder.
    """
    found = {}
    for source in begun_with(options):
        licence, trained = licence_of(source), Path(source, "training.json")
        if licence is None and trained.exists():
            found |= licences_of(read(trained)["options"])
        elif licence is None:
            raise ValueError(
                f"the training began with {source}, whose card names no licence; give the licences of the weights that "
                'the model contains: --weights "NAME=LICENCE" ...'
            )
        else:
            name = base_model if base_model and source == options.get("model") else source
            found[Path(name).name if is_local(name) else name] = licence
    return found


def licence_of(model: str) -> str | None:
    """Licence in the card of a model, folder or Hub id."""
    if Path(model).is_dir():
        card = Path(model, "README.md")
        return ModelCard.load(card).data.license if card.exists() else None
    data = HfApi().model_info(model).card_data
    return data.license if data else None


def write_pictures(folder: Path, views: list, images: Sequence[str], report: Path | None) -> None:
    """The views of the recorded prediction side by side, and the report's pictures."""
    pictures = [Image.fromarray(view) for view in views]
    width = sum(picture.width + GAP for picture in pictures) - GAP
    together = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    place = 0
    for picture in pictures:
        together.paste(picture, (place, 0))
        place += picture.width + GAP
    (folder / PICTURE).parent.mkdir(exist_ok=True)
    together.save(folder / PICTURE)
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


def adapter(folder: Path, policy: Architecture) -> str:
    """What an adapter changes."""
    config = read(folder / "adapter_config.json")
    depth = ", depth expert" if policy.name == "DepthVLA" else ""
    return (
        f"{policy.seen} of the base. Low-rank adapters (rank {config['r']}, alpha {config['lora_alpha']}) on the "
        f"attention and MLP layers of language model{depth} and action expert; trained whole: what reads states and "
        "reads and writes actions."
    )


def parameter_rows(counts: Mapping[str, int]) -> list[list[str]]:
    return [[part, f"{count:,}"] for part, count in [*counts.items(), ("all", sum(counts.values()))]]


def recorded_views(keys: Iterable[str], names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """{view: key} of the pictures and of the depth maps in a recorded prediction, whose keys are those of a window."""
    pictures = {key.removeprefix("view."): key for key in keys if key in ("left", "right") or key.startswith("view.")}
    depths = {key.removeprefix("depth").removeprefix(".") or "left": key for key in keys if key.startswith("depth")}
    return tuple({name: found[name] for name in names if name in found} for found in (pictures, depths))


def snippet(views: Mapping[str, str], pair: bool = False) -> str:
    """Code of the views of `sample`, by name, or of a pair in its order, which earlier code of a folder takes too."""
    values = {view: f'sample["{key}"]' for view, key in views.items()}
    if pair:
        return f"[{', '.join(values.values())}]"
    return "{" + ", ".join(f'"{view}": {value}' for view, value in values.items()) + "}"


def depth_snippet(depths: Mapping[str, str], policy: Architecture) -> str:
    """Code of the depth maps of `sample` that the policy is shown."""
    if policy.name == "StereoVLA":
        return 'sample["depth"]  # m, of the left view'
    return f"{snippet(depths)}  # m, of each view"


def in_words(policy: Architecture) -> str:
    """What a recorded prediction holds of the views."""
    if policy.name == "StereoVLA":
        return "a rectified pair (uint8 arrays or PIL), left first"
    also = "; left and right are a rectified pair" if policy.stereo else ""
    return f"a picture of each camera (uint8 arrays or PIL){also}"


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
