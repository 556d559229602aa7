"""formats.depth_estimation: pseudo-labels of a real, small Depth Anything, and that they resume to the byte."""

import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from command_lines import COMMAND
from command_lines import data as main
from hub_server import serve
from lerobot_folder import contents
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTImageProcessorPil,
)
from views_dataset import MONO, SMALL, WRIST, WRIST_DEPTH, write_views

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.checking import find_problems
from stereovla.dataset_builder.formats import depth_estimation
from stereovla.dataset_builder.formats.depth_estimation import DepthEstimator, DepthOptions, estimate_depth
from stereovla.dataset_builder.streaming.window_stream import WindowStream

LENGTHS = (4, 3, 2)
MOST_M = 5


def write_checkpoint(folder, kind="metric"):
    """Random weights, an image processor as Depth Anything's checkpoints have it, at 28 px in place of 518."""
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
    )
    backbone.reshape_hidden_states = False
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=8, depth_estimation_type=kind, max_depth=MOST_M,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for weights in model.parameters():  # as they are initialised, every picture is equally far away
            weights.normal_(std=0.3)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small-metric")


@pytest.fixture(scope="module")
def mono(tmp_path_factory):
    depths = (schema.DEPTH, WRIST_DEPTH)
    return write_views(tmp_path_factory.mktemp("mono") / "data", LENGTHS, (*MONO, *depths))


def options(dataset, checkpoint, out, **more) -> DepthOptions:
    return DepthOptions(dataset=str(dataset), model=str(checkpoint), out=str(out), **{"batch_size": 3, **more})


@pytest.fixture(scope="module")
def labelled(mono, checkpoint, tmp_path_factory):
    return estimate_depth(options(mono, checkpoint, tmp_path_factory.mktemp("labelled") / "out"))


def rows_of(folder):
    return [row for path in sorted((folder / "data").glob("*.parquet")) for row in shards.read_rows(path)]


def test_depth_of_every_view_is_what_the_model_says_of_its_picture(mono, checkpoint, labelled):
    """Against the model itself, one picture after the other."""
    model = DepthAnythingForDepthEstimation.from_pretrained(checkpoint).eval()
    processor = DPTImageProcessorPil.from_pretrained(checkpoint)
    before, means = rows_of(mono), set()
    assert len(before) == sum(LENGTHS)
    for row, wanted in zip(rows_of(labelled), before, strict=True):
        schema.validate_row(row)
        for key, depth in ((schema.LEFT, schema.DEPTH), (WRIST, WRIST_DEPTH)):
            assert (depth in row) == (key in row)
            if key in row:
                with torch.no_grad():
                    inputs = processor(Image.fromarray(row[key]), return_tensors="pt")
                    found = model(**inputs).predicted_depth[None]
                    found = torch.nn.functional.interpolate(found, row[key].shape[:2], mode="bicubic")[0, 0].numpy()
                assert found.std() > 1e-3 and 0 < found.mean() < MOST_M
                np.testing.assert_allclose(row[depth], np.maximum(found, 0), atol=1e-4)
                means.add(round(float(found.mean()), 3))
        assert set(row) - set(wanted) == {schema.DEPTH, WRIST_DEPTH} & set(row)
        for key, value in wanted.items():
            np.testing.assert_array_equal(row[key], value)
    assert rows_of(labelled)[0][WRIST_DEPTH].shape == SMALL and len(means) > 9


def test_what_it_says_of_itself(labelled, mono, checkpoint, tmp_path):
    info = shards.read_json(labelled / "meta/info.json")
    source = info["depth_source"]
    assert source.startswith("estimated by small-metric@") and str(checkpoint.parent) not in source
    assert info["columns"].index(schema.DEPTH) == info["columns"].index("state_is_pose") + 1
    text = " ".join((labelled / "README.md").read_text().split())
    assert f"Source of the depth: {source}: a model's answers to single pictures, no measurement." in text
    assert (
        find_problems(labelled) == []
        and (labelled / "meta/stats.json").read_bytes() == (mono / "meta/stats.json").read_bytes()
    )
    stream = WindowStream(
        labelled, views=("left", "wrist"), mixture={"action": 1, "depth": 1}, depth_points="uniform", epochs=1, lanes=2
    )
    windows = list(stream)
    assert len(windows) == sum(LENGTHS) and all("depth" in window for window in windows)
    other = shutil.copytree(checkpoint, tmp_path / "small-metric")
    size = {"height": 42, "width": 42}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(other)
    assert DepthEstimator(str(other)).name != source.removeprefix("estimated by ")


class Stopped(BaseException):
    """As if the process were killed: nothing may catch it."""


@pytest.mark.parametrize("calls", [1, 2, 4, 6, 8])
def test_stopped_anywhere_the_same_command_ends_in_the_same_bytes(
    mono, checkpoint, labelled, tmp_path, monkeypatch, calls
):
    """Before a batch of the model, or before a file gets its name."""
    whole, renamed, count = depth_estimation.shards.encode_image, depth_estimation.shards.os.replace, []

    def stopping(function):
        def stop(*arguments):
            count.append(1)
            if len(count) == 3 * calls:
                raise Stopped
            return function(*arguments)

        return stop

    with monkeypatch.context() as patch:
        patch.setattr(depth_estimation.shards, "encode_image", stopping(whole))
        patch.setattr(depth_estimation.shards.os, "replace", stopping(renamed))
        with pytest.raises(Stopped):
            estimate_depth(options(mono, checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out" / shards.MANIFEST).exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/data/*.parquet")}
    estimate_depth(options(mono, checkpoint, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(labelled)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # what was done is not done again


def test_the_command_replaces_depth_and_says_so(checkpoint, tmp_path, capsys):
    """Of a pair the right view gets none, unless it had one: a dataset names one source of its depth."""
    data = write_views(tmp_path / "data", [2, 3], depth_source="simulation")
    command = ["estimate_depth", "--dataset", str(data), "--model", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"the depth of {data} (simulation) is replaced in {tmp_path / 'out'} by what small-metric@" in printed
    info = shards.read_json(tmp_path / "out/meta/info.json")
    assert info["columns"] == shards.read_json(data / "meta/info.json")["columns"]
    assert main(["check", str(tmp_path / "out"), "--quick"]) == 0
    for row, wanted in zip(rows_of(tmp_path / "out"), rows_of(data), strict=True):
        assert np.abs(row[schema.DEPTH] - wanted[schema.DEPTH]).max() > 0.01 and "observation.depth.right" not in row
    assert main([*command, "--batch_size", "5"]) == 2
    assert "was begun with other options: batch_size was 8, now 5" in capsys.readouterr().err


def test_a_checkpoint_of_the_hub_is_named_with_its_revision(mono, checkpoint, labelled, tmp_path):
    """In a process of its own, since the address of the Hub is read when huggingface_hub is imported."""
    command = [*COMMAND, "data", "estimate_depth", "--dataset", str(mono), "--model", "someone/small-metric"]
    command += ["--out", str(tmp_path / "out"), "--batch_size", "3"]
    with serve() as server:
        repository = server.add("model", "someone/small-metric", checkpoint)
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    source = shards.read_json(tmp_path / "out/meta/info.json")["depth_source"]
    assert source == f"estimated by someone/small-metric@{repository.heads['main']}"
    for path in (labelled / "data").iterdir():
        assert (tmp_path / "out/data" / path.name).read_bytes() == path.read_bytes()


def test_what_cannot_be_used_is_refused_in_words(mono, checkpoint, tmp_path, capsys):
    relative = write_checkpoint(tmp_path / "relative", "relative")
    other = tmp_path / "other"
    DPTConfig().save_pretrained(other)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "nothing"}')
    metric = "metric checkpoints are depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf"
    for model, message in (
        (relative, f"(depth_anything): depth is relative, not metric; {metric}"),
        (other, f"(dpt): no Depth Anything; {metric}"),
        (unknown, "is no checkpoint of transformers"),
        (tmp_path / "nowhere/at/all", "is neither a folder nor a Hub id"),
    ):
        command = ["estimate_depth", "--dataset", str(mono), "--model", str(model), "--out", str(tmp_path / "out")]
        assert main(command) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--revision is 'v1', but .* is a folder; leave the option out"):
        estimate_depth(options(mono, checkpoint, tmp_path / "out", revision="v1"))
    with pytest.raises(ValueError, match="the dataset itself"):
        estimate_depth(options(mono, checkpoint, mono))
    broken = shutil.copytree(mono, tmp_path / "broken")
    first = sorted((broken / "data").glob("*"))[0]
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(shards.ShardError, match="is not what was built: data/train-00000.*truncated"):
        estimate_depth(options(broken, checkpoint, tmp_path / "out"))
    for wrong, message in (({"model": ""}, "--model is missing"), ({"batch_size": 0}, "batch_size=0 must be")):
        with pytest.raises(ValueError, match=message):
            DepthOptions(**{"dataset": "d", "model": "m", "out": "o", **wrong})
