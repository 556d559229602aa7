"""The depth expert: where tokens and pixels lie, what absent views and two eyes change."""

import math

import pytest
import torch
from published_pi0 import depth_anything, randomized
from tiny_depthvla import tiny

from stereovla.modeling_stereovla import DepthExpertConfig, DepthExpertModel
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.modeling_stereovla.depth_expert import shown_depth
from stereovla.modeling_stereovla.visual_tokens import pool_to_grid

CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def expert(**overrides) -> DepthExpertModel:
    config = DepthExpertConfig.from_preset("depthvla-tiny", **overrides)
    return randomized(DepthExpertModel(config)).double()


def pictures(rows: int, views: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, views, 3, 64, 64, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_the_encoder_is_the_backbone_of_depth_anything():
    """The converter's tests compare it with published files; here the same weights are in both, in float64."""
    theirs = depth_anything().double()
    backbone = theirs.config.backbone_config
    patch, grid = backbone.patch_size, 3
    model = expert(encoder_config=backbone.to_dict(), image_size=grid * patch, patch_size=patch, merge_size=1)
    report = model.encoder.tower.load_state_dict(theirs.backbone.state_dict(), strict=False)
    assert not report.missing_keys and not report.unexpected_keys
    pixels = pictures(2, 1)[:, 0, :, : grid * patch, : grid * patch]
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    right = theirs.backbone((pixels - mean) / std).feature_maps[-1][:, 1:]
    found = model.encoder(pixels)
    assert found.shape == (2, grid**2, backbone.hidden_size)
    assert (found - right).abs().max() <= 1e-6 * right.std()


# ---- tokens and pixels


@torch.no_grad()
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("views", [1, 3])
def test_what_a_token_says_of_a_pixel_lands_there(merge, views):
    """A head that writes the number of the token and of the pixel in its patch."""
    model = expert(patch_size=16 * merge, merge_size=merge)
    patch, grid = 16 * merge, 4 // merge
    model.head.weight.zero_()
    model.head.weight[:, 0] = patch**2
    model.head.bias.copy_(torch.arange(patch**2))
    hidden = torch.zeros(2, views * grid**2, model.config.hidden_size, dtype=torch.float64)
    hidden[0, :, 0] = torch.arange(views * grid**2)
    hidden[1, :, 0] = 1000 + torch.arange(views * grid**2)
    found = model.log_depth(hidden)
    assert found.shape == (2, views, 64, 64) and found.dtype == torch.float32
    for row, first in ((0, 0), (1, 1000)):
        for view in range(views):
            for y in range(0, 64, 3):
                for x in range(0, 64, 5):
                    token = first + view * grid**2 + (y // patch) * grid + x // patch
                    assert found[row, view, y, x] == token * patch**2 + (y % patch) * patch + x % patch


@torch.no_grad()
@pytest.mark.parametrize("merge", [1, 2])
def test_a_token_holds_the_cells_of_its_patch(merge):
    """An encoder that writes the number of its view and cell, and a projector that passes them on."""
    model = expert(patch_size=16 * merge, merge_size=merge)
    width = model.encoder.size
    cells, grid = 4, 4 // merge

    def numbered(_, inputs, features):
        views = len(inputs[0])
        numbers = torch.arange(views * cells**2, dtype=torch.float64).view(views, cells**2, 1)
        return numbers.expand_as(features)

    model.encoder.register_forward_hook(numbered)
    model.norm = torch.nn.Identity()
    model.norm.weight = model.projector.weight  # its dtype is asked for
    model.projector.weight.zero_()
    for place in range(merge**2):
        model.projector.weight[place, place * width] = 1
    model.projector.bias.zero_()
    found = model.embed(pictures(2, 2), None)[..., : merge**2]
    expected = []
    for view in range(4):  # two of each sample
        for y in range(grid):
            for x in range(grid):
                held = [(y * merge + i) * cells + x * merge + j for i in range(merge) for j in range(merge)]
                expected.append([view * cells**2 + cell for cell in held])
    assert torch.equal(found.flatten(0, 1), torch.tensor(expected, dtype=torch.float64))


@torch.no_grad()
def test_pointers_read_the_depth_of_their_own_cell():
    """A depth token of 2 x 2 cells tells each visual token what it knows of the cell that this one shows."""
    model = tiny(
        use_pointers=True,
        image_size=64,
        patch_size=16,
        depth_config={"patch_size": 32, "merge_size": 2},
    ).model
    hidden = torch.zeros(1, 4, model.config.depth_config.hidden_size, dtype=torch.float64)
    hidden[0, :, 0] = torch.arange(4)
    model.depth_reading.weight.zero_()
    model.depth_reading.weight[:, 0] = 10
    width = model.config.text_config.hidden_size
    model.depth_reading.bias.copy_(torch.arange(4).repeat_interleave(width))
    found = model._read_depth(hidden)[0, :, 0]
    expected = [10 * (2 * (y // 2) + x // 2) + 2 * (y % 2) + x % 2 for y in range(4) for x in range(4)]
    assert found.tolist() == expected


# ---- views


@torch.no_grad()
def test_absent_views_change_nothing_of_the_others():
    model = expert()
    there = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    pixels = pictures(3, 3)
    first = model(pixels, there)
    other = torch.where(there[..., None, None, None], pixels, float("nan"))
    assert torch.equal(model(other, there).depth[there], first.depth[there])
    alone = model(pixels[:, :2], there[:, :2])
    # the third view of the second sample is not there: it has two
    torch.testing.assert_close(first.depth[1, :2], alone.depth[1], **CLOSE)
    assert (first.depth[2, :2] - alone.depth[2]).abs().max() > 1e-2  # where it is there, the others see it
    torch.testing.assert_close(model(pixels[2:]).depth, first.depth[2:], **CLOSE)
    torch.testing.assert_close(model(pixels[1:2, :2]).depth, first.depth[1:2, :2], **CLOSE)
    # the third view of the first sample keeps its positions, which are the third's
    moved = model(pixels[:1, [0, 2]]).depth
    assert (moved[0, 1] - first.depth[0, 2]).abs().max() > 1e-4


@torch.no_grad()
def test_a_stereo_expert_looks_at_left_and_right_alone():
    model = expert(**stereo_encoder())
    pixels = pictures(2, 2)
    output = model(pixels)
    assert output.depth.shape == (2, 1, 64, 64)
    features = pool_to_grid(model.stereo(pixels, output_disparity=False).features, model.cells)
    tokens = model.projector(model.norm(features))
    torch.testing.assert_close(model.embed(pixels, None), tokens, **CLOSE)
    torch.testing.assert_close(model.log_depth(model.run(tokens, None)[0]), output.log_depth, **CLOSE)
    for eye in (0, 1):
        changed = pixels.clone()
        changed[:, eye] = changed[:, eye].flip(-1)
        assert (model(changed).depth - output.depth).abs().max() > 1e-3
    # in the policy other views lie between the two
    between = torch.cat([pixels[:, :1], pictures(2, 1).flip(-1), pixels[:, 1:]], dim=1)
    assert torch.equal(model.embed(between, torch.tensor([[True, True], [True, False]])), model.embed(pixels, None))
    assert model.token_mask(torch.tensor([[True, False]])) is None


def test_wrong_shapes_are_refused():
    model = expert()
    with pytest.raises(ValueError, match=r"shape \(1, 1, 3, 32, 64\); it must be \(batch, views, 3, 64, 64\)"):
        model(torch.zeros(1, 1, 3, 32, 64))
    with pytest.raises(ValueError, match="has 1 views; a stereo encoder needs left and right"):
        expert(**stereo_encoder())(torch.zeros(1, 1, 3, 64, 64))
    with pytest.raises(ValueError, match="depth_map is missing: this depth expert is shown depth"):
        expert(input="depth")(torch.zeros(1, 1, 3, 64, 64))


# ---- depth in place of pictures


def test_depth_is_shown_in_its_logarithm():
    depth = torch.tensor([[0.1, 1.0, 10.0, 10**0.5], [0.05, 20.0, 0.0, -1.0], [math.nan, math.inf, -math.inf, 0.2]])
    found = shown_depth(depth)
    assert found.shape == (3, 3, 4) and all(torch.equal(channel, found[0]) for channel in found)
    right = [[0, 0.5, 1, 0.75], [0, 1, 0, 0], [0, 0, 0, math.log10(2) / 2]]
    torch.testing.assert_close(found[0], torch.tensor(right), atol=1e-6, rtol=0)


@torch.no_grad()
def test_an_expert_that_is_shown_depth_does_not_look_at_the_pictures():
    model = expert(input="depth")
    depth = 0.2 + pictures(2, 2)[:, :, 0]
    there = torch.tensor([[True, True], [True, False]])
    first = model(pictures(2, 2), there, depth)
    assert torch.equal(model(pictures(2, 2).flip(-1), there, depth).depth[there], first.depth[there])
    assert (model(pictures(2, 2), there, depth.flip(-1)).depth - first.depth)[there].abs().max() > 1e-2
    plain = expert()
    shown = plain(shown_depth(depth), there)
    torch.testing.assert_close(first.depth[there], shown.depth[there], **CLOSE)
