"""The stereo encoder and StereoVLA at every size they promise: images, disparity ranges, feature choices."""

import pytest
import torch
from test_modeling_stereovla import make_inputs
from torch.nn import functional as F

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.configuration_stereo_encoder import FEATURE_CHOICES, StereoEncoderConfig
from stereovla.modeling_stereovla.stereo_encoder import StereoEncoderModel

# the structure of the released network, all four scales and three hourglass levels, with few channels
THIN = {
    "edgenext_depths": [0, 1, 1, 1],
    "edgenext_channels": [4, 8, 8, 8],
    "edgenext_splits": [0, 2, 0, 0],
    "edgenext_heads": 2,
    "layer_scale_init_value": 1.0,
    "num_refine_blocks": 1,
    "num_correlation_groups": 2,
    "num_concat_channels": 2,
    "volume_channels": 4,
    "num_stem_blocks": 1,
    "hourglass_channels": [4, 4, 4],
    "num_hourglass_blocks": 1,
    "disparity_kernel_size": 5,
    "num_disparity_layers": 1,
    "num_disparity_heads": 2,
    "num_classifier_blocks": 0,
    "classifier_kernel_sizes": [3, 1],
}
SIZES = [(224, 224), (448, 448), (896, 896), (480, 640)]


def thin_model(**overrides) -> StereoEncoderModel:
    torch.manual_seed(0)
    return StereoEncoderModel(StereoEncoderConfig(**{**THIN, "max_disparity": 32, **overrides})).eval()


def random_pair(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 2, 3, height, width, generator=torch.Generator().manual_seed(1))


def check_volume_at_samples(model: StereoEncoderModel, pair: torch.Tensor, samples: int = 200) -> None:
    """Compares the raw volume with the definition of its entries, at random places and on both sides of x = d."""
    maps = model.extract_features(model.normalized_views(pair))
    volume, (left, right) = model.raw_volume(maps)[0], maps[0]
    projected_left, projected_right = model.match_projection(maps[0])
    groups, concat, bins = (
        model.config.num_correlation_groups,
        model.config.num_concat_channels,
        model.config.num_disparities,
    )
    height, width = left.shape[-2:]
    assert volume.shape == (groups + 2 * concat, bins, height, width)
    generator = torch.Generator().manual_seed(2)
    places = [[int(torch.randint(n, (), generator=generator)) for n in (bins, height, width)] for _ in range(samples)]
    for d, y, _ in places[: samples // 4]:
        places += [[d, y, min(d, width - 1)], [d, y, max(min(d, width) - 1, 0)]]
    matched = 0
    for d, y, x in places:
        expected = torch.zeros(groups + 2 * concat)
        expected[groups : groups + concat] = projected_left[:, y, x]
        if x >= d:
            matched += 1
            one, other = left[:, y, x].view(groups, -1), right[:, y, x - d].view(groups, -1)
            expected[:groups] = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1)).clamp_min(1e-12)
            expected[groups + concat :] = projected_right[:, y, x - d]
        torch.testing.assert_close(volume[:, d, y, x], expected, rtol=1e-4, atol=1e-5)
    assert 0 < matched < len(places)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("features", FEATURE_CHOICES)
@torch.no_grad()
def test_every_image_size_and_feature_choice(height, width, features):
    model = thin_model(features=features)
    output = model(random_pair(height, width))
    assert output.features.shape == (1, model.config.num_feature_channels(width), height // 4, width // 4)
    assert output.initial_disparity.shape == (1, 1, height // 4, width // 4)
    assert output.disparity.shape == (1, height, width)
    assert output.features.isfinite().all() and output.features.std() > 0
    assert 0 <= output.disparity.min() and output.disparity.max() < model.config.max_disparity


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_the_raw_volume_at_sampled_places(height, width):
    check_volume_at_samples(thin_model(), random_pair(height, width))


@pytest.mark.parametrize("max_disparity", [32, 96, 160, 416, 672])  # the last two reach further than 224 px
@torch.no_grad()
def test_every_disparity_range(max_disparity):
    """The same weights load at every range, and a longer volume begins with the shorter one."""
    model, pair = thin_model(max_disparity=max_disparity), random_pair(224, 224)
    wider = thin_model(max_disparity=max_disparity + 32)
    wider.load_state_dict(model.state_dict())
    output = model(pair)
    assert output.features.shape == (1, 4 * max_disparity // 4, 56, 56)
    assert output.logits.shape == (1, 1, max_disparity // 4, 56, 56)
    maps = model.extract_features(model.normalized_views(pair))
    short, long = model.raw_volume(maps), wider.raw_volume(maps)
    assert long.shape[2] == short.shape[2] + 8 and torch.equal(long[:, :, : short.shape[2]], short)
    check_volume_at_samples(model, pair, samples=40)


@torch.no_grad()
def test_a_crop_of_the_volume_gives_the_crop_of_the_filtered_one():
    """At 480x640: away from the new borders, no place of the filtered volume depends on where it is in the image."""
    model = thin_model(hourglass_channels=[4])
    maps = model.extract_features(model.normalized_views(random_pair(480, 640)))
    left, volume = [features[0::2] for features in maps], model.raw_volume(maps)
    whole = model.filter(volume, left)
    top, start, height, width = 16, 64, 64, 80  # in pixels of the volume, multiples of the coarsest stride
    crops = [
        features[..., top >> i : (top + height) >> i, start >> i : (start + width) >> i]
        for i, features in enumerate(left)
    ]
    cropped = model.filter(volume[..., top : top + height, start : start + width], crops)
    reach = 12
    inner = cropped[..., reach:-reach, reach:-reach]
    expected = whole[..., top + reach : top + height - reach, start + reach : start + width - reach]
    torch.testing.assert_close(inner, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cropped, whole[..., top : top + height, start : start + width], atol=1e-3)


@pytest.mark.parametrize("features", ["cost_volume", "filtered_cost_volume", "lookup"])
@torch.no_grad()
def test_reachable_bins_only_is_the_filter_of_the_shorter_volume(features):
    """At 96 px 24 bins can match; a model of 32 bins that filters those is the one of 24 bins, and fills the rest."""
    pair = random_pair(64, 96)
    full, short = (thin_model(max_disparity=d, features=features) for d in (128, 96))
    reachable = thin_model(max_disparity=128, reachable_bins_only=True, features=features)
    output, expected = reachable(pair), short(pair)
    torch.testing.assert_close(output.disparity, expected.disparity)
    torch.testing.assert_close(output.logits, expected.logits)
    assert not torch.allclose(output.disparity, full(pair).disparity)  # and only nearly the full one
    assert output.features.shape[1] == full.config.num_feature_channels(96)
    if features == "cost_volume":  # which nothing filters
        torch.testing.assert_close(output.features, full(pair).features, rtol=0, atol=0)
    elif features == "lookup":
        torch.testing.assert_close(output.features, expected.features)
    else:
        bins, kept = output.features.unflatten(1, (4, 32)), expected.features.unflatten(1, (4, 24))
        torch.testing.assert_close(bins[:, :, :24], kept)
        for d in range(24, 32):
            torch.testing.assert_close(bins[:, :, d], kept.mean(2))


@torch.no_grad()
def test_reachable_bins_only_changes_nothing_where_all_can_be_reached():
    model, reachable, pair = thin_model(), thin_model(reachable_bins_only=True), random_pair(64, 96)
    for name in ("features", "disparity", "logits"):
        torch.testing.assert_close(reachable(pair)[name], model(pair)[name], rtol=0, atol=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_released_widths_at_224_px():
    torch.manual_seed(0)
    model = StereoEncoderModel(StereoEncoderConfig.foundationstereo("small")).eval()
    pair = random_pair(224, 224)
    output = model(pair)
    assert output.features.shape == (1, 2912, 56, 56) and model.config.num_feature_channels(224) == 2912
    assert output.logits.shape == (1, 1, 104, 56, 56) and output.disparity.shape == (1, 224, 224)
    assert output.features.isfinite().all() and output.features.std() > 0
    check_volume_at_samples(model, pair)
    model.filter.alike_bins = lambda _bins, _width: 1  # also those that are alike
    difference = model(pair, output_disparity=False).features - output.features
    assert difference.abs().max() <= 1e-5 * output.features.std()


# ---- StereoVLA


def policy(image_size: int, stereo: dict | None) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    tower = {"image_size": image_size, "patch_size": image_size // 16}
    config = StereoVLAConfig.from_preset(
        "tiny", **tower, semantic_config=tower, spatial_config=tower, stereo_config=stereo, chain_of_thought=False
    )
    return StereoVLAForActionPrediction(config).eval()


@pytest.mark.parametrize("image_size", [224, 448])
@pytest.mark.parametrize("features", [*FEATURE_CHOICES, "mono"])
@torch.no_grad()
def test_the_policy_at_every_image_size_and_feature_choice(image_size, features):
    stereo = None if features == "mono" else StereoEncoderConfig(**THIN, max_disparity=32, features=features).to_dict()
    model = policy(image_size, stereo)
    assert model.config.num_visual_tokens == 256
    inputs, fused = make_inputs(model.config, batch=1), []
    model.model.visual_tokens.projector.register_forward_pre_hook(lambda _module, given: fused.append(given[0]))
    noise = torch.randn(1, model.config.chunk_size, 7)
    actions = model.predict_action(**inputs, noise=noise)
    assert actions.shape == (1, 8, 7) and actions.isfinite().all()
    channels = 0 if features == "mono" else model.config.stereo_config.num_feature_channels(image_size)
    assert fused[0].shape == (1, 256, model.config.fused_size) and model.config.fused_size == 64 + channels
    if channels:
        geometry = model.model.visual_tokens.stereo(inputs["pixel_values"], output_disparity=False).features
        expected = F.adaptive_avg_pool2d(geometry, 16).flatten(2).transpose(1, 2)
        torch.testing.assert_close(fused[0][..., 64:], expected, rtol=1e-4, atol=1e-5)
    inputs["pixel_values"][:, 1] = inputs["pixel_values"][:, 1].flip(-1)
    assert torch.equal(model.predict_action(**inputs, noise=noise), actions) == (features == "mono")
