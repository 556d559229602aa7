"""Visual tokens: the order and pooling of the fused features, and the ablations that leave encoders out."""

import pytest
import torch
from test_modeling_stereovla import make_inputs, make_training_inputs
from torch.nn import functional as F

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.configuration_stereovla import PRESETS
from stereovla.modeling_stereovla.visual_tokens import StereoVisualTokens, normalize_pixels, pool_to_grid

ABLATIONS = {
    "mono": {"stereo_config": None},
    "mono, one encoder": {"stereo_config": None, "spatial_config": None},
    "no semantics": {"semantic_config": None},
    "stereo alone": {"semantic_config": None, "spatial_config": None},
}


def tiny(**overrides) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", **overrides)).eval()


@torch.no_grad()
def test_tokens_are_the_projected_semantic_spatial_and_pooled_stereo_features():
    torch.manual_seed(0)
    tokens = StereoVisualTokens(StereoVLAConfig.from_preset("tiny")).eval()
    pair = torch.rand(2, 2, 3, 64, 64)
    half = (0.5, 0.5, 0.5)
    semantic = tokens.semantic.tower(pixel_values=normalize_pixels(pair[:, 0], half, half)).last_hidden_state
    volume = tokens.stereo(pair).features  # (2, 128, 8, 8)
    expected = torch.zeros(2, 16, 32 + 32 + 128)
    expected[..., :32] = semantic
    expected[..., 32:64] = tokens.spatial(pair[:, 0])
    for row in range(4):
        for column in range(4):
            patch = volume[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected[:, 4 * row + column, 64:] = patch.mean((2, 3))
    torch.testing.assert_close(tokens(pair).tokens, tokens.projector(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "grid"), [(8, 8, 4), (4, 4, 4), (7, 9, 4), (8, 12, 4)])
def test_pooling_equals_torchs_adaptive_one(height, width, grid):
    features = torch.randn(2, 3, height, width)
    expected = F.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_to_grid(features, grid), expected)


# ---- ablations


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_saves_loads_and_predicts(ablation, tmp_path):
    model = tiny(**ABLATIONS[ablation])
    absent = {name.removesuffix("_config") for name in ABLATIONS[ablation]}
    assert all(getattr(model.model.visual_tokens, name) is None for name in absent)
    model.save_pretrained(tmp_path)
    again = StereoVLAForActionPrediction.from_pretrained(tmp_path)
    assert all(getattr(again.config, name) is None for name in ABLATIONS[ablation])
    assert set(again.state_dict()) == set(model.state_dict())
    inputs, noise = make_inputs(model.config), torch.randn(2, model.config.chunk_size, 7)
    assert torch.equal(again.predict_action(**inputs, noise=noise), model.predict_action(**inputs, noise=noise))
    with pytest.raises(ValueError, match=f"cannot freeze .*{sorted(absent)[0]}.*; this model has"):
        model.freeze(*absent)
    remaining = {"semantic", "spatial", "stereo"} - absent
    model.train().freeze(*remaining)
    assert not any(getattr(model.model.visual_tokens, name).training for name in remaining)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_parameter_of_an_ablation_learns(ablation):
    has_stereo = "stereo_config" not in ABLATIONS[ablation]
    model = tiny(**ABLATIONS[ablation], disparity_loss_weight=float(has_stereo)).train()
    size = model.config.image_size
    truth = {"disparity": torch.rand(4, size, size) * 20 + 1} if has_stereo else {}
    output = model(**make_training_inputs(model.config), **truth)
    output.loss.backward()
    assert (output.disparity is not None) == (output.disparity_loss is not None) == has_stereo
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


@torch.no_grad()
def test_a_mono_model_does_not_look_at_the_right_view():
    model = tiny(stereo_config=None)
    inputs, noise = make_inputs(model.config), torch.randn(2, model.config.chunk_size, 7)
    expected = model.predict_action(**inputs, noise=noise)
    blind = inputs["pixel_values"].clone()
    blind[:, 1] = float("nan")
    assert torch.equal(model.predict_action(**(inputs | {"pixel_values": blind}), noise=noise), expected)
    blind[:, 0] = inputs["pixel_values"][:, 1]
    assert not torch.allclose(model.predict_action(**(inputs | {"pixel_values": blind}), noise=noise), expected)


@torch.no_grad()
def test_a_mono_model_has_no_disparity():
    model = tiny(stereo_config=None)
    prompt = {key: value for key, value in make_inputs(model.config).items() if key != "state"}
    assert model(**prompt).disparity is None
    with pytest.raises(ValueError, match="no stereo encoder"):
        model(**prompt, output_disparity=True)
    with pytest.raises(ValueError, match="no stereo encoder"):
        model(**make_training_inputs(model.config), disparity=torch.ones(4, 64, 64))


def test_configurations_that_cannot_work_are_refused():
    with pytest.raises(Exception, match="all None; one at least must give visual tokens"):
        StereoVLAConfig.from_preset("tiny", semantic_config=None, spatial_config=None, stereo_config=None)
    with pytest.raises(Exception, match="disparity_loss_weight is 0.5 .*they must be 0 and 'all'"):
        StereoVLAConfig.from_preset("tiny", stereo_config=None, disparity_loss_weight=0.5)
    with pytest.raises(Exception, match="stereo_learns_from 'disparity', but stereo_config is None"):
        StereoVLAConfig.from_preset("tiny", stereo_config=None, stereo_learns_from="disparity")
    with pytest.raises(Exception, match="image_size is 48; it must be divisible by 32"):
        StereoVLAConfig.from_preset("tiny", image_size=48)
    towers = {"semantic_config": {"image_size": 48}, "spatial_config": {"image_size": 48}}
    assert StereoVLAConfig.from_preset("tiny", image_size=48, stereo_config=None, **towers).num_visual_tokens == 9


def test_no_part_at_all_means_the_papers():
    full = StereoVLAConfig()
    assert full.fused_size == 1152 + 1024 + 2912
    assert full.to_dict() == StereoVLAConfig.from_preset("full").to_dict()
    mono = StereoVLAConfig.from_preset("full", stereo_config=None)
    assert mono.stereo_config is None and mono.fused_size == 1152 + 1024


def test_a_dict_brings_in_a_part_that_the_preset_lacks():
    spatial = PRESETS["tiny"]()["spatial_config"] | {"image_size": 96, "patch_size": 8}
    assert StereoVLAConfig.from_preset("demo", spatial_config=spatial).spatial_config.hidden_size == 32
    with pytest.raises(ValueError, match="did you mean 'stereo_config'"):
        StereoVLAConfig.from_preset("demo", stereo_konfig={"max_disparity": 64})
