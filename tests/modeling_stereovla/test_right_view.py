"""How a model without stereo encoder sees the right view: as tokens of its own, or by left-right attention."""

import pytest
import torch
from torch.nn import functional as F

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.view_attention import HEAD_DIM, ViewAttention, rotary_2d, rotate
from stereovla.modeling_stereovla.visual_tokens import StereoVisualTokens

MONO = {"stereo_config": None, "disparity_loss_weight": 0.0, "stereo_learns_from": "all"}


def config_of(right_view: str | None, **overrides) -> StereoVLAConfig:
    return StereoVLAConfig.from_preset("tiny", **MONO, right_view=right_view, **overrides)


def pair(rows: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(rows, 2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_separate_tokens_are_those_of_each_view_alone():
    torch.manual_seed(0)
    both = StereoVisualTokens(config_of("separate", place_code=True)).eval()
    alone = StereoVisualTokens(config_of(None, place_code=True)).eval()
    alone.load_state_dict(both.state_dict())
    pixels = pair()
    found = both(pixels).tokens
    left, right = alone(pixels).tokens, alone(pixels.flip(1)).tokens
    torch.testing.assert_close(found, torch.cat([left, right], dim=1), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(left, right, atol=1e-2)


def plain(module: ViewAttention, features: torch.Tensor) -> torch.Tensor:
    """The same, token by token and with rotations as complex numbers."""

    def attend(part, tokens, read, turned):
        q, k, v = part.query(tokens), part.key(read), part.value(read)
        out = torch.zeros_like(q)
        waves = HEAD_DIM // 4
        frequencies = 100.0 ** -(torch.arange(waves, dtype=torch.float64) / waves)

        def turn(vector, n):
            if not turned:
                return vector
            v_, u = divmod(n, module.grid)
            angles = torch.cat([u * frequencies, v_ * frequencies])
            turned_ = torch.complex(*vector.double().chunk(2)) * torch.polar(torch.ones_like(angles), angles)
            return torch.cat([turned_.real, turned_.imag]).to(vector.dtype)

        for b in range(len(q)):
            for begin in range(0, q.shape[-1], HEAD_DIM):
                head = slice(begin, begin + HEAD_DIM)
                keys = torch.stack([turn(k[b, m, head], m) for m in range(k.shape[1])])
                for n in range(q.shape[1]):
                    weights = (keys @ turn(q[b, n, head], n) / HEAD_DIM**0.5).softmax(0)
                    out[b, n, head] = weights @ v[b, :, head]
        return part.out(out)

    left, right = features.unbind(1)
    for layer in module.layers:

        def read(tokens, other, layer=layer):
            normed = layer.own_norm(tokens)
            tokens = tokens + attend(layer.own, normed, normed, False)
            tokens = tokens + attend(layer.other, layer.other_norm(tokens), layer.read_norm(other), True)
            return tokens + layer.mlp(layer.mlp_norm(tokens))

        left, right = read(left, right), read(right, left)
    return left


@torch.no_grad()
def test_attention_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    module = ViewAttention(64, 3)
    features = torch.randn(2, 2, 9, 64)
    torch.testing.assert_close(module(features), plain(module, features), atol=1e-5, rtol=1e-4)


def test_scores_know_how_far_apart_two_places_are_and_not_where_they_are():
    grid, generator = 5, torch.Generator().manual_seed(0)
    query, key = (torch.randn(HEAD_DIM, generator=generator).expand(1, 1, grid**2, -1) for _ in range(2))
    rotary = rotary_2d(grid, query)
    scores = (rotate(query, rotary) @ rotate(key, rotary).transpose(-1, -2))[0, 0].unflatten(0, (grid, grid))
    scores = scores.unflatten(2, (grid, grid))  # (v, u, other v, other u)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[3, 2, 4, 4], atol=1e-4, rtol=1e-4)
    different = [scores[2, 2, 2, 1], scores[2, 2, 2, 3], scores[2, 2, 1, 2], scores[2, 2, 3, 2]]
    assert len({round(float(score), 3) for score in different}) == 4


@pytest.mark.parametrize("right_view", ["separate", "attention"])
def test_the_policy_sees_the_right_view_and_learns_from_it(right_view):
    config = config_of(right_view, use_pointers=True, pointing_loss_weight=1.0)
    torch.manual_seed(0)
    model = StereoVLAForActionPrediction(config).train()
    ids = torch.full((2, 1 + config.num_image_tokens + 6), 5)
    ids[:, 0], ids[:, 1 : 1 + config.num_image_tokens] = 1, config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": pair(), "state": torch.zeros(2, 4, 7)}
    targets = {"actions": torch.zeros(2, 8, 7), "points": torch.full((2, 2, 2), 20.0)}
    draws = {"noise": torch.ones(2, 1, 8, 7), "time": torch.full((2, 1), 0.5), "hide_pose": torch.zeros(2).bool()}
    output = model(**inputs, **targets, **draws)
    output.loss.backward()
    learning = [name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert any("semantic" in name for name in learning)
    layers = [name for name in learning if ".view_attention.layers.1.other." in name]
    assert bool(layers) == (right_view == "attention")
    noise = torch.zeros(2, 8, 7)
    model.eval()
    act = lambda pixels: model.predict_action(**inputs | {"pixel_values": pixels}, noise=noise, chain_of_thought=False)  # noqa: E731
    other = pair().clone()
    other[:, 1] = other[:, 1].flip(-1)
    assert (act(other) - act(pair())).abs().max() > 1e-4
    mono = StereoVLAForActionPrediction(config_of(None)).eval()
    ids = ids[:, -(1 + mono.config.num_image_tokens + 6) :].clone()
    ids[:, 0] = 1
    inputs["input_ids"] = ids
    tokens = [mono.model(input_ids=ids, pixel_values=p).last_hidden_state for p in (other, pair())]
    assert F.mse_loss(*tokens) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({**MONO, "right_view": "both"}, "right_view is 'both'; it must be None, 'separate' or 'attention'"),
        ({"right_view": "separate"}, "right_view is 'separate', and stereo_config given"),
        ({**MONO, "right_view": "attention", "points_frame": "base", "points_of": "given"}, "points_frame given"),
        (
            {**MONO, "right_view": "attention", "semantic_config": {"hidden_size": 48, "num_attention_heads": 3}},
            "have 80 channels; they must be a multiple of 32",
        ),
    ],
)
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(Exception, match=message):
        StereoVLAConfig.from_preset("tiny", **overrides)
