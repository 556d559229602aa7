"""docs/trainer.md as it stands: transformers' Trainer lowers the loss, resumes, and saves what loads as trained."""

import json
import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from house import ROOT
from safetensors.torch import load_file
from synthetic_dataset import write_training_dataset
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.training.feed import Batches
from stereovla.training.models import POLICIES, towers_of, untrained

(PROGRAM,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trainer.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With several, sums are taken in an order that is not the same in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next test's own


@pytest.fixture(scope="module", params=["tiny", "depthvla-tiny"])
def place(request, tmp_path_factory) -> Path:
    """A folder with demo/dataset and demo/training/model, of a preset."""
    place = tmp_path_factory.mktemp("trainer")
    dataset = write_training_dataset(place / "demo/dataset")
    torch.manual_seed(0)
    model, processor = untrained(request.param, load_meta(str(dataset)))
    model.save_pretrained(place / "demo/training/model")
    processor.save_pretrained(place / "demo/training/model")
    return place


@pytest.fixture(scope="module")
def run(place) -> dict:
    """The page's program, run in that folder; what it defines."""
    (place / "program.py").write_text(PROGRAM.replace("learning_rate=1e-4", "learning_rate=2e-3"))
    before = os.getcwd()
    os.chdir(place)
    try:
        return runpy.run_path("program.py")
    finally:
        os.chdir(before)


def test_the_loss_falls_and_evaluation_has_one(run):
    log = run["trainer"].state.log_history
    losses = [line["loss"] for line in log if "loss" in line]
    held_out = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert len(losses) == 20 and len(held_out) == 2
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) and all(np.isfinite(held_out))


def chunk(model, processor) -> np.ndarray:
    rng = np.random.default_rng(0)
    views = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in processor.pixel_views}
    text, state = "pick up the red cube", np.full(7, 0.2)
    inputs = processor(images=views, text=text, state=state, embodiment="franka_panda", check_stereo=False)
    return model.eval().predict_action(**inputs, generator=torch.Generator().manual_seed(0)).numpy()


def test_what_it_saved_loads_as_what_it_trained(run, place):
    live, folder = run["trainer"].model, place / "finetuned/model"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
    np.testing.assert_allclose(chunk(loaded, processor), chunk(live, processor), atol=1e-5)
    started = AutoModel.from_pretrained(place / "demo/training/model", trust_remote_code=True)
    assert np.abs(chunk(started, processor) - chunk(live, processor)).max() > 1e-2


def test_it_resumes_into_the_same_weights(run, place, tmp_path):
    """From the checkpoint after 10 steps, with a model that begins as something else."""
    checkpoint = place / "finetuned/checkpoint-10"
    torch.manual_seed(5)
    other = POLICIES[run["model"].config.model_type][0](run["model"].config)
    trainer = run["trainer"]
    again = Trainer(
        model=other,
        args=trainer.args,
        train_dataset=WindowStream(str(place / "demo/dataset"), split="train", seed=0, **run["windows"]),
        data_collator=trainer.data_collator,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
    )
    again.args.output_dir = str(tmp_path)
    again.train(resume_from_checkpoint=str(checkpoint))
    expected = load_file(place / "finetuned/model/model.safetensors")
    again.save_model(str(tmp_path / "model"))
    found = load_file(tmp_path / "model/model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-3)


def grad_norm(place: Path, run: dict, size: int, parts: int, tmp_path: Path) -> float:
    """Of the first step on 4 windows, in `parts` of `size`, with draws that follow from the windows."""
    config = run["model"].config
    model = AutoModel.from_pretrained(place / "demo/training/model", trust_remote_code=True)
    model.freeze(towers_of(model)[-1])
    batches = Batches(
        WindowStream(str(place / "demo/dataset"), split="train", seed=3, **run["windows"]),
        size,
        run["processor"],
        config,
    )
    arguments = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
    arguments |= {"output_dir": str(tmp_path), "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments, remove_unused_columns=False, use_cpu=True),
        train_dataset=batches.stream,
        data_collator=batches.collate,
    )
    trainer.train()
    return next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)


def test_accumulated_gradients_are_the_mean_of_the_parts(run, place, tmp_path):
    whole, parts = (grad_norm(place, run, *sizes, tmp_path) for sizes in ((4, 1), (1, 4)))
    assert parts == pytest.approx(whole, rel=1e-3)


def test_the_checkpoint_of_a_trainer_is_a_model_folder(place, run):
    """Its config holds what Trainer wrote into it, and is read without a word; a key of the future is named."""
    folder = place / "finetuned/checkpoint-20"
    saved = json.loads((folder / "config.json").read_text())
    assert "use_cache" in saved
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    views = dict.fromkeys(run["processor"].pixel_views, np.zeros((64, 64, 3), np.uint8))
    inputs = run["processor"](images=views, text="a cube", objective="box", check_stereo=False)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
