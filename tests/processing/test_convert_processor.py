"""The processor of a converted model: from published folders to actions in a fresh process, and what is refused."""

import json
import subprocess
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import COMMAND, main
from gemma_tokenizer import gemma_tokenizer
from PIL import Image
from published_folders import assembly, release, released_shapes, write_parts
from published_weights import random_weights
from safetensors.torch import load_file
from sentencepiece_folder import TEXTS, VOCABULARY, train, write_tokenizer

from stereovla.modeling_stereovla import (
    DepthVLAConfig,
    DepthVLAForActionPrediction,
    StereoVLAForActionPrediction,
    convert_parts,
    convert_stereovla,
)
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.processing import DepthVLAProcessor, StereoProcessor, convert_processor
from stereovla.processing.convert_processor import build_processor, read_config, write_processor

ROOT = Path(__file__).parents[2]
CONVERT = [*COMMAND, "convert", "processor"]
INSTRUCTION = "pick up the red cube"
STATE = [[0.1, -0.2, 0.3, 0.0, 0.1, -0.1, 1.0], [0.2, -0.1, 0.3, 0.1, 0.1, -0.1, -1.0]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of the language model's tokenizer, and sentencepiece's own."""
    folder = tmp_path_factory.mktemp("internlm2")
    return folder, write_tokenizer(folder, train())


@pytest.fixture
def released(tmp_path):
    """Folder of the converted release."""
    rows = -(-(VOCABULARY + 1) // 64) * 64  # the release's padding
    return convert_stereovla.convert(
        release(tmp_path / "release", random_weights(released_shapes(rows)), vocabulary=VOCABULARY)
    )


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """Folder of a model that was put together from parts."""
    folder = tmp_path_factory.mktemp("assembled")
    return convert_parts.convert(assembly(write_parts(folder / "parts", VOCABULARY), folder / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


FRESH = """
import importlib.util, json, sys
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

folder, images, request, noise, result = sys.argv[1:]
assert not any(importlib.util.find_spec(name) for name in ("modeling_stereovla", "processing"))
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for part in (model, processor, processor.image_processor):
    assert type(part).__module__.startswith("transformers_modules"), type(part)
pair = [Image.open(f"{images}/{side}.png") for side in ("left", "right")]
inputs = processor(images=pair, **json.loads(request))
chunk = model.predict_action(**inputs, noise=torch.tensor(json.loads(noise)))
actions = processor.decode_actions(chunk, embodiment="epiclab_franka")
logits = model(**{name: inputs[name] for name in ("input_ids", "pixel_values")}).logits.detach()
save_file({**inputs, "logits": logits, "chunk": chunk, "actions": torch.from_numpy(actions)}, result)
"""


@torch.no_grad()
def test_converted_release_acts_in_a_fresh_process_as_in_this_one(released, tokenizer, fresh, tmp_path):
    """Both commands' folder, loaded by the Auto classes where this package is not installed (-I), on a real pair."""
    folder, reference = tokenizer
    command = [*CONVERT, "--model", str(released), "--tokenizer", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "has its processor" in run.stdout, run.stderr[-2000:]

    request = {"text": INSTRUCTION, "state": STATE, "embodiment": "epiclab_franka"}
    noise = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    arguments = [released, ROOT / "docs" / "images", json.dumps(request), json.dumps(noise.tolist())]
    result = tmp_path / "result.safetensors"
    fresh.run(FRESH, *map(str, arguments), str(result))
    found = load_file(result)

    # the same here, with a processor that was never saved
    processor = build_processor(released, folder)
    model = StereoVLAForActionPrediction.from_pretrained(released).eval()
    pair = [Image.open(ROOT / "docs" / "images" / f"{side}.png") for side in ("left", "right")]
    inputs = processor(images=pair, **request)
    assert found.keys() == inputs.keys() | {"logits", "chunk", "actions"}
    for name, value in inputs.items():
        assert torch.equal(found[name], value), name
    logits = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(found["logits"], logits, atol=1e-6, rtol=0)
    chunk = model.predict_action(**inputs, noise=noise)
    torch.testing.assert_close(found["chunk"], chunk, atol=1e-6, rtol=0)

    # and by hand: the prompt by sentencepiece, states as bins of the release's percentiles, actions in robot units
    prompt = reference.encode(f"In: What action should the robot take to {INSTRUCTION}?\nOut: ")
    ids = found["input_ids"][0].tolist()
    assert ids[: -4 * 7] == [1, *[VOCABULARY + 1] * 256, *prompt]
    low, high = np.linspace(-1, -0.5, 7), np.linspace(0.5, 1, 7)
    normalised = (2 * (np.array(STATE) - low) / (high - low) - 1)[[0, 0, 0, 1]]
    bins = np.clip(np.digitize(normalised, np.linspace(-1, 1, 64)), 1, 64)
    assert ids[-4 * 7 :] == (VOCABULARY - bins).ravel().tolist()
    by_hand = (found["chunk"][0].numpy() + 1) * (high - low) + 2 * low
    np.testing.assert_allclose(found["actions"][0].numpy(), by_hand, atol=1e-5)


def test_processor_says_what_the_release_says(released, tokenizer):
    write_processor(build_processor(released, tokenizer[0]), released)
    processor = StereoProcessor.from_pretrained(released)
    arguments = json.loads((released / "processor_arguments.json").read_text())
    for name, value in arguments.items():
        assert getattr(processor, name) == value, name
    assert processor.max_length == 2048 and processor.control_rates_hz == {"epiclab_franka": 5.0}
    assert (processor.chunk_size, processor.state_history, processor.state_dim, processor.action_dim) == (5, 4, 7, 7)
    assert (processor.bins.num_bins, processor.bins.vocab_size) == (64, VOCABULARY)
    assert (processor.image_token_id, processor.tokenizer.pad_token_id) == (VOCABULARY + 1, VOCABULARY)
    assert processor.image_processor.target_size == (224, 224)
    assert not list(released.glob("convert_*")) and not list(released.glob("*chat*"))


def test_processor_of_assembled_parts_has_no_statistics(assembled, tokenizer):
    folder, reference = tokenizer
    write_processor(build_processor(assembled, folder), assembled)
    processor = StereoProcessor.from_pretrained(assembled)
    pair = [Image.open(ROOT / "docs" / "images" / f"{side}.png") for side in ("left", "right")]
    batch = processor(images=pair, text="green apple", objective="box")  # needs none
    prompt = reference.encode(TEXTS[2])
    assert batch["input_ids"][0].tolist() == [1, *[VOCABULARY + 1] * 256, *prompt]
    with pytest.raises(ValueError, match="this processor has no statistics: pass norm_stats"):
        processor(images=pair, text=INSTRUCTION, state=STATE, embodiment="arm")
    with pytest.raises(ValueError, match="this processor has no statistics"):
        processor.decode_actions(torch.zeros(1, 5, 7), embodiment="arm")
    limits = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    statistics = {"arm": dict.fromkeys(("state", "action", "keyframe_pose"), limits)}
    processor = StereoProcessor.from_pretrained(assembled, norm_stats=statistics)
    inputs = processor(images=pair, text=INSTRUCTION, state=STATE, embodiment="arm")
    chunk = StereoVLAForActionPrediction.from_pretrained(assembled).eval().predict_action(**inputs, num_steps=2)
    np.testing.assert_allclose(processor.decode_actions(chunk, embodiment="arm"), chunk.numpy(), atol=1e-6)


@pytest.fixture(params=[False, True], ids=["one_eye", "two_eyes"])
def depthvla(request, tmp_path):
    """Folder of a tiny DepthVLA with words for PaliGemma's small tokenizer, and the tokenizer's."""
    tokenizer = gemma_tokenizer([INSTRUCTION])
    tokenizer.save_pretrained(tmp_path / "paligemma")
    rows, image = len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = DepthVLAConfig.from_preset(
        "depthvla-tiny",
        views=["left", "wrist"],
        vlm_config={
            "text_config": {"vocab_size": rows, **ids},
            "vocab_size": rows,
            "image_token_index": image,
        },
        depth_config=stereo_encoder() if request.param else {},
        image_token_id=image,
        action_vocab_size=tokenizer.convert_tokens_to_ids("<loc1023>") + 1,
        num_bins=128,
    )
    torch.manual_seed(0)
    DepthVLAForActionPrediction(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model", tmp_path / "paligemma", tokenizer


def test_processor_of_a_depthvla(depthvla):
    """PaliGemma's tokenizer as it is, the model's views and sizes; what it makes is what the model takes."""
    folder, paligemma, tokenizer = depthvla
    main(["convert", "processor", "--model", str(folder), "--tokenizer", str(paligemma)])
    limits = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    statistics = {"arm": dict.fromkeys(("state", "action", "keyframe_pose"), limits)}
    processor = DepthVLAProcessor.from_pretrained(folder, norm_stats=statistics)
    model = DepthVLAForActionPrediction.from_pretrained(folder).eval()
    config = model.config
    assert list(processor.pixel_views) == list(config.pixel_views)
    assert processor.image_token_id == config.image_token_id
    assert (processor.bins.vocab_size, processor.bins.num_bins) == (config.action_vocab_size, 128)
    assert processor.image_processor.target_size == (64, 64) and processor.num_visual_tokens == 16
    assert processor.image_processor.resample == Image.Resampling.BICUBIC

    files = {side: Image.open(ROOT / "docs" / "images" / f"{side}.png") for side in ("left", "right")}
    pictures = {name: files.get(name, files["left"]) for name in config.pixel_views}
    lacking = pictures | {"wrist": None}
    width, height = files["left"].size
    robot = {"text": INSTRUCTION, "state": STATE[0], "embodiment": "arm"}
    samples = [
        {"objective": "action", **robot, "actions": [STATE[0]], "depth_map": np.full((height, width), 0.5)},
        {"objective": "pose", **robot, "keyframe_pose": STATE[1]},
        {"objective": "box", "text": "green apple", "boxes": [[0, 0, width, height / 2]] * 2},
        {"objective": "depth", "points_px": [3, 3], "depths_m": 0.5, "depth_map": {"left": np.ones((height, width))}},
    ]
    columns = {name: [sample.get(name) for sample in samples] for name in set().union(*samples)}
    batch = processor([pictures, lacking, lacking, pictures], **columns, return_labels=True)
    with torch.no_grad():
        output = model(**batch, generator=torch.Generator().manual_seed(0))
    assert output.loss.isfinite() and all(output[f"{name}_loss"] > 0 for name in ("action", "language", "depth_map"))

    inputs = processor([pictures, lacking], [INSTRUCTION] * 2, [STATE[0]] * 2, "arm")
    chunk = model.predict_action(**inputs, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(processor.decode_actions(chunk, "arm"), chunk.numpy(), atol=1e-6)
    question = processor(lacking, "green apple", objective="box")
    ids = tokenizer("What is the bounding box of green apple in the images?\n", add_special_tokens=False)["input_ids"]
    assert question["input_ids"][0].tolist() == [processor.image_token_id] * 16 + [2, *ids]


def test_tokenizers_that_are_not_the_depthvla_s_are_refused(depthvla, tmp_path):
    folder, paligemma, tokenizer = depthvla
    before, image = contents(folder), tokenizer.convert_tokens_to_ids("<image>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": image - 1}))
    with pytest.raises(ValueError, match=rf"'image_token_id': {image - 1}}}; the tokenizer of .*: {image}}}"):
        build_processor(folder, paligemma)
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        build_processor(folder, tmp_path)
    assert contents(folder).keys() == before.keys()


# ---- files


def test_files_appear_together_and_are_never_replaced(released, tokenizer, monkeypatch):
    before = contents(released)
    processor = build_processor(released, tokenizer[0])

    def fail_at_last(path, target, rename=Path.rename):
        if path.name == "processor_config.json":
            assert [*path.parent.iterdir()] == [path], "without this file a folder has no processor: it must come last"
            raise OSError("no space left")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Path, "rename", fail_at_last)
        write_processor(processor, released)
    assert contents(released) == before

    write_processor(processor, released)
    after = contents(released)
    assert {name: after[name] for name in before} == before
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "answers.py"} <= after.keys()
    write_processor(processor, released)  # is there already
    assert contents(released) == after

    processor.norm_stats = None
    with pytest.raises(
        FileExistsError, match=r"different \['processor_config.json'\], missing \[\]; remove answers.py"
    ):
        write_processor(processor, released)
    (released / "tokenizer.json").unlink()
    with pytest.raises(FileExistsError, match=r"missing \['tokenizer.json'\]"):
        write_processor(build_processor(released, tokenizer[0]), released)
    del after["tokenizer.json"]
    assert contents(released) == after


def test_other_models_and_tokenizers_are_refused(assembled, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a 'llama', not a 'stereovla' or 'depthvla'"):
        read_config(tmp_path)
    before = contents(assembled)
    other = train()
    del other.pieces[-1]
    write_tokenizer(tmp_path / "other", other)
    with pytest.raises(ValueError, match="ids {'<PAD>': 560, '<image>': 561}; the tokenizer of .* has 559 tokens"):
        build_processor(assembled, tmp_path / "other")
    assert contents(assembled) == before


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "processor", "--help"])
    text = capsys.readouterr().out
    assert "stereovla convert processor --model" in text
    for option in fields(convert_processor.Options):
        assert f"--{option.name}" in text and option.metadata["help"]
