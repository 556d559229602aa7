"""Matching functions against plain loops, finite differences and numpy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stereovla.modeling_stereovla.cost_volume import (
    all_pairs_correlation,
    depth_to_disparity,
    disparity_loss,
    disparity_to_depth,
    groupwise_correlation,
    known_disparity,
    lookup_features,
    matching_volume,
    regress_disparity,
    sample_rows,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_views(batch=2, channels=6, height=3, width=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, channels, height, width, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("num_disparities", [4, 12])  # fewer and more disparities than columns
def test_volume_equals_a_loop(num_disparities):
    left, right = random_views()
    projected_left, projected_right = random_views(channels=2, seed=1)
    volume = matching_volume(left, right, projected_left, projected_right, num_disparities, num_groups=3)
    expected = torch.zeros(2, 3 + 4, num_disparities, 3, 7, dtype=torch.float64)
    for b in range(2):
        for d in range(num_disparities):
            for y in range(3):
                for x in range(7):
                    expected[b, 3:5, d, y, x] = projected_left[b, :, y, x]  # not masked
                    if x < d:
                        continue
                    expected[b, 5:7, d, y, x] = projected_right[b, :, y, x - d]
                    for group in range(3):
                        one = left[b, 2 * group : 2 * group + 2, y, x]
                        other = right[b, 2 * group : 2 * group + 2, y, x - d]
                        expected[b, group, d, y, x] = one @ other / (one.norm() * other.norm())
    torch.testing.assert_close(volume, expected)


@pytest.mark.parametrize("num_disparities", [3, 7])  # fewer and more disparities than columns
def test_gradients_equal_finite_differences(num_disparities):
    """The whole raw volume with respect to the features of both views, correlated and concatenated ones."""
    views = [*random_views(batch=1, channels=4, height=2, width=5), *random_views(1, 2, 2, 5, seed=1)]
    views = [view.requires_grad_() for view in views]
    assert torch.autograd.gradcheck(lambda *maps: matching_volume(*maps, num_disparities, num_groups=2), views)


def test_correlation_stays_float32_under_autocast():
    left, right = random_views(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        volume = matching_volume(left, right, left, right, 4, num_groups=3)
    torch.testing.assert_close(volume, matching_volume(left, right, left, right, 4, num_groups=3), rtol=0, atol=0)


def test_constant_features_give_a_finite_gradient():
    left, right = torch.zeros(1, 2, 2, 4, requires_grad=True), torch.ones(1, 2, 2, 4)
    volume = groupwise_correlation(left, right, 2, 1)
    volume.sum().backward()
    assert volume.abs().max() == 0 and left.grad.isfinite().all()


def test_a_shifted_view_matches_at_its_shift():
    right = torch.randn(1, 8, 4, 20)
    left = torch.roll(right, 3, dims=-1)  # left[x] = right[x - 3]
    volume = groupwise_correlation(left, right, 8, 2)[..., 8:]
    torch.testing.assert_close(volume[:, :, 3], torch.ones_like(volume[:, :, 3]))
    assert (volume.mean(1).argmax(1) == 3).all()


def test_errors_name_the_sizes():
    left, right = random_views()
    with pytest.raises(ValueError, match="6 feature channels cannot be split into num_groups = 4"):
        groupwise_correlation(left, right, 4, 4)
    with pytest.raises(ValueError, match=r"left \(2, 6, 3, 7\), right \(2, 6, 3, 5\)"):
        groupwise_correlation(left, right[..., :5], 4, 3)


def test_all_pairs_contains_every_shift():
    left, right = random_views(channels=4)
    pairs = all_pairs_correlation(left, right)  # (B, H, W left, W right)
    banded = groupwise_correlation(left, right, 7, 1)[:, 0]  # (B, D, H, W)
    for d in range(7):
        diagonal = torch.diagonal(pairs, offset=-d, dim1=2, dim2=3)
        torch.testing.assert_close(diagonal, banded[:, d, :, d:], check_dtype=False, rtol=1e-5, atol=1e-6)


def test_regression_is_the_expectation():
    logits = torch.full((1, 1, 6, 1, 2), -1e4)
    logits[0, 0, 4, 0, 0] = 0  # certain
    logits[0, 0, 1:3, 0, 1] = 0  # halfway between 1 and 2
    torch.testing.assert_close(regress_disparity(logits).flatten(), torch.tensor([4.0, 1.5]))


def test_row_sampling_equals_numpy():
    rows, positions = torch.randn(3, 2, 9), torch.linspace(-2, 10, 25).repeat(3, 1) + 0.01
    sampled = sample_rows(rows, positions)
    for row in range(3):
        for channel in range(2):
            # numpy continues with the last value; ours fades to zero within one step outside
            padded = np.concatenate([[0], rows[row, channel].numpy(), [0]])
            expected = np.interp(positions[row].numpy() + 1, np.arange(11), padded)
            np.testing.assert_allclose(sampled[row, channel].numpy(), expected, atol=1e-6)


def test_lookup_equals_grid_sampling():
    """Second implementation, as IGEV's code does it: one-row images and grid_sample."""
    batch, channels, bins, height, width, radius = 2, 3, 8, 2, 6, 2
    volume, disparity = torch.randn(batch, channels, bins, height, width), torch.rand(batch, 1, height, width) * 7
    correlation = torch.randn(batch, height, width, width)
    found = lookup_features(volume, correlation, disparity, levels=2, radius=radius)
    geometry = volume.permute(0, 3, 4, 1, 2).reshape(-1, channels, 1, bins)
    pairs = correlation.reshape(-1, 1, 1, width)
    d = disparity.permute(0, 2, 3, 1).reshape(-1, 1)
    x = torch.arange(width).float().repeat(batch * height)[:, None]
    offsets = torch.arange(-radius, radius + 1).float()
    expected = []
    for level in range(2):
        for rows, centre in ((geometry, d), (pairs, x - d)):
            position = centre / 2**level + offsets
            grid = torch.stack([2 * position / (rows.shape[-1] - 1) - 1, torch.zeros_like(position)], -1)[:, None]
            sampled = F.grid_sample(rows, grid, align_corners=True)
            expected.append(sampled.reshape(batch, height, width, -1))
        geometry, pairs = F.avg_pool2d(geometry, (1, 2)), F.avg_pool2d(pairs, (1, 2))
    torch.testing.assert_close(found, torch.cat(expected, -1).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_depth_and_disparity_are_inverse():
    disparity, focal, baseline = torch.tensor([4.0, 30.0]), torch.tensor(200.0), torch.tensor(0.063)
    depth = disparity_to_depth(disparity, focal, baseline)
    torch.testing.assert_close(depth, torch.tensor([3.15, 0.42]))
    torch.testing.assert_close(depth_to_disparity(depth, focal, baseline), disparity)


def test_disparity_loss_is_zero_at_the_truth_and_ignores_unknown_and_too_large_ones():
    truth = torch.rand(2, 64, 64) * 20 + 1
    predicted = (truth[:, None, 2::4, 2::4] / 4).clone()
    assert disparity_loss(predicted, truth, 32) == 0
    predicted[0, 0, 0, 0] += 5
    assert disparity_loss(predicted, truth, 32) == pytest.approx(4.5)  # smooth L1: |e| - 1/2 beyond 1
    for value in (0, 32):
        truth[0, 2, 2] = value
        assert disparity_loss(predicted, truth, 32) == 0
        assert known_disparity(truth, 32)[1].sum() == 2 * 16 * 16 - 1
