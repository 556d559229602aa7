"""sharing.model_card: the card says what the weights are, from what data, and how well they do, in the Hub's forms."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors.torch import save_file
from synthetic_dataset import write_finished_dataset
from tiny_checkpoint import save_tiny_checkpoint, stereo_pair

from stereovla.sharing.model_card import CardOptions, write_model_card


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_finished_dataset(tmp_path_factory.mktemp("data") / "demonstrations")


@pytest.fixture
def folder(tmp_path, dataset) -> Path:
    """A model folder as train.py leaves it, but for what the card does not read."""
    folder = save_tiny_checkpoint(tmp_path / "run/model")
    views = {side: torch.from_numpy(view) for side, view in zip(("left", "right"), stereo_pair(), strict=True)}
    prompt = json.dumps({"instruction": "pick up the red cube", "embodiment": "franka_panda"})
    save_file(views, folder / "reference_prediction.safetensors", metadata={"prompt": prompt})
    write_training(folder, dataset)
    return folder


def write_training(folder: Path, dataset: Path | str, model: str | None = None) -> None:
    options = {"dataset": [str(dataset)], "model": model, "output_dir": "x"}
    training = {"summary": "3 steps.", "mixture": "5:2:2:1", "example_instruction": "pick", "options": options}
    (folder / "training.json").write_text(json.dumps(training))


@pytest.fixture
def report(tmp_path, dataset) -> Path:
    def metric(kind: str, value: float) -> dict:
        return {
            "task": "pick",
            "dataset": "50 frames",
            "name": kind,
            "type": kind,
            "value": value,
            "text": f"{value} mm",
        }

    folder = tmp_path / "report"
    folder.mkdir()
    metrics = {"metrics": [metric("success_rate", 0.9), metric("mm", 6.5)], "images": ["a.png"], "method": "How."}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "report.json").write_text(json.dumps({"offline": {"options": {"dataset": str(dataset)}}}))
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    return folder


def options(**given) -> CardOptions:
    known = {"license": "mit", "repo_id": "me/policy", "weights": {}, "dataset_ids": [], "base_model": None}
    return CardOptions(**known | {"report": None} | given)


def test_the_card_has_data_parts_cameras_and_results(folder, report):
    card = ModelCard.load(
        write_model_card(folder, "model", options(report=report, dataset_ids=["me/demonstrations"]), None)
    )
    for line in (
        "# me/policy",
        "![a.png](a.png)",
        "![images/sample.png](images/sample.png)",
        'name = "me/policy"',
        "Views of 64 x 64 px become 16 visual tokens, fused by an MLP from siglip_vision_model, dinov2_with_registers, "
        "stereo cost volume.",
        "| action expert |",
        "No weights of other models are contained",
        "| mm | 50 frames | 6.5 mm |",
        "| [me/demonstrations](https://huggingface.co/datasets/me/demonstrations) | 3 | 12 |",
        "| franka_panda | 10.0 | action | q01: -0.04,",
        "| franka_panda | baseline, m | 0.063 | 0.063 |",
        "must not drive a real robot",
    ):
        assert line in card.text, line
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "robotics")
    assert data.datasets == ["me/demonstrations"]
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("success_rate", 0.9),
        ("mm", 6.5),
    ]
    # every part counts, and nothing twice
    table = card.text.partition("| part | parameters |")[2].strip().partition("\n\n")[0].splitlines()[1:]
    counts = [int(line.split("|")[2].replace(",", "")) for line in table]
    assert sum(counts[:-1]) == counts[-1] > 100_000
    left, right = stereo_pair()
    with Image.open(folder / "images/sample.png") as picture:
        assert picture.crop((0, 0, 64, 64)).tobytes() == left.tobytes()
        assert picture.crop((68, 0, 132, 64)).tobytes() == right.tobytes()


def test_errors_on_a_dataset_of_the_hub_go_to_its_leaderboard(folder, report):
    write_model_card(folder, "model", options(report=report, dataset_ids=["me/demonstrations"]), None)
    path = folder / ".eval_results/stereovla.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("me/demonstrations", "mm", 6.5)
    write_model_card(folder, "model", options(report=report), None)  # measured on a folder: on no leaderboard
    assert not path.exists()


def test_weights_of_others_name_their_licences(folder, dataset, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_training(folder, dataset, str(base))
    with pytest.raises(ValueError, match="whose card names no licence; give the licences"):
        write_model_card(folder, "model", options(), None)
    text = write_model_card(folder, "model", options(weights={"SigLIP": "apache-2.0"}), None).read_text()
    assert "| SigLIP | apache-2.0 |" in text and str(tmp_path) not in text
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    card = ModelCard.load(write_model_card(folder, "model", options(base_model="me/base"), None))
    assert "| me/base | cc-by-nc-4.0 |" in card.text and card.data.base_model == "me/base"
    assert card.data.base_model_relation == "finetune"
