"""The miniature of the released StereoVLA: its files as the release lays them out, its recorded tensors, our model."""

import importlib.util
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from stereovla.modeling_stereovla import StereoEncoderConfig, StereoEncoderModel, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.convert_stereovla import Options, convert
from stereovla.modeling_stereovla.stereo_encoder import StereoEncoderOutput

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens" / "stereovla_miniature"
# 3 channels x 8 disparities = the 24 channels that stand for the stereo network in the recording
STEREO = {
    "max_disparity": 32,
    "edgenext_depths": [0, 1],
    "edgenext_channels": [8, 16],
    "edgenext_kernel_sizes": [3, 5],
    "edgenext_splits": [0, 2],
    "edgenext_heads": 4,
    "num_refine_blocks": 0,
    "num_correlation_groups": 4,
    "num_concat_channels": 4,
    "volume_channels": 3,
    "num_stem_blocks": 0,
    "hourglass_channels": [8],
    "num_hourglass_blocks": 1,
    "disparity_kernel_size": 3,
    "num_disparity_layers": 0,
    "num_classifier_blocks": 0,
    "classifier_kernel_sizes": [1, 1],
}
STATISTICS = {
    key: {"min": np.linspace(-1, -0.5, 7) * scale, "max": np.linspace(0.5, 1, 7) * scale}
    for scale, key in enumerate(("proprio", "action", "goal"), 1)
}


def released_weights() -> dict[str, torch.Tensor]:
    return recorded_inputs().state_dict_from_keys(str(GOLDENS / "keys.tsv"))


def recorded_inputs():
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDENS / "inputs.py")
    inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    return inputs


def recorded_case() -> dict:
    return json.loads((GOLDENS / "case.json").read_text())


def recorded_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "tensors.safetensors")


def release_config(case: dict) -> dict:
    """config.json of a release of these sizes, with the release's field names."""
    return {
        "model": {
            "model_type": "assembled_vla",
            "model_specific": {
                "backbone_2d": {"name": "dinosiglip_stereo_vcp", "image_size": case["image_size"]},
                "llm": {"name": "internlm/internlm2-1_8b", "max_len": 2048, "special_tokens": []},
                "pred": "cotrain_flow_matching",
                "action_expert": 1,
                "action_expert_cfg": case["expert"],
                "flow_matching_cfg": case["flow"],
                "action_token_num": case["action_token_num"],
            },
            "max_proprio_dim": case["proprio_dim"],
            "max_action_dim": case["action_dim"],
            "max_goal_dim": case["goal_dim"],
            "dt": 0.2,
            "proprio_steps": case["proprio_steps"],
            "action_steps": case["action_steps"],
            "image_steps": 1,
            "image_keys": ["left", "right"],
            "image_size": case["image_size"],
        },
        "train": {"full_bf16": False},
    }


class _Released:
    """Base of the classes that the pickle below names."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def write_preprocessor(path: Path, statistics: dict | None = None, extra: object = None) -> None:
    """A pickle as the release's: objects of classes of a package that is gone when the file is read."""
    name = "vla_network.preprocessor.preprocess"
    module = types.ModuleType(name)
    for parent in ("vla_network", "vla_network.preprocessor"):
        sys.modules[parent] = types.ModuleType(parent)
    sys.modules[name] = module
    classes = ("DataPreprocessor", "RatioMinMaxUniformRobotNormalizer")
    for class_name in classes:
        setattr(module, class_name, type(class_name, (_Released,), {"__module__": name}))
    try:
        stats = {"epiclab_franka": STATISTICS if statistics is None else statistics}
        normalizer = module.RatioMinMaxUniformRobotNormalizer(num_samples=100, ratio=0.01, stats=stats)
        preprocessor = module.DataPreprocessor(config={"a": 1, "more": extra}, robot_normalizer=normalizer)
        path.write_bytes(pickle.dumps(preprocessor))
    finally:
        for key in ("vla_network", "vla_network.preprocessor", name):
            del sys.modules[key]


def write_release(folder: Path, weights: dict[str, torch.Tensor] | None = None) -> Options:
    """The release's folder, and options of the converter for it."""
    case = recorded_case()["case"]
    (folder / "checkpoint").mkdir(parents=True)
    save_file(released_weights() if weights is None else weights, folder / "checkpoint" / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(release_config(case)))
    (folder / "internlm2.json").write_text(json.dumps(case["llm"]))
    write_preprocessor(folder / "preprocessor.npz")
    torch.manual_seed(0)
    StereoEncoderModel(StereoEncoderConfig(**STEREO)).save_pretrained(folder / "stereo")
    return Options(
        checkpoint=str(folder / "checkpoint" / "model.safetensors"),
        internlm2_config=str(folder / "internlm2.json"),
        out=str(folder / "converted"),
        stereo=str(folder / "stereo"),
        semantic_heads=case["siglip"]["num_heads"],
        spatial_heads=case["dino"]["num_heads"],
    )


def converted_model(folder: Path) -> StereoVLAForActionPrediction:
    """The miniature through the converter and `from_pretrained`."""
    return StereoVLAForActionPrediction.from_pretrained(convert(write_release(folder))).eval()


class Recorded(torch.nn.Module):
    """Stands for the stereo encoder and returns volumes (B, C, H, W)."""

    def __init__(self, volumes: torch.Tensor):
        super().__init__()
        self.volumes = volumes

    def forward(self, pixel_values, output_disparity=False):
        return StereoEncoderOutput(features=self.volumes[: len(pixel_values)])


def show(model: StereoVLAForActionPrediction, siglip: torch.Tensor, dino: torch.Tensor, volumes: torch.Tensor):
    """Makes the model see the recorded inputs of its three towers, whatever pixels it is given.

    Args:
        siglip, dino: (B, 3, H, W), normalised already. volumes: (B, H, W, C).
    """
    tokens = model.model.visual_tokens
    for encoder, pixels in ((tokens.semantic, siglip), (tokens.spatial, dino)):
        encoder.mean, encoder.std = (0.0,) * 3, (1.0,) * 3
        encoder._forward_pre_hooks.clear()
        encoder.register_forward_pre_hook(lambda _module, inputs, pixels=pixels: (pixels[: len(inputs[0])],))
    tokens.stereo = Recorded(volumes.permute(0, 3, 1, 2))
