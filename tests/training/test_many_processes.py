"""Training in two processes, with DDP and FSDP2, started by `accelerate launch` with the configs of this repository:
what one process computes at the same batch, and checkpoints that each goes on from.
"""

import shutil
from pathlib import Path

import pytest
from training_runs import arguments, assert_same_training, held_share, recorded, run_here, run_two

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import StereoVLAConfig
from stereovla.training.feed import Batches, Feed
from stereovla.training.models import untrained
from stereovla.training.processes import join

# of two samples each process has one, so that one has action samples and the other none; frozen is the encoder whose
# batch norm would take the statistics of a part
PAIRS = ["--batch_size", "2", "--freeze", "stereo", "--mixture", "1:1:0:0"]
# beside that, half the samples have no depth map
DEPTHVLA = ["--preset", "depthvla-tiny", "--freeze", "", "--depth_map_share", "0.5"]
DEPTHVLA += ["--config", '{"language_loss_weight": 0.5}']


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return recorded(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> Path:
    """A run in one process."""
    output = tmp_path_factory.mktemp("training") / "alone"
    run_here([*arguments(dataset, output), *PAIRS])
    return output


@pytest.fixture(scope="module")
def split(dataset, tmp_path_factory) -> Path:
    """The same run in two processes that split weights and optimizer between them."""
    output = tmp_path_factory.mktemp("training") / "split"
    printed = run_two("fsdp2", [*arguments(dataset, output), *PAIRS])
    assert held_share(printed, "FSDP") < 0.51  # parameters whose first dimension is odd cannot be halved exactly
    return output


def half_way(run: Path, output: Path) -> Path:
    """A copy of `run` as it was after four steps."""
    output.mkdir()
    shutil.copytree(run / "checkpoint-0000004", output / "checkpoint-0000004")
    shutil.copy(run / "losses.jsonl", output)
    return output


def test_split_over_two_processes_trains_as_one(alone, split):
    assert_same_training(alone, split)


def test_one_process_goes_on_from_a_checkpoint_of_two(dataset, split, tmp_path, capsys):
    output = half_way(split, tmp_path / "run")
    run_here([*arguments(dataset, output), *PAIRS])
    assert "going on from checkpoint-0000004" in capsys.readouterr().out
    assert_same_training(split, output)


@pytest.mark.slow
def test_two_that_split_the_weights_go_on_from_a_checkpoint_of_one(dataset, alone, tmp_path):
    output = half_way(alone, tmp_path / "run")
    assert "going on from checkpoint-0000004" in run_two("fsdp2", [*arguments(dataset, output), *PAIRS])
    assert_same_training(alone, output)


@pytest.mark.slow
def test_two_with_whole_weights_train_as_one(dataset, alone, tmp_path):
    printed = run_two("ddp", [*arguments(dataset, tmp_path / "run"), *PAIRS])
    assert held_share(printed, "MULTI_CPU") == 1
    assert_same_training(alone, tmp_path / "run")


@pytest.mark.slow
def test_two_with_whole_weights_go_on_from_those_that_split_them(dataset, split, tmp_path):
    output = half_way(split, tmp_path / "run")
    run_two("ddp", [*arguments(dataset, output), *PAIRS])
    assert_same_training(split, output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "own", "rounding"),
    [
        # the running means are the result; parts are summed before they are exchanged
        ("fsdp2", ["--ema_decay", "0.5", "--accumulation", "2", "--batch_size", "4"], 1e-4),
        # bfloat16 has 8 bits of mantissa
        ("fsdp2", ["--mixed_precision", "bf16", "--gradient_checkpointing", "True"], 1e-2),
        # a disparity loss, pointers and a convolutional encoder, whose batch norm is frozen
        ("fsdp2", ["--preset", "demo", "--freeze", "stereo,semantic", "--learning_rate", "3e-4"], 1e-4),
        # pictures that samples share go through the language model's layers in a pass of their own
        ("fsdp2", ["--questions_per_frame", "2", "--batch_size", "4"], 1e-4),
        # experts that run by themselves or, with the mask "full", layer by layer together; a tied output layer
        ("fsdp2", DEPTHVLA, 1e-4),
        ("fsdp2", [*DEPTHVLA, "--mask", "full", "--gradient_checkpointing", "True"], 1e-4),
        ("ddp", DEPTHVLA, 1e-4),
        ("ddp", [*DEPTHVLA, "--mask", "full"], 1e-4),
    ],
)
def test_training_in_two_with_options_is_that_of_one(dataset, tmp_path, kind, own, rounding):
    for name, start in (("one", run_here), ("two", lambda given: run_two(kind, given))):
        start([*arguments(dataset, tmp_path / name), *PAIRS, *own])
    assert_same_training(tmp_path / "one", tmp_path / "two", rounding)


@pytest.mark.slow
def test_split_adapters_train_as_those_of_one_process(dataset, alone, tmp_path):
    own = [*PAIRS, "--model", str(alone / "model"), "--lora_rank", "2"]
    run_here([*arguments(dataset, tmp_path / "alone"), *own])
    run_two("fsdp2", [*arguments(dataset, tmp_path / "split"), *own])
    assert_same_training(tmp_path / "alone", tmp_path / "split")


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("tiny", {}),
        ("demo", {}),
        ("depthvla-tiny", {"language_loss_weight": 0.5}),
        ("depthvla-tiny", {"language_loss_weight": 0.5, "mask": "full"}),
        ("depthvla-demo", {}),
    ],
)
def test_every_trained_weight_has_a_gradient_whatever_a_batch_lacks(dataset, preset, options):
    """Processes that split weights wait for each other wherever one of them has a gradient."""
    meta = load_meta(dataset)
    model, processor = untrained(preset, meta, **options)
    config = model.config
    sizes = {"chunk_size": config.chunk_size, "history": config.state_history, "depth_map_share": 0.0}
    stream = WindowStream(dataset, mixture={"depth": 1.0}, pool_episodes=2, **sizes)
    inputs, objectives = Feed(Batches(stream, 2, processor, config), 0, 0).take()
    assert objectives == ["depth", "depth"] and not {"disparity", "depth_map"} & inputs.keys()
    model.train()(**inputs).loss.backward()
    lacking = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if getattr(config, "disparity_loss_weight", 1) == 0:  # then nothing reads the disparity, in no process and no step
        lacking = [name for name in lacking if ".stereo.classifier." not in name]
    assert not lacking


def test_feeds_of_two_processes_share_the_windows(dataset):
    """Each window's noise is drawn from a seed of its own, which tells the windows apart."""
    meta = load_meta(dataset)
    _, processor = untrained("tiny", meta)
    config = StereoVLAConfig.from_preset("tiny")

    def drawn(rank: int, world_size: int, count: int) -> list[bytes]:
        sizes = {"chunk_size": config.chunk_size, "history": config.state_history, "depth_map_share": 0.0}
        stream = WindowStream(dataset, pool_episodes=2, rank=rank, world_size=world_size, **sizes)
        feed = Feed(Batches(stream, 4, processor, config), 0, 0)
        return [noise.numpy().tobytes() for _ in range(count) for noise in feed.take()[0]["noise"]]

    parts = [drawn(rank, 2, 3) for rank in range(2)]
    assert len({*parts[0], *parts[1]}) == 24
    # of one process the next batch holds what the two hold together
    assert {*drawn(0, 1, 6)} == {*parts[0], *parts[1]}


def test_what_could_not_be_trained_as_configured_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fp16 is not supported with FSDP; choose bf16 or no"):
        join("fp16")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="FSDP_VERSION is 1; it must be 2"):
        join("no")
