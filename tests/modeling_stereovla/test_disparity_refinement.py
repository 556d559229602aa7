"""The search around a disparity against plain loops, and that it finds what the coarse volume cannot."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from stereovla.modeling_stereovla import StereoEncoderConfig, StereoEncoderModel, StereoVLAConfig
from stereovla.modeling_stereovla.cost_volume import disparity_loss
from stereovla.modeling_stereovla.disparity_refinement import DisparityRefinement, correlation_around

SMALL = StereoVLAConfig.from_preset("tiny").stereo_config.to_dict()


def encoder(**changes) -> StereoEncoderModel:
    torch.manual_seed(0)
    return StereoEncoderModel(StereoEncoderConfig(**SMALL | {"refinement_channels": 8} | changes))


def shifted_pair(disparity: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    """A textured plane (2, 3, size, size) that the right camera sees `disparity` px further left."""
    noise = torch.rand(3, size, size + disparity, generator=torch.Generator().manual_seed(seed))
    wide = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2) * 6
    return torch.stack([wide[..., :size], wide[..., disparity:]])


def test_correlation_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 2, 4, 3, 9, generator=generator)
    centre = torch.randint(0, 9, (2, 3, 9), generator=generator)
    found = correlation_around(left, right, centre, radius=2, num_groups=2)
    expected = torch.zeros(2, 5, 2, 3, 9)
    for b in range(2):
        for number, offset in enumerate(range(-2, 3)):
            for y in range(3):
                for x in range(9):
                    column = x - int(centre[b, y, x]) - offset
                    if not 0 <= column < 9:
                        continue
                    for group in range(2):
                        one, other = (v[b, 2 * group : 2 * group + 2, y, c] for v, c in ((left, x), (right, column)))
                        expected[b, number, group, y, x] = one @ other / (one.norm() * other.norm())
    torch.testing.assert_close(found, expected.flatten(1, 2))


def test_the_refined_disparity_is_what_the_model_returns_within_reach_of_the_coarse_one():
    model = encoder(refinement_radius=2).eval()
    with torch.no_grad():
        output = model(torch.rand(2, 2, 3, 64, 96))
    assert output.refined_disparity.shape == (2, 1, 32, 48) and output.disparity.shape == (2, 64, 96)
    coarse = 2 * torch.nn.functional.interpolate(output.initial_disparity, scale_factor=2, mode="bilinear")
    assert (output.refined_disparity - coarse).abs().max() <= 2.5  # half a px for the rounding of its centre
    expected = torch.nn.functional.interpolate(2 * output.refined_disparity, size=(64, 96), mode="bilinear")
    torch.testing.assert_close(output.disparity, expected.squeeze(1))
    assert [found.shape[-1] for found in output.maps] == [24, 48]


def test_no_gradient_goes_from_the_search_into_where_it_begins():
    """The coarse disparity is learnt by its own loss alone; the backbone by both."""
    model = encoder()
    model(torch.rand(1, 2, 3, 64, 64)).refined_disparity.sum().backward()
    assert all(weight.grad is None for weight in model.classifier.parameters())
    assert all(weight.grad is not None for weight in model.refinement.parameters())
    assert model.backbone.stem[0].weight.grad.abs().sum() > 0


def test_it_learns_where_between_the_bins_of_the_volume_a_match_is():
    """Told the nearest bin, which is 4 px wide, it finds planes at odd disparities in textures that it has not seen."""
    torch.manual_seed(0)
    config = StereoEncoderConfig(**SMALL | {"refinement_channels": 8})
    refinement = DisparityRefinement(config)
    optimizer = torch.optim.Adam(refinement.parameters(), lr=1e-2)
    disparities = torch.tensor([5, 6, 7, 9, 10, 11, 13, 14, 15])
    truth = disparities[:, None, None].expand(-1, 64, 64).float()
    coarse = ((disparities / 4).round() + 0.0).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)

    def search(seed: int) -> torch.Tensor:
        views = torch.cat([shifted_pair(int(disparity), seed=seed) for disparity in disparities])
        return refinement(views, torch.zeros(len(views), config.map_channels[0], 16, 16), coarse)

    for step in range(80):
        loss = disparity_loss(search(step), truth, 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = 2 * search(1000)[:, 0, 4:-4, 12:-4]
    errors = (found - disparities[:, None, None]).abs()
    told = (4 * coarse[:, 0, 0, 0] - disparities).abs().mean()
    assert errors.mean() < 0.5 * told
    assert errors.median() < 0.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"refinement_channels": -2}, "refinement_channels and refinement_radius are -2 and 3"),
        ({"refinement_channels": 7}, "an even number or 0"),
        ({"refinement_radius": 0}, "and 1 or more"),
        ({"max_disparity": 24}, "max_disparity is 24 px; it must be a positive multiple of 16"),
    ],
)
def test_sizes_are_checked(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        encoder(**changes)
