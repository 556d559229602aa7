"""Volume filtering: attention layouts against loops, receptive fields, gating, published sizes."""

import math

import pytest
import torch

from stereovla.modeling_stereovla.configuration_stereo_encoder import StereoEncoderConfig
from stereovla.modeling_stereovla.cost_filtering import (
    AxialPlanarConvolution,
    CostFilter,
    DisparityClassifier,
    DisparityLayer,
    DisparityTransformer,
    FeatureGate,
    OneTapConvolution,
    repeat_bin,
    sinusoidal_positions,
)
from stereovla.modeling_stereovla.cost_volume import matching_volume


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


@pytest.mark.parametrize(("channels", "size", "taps"), [(6, 12, 5), (6, 12, 1), (28, 40, 17)])  # small and large path
def test_convolution_with_one_tap_across_the_image_equals_torchs(channels, size, taps):
    ours = OneTapConvolution(channels, 4, taps)
    plain = torch.nn.Conv3d(channels, 4, (taps, 1, 1), padding=(taps // 2, 0, 0))
    plain.load_state_dict(ours.state_dict())
    volume = torch.randn(1, channels, 24, size, size, requires_grad=True)
    torch.testing.assert_close(ours(volume), plain(volume), rtol=1e-4, atol=1e-5)
    parameters = [(volume, *module.parameters()) for module in (ours, plain)]
    weights = torch.randn(1, 4, 24, size, size)
    gradients = [
        torch.autograd.grad((module(volume) * weights).sum(), wanted)
        for module, wanted in zip((ours, plain), parameters, strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


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


def randomise_statistics(network):
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)


def filter_inputs(config, height, width):
    """A raw volume as the encoder makes it, the left view's maps, and what the volume is made from."""
    channels = 2 * [config.map_channels[0]] + 2 * [config.num_concat_channels]
    views = [torch.randn(2, c, height, width, requires_grad=True) for c in channels]
    volume = matching_volume(*views, config.num_disparities, config.num_correlation_groups)
    maps = [torch.randn(2, c, height >> i, width >> i) for i, c in enumerate(config.map_channels)]
    return volume, maps[config.volume_stride - 1 :], views


@pytest.mark.parametrize(
    ("width", "max_disparity", "options", "computed"),
    [
        (56, 416, {}, 63),  # 224 px with the released range: 56 + 2 * 3 + 1 of 104 bins
        (56, 256, {}, 63),  # of 64: the least that can be left out
        (24, 416, {"num_stem_blocks": 2}, 35),
        (24, 128, {"num_stem_blocks": 0, "stem_kernel_size": 5}, 29),
        (24, 128, {"volume_stride": 2, "hourglass_channels": [8]}, 31),
        (24, 96, {}, 24),  # every bin reaches a pixel
    ],
)
def test_bins_that_are_alike_are_computed_once(width, max_disparity, options, computed):
    """The same volume and the same gradients as when all bins are computed."""
    config = small_config(max_disparity=max_disparity, **options)
    network = CostFilter(config).eval()
    randomise_statistics(network)
    volume, maps, views = filter_inputs(config, 8, width)
    lengths, results = [], []
    network.stem.register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[2]))
    for everything in (False, True):
        if everything:
            network.alike_bins = lambda _bins, _width: 1
        filtered = network(volume, maps)
        wanted = [*views, *network.parameters()]
        gradients = torch.autograd.grad((filtered * filtered.detach().cos()).sum(), wanted, retain_graph=True)
        results.append((filtered.detach(), gradients))
    assert lengths == [computed, config.num_disparities]
    (skipped, gradients), (full, expected) = results
    assert (skipped - full).abs().max() <= 1e-5 * full.std()
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_training_computes_every_bin():
    config = small_config(max_disparity=128)
    network = CostFilter(config).train()
    volume, maps, _ = filter_inputs(config, 8, 8)
    lengths = []
    network.stem.register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[2]))
    network(volume, maps)
    assert lengths == [32]


def test_a_repeated_bin_stays_in_order_and_channels_last_in_memory():
    volume = torch.randn(2, 3, 4, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    longer = repeat_bin(volume, 2, 3)
    assert torch.equal(longer, volume[:, :, [0, 1, 2, 2, 2, 3]])
    assert longer.is_contiguous(memory_format=torch.channels_last_3d)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_tap_convolutions_have_the_gradients_of_float32(dtype, autocast, threads):
    """Whatever lay in the memory before: torch's own kernels do not write all of their bfloat16 gradients."""
    torch.manual_seed(0)
    layer = OneTapConvolution(32, 32, 5).to(dtype)
    exact = torch.nn.Conv3d(32, 32, (5, 1, 1), padding=(2, 0, 0))
    exact.load_state_dict(layer.state_dict())
    before = torch.get_num_threads()
    volume = torch.randn(24, 32, 4, 6, 6, dtype=dtype).to(memory_format=torch.channels_last_3d)
    exact(volume.float()).square().mean().backward()
    expected = exact.weight.grad / exact.weight.grad.abs().max()
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 2e-2
    torch.set_num_threads(threads)
    try:
        for _ in range(40):
            rubbish = [torch.full((size,), 1e30) for size in (1000, 5120, 20480, 50000, 300000)]
            del rubbish
            layer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                output = layer(volume)
            assert output.dtype == (torch.bfloat16 if autocast else dtype)
            output.float().square().mean().backward()
            gradient = layer.weight.grad.float() / exact.weight.grad.abs().max()
            torch.testing.assert_close(gradient, expected, atol=tolerance, rtol=0)
    finally:
        torch.set_num_threads(before)
