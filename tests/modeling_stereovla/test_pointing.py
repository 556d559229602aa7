"""The pointing targets against a brute-force bilinear reference, and that pointing can be learned and reads out."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_depthvla import tiny, tiny_config, training_batch
from torch.nn import functional as F

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.objectives import (
    KeyframeObjective,
    PointingObjective,
    Predictions,
    Targets,
    objectives_of,
)
from stereovla.modeling_stereovla.pointing import POINTED_AT, Pointed, Pointers, soft_token_targets


def test_targets_reproduce_the_point_and_sum_to_one():
    grid, patch = 8, 16
    points = torch.tensor([[24.0, 40.0], [100.0, 8.0], [64.0, 64.0], [37.5, 90.25]])
    weights, known = soft_token_targets(points, grid, patch)
    assert known.all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    v, u = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    centres = torch.stack([(u + 0.5) * patch, (v + 0.5) * patch], -1).reshape(-1, 2)
    torch.testing.assert_close(weights @ centres, points)  # inside the outer token centres, bilinear weights are exact
    assert ((weights > 0).sum(-1) <= 4).all()


def test_unknown_points_have_no_weight():
    points = torch.tensor([[float("nan"), 3.0], [-1.0, 5.0], [5.0, 129.0], [128.0, 0.0]])
    weights, known = soft_token_targets(points, 8, 16)
    assert known.tolist() == [False, False, False, True]
    assert weights[:3].sum() == 0 and weights[3].argmax() == 7


def test_a_pointer_learns_to_find_the_token_that_differs():
    config = StereoVLAConfig.from_preset("tiny", use_pointers=True)
    torch.manual_seed(0)
    pointers, objective = Pointers(config), PointingObjective(config)
    grid, hidden = 4, config.text_config.hidden_size
    signature = torch.randn(2, hidden)
    optimizer = torch.optim.Adam(pointers.parameters(), lr=3e-3)
    for _ in range(150):
        where = torch.randint(grid**2, (32, 2))
        tokens = 0.1 * torch.randn(32, grid**2, hidden)
        for kind in range(2):
            tokens[torch.arange(32), where[:, kind]] += signature[kind]
        points = torch.stack([where % grid, where // grid], -1) * 16.0 + 8.0
        text, mask = torch.randn(32, 5, hidden), torch.ones(32, 5, dtype=torch.bool)
        state, state_token = torch.zeros(32, config.state_dim), torch.zeros(32, config.expert_hidden_size)
        pointed = pointers(tokens, text, mask, state, state_token)
        loss = objective.outputs(Predictions(pointed=pointed), Targets(points=points), 64)["pointing_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (pointed.logits.argmax(-1) == where).float().mean() > 0.9
    assert pointed.tokens.shape == (32, 3, config.expert_hidden_size)


@pytest.mark.parametrize("ordered", [False, True])
def test_pointers_tell_what_is_moved_from_where_it_goes(ordered):
    """Of "put A onto B" both names stand in the words, however many stand before; only their order says which is
    which.
    """
    torch.manual_seed(0)
    config = StereoVLAConfig.from_preset("tiny", use_pointers=True, points_at_destination=ordered)
    objective, grid, hidden = PointingObjective(config), 4, config.text_config.hidden_size
    model = StereoVLAForActionPrediction(config)  # as models are initialised
    pointers = model.pointers
    assert pointers.names == POINTED_AT[: 2 + ordered]
    names, onto, others = torch.randn(6, hidden), torch.randn(hidden), torch.randn(5, hidden)
    optimizer = torch.optim.Adam(pointers.parameters(), lr=3e-3)
    for _ in range(300):
        pairs = torch.rand(32, 6).argsort(1)[:, :2]
        where = torch.rand(32, grid**2).argsort(1)[:, :3]
        tokens = 0.1 * torch.randn(32, grid**2, hidden)
        for kind in range(2):
            tokens[torch.arange(32), where[:, kind]] += names[pairs[:, kind]]
        text = torch.stack([names[pairs[:, 0]], onto.expand(32, -1), names[pairs[:, 1]]], 1)
        before = others[torch.randint(5, (32, int(torch.randint(1, 5, ()))))]
        text = torch.cat([before, text, torch.randn(32, 2, hidden)], 1)
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        mask[:, -2:] = False  # padding that says anything
        where[:, 2] = where[:, 1]
        points = torch.stack([where % grid, where // grid], -1) * 16.0 + 8.0
        points[:, 1] = float("nan")
        state, state_token = torch.zeros(32, config.state_dim), torch.zeros(32, config.expert_hidden_size)
        pointed = pointers(tokens, text, mask, state, state_token)
        count = objective.count(Targets(points=points))
        assert count == 32 * (1 + ordered)
        loss = objective.outputs(Predictions(pointed=pointed), Targets(points=points), count)["pointing_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = (pointed.logits.argmax(-1) == where[:, : 2 + ordered]).float().mean(0)
    if ordered:
        assert hits[0] > 0.9 and hits[2] > 0.9
        assert pointed.tokens.shape == (32, 4, config.expert_hidden_size)
    else:
        assert hits[0] < 0.8


def test_a_batch_without_destinations_trains_pointers_that_have_one():
    config = StereoVLAConfig.from_preset("tiny", use_pointers=True, points_at_destination=True)
    objective, logits, points = PointingObjective(config), torch.randn(3, 3, 16), 64 * torch.rand(3, 3, 2)
    points[:, 2] = float("nan")
    whole, without = (
        objective.outputs(Predictions(pointed=Pointed(logits)), Targets(points=given), 6)
        for given in (points, points[:, :2])
    )
    assert objective.count(Targets(points=points[:, :2])) == objective.count(Targets(points=points)) == 6
    torch.testing.assert_close(whole, without)
    with pytest.raises(StrictDataclassClassValidationError, match="points_at_destination is True and use_point"):
        StereoVLAConfig.from_preset("tiny", points_at_destination=True)


def test_a_name_points_as_an_instruction_of_that_name_does():
    """Each name by itself, whatever others are padded to; and the loss is the mean over the objects in the picture."""
    torch.manual_seed(0)
    config = StereoVLAConfig.from_preset("tiny", use_pointers=True, points_at_destination=True, naming_loss_weight=1.0)
    pointers, hidden, grid = Pointers(config).double(), config.text_config.hidden_size, 4
    torch.nn.init.normal_(pointers.word_before.weight)  # which begins as nothing
    tokens, names = torch.randn(2, grid**2, hidden).double(), torch.randn(2, 3, 4, hidden).double()
    lengths = torch.tensor([[1, 4, 2], [3, 0, 1]])
    is_word = torch.arange(4) < lengths[..., None]
    text, mask = torch.randn(2, 5, hidden).double(), torch.ones(2, 5, dtype=torch.bool)
    state, state_token = torch.zeros(2, config.state_dim).double(), torch.zeros(2, config.expert_hidden_size).double()
    pointed = pointers(tokens, text, mask, state, state_token, names=(names, is_word))
    without = pointers(tokens, text, mask, state, state_token)
    assert without.named is None and torch.equal(without.logits, pointed.logits)
    for picture, name in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
        alone = names[picture, name, : lengths[picture, name]][None]
        words = torch.ones(alone.shape[:2], dtype=torch.bool)
        asked = pointers(tokens[picture][None], alone, words, state[:1], state_token[:1]).logits[0, 0]
        torch.testing.assert_close(pointed.named[picture, name], asked)
    points = torch.full((2, 3, 2), float("nan")).double()
    for place, pixel in (((0, 0), (8.0, 24.0)), ((0, 2), (40.0, 8.0)), ((1, 0), (70.0, 3.0))):
        points[place] = torch.tensor(pixel).double()
    (objective,) = [one for one in objectives_of(config) if one.name == "naming"]
    targets = Targets(name_points=points)
    assert objective.count(targets) == 2  # the third lies outside of the picture
    found = objective.outputs(Predictions(pointed=pointed), targets, 2)
    places = ((0, 0, 1 * grid + 0), (0, 2, 0 * grid + 2))  # in the middle of a token
    expected = [-pointed.named[picture, name].log_softmax(-1)[place] for picture, name, place in places]
    torch.testing.assert_close(found["naming_loss"], torch.stack(expected).mean())
    hits = [float(pointed.named[picture, name].argmax() == place) for picture, name, place in places]
    assert found["naming_accuracy"] == sum(hits) / 2


def test_a_depthvla_learns_names_too_and_full_models_do_not():
    options = {"use_pointers": True, "naming_loss_weight": 1.0}
    model, inputs = tiny(torch.float32, **options).train(), training_batch(tiny_config(**options), dtype=torch.float32)
    rows = len(inputs["pixel_values"])
    names = torch.tensor([[[5, 6], [7, -100]]]).expand(rows, -1, -1)
    points = torch.tensor([[[8.0, 8.0], [24.0, 8.0]]]).repeat(rows, 1, 1)
    output = model(**inputs, names=names, name_points=points)
    output.loss.backward()
    assert output.naming_loss > 0 and 0 <= output.naming_accuracy <= 1
    assert model.pointers.word_query[0].weight.grad.abs().sum() > 0
    assert model.loss_counts(**inputs, names=names, name_points=points)["naming"] == 2 * rows
    assert model(**inputs, names=names, name_points=torch.full_like(points, float("nan"))).naming_loss == 0
    for preset, weight in (("lab", 1.0), ("full", 0.0), ("demo", 0.0)):
        assert StereoVLAConfig.from_preset(preset).naming_loss_weight == weight
    off = StereoVLAConfig.from_preset("tiny", use_pointers=False)
    assert "naming" not in [objective.name for objective in objectives_of(off)]


def test_loss_ignores_unknown_points():
    objective = PointingObjective(StereoVLAConfig.from_preset("tiny", use_pointers=True))
    logits = torch.randn(2, 2, 16)
    points = torch.tensor([[[8.0, 8.0], [24.0, 8.0]], [[float("nan")] * 2, [float("nan")] * 2]])
    targets = Targets(points=points)
    assert objective.count(targets) == 2
    found = objective.outputs(Predictions(pointed=Pointed(logits)), targets, 2)
    # both points are the centres of tokens: 0 and 1
    expected = F.cross_entropy(logits[0], torch.tensor([0, 1]))
    torch.testing.assert_close(found["pointing_loss"], expected)
    hits = (logits[0].argmax(-1) == torch.tensor([0, 1])).float().mean()
    torch.testing.assert_close(found["pointing_accuracy"], hits)


def test_displacement_loss_ignores_samples_without_a_keyframe():
    objective = KeyframeObjective(StereoVLAConfig.from_preset("tiny", use_pointers=True))
    predicted, truth = torch.randn(3, 7), torch.randn(3, 7)
    truth[1] = float("nan")
    targets = Targets(displacement=truth)
    assert objective.count(targets) == 2
    found = objective.outputs(Predictions(pointed=Pointed(torch.zeros(2, 2, 16), displacement=predicted)), targets, 2)
    expected = F.smooth_l1_loss(predicted[[0, 2]], truth[[0, 2]], beta=0.1)
    torch.testing.assert_close(found["keyframe_loss"], expected)
