"""EdgeNeXt features: each block against a plain loop, channel bookkeeping, independence of the samples."""

import math

import pytest
import torch

from stereovla.modeling_stereovla.configuration_stereo_encoder import StereoEncoderConfig
from stereovla.modeling_stereovla.edgenext import (
    CrossCovarianceAttention,
    FourierPosition,
    SplitAttentionBlock,
    StereoFeatures,
    instance_norm,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small_config(**overrides):
    sizes = {
        "edgenext_depths": [0, 2, 1],
        "edgenext_channels": [8, 16, 24],
        "edgenext_kernel_sizes": [3, 5, 7],
        "edgenext_splits": [0, 2, 3],
        "edgenext_heads": 4,
        "layer_scale_init_value": 1.0,
        "num_correlation_groups": 4,
        "hourglass_channels": [8],
    }
    return StereoEncoderConfig(**{**sizes, **overrides})


@pytest.mark.parametrize("channels", [3, 80])  # narrow maps come back channels last, wide ones do not
def test_instance_norm_is_per_sample_and_channel(channels):
    features = torch.randn(2, channels, 5, 7, dtype=torch.float64) * 3 + 2
    normalized = instance_norm(features)
    for sample in range(2):
        for channel in range(channels):
            plane = features[sample, channel]
            expected = (plane - plane.mean()) / (plane.var(correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(normalized[sample, channel], expected)
    assert normalized.is_contiguous(memory_format=torch.channels_last) == (channels < 64)


@torch.no_grad()
def test_cross_covariance_attention_equals_a_loop_over_heads():
    attention = CrossCovarianceAttention(12, heads=3).double()
    attention.temperature.uniform_(0.5, 2)
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    qkv = attention.qkv(tokens)
    rows = []
    for sample in range(2):
        mixed = torch.zeros(5, 12, dtype=torch.float64)
        for head in range(3):
            columns = slice(4 * head, 4 * head + 4)
            query, key, value = (qkv[sample, :, 12 * part : 12 * part + 12][:, columns] for part in range(3))
            cosine = (query / query.norm(dim=0)).T @ (key / key.norm(dim=0))  # (4, 4), between channels
            mixed[:, columns] = value @ (cosine * attention.temperature[head]).softmax(-1).T
        rows.append(attention.out(mixed))
    torch.testing.assert_close(attention(tokens), torch.stack(rows))


@torch.no_grad()
def test_fourier_position_equals_its_formula():
    position = FourierPosition(6, hidden=4)
    encoded = position(2, 3)
    for row in range(2):
        for column in range(3):
            entries = []
            for step, length in ((row + 1, 2), (column + 1, 3)):
                angle = step / (length + 1e-6) * 2 * math.pi
                for pair in range(2):
                    period = 10000 ** (2 * pair / 4)
                    entries += [math.sin(angle / period), math.cos(angle / period)]
            expected = position.projection(torch.tensor(entries).view(1, 8, 1, 1)).flatten()
            torch.testing.assert_close(encoded[0, row * 3 + column], expected)


@torch.no_grad()
def test_later_splits_see_the_earlier_ones():
    block = SplitAttentionBlock(12, splits=3, heads=2, layer_scale=0.0, with_position=False)
    block.mlp.layer_scale.scale.fill_(1.0)
    block.mlp.norm = block.mlp.expand = block.mlp.contract = torch.nn.Identity()  # leaves gelu(concatenated splits)
    features = torch.randn(1, 12, 6, 6)
    first, second, last = features.chunk(3, dim=1)
    first = block.convolutions[0](first)
    second = block.convolutions[1](second + first)
    expected = features + torch.nn.functional.gelu(torch.cat([first, second, last], dim=1))
    torch.testing.assert_close(block(features), expected)


@torch.no_grad()
def test_maps_have_the_stated_sizes():
    config = small_config()
    maps = StereoFeatures(config)(torch.randn(2, 3, 64, 96))
    shapes = [(2, 16, 16, 24), (2, 32, 8, 12), (2, 24, 4, 6)]
    assert [tuple(features.shape) for features in maps] == shapes
    assert config.map_channels == [16, 32, 24]


def test_samples_do_not_influence_each_other_even_in_training():
    network = StereoFeatures(small_config()).train()
    images = torch.randn(3, 3, 32, 32)
    for together, alone in zip(network(images), network(images[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


# parameter counts of the published network, both releases (stem, stages, decoder, last convolutions)
@pytest.mark.parametrize(("release", "last"), [("large", 2_258_816), ("small", 737_792)])
def test_published_sizes(release, last):
    with torch.device("meta"):
        network = StereoFeatures(StereoEncoderConfig.foundationstereo(release))

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(network.stem) == 2_448
    assert count(network.stages) == 5_278_776
    assert [count(block) for block in network.upsampling] == [2_621_440, 1_155_072, 313_344]
    assert count(network.fuse) + count(network.refine) == last
