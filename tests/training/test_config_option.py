"""What --config and the options of a DepthVLA say, and the config of the model that is made so."""

import json
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint
from training_runs import arguments

from stereovla.command_line import parse
from stereovla.training.depth import DepthOptions
from stereovla.training.depth import build as build_depth
from stereovla.training.stereo import StereoOptions
from stereovla.training.stereo import build as build_stereo
from train import TrainingOptions, build

STATISTICS = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
META = {
    "tasks": ["pick up the red cube"],
    "stats": {"franka_panda": {name: STATISTICS for name in ("state", "action", "keyframe_pose")}},
    "fps": 10.0,
    "state_dim": 7,
    "action_dim": 7,
}


def config_of(*given: str):
    options = parse(TrainingOptions, "train", [*arguments("unused", Path("unused")), *given])
    return build(options, META)[0].config


def test_fields_of_a_config_and_of_its_parts_are_replaced():
    fields = {"flow_draws": 3, "text_config": {"num_hidden_layers": 3}, "stereo_config": {"volume_channels": 8}}
    config = config_of("--preset", "tiny", "--config", json.dumps(fields))
    plain = config_of("--preset", "tiny")
    assert (config.flow_draws, config.text_config.num_hidden_layers, config.stereo_config.volume_channels) == (3, 3, 8)
    assert config.text_config.hidden_size == plain.text_config.hidden_size
    assert config.stereo_config.max_disparity == plain.stereo_config.max_disparity
    mono = config_of("--preset", "tiny", "--config", '{"stereo_config": null}')
    assert mono.stereo_config is None and mono.semantic_config is not None


def test_the_longest_delay_stands_in_the_config_of_a_new_model_and_of_a_trained_one(tmp_path):
    assert config_of("--preset", "tiny").max_delay == 0
    assert config_of("--preset", "tiny", "--max_delay", "3").max_delay == 3
    folder = str(save_tiny_checkpoint(tmp_path / "model"))
    assert config_of("--preset", "tiny", "--model", folder, "--max_delay", "5").max_delay == 5
    for given, words in (
        (["--max_delay", "8"], "max_delay is 8; it must be at least 0 and below chunk_size"),
        (["--model", folder, "--max_delay", "2", "--lora_rank", "2"], "which an adapter does not have"),
    ):
        with pytest.raises(ValueError, match=words):
            config_of("--preset", "tiny", *given)


def test_each_ablation_stands_in_the_config():
    def of(*given: str):
        return config_of("--preset", "depthvla-tiny", *given)

    assert of("--depth_input", "none").depth_config is None
    assert of("--mask", "full").mask == "full" and of().mask == "block"
    assert of("--depth_loss", "off").depth_map_loss_weight == 0 and of().depth_map_loss_weight == 1
    assert of("--depth_input", "depth").depth_config.input == "depth"
    stereo = of("--depth_input", "stereo", "--config", '{"depth_config": {"merge_size": 2}}')
    assert stereo.depth_config.encoder_config is None and stereo.pixel_views == ["left", "right"]
    assert stereo.depth_config.merge_size == 2
    assert of("--freeze", "depth_expert").frozen_parts == ["depth_expert"] and of().frozen_parts == []
    assert list(of("--views", "left,wrist").views) == ["left", "wrist"]


def test_stages_take_the_same_option():
    plain = parse(StereoOptions, "stereo", ["--dataset", "a", "--output_dir", "b", "--preset", "tiny"])
    changed = parse(
        StereoOptions,
        "stereo",
        ["--dataset", "a", "--output_dir", "b", "--preset", "tiny", "--config", '{"volume_stride": 1}'],
    )
    assert (build_stereo(plain).config.volume_stride, build_stereo(changed).config.volume_stride) == (2, 1)
    depth = parse(
        DepthOptions,
        "depth",
        ["--dataset", "a", "--output_dir", "b", "--preset", "depthvla-tiny"]
        + ["--config", '{"decoder_config": {"hidden_size": 48}}'],
    )
    assert build_depth(depth).head.in_features == 48


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--preset", "tiny", "--config", "{"], "--config '{' is no JSON"),
        (["--preset", "tiny", "--config", "[1]"], r"--config is '\[1\]'; it must be a JSON object"),
        (["--preset", "tiny", "--config", '{"flow_drawz": 1}'], "no field 'flow_drawz'; did you mean 'flow_draws'"),
        (["--preset", "tiny", "--part_rates", "{"], "--part_rates '{' is no JSON"),
        (["--preset", "tiny", "--part_rates", "[1]"], r"--part_rates is '\[1\]'; it must be a JSON object"),
        (["--preset", "tiny", "--part_rates", '{"lm_head": "x"}'], "the factor of lm_head is 'x'; it must be a number"),
        (["--preset", "tiny", "--mask", "full"], "--mask are options of a DepthVLA, but --preset tiny is a StereoVLA"),
        (["--preset", "depthvla-tiny", "--model", "m", "--mask", "full"], "--mask say how an untrained"),
        (["--preset", "tiny", "--model", "m", "--config", '{"flow_draws": 1}'], "m has its own config"),
    ],
)
def test_what_cannot_be_made_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        config_of(*given)
