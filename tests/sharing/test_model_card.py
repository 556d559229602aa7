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

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.sharing.folders import replacements
from stereovla.sharing.model_card import CardOptions, write_model_card
from stereovla.training.models import untrained


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_finished_dataset(tmp_path_factory.mktemp("data") / "demonstrations")


@pytest.fixture
def folder(tmp_path, dataset) -> Path:
    return trained(tmp_path / "run/model", dataset)


def trained(folder: Path, dataset: Path, **config) -> Path:
    """A model folder as train.py leaves it, but for what the card does not read."""
    save_tiny_checkpoint(folder, **config)
    views = {side: torch.from_numpy(view) for side, view in zip(("left", "right"), stereo_pair(), strict=True)}
    prompt = json.dumps({"instruction": "pick up the red cube", "embodiment": "franka_panda"})
    save_file(views, folder / "reference_prediction.safetensors", metadata={"prompt": prompt})
    write_training(folder, dataset)
    return folder


def write_training(folder: Path, dataset: Path | str, model: str | None = None, **begun: str | None) -> None:
    options = {"dataset": [str(dataset)], "model": model, "output_dir": "x", **begun}
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
        "A StereoVLA policy that sees with two eyes ([arXiv 2512.21970](https://arxiv.org/abs/2512.21970)):",
        "a rectified image pair, an instruction and the arm's state in, 8 delta end-effector poses out.",
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
    assert data.tags == ["robotics", "vla", "stereo", "stereovla"]
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


@pytest.mark.parametrize(
    ("destination", "marks"), [(False, "target and gripper"), (True, "target, gripper and destination")]
)
def test_the_card_says_what_the_paper_has_not(dataset, folder, tmp_path, destination, marks):
    pointing = {"use_pointers": True, "points_frame": "base", "points_at_destination": destination}
    pointing = trained(tmp_path / "pointing/model", dataset, **pointing)
    plain, text = (write_model_card(each, "model", options(), None).read_text() for each in (folder, pointing))
    assert "Not in the paper" not in plain
    assert f"it marks {marks} among the visual tokens" in text
    assert "points of the stereo encoder's disparity and the calibration, in the robot base's frame" in text


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


def test_licences_are_followed_through_what_was_trained_here(folder, dataset, tmp_path):
    """A depth expert of `pretrain depth` has no licence yet: its encoder's counts, if it has one."""
    encoder, expert = tmp_path / "encoder", tmp_path / "expert"
    for path in (encoder, expert):
        path.mkdir()
    (encoder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    write_training(folder, dataset, depth_expert=str(expert))
    for begun, text in ((str(encoder), "| encoder | cc-by-nc-4.0 |"), (None, "No weights of other models")):
        write_training(expert, dataset, encoder=begun)
        assert text in write_model_card(folder, "model", options(), None).read_text()
    (expert / "training.json").unlink()
    with pytest.raises(ValueError, match=f"began with {expert}, whose card names no licence"):
        write_model_card(folder, "model", options(), None)


def depthvla(folder: Path, dataset: Path, reads: tuple[str, ...], **fields) -> Path:
    """As `folder`, of a DepthVLA; `reads` are the keys of its recorded prediction."""
    torch.manual_seed(0)
    model, processor = untrained("depthvla-tiny", load_meta(str(dataset)), **fields)
    model.config.frozen_parts = ["vision"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    pictures = {name: torch.full((40, 30 + number, 3), 50 * number) for number, name in enumerate(reads)}
    prompt = json.dumps({"instruction": "pick up the red cube", "embodiment": "franka_panda"})
    pictures = {name: picture.to(torch.uint8) for name, picture in pictures.items()}
    save_file(pictures, folder / "reference_prediction.safetensors", metadata={"prompt": prompt})
    write_training(folder, dataset)
    return folder


PI0 = {"depth_config": None, "depth_map_loss_weight": 0.0}
ABLATED = {"views": ["left", "wrist"], "depth_config": {"input": "depth"}, "mask": "full", "depth_map_loss_weight": 0.0}


@pytest.mark.parametrize(
    ("reads", "fields", "tags", "lines"),
    [
        (
            ("left",),
            {"depth_expert_source": "someone/depth"},
            ["depth", "depthvla"],
            [
                "A DepthVLA policy that sees one camera (left) ([arXiv 2510.13375](https://arxiv.org/abs/2510.13375)):",
                "a picture, an instruction",
                "Views of 64 x 64 px become 16 visual tokens each",
                "(siglip_vision_model; Gemma type, 2 layers, 64 wide)",
                "a depth expert (dinov2; decoder 2 layers, 32 wide)",
                "- Cameras: left.",
                "- Depth expert: began with the weights of someone/depth.",
                "- Its encoder is shown the pictures.",
                "- Scale-invariant depth loss: on (weight 1, lambda 0.5).",
                "- Block mask between language model and depth expert: on,",
                "- Held fixed in the last training: vision.",
                'images = {"left": sample["left"]}',
                "| depth expert: decoder |",
            ],
        ),
        (
            ("left", "view.wrist", "depth", "depth.wrist"),
            ABLATED,
            ["depth", "depthvla"],
            [
                "sees 2 cameras (left, wrist)",
                "a picture of each camera with its true depth, an instruction",
                "- Cameras: left, wrist; all but the first may be absent.",
                "- Depth expert: began untrained (random weights).",
                "- Its encoder is shown the true depth in place of the pictures.",
                "- Scale-invariant depth loss: off.",
                "- Block mask between language model and depth expert: off,",
                'images = {"left": sample["left"], "wrist": sample["view.wrist"]}',
                'depth_map = {"left": sample["depth"], "wrist": sample["depth.wrist"]}',
                ", depth_map=depth_map)",
            ],
        ),
        (
            ("left", "right"),
            {"depth_config": stereo_encoder()},
            ["stereo", "depth", "depthvla"],
            [
                "sees 2 cameras (left and right, a rectified pair)",
                "a depth expert (stereo cost volume;",
                "- Its encoder is shown left and right view, by a stereo encoder.",
                "| depth expert: stereo encoder (left and right view) |",
                "manipulation with rectified stereo pairs:",
            ],
        ),
        (
            ("left",),
            PI0,
            ["pi0"],
            [
                "A pi0 policy that sees one camera (left) ([arXiv 2410.24164](https://arxiv.org/abs/2410.24164)):",
                "- Depth expert: none; the model is pi0.",
                "reads its keys and values at every layer",
            ],
        ),
    ],
)
def test_the_card_of_a_depthvla(tmp_path, dataset, reads, fields, tags, lines):
    folder = depthvla(tmp_path / "run/model", dataset, reads, **fields)
    card = ModelCard.load(write_model_card(folder, "model", options(), None))
    for line in lines:
        assert line in card.text, line
    assert "StereoVLA" not in card.text and "with two eyes" not in card.text
    assert card.data.tags == ["robotics", "vla", *tags]
    table = card.text.partition("| part | parameters |")[2].strip().partition("\n\n")[0].splitlines()[1:]
    counts = {line.split("|")[1].strip(): int(line.split("|")[2].replace(",", "")) for line in table}
    assert counts.pop("all") == sum(counts.values()) > 200_000 and "other" not in counts
    pictures = [name for name in reads if not name.startswith("depth")]
    with Image.open(folder / "images/sample.png") as picture:
        assert picture.size == (sum(30 + reads.index(name) for name in pictures) + 4 * (len(pictures) - 1), 40)


def test_a_depth_expert_from_a_folder_is_named_without_its_path(tmp_path, dataset):
    source = tmp_path / "somewhere/expert"
    source.mkdir(parents=True)
    folder = depthvla(tmp_path / "run/model", dataset, ("left",), depth_expert_source=str(source))
    text = write_model_card(folder, "model", options(), None).read_text()
    assert "began with the weights of expert." in text and str(tmp_path) not in text
    sent = replacements(folder, "model", None, [])
    config = json.loads(sent["config.json"])
    assert config["depth_expert_source"] == "expert"
    assert config | {"depth_expert_source": str(source)} == json.loads((folder / "config.json").read_text())
