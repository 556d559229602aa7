"""The code of places and bins: what is added where, that places follow from it, and that bins are read from it."""

import pytest
import torch

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.place_code import code_of_grid, waves, write_bins


def policy(**overrides) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", **overrides)).eval()


@torch.no_grad()
def test_the_code_is_added_to_the_visual_tokens():
    pair = torch.rand(2, 2, 3, 64, 64)
    plain, told = policy(), policy(place_code=True)
    told.load_state_dict(plain.state_dict())  # it has no weights
    code = (told.model.visual_tokens(pair).tokens - plain.model.visual_tokens(pair).tokens)[0]
    torch.testing.assert_close(code, code_of_grid(4, code), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "width"), [(4, 64), (12, 96), (16, 192), (3, 30)])
def test_places_follow_linearly_from_the_code(grid, width):
    code = code_of_grid(grid, torch.zeros(1, width)).double()
    assert code.shape == (grid**2, width) and code.abs().max() <= 1
    v, u = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    places = torch.stack([u, v], -1).flatten(0, 1).double()
    told = torch.cat([code, torch.ones(grid**2, 1)], -1)
    read = told @ torch.linalg.lstsq(told, places, driver="gelsd").solution
    torch.testing.assert_close(read, places, atol=0.02, rtol=0)
    assert (torch.cdist(code, code) + 10 * torch.eye(grid**2)).min() > 0.1


@torch.no_grad()
def test_a_bin_is_nearest_to_the_place_that_it_means():
    """The code of (x, x) as hidden state, without training: the argmax over all words is the bin of x."""
    model = policy(place_code=True)
    config = model.config
    edges = torch.linspace(-1, 1, config.num_bins)
    bins = torch.arange(1, config.num_bins)
    middles = (edges[bins - 1] + edges[bins]) / 2  # as `BinTokens.decode` reads them
    logits = model.lm_head(waves(middles[:, None].expand(-1, 2), 64, 4))
    wrong = (config.action_vocab_size - logits.argmax(-1) - bins).abs()
    assert wrong.max() <= 1


@torch.no_grad()
def test_rows_keep_their_size_and_other_words_are_left_alone():
    before = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    after = before.clone()
    write_bins(after, 30, 50, 4)
    changed = (after != before).any(-1)
    assert changed.nonzero()[:, 0].tolist() == list(range(30, 80))
    for weight in (before, after):
        torch.testing.assert_close(weight[30:80].square().mean().sqrt(), torch.tensor(0.1), rtol=0.05, atol=0)


def test_loading_does_not_write_over_what_was_trained(tmp_path):
    model = policy(place_code=True)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = StereoVLAForActionPrediction.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
