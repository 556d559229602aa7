"""The code of places and bins: what is added where, that places follow from it, and that bins are read from it."""

import pytest
import torch
from synthetic_dataset import write_training_dataset

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.place_code import code_of_grid, waves, write_bins, write_hundredths, write_pixels
from stereovla.training.models import untrained


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


@torch.no_grad()
def test_a_pixel_is_written_as_the_bin_of_its_place():
    """The row of a number is nearest to that of the bin which stands for the middle of the pixel."""
    size, width, bins = 96, 64, 192
    weight = torch.randn(size + bins, width, generator=torch.Generator().manual_seed(0))
    untouched = weight.clone()
    write_pixels(weight, {3 + pixel: pixel for pixel in range(size - 10)}, size, 12)
    assert (weight != untouched).any(-1).nonzero()[:, 0].tolist() == list(range(3, 3 + size - 10))
    write_bins(weight, size, bins, 12)
    rows = torch.nn.functional.normalize(weight, dim=-1)
    nearest = (rows[3 : 3 + size - 10] @ rows[size:].T).argmax(-1)  # 0 is the last bin, of place 1
    places = 1 - nearest * 2 / (bins - 1)
    middles = (torch.arange(size - 10) + 0.5) * 2 / size - 1
    assert (places - middles).abs().max() <= 1.01 / (bins - 1)


def test_an_untrained_model_reads_the_numbers_of_its_tokenizer(tmp_path):
    meta = load_meta(write_training_dataset(tmp_path / "dataset"))
    torch.manual_seed(0)
    model, processor = untrained("tiny", meta, place_code=True)
    size, width = model.config.image_size, model.config.text_config.hidden_size
    for pixel in (0, 5, size - 1):
        (word,) = processor.tokenizer(str(pixel), add_special_tokens=False)["input_ids"]
        code = waves(torch.full((1, 2), (pixel + 0.5) * 2 / size - 1), width, size // model.config.patch_size)[0]
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            assert torch.cosine_similarity(weight[word], code, dim=0) > 0.999


def test_hundredths_rise_from_side_to_side():
    weight = torch.randn(150, 64, generator=torch.Generator().manual_seed(0))
    untouched = weight.clone()
    write_hundredths(weight, 30, 12)
    assert (weight != untouched).any(-1).nonzero()[:, 0].tolist() == list(range(30, 130))
    code = waves(torch.linspace(-0.99, 0.99, 100)[:, None].expand(-1, 2), 64, 12)
    assert torch.cosine_similarity(weight[30:130], code).min() > 0.999


def test_loading_does_not_write_over_what_was_trained(tmp_path):
    model = policy(place_code=True)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = StereoVLAForActionPrediction.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
