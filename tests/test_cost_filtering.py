"""Volume filtering: attention layouts against loops, receptive fields, gating, published sizes."""

import math

import pytest
import torch

from modeling_stereovla.configuration_stereo_encoder import StereoEncoderConfig
from modeling_stereovla.cost_filtering import (
    AxialPlanarConvolution,
    CostFilter,
    DisparityClassifier,
    DisparityLayer,
    DisparityTransformer,
    FeatureGate,
    sinusoidal_positions,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small_config(**overrides):
    sizes = {
        "max_disparity": 32,
        "edgenext_depths": [1, 1, 1],
        "edgenext_channels": [8, 12, 16],
        "edgenext_kernel_sizes": [3, 3, 3],
        "edgenext_splits": [0, 0, 0],
        "num_correlation_groups": 4,
        "num_concat_channels": 2,
        "volume_channels": 8,
        "num_stem_blocks": 1,
        "hourglass_channels": [8, 16],
        "num_hourglass_blocks": 1,
        "disparity_kernel_size": 5,
        "num_disparity_layers": 1,
        "num_disparity_heads": 2,
        "disparity_dropout": 0.0,
    }
    return StereoEncoderConfig(**{**sizes, **overrides})


@pytest.mark.parametrize("layout", ["disparity", "heads"])
@torch.no_grad()
def test_attention_layouts_equal_a_loop(layout):
    layer = DisparityLayer(6, heads=2, dropout=0.0, layout=layout).double()
    tokens = torch.randn(3, 5, 6, dtype=torch.float64)
    query, key, value = (project(tokens).view(3, 5, 2, 3) for project in (layer.query, layer.key, layer.value))
    mixed = torch.zeros(3, 5, 2, 3, dtype=torch.float64)
    for n in range(3):
        for d in range(5):
            for head in range(2):
                if layout == "disparity":  # the same head at every disparity
                    keys, values = key[n, :, head], value[n, :, head]
                else:  # every head at the same disparity
                    keys, values = key[n, d], value[n, d]
                weights = (keys @ query[n, d, head] / math.sqrt(3)).softmax(0)
                mixed[n, d, head] = weights @ values
    torch.testing.assert_close(layer.attend(tokens), layer.out(mixed.flatten(2)))


def test_positions_interleave_sines_and_cosines():
    positions = sinusoidal_positions(3, 4, torch.device("cpu"))
    for row in range(3):
        expected = [f(row / 10000 ** (2 * pair / 4)) for pair in range(2) for f in (math.sin, math.cos)]
        torch.testing.assert_close(positions[row], torch.tensor(expected))


def test_axial_planar_convolution_reaches_as_far_as_its_kernels():
    block = AxialPlanarConvolution(8, 5).eval()
    volume = torch.zeros(1, 8, 15, 9, 9)
    changed = volume.clone()
    changed[0, :, 7, 4, 4] = 1
    with torch.no_grad():
        difference = (block(changed) - block(volume)).abs().amax((0, 1))
    touched = difference.nonzero()
    assert touched[:, 0].min() >= 5 and touched[:, 0].max() <= 9
    assert touched[:, 1:].min() >= 3 and touched[:, 1:].max() <= 5
    assert (touched[:, 0] != 7).any(), "the convolution along the disparity does nothing"


@torch.no_grad()
def test_gate_is_one_factor_per_pixel_and_channel():
    gate = FeatureGate(6, 4).eval()
    features = torch.randn(2, 6, 5, 5)
    factor = gate(torch.ones(2, 4, 3, 5, 5), features)
    assert ((factor > 0) & (factor < 1)).all()
    assert (factor == factor[:, :, :1]).all(), "the gate differs between disparities"
    volume = torch.randn(2, 4, 3, 5, 5)
    torch.testing.assert_close(gate(volume, features), volume * factor)


@torch.no_grad()
def test_transformer_mixes_disparities_of_one_location_only():
    transformer = DisparityTransformer(small_config()).eval()
    volume = torch.randn(1, 8, 8, 16, 16)
    changed = volume.clone()
    changed[0, :, 0:4, 0:4, 0:4] += 1
    difference = (transformer(changed) - transformer(volume)).abs().amax((0, 1))  # (D, H, W)
    assert difference[6, 0, 0] > 0, "the other disparity token does not see the change"
    # trilinear upsampling by 4 reaches at most half a patch into the next one
    assert difference[:, 6:, :].max() == 0 and difference[:, :, 6:].max() == 0


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_filter_keeps_the_disparity_axis(stride):
    config = small_config(volume_stride=stride, hourglass_channels=[8])
    maps = [torch.randn(2, c, 32 >> i, 48 >> i) for i, c in enumerate(config.map_channels)]
    filtered = CostFilter(config).eval()(torch.randn(2, 8, 8, 32, 48), maps[stride - 1 :])
    assert filtered.shape == (2, 8, 8, 32 // stride, 48 // stride)
    assert filtered.min() >= 0 and filtered.max() > 0


@torch.no_grad()
def test_no_transformer_and_no_output_block():
    config = small_config(num_disparity_layers=0, num_hourglass_blocks=0, num_stem_blocks=0)
    maps = [torch.randn(1, c, 16 >> i, 16 >> i) for i, c in enumerate(config.map_channels)]
    assert CostFilter(config).eval()(torch.randn(1, 8, 8, 16, 16), maps).shape == (1, 8, 8, 16, 16)


# parameter counts of the published network, both releases: projection and stem, its gate, hourglass, classifier
@pytest.mark.parametrize(("release", "gate"), [("large", 28_476), ("small", 10_140)])
def test_published_sizes(release, gate):
    config = StereoEncoderConfig.foundationstereo(release)
    with torch.device("meta"):
        network, classifier = CostFilter(config), DisparityClassifier(config)

    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert count(network.project, network.stem, network.blocks) == 107_044
    assert count(network.gate) == gate
    assert count(network.hourglass) == 4_741_700
    assert count(classifier) == 26_055
