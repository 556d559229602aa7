"""The language model's own attention points: against transformers' attention weights, and that it learns to find."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from test_modeling_stereovla import make_training_inputs
from torch.nn import functional as F

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.objectives import LanguagePointingObjective, Predictions, Targets, objectives_of

NAN = float("nan")
POINTING = {"language_pointing_layer": 1, "language_pointing_loss_weight": 1.0}


def config(**overrides) -> StereoVLAConfig:
    return StereoVLAConfig.from_preset("tiny", **POINTING, **overrides)


def policy(**overrides) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(config(**overrides)).eval()


def points_of(labels: torch.Tensor, size: int, seed: int = 0) -> torch.Tensor:
    """A point for each label of the answers, but for those of the last row, which are about nothing."""
    points = torch.rand(*labels.shape, 2, generator=torch.Generator().manual_seed(seed)) * size
    points[labels == -100] = NAN
    points[-1] = NAN
    return points


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_it_is_the_attention_of_the_layer(padding):
    """Of two of four heads, which share two sets of keys, as transformers' own attention weighs them."""
    model = policy(text_config={"num_attention_heads": 4, "num_key_value_heads": 2})
    model.set_attn_implementation("eager")  # the one that gives its weights away
    inputs = make_training_inputs(model.config)
    inputs["answer_points"] = points_of(inputs["labels"], model.config.image_size)
    if padding != "none":
        amount = (3, 0) if padding == "left" else (0, 3)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        inputs |= {name: F.pad(inputs[name], amount, value=value) for name, value in fill.items()}
        inputs["answer_points"] = F.pad(inputs["answer_points"], (0, 0, *amount), value=NAN)
    seen = inputs["input_ids"] == model.config.image_token_id
    words = (inputs["input_ids"] >= 10) & (inputs["input_ids"] < 400)  # those of `make_inputs`
    words &= torch.rand(words.shape) < 0.5
    words[1] = False  # nothing that could be read
    inputs["asked_words"] = words
    assert words[[0, 2]].any(-1).all()
    output = model(**inputs, output_attentions=True)
    expected, hits = [], []
    for row, place in inputs["answer_points"][:, 1:, 0].isfinite().nonzero():
        weights = output.attentions[1][row, :2, place][:, seen[row]]  # (heads, N)
        # four tokens of 16 px on a side: bilinear weights by hand
        u, v = (inputs["answer_points"][row, place + 1] / 16 - 0.5).clamp(0, 3)
        wanted = torch.zeros(4, 4)
        for column, row_of_tokens in ((c, r) for c in range(4) for r in range(4)):
            wanted[row_of_tokens, column] = max(0, 1 - abs(u - column)) * max(0, 1 - abs(v - row_of_tokens))
        places = words[row].nonzero()[:, 0]
        first = (len(places) + 1) // 2  # these are for the first head, the others for the second; of one, for both
        parts = [places[:first], places[first:]] if len(places) > 1 else [places, places]
        reading = output.attentions[0][row, :2, place]
        read = torch.stack([weights[part].sum() for weights, part in zip(reading, parts, strict=True)])
        read = read if len(places) else torch.ones(2)
        expected.append(-(weights.log() * wanted.flatten()).sum(-1).mean() - read.log().mean())
        hits.append(weights.mean(0).argmax() == wanted.argmax())
    assert len(expected) == 3 * 15
    torch.testing.assert_close(output.language_pointing_loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.language_pointing_accuracy, torch.stack(hits).float().mean())


def test_points_outside_the_picture_and_unknown_ones_have_no_loss():
    objective = LanguagePointingObjective(config())
    points = torch.tensor([[[8.0, 8.0], [24.0, 8.0], [NAN, NAN], [65.0, 3.0], [8.0, 8.0]]])
    targets = Targets(answer_points=points)
    # the first label has no token before it; of the others two are in the picture
    assert objective.count(targets) == 2
    logits = torch.randn(2, 2, 16)
    read = torch.rand(2, 2)
    predictions = Predictions(language_pointing=logits.log_softmax(-1), language_reading=read.log())
    found = objective.outputs(predictions, targets, 2)
    expected = F.cross_entropy(logits.flatten(0, 1), torch.tensor([1, 1, 0, 0]))  # both are centres of tokens
    expected = expected - read.log().mean()
    torch.testing.assert_close(found["language_pointing_loss"], expected)


def test_a_batch_without_answers_has_gradients_of_zero():
    """Processes that share weights wait for each other's gradients."""
    model = policy()
    inputs = make_training_inputs(model.config)
    inputs["answer_points"] = torch.full((*inputs["labels"].shape, 2), NAN)
    output = model(**inputs)
    assert output.language_pointing_loss == 0
    output.loss.backward()


def test_only_what_comes_before_the_attention_learns_from_it():
    model = policy()
    inputs = make_training_inputs(model.config)
    inputs["answer_points"] = points_of(inputs["labels"], model.config.image_size)
    model(**inputs).language_pointing_loss.backward()
    layers = model.model.language_model.layers
    learning = {name for name, parameter in layers[1].named_parameters() if parameter.grad is not None}
    assert learning == {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"}
    assert all(parameter.grad.any() for parameter in layers[0].parameters())
    assert all(parameter.grad.any() for parameter in model.model.visual_tokens.projector.parameters())
    assert model.lm_head.weight.grad is None


def test_checkpointing_changes_nothing():
    model = policy()
    inputs = make_training_inputs(model.config)
    inputs["answer_points"] = points_of(inputs["labels"], model.config.image_size)
    inputs |= {"noise": torch.randn(4, 1, 8, 7), "time": torch.rand(4, 1)}
    model.train()
    found = []
    for change in (lambda: None, model.gradient_checkpointing_enable):
        change()
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        layer = model.model.language_model.layers[1].self_attn
        found.append((output.language_pointing_loss.detach(), layer.q_proj.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


def test_attention_learns_to_find_what_is_asked_for():
    """Among visual tokens that are drawn anew each time, the one that the second word of the prompt names."""
    torch.manual_seed(0)
    model = policy(place_code=True, language_loss_weight=0.0).train()
    signatures = torch.randn(5, model.config.text_config.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    inputs = make_training_inputs(model.config, 32)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    inputs["labels"][:, :-3] = -100
    inputs["asked_words"] = torch.arange(inputs["labels"].shape[1]).expand(32, -1) == 18
    for _ in range(110):
        wanted, where = torch.randint(5, (32,)), torch.rand(32, 16).argsort(-1)[:, :5]
        tokens = 0.1 * torch.randn(32, 16, signatures.shape[1])
        tokens[torch.arange(32)[:, None], where] += signatures
        place = where[torch.arange(32), wanted]
        inputs["input_ids"][:, 18] = 10 + wanted
        centres = torch.stack([place % 4, place // 4], -1) * 16.0 + 8.0
        inputs["answer_points"] = torch.where(inputs["labels"][..., None] == -100, NAN, centres[:, None])
        output = model(**inputs, inputs_embeds=model.model.embed(inputs["input_ids"], tokens))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.language_pointing_accuracy > 0.9


def test_it_is_an_option_and_off_in_the_papers_model():
    for preset in ("full", "tiny"):
        off = StereoVLAConfig.from_preset(preset)
        assert (off.language_pointing_layer, off.language_pointing_loss_weight) == (None, 0.0)
        assert not off.place_code and not off.bin_smoothing
        assert "language_pointing" not in [objective.name for objective in objectives_of(off)]
    with pytest.raises(
        StrictDataclassError, match=r"language_pointing_layer is 2; it must be None or one of 1 \.\.\. 1"
    ):
        StereoVLAConfig.from_preset("tiny", language_pointing_layer=2)
    with pytest.raises(
        StrictDataclassError,
        match="language_pointing_loss_weight is 1.0, but language_pointing_layer is None",
    ):
        StereoVLAConfig.from_preset("tiny", language_pointing_loss_weight=1.0)
    with pytest.raises(StrictDataclassError, match="bin_smoothing is -1.0; it must be at least 0"):
        StereoVLAConfig.from_preset("tiny", bin_smoothing=-1.0)
