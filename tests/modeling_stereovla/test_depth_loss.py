"""The depth loss against its formula in numpy, and what it does not see."""

import numpy as np
import pytest
import torch
from tiny_depthvla import float64_throughout, tiny, training_batch

from stereovla.modeling_stereovla.depth_loss import EPSILON, known_depth, scale_invariant_losses

UNKNOWN = (0.0, -1.0, float("nan"), float("inf"), -float("inf"))


def some_depths(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted log depth and true depth in m, with every kind of unknown pixel in it."""
    generator = torch.Generator().manual_seed(seed)
    log_depth = torch.randn(*shape, generator=generator, dtype=torch.float64)
    depth = 0.3 + 2 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    for column, value in enumerate(UNKNOWN):
        depth[..., 1:4, column] = value
    return log_depth, depth


def formula(log_depth: np.ndarray, depth: np.ndarray, share: float) -> float:
    """Of one picture: half the pairs of pixels (Eigen et al., eq. 3), which for lambda 1 is the variance."""
    known = np.isfinite(depth) & (depth > 0)
    y = log_depth[known] - np.log(depth[known])
    pairs = (y[:, None] - y[None, :]) ** 2
    return np.sqrt(share * pairs.mean() / 2 + (1 - share) * (y**2).mean() + EPSILON)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.85, 1.0])
def test_losses_equal_the_formula_over_pairs_of_pixels(share):
    log_depth, depth = some_depths(2, 3, 6, 7)
    depth[1, 2] = 0  # a picture of which nothing is known
    with float64_throughout():
        found = scale_invariant_losses(log_depth, depth, share)
    assert found.shape == (2, 3) and found[1, 2] == 0
    for row, view in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        right = formula(log_depth[row, view].numpy(), depth[row, view].numpy(), share)
        assert found[row, view].item() == pytest.approx(right, rel=1e-12)


def test_unknown_pixels_have_neither_loss_nor_gradient():
    log_depth, depth = some_depths(4, 6, 7)
    known = known_depth(depth)
    assert known[:, 1:4, : len(UNKNOWN)].sum() == 0 and known.sum() == 4 * (42 - 3 * len(UNKNOWN))
    found = log_depth.clone().requires_grad_()
    losses = scale_invariant_losses(found, depth, 0.5)
    losses.sum().backward()
    assert torch.equal(found.grad != 0, known)
    changed = torch.where(known, log_depth, torch.full_like(log_depth, float("nan")))
    assert torch.equal(scale_invariant_losses(changed, depth, 0.5), losses)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_perfect_prediction_has_a_finite_gradient(share):
    _, depth = some_depths(2, 6, 7)
    depth[1] = 0
    found = torch.where(known_depth(depth), depth, 1.0).float().log().requires_grad_()
    losses = scale_invariant_losses(found, depth.float(), share)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([EPSILON**0.5, 0])
    assert found.grad.isfinite().all()


@pytest.mark.parametrize(("share", "error"), [(1.0, 0.0), (0.5, 0.5**0.5), (0.0, 1.0)])
def test_a_wrong_scale_is_forgiven_in_the_share_of_lambda(share, error):
    """A prediction that is e times too far has the error 1 in log depth everywhere."""
    _, depth = some_depths(6, 7)
    found = torch.where(known_depth(depth), depth, 1.0).log() + 1
    with float64_throughout():
        loss = scale_invariant_losses(found, depth, share).item()
    assert loss == pytest.approx((error**2 + EPSILON) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("parts", [[slice(0, 3)], [slice(0, 1), slice(1, 3)]])
def test_parts_of_a_batch_add_up_to_the_mean_over_pictures(parts):
    """Of six pictures, one is of a view that is not there, and of one no depth is known: the mean is over four."""
    model = tiny(views=["left", "wrist"])
    batch = training_batch(model.config)
    batch["depth_map"][2, 0] = float("nan")
    counts = model.loss_counts(**batch)
    assert counts["depth_map"] == 4
    with torch.no_grad(), float64_throughout():
        outputs = [model(**{name: value[part] for name, value in batch.items()}, counts=counts) for part in parts]
    log_depth = torch.cat([output.depth for output in outputs]).log().numpy()
    pictures = [(0, 0), (0, 1), (1, 0), (2, 1)]
    right = [formula(log_depth[picture], batch["depth_map"][picture].numpy(), 0.5) for picture in pictures]
    assert sum(output.depth_map_loss.item() for output in outputs) == pytest.approx(np.mean(right), rel=1e-12)
