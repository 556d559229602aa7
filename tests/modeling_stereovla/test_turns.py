"""Turns that hold alike: their losses against a brute-force search, no seam, and which of them the expert is told."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.model_outputs import StereoVLAModelOutput
from stereovla.modeling_stereovla.objectives import KeyframeObjective, Predictions, Targets
from stereovla.modeling_stereovla.pointing import Pointed
from stereovla.modeling_stereovla.robot_heads import sizes_in_tensors
from stereovla.modeling_stereovla.turns import TurnHead, nearest_turns, smallest_turns, turn_losses, turn_vectors


def degrees(*values: float) -> torch.Tensor:
    return torch.deg2rad(torch.tensor(values))


@pytest.mark.parametrize("symmetry", [1, 2])
def test_a_vector_of_any_length_gives_its_turn_back(symmetry):
    turns = torch.linspace(-0.99, 0.99, 41) * math.pi / symmetry
    for length in (0.3, 1.0, 2.0):
        torch.testing.assert_close(smallest_turns(length * turn_vectors(turns, symmetry), symmetry), turns)
    # all that hold alike have one vector, and it gives the smallest of them
    others = turns + 2 * math.pi / symmetry
    torch.testing.assert_close(smallest_turns(turn_vectors(others, symmetry), symmetry), turns, atol=1e-5, rtol=0)


@pytest.mark.parametrize("equal", [2, 4, 6])
def test_the_loss_is_that_of_the_nearest_of_all_turns_that_are_as_right(equal):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(64, 1, 2, generator=generator)
    turns = (torch.rand(64, 1, generator=generator) - 0.5) * 2 * math.pi
    number = torch.full((64,), float(equal))
    found = turn_losses(vectors, turns, 2, number)
    for row in range(64):
        candidates = [turns[row, 0].item() + k * 2 * math.pi / equal for k in range(equal)]
        targets = [torch.tensor([math.cos(2 * turn), math.sin(2 * turn)]) for turn in candidates]
        direction = F.normalize(vectors[row, 0], dim=0)
        nearest = min(targets, key=lambda target: (target - direction).norm().item())
        expected = F.smooth_l1_loss(vectors[row, 0], nearest, reduction="sum", beta=0.1)
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=0)
    # whichever of them is the label
    again = turn_losses(vectors, turns + 2 * math.pi / equal, 2, number)
    torch.testing.assert_close(again, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("symmetry", "seam"), [(1, 180.0), (2, 90.0), (2, 180.0), (2, -90.0)])
def test_nothing_leaps_at_a_seam(symmetry, seam):
    vectors = torch.randn(1, 1, 2, generator=torch.Generator().manual_seed(1)).expand(2, 1, 2)
    period = 360 / symmetry
    below, above = seam - 0.001, seam + 0.001
    labels = degrees(below, above - period)[:, None]  # as an expert would name them: nearly a period apart
    first, second = turn_losses(vectors, labels, symmetry)
    assert abs(first - second) < 1e-3
    numbers = F.smooth_l1_loss(torch.zeros(2), labels[:, 0], reduction="none", beta=0.1)
    assert abs(labels[0] - labels[1]) > 3 and (period < 360 or numbers.min() > 3)  # which a number would have to meet


def test_half_of_the_labels_at_either_side_of_the_seam_do_not_cancel():
    """What a regressed number makes 0: an object that lies across, half of whose labels are +90 degrees, half -90."""
    vector = torch.tensor([[[0.3, 0.1]]], requires_grad=True)
    number = torch.tensor(0.3, requires_grad=True)
    labels = degrees(89.0, -89.0, 90.0, -90.0)
    optimizer = torch.optim.SGD([vector, number], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        turn_losses(vector.expand(4, 1, 2), labels[:, None], 2).mean().backward()
        F.smooth_l1_loss(number.expand(4), labels, beta=0.1).backward()
        optimizer.step()
    assert abs(abs(torch.rad2deg(smallest_turns(vector, 2)).item()) - 90) < 1.5
    assert abs(torch.rad2deg(number).item()) < 20


def test_unknown_turns_have_no_loss_and_no_gradient():
    vectors = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    turns = torch.tensor([[0.1, float("nan")], [float("nan")] * 2, [0.2, 0.3]])
    losses = turn_losses(vectors, turns, 2, torch.tensor([4.0, 2.0, 2.0]))
    assert losses[1] == 0 and losses.isfinite().all()
    losses.sum().backward()
    assert vectors.grad.isfinite().all()
    assert (vectors.grad.abs().sum(-1) > 0).tolist() == [[True, False], [False, False], [True, True]]


def test_the_expert_is_told_the_branch_of_its_labels_and_else_the_smallest():
    head = TurnHead(4, 8, 1, 2)
    predicted = turn_vectors(degrees(-78.0, -78.0, 85.0, 10.0), 2)[:, None]
    told = head.told(predicted, degrees(100.0, -80.0, -8.0, float("nan"))[:, None], torch.tensor([2.0, 2.0, 4.0, 2.0]))
    torch.testing.assert_close(told[:, 0], degrees(102.0, -78.0, -5.0, 10.0))
    torch.testing.assert_close(head.told(predicted, None, None)[:, 0], degrees(-78.0, -78.0, 85.0, 10.0))
    # without counts of its own, half a turn is what is the same
    torch.testing.assert_close(head.told(predicted[:1], degrees(100.0)[:, None], None)[:, 0], degrees(102.0))


def test_nearest_turns_are_a_whole_number_of_steps_away():
    turns, others = degrees(10.0, 10.0, 10.0), degrees(200.0, 75.0, 40.0)
    found = torch.rad2deg(nearest_turns(turns[:, None], others[:, None], torch.tensor([2.0, 4.0, 6.0])))
    torch.testing.assert_close(found[:, 0], torch.tensor([190.0, 100.0, 10.0]), atol=1e-3, rtol=0)


def policy(**changes) -> StereoVLAForActionPrediction:
    """The smallest one with pointers, of turns modulo half a turn."""
    fields = {"use_pointers": True, "turn_symmetry": 2, "keyframe_loss_weight": 1.0, "pointing_loss_weight": 1.0}
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", **fields | changes))


def sample(config: StereoVLAConfig, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((rows, config.num_visual_tokens + 6), config.image_token_id)
    ids[:, -6:] = torch.arange(10, 16)
    size = config.image_size
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(rows, 2, 3, size, size, generator=generator),
        "state": torch.rand(rows, config.state_history, config.state_dim, generator=generator),
        "facing": torch.tensor([[0.3], [-0.2]])[:rows],
        "actions": torch.rand(rows, config.chunk_size, config.action_dim, generator=generator),
        "noise": torch.randn(rows, 1, config.chunk_size, config.action_dim, generator=generator),
        "time": torch.full((rows, 1), 0.5),
        "points": torch.full((rows, 2, 2), 20.0),
        "displacement": torch.rand(rows, config.pose_dim, generator=generator),
        "turns": torch.tensor([[1.2], [-0.4]])[:rows],
    }


def test_a_policy_learns_the_same_from_turns_that_hold_alike():
    model = policy().eval()
    batch = sample(model.config)
    plain = model(**batch)
    half_turn = model(**batch | {"turns": batch["turns"] + math.pi})
    torch.testing.assert_close(half_turn.keyframe_loss, plain.keyframe_loss)
    quarter = model(**batch | {"turns": batch["turns"] + math.pi / 2})
    assert abs(quarter.keyframe_loss - plain.keyframe_loss) > 0.01
    # of a cube it is the same
    cube = {"equal_turns": torch.tensor([4.0, 4.0])}
    first, second = model(**batch, **cube), model(**batch | cube | {"turns": batch["turns"] + math.pi / 2})
    torch.testing.assert_close(first.keyframe_loss, second.keyframe_loss)
    # the loss is that of the numbers, and beside it the vectors', each part like a number
    found = KeyframeObjective(model.config).outputs(
        Predictions(pointed=Pointed(torch.zeros(1, 2, 4), displacement=torch.zeros(1, 7), turns=torch.zeros(1, 1, 2))),
        Targets(displacement=torch.zeros(1, 7), turns=torch.zeros(1, 1)),
        1,
    )
    assert found["keyframe_loss"].item() == pytest.approx((1 - 0.05) / 7)


def test_every_weight_has_a_gradient_with_and_without_a_keyframe():
    """Of processes that share weights each waits for the others' gradients."""
    model = policy()
    batch = sample(model.config)
    for without in ((), ("displacement", "turns", "points")):
        model.zero_grad()
        model(**{name: value for name, value in batch.items() if name not in without}).loss.backward()
        assert all(weight.grad is not None for weight in model.pointers.turns.parameters())
    assert all((weight.grad == 0).all() for weight in model.pointers.turns.cosine.parameters())


def test_what_is_told_reaches_the_actions():
    """The predicted turn, and in training the branch of the label, change what the action expert does."""
    model = policy().eval()
    batch = sample(model.config)
    asked = {name: batch[name] for name in ("input_ids", "pixel_values", "state", "facing")}
    noise = torch.zeros(2, model.config.chunk_size, model.config.action_dim)
    before = model.predict_action(**asked, noise=noise)
    losses = [model(**batch | {"turns": batch["turns"] + k * math.pi}).action_loss for k in (0, 1)]
    assert losses[0] != losses[1]
    with torch.no_grad():
        model.pointers.turns.sine.bias += 5.0
    assert (model.predict_action(**asked, noise=noise) - before).abs().max() > 1e-4


def test_a_turn_leads_from_where_the_tool_faces_to_where_the_picture_says():
    """However the tool stands, and whatever the state says: the picture alone says where the tool shall face."""
    model = policy().eval()
    batch = sample(model.config)
    visual = torch.randn(2, model.config.num_visual_tokens, 64, generator=torch.Generator().manual_seed(5))
    there = []
    for facing, shift in ((batch["facing"], 0.0), (batch["facing"] + 0.7, 0.0), (batch["facing"], 0.5)):
        ids, seen = batch["input_ids"], StereoVLAModelOutput(visual_tokens=visual)
        _, pointed = model._state_tokens(batch["state"] + shift, ids, torch.ones_like(ids), seen, facing=facing)
        there.append(smallest_turns(pointed.turns, 2) + facing)
    for other in there[1:]:
        torch.testing.assert_close((other - there[0] + math.pi / 2) % math.pi, torch.full((2, 1), math.pi / 2))
    without = {name: value for name, value in batch.items() if name != "facing"}
    with pytest.raises(ValueError, match="facing is missing; a model of turn_symmetry 2"):
        model(**without)


@pytest.mark.parametrize(("symmetry", "given"), [(2, False), (0, True)])
def test_a_batch_of_a_processor_with_another_symmetry_is_refused(symmetry, given):
    model = policy(turn_symmetry=symmetry)
    batch = sample(model.config)
    if not given:
        del batch["turns"]
    with pytest.raises(
        ValueError, match=f"turn_symmetry is {symmetry} and the batch has {'' if given else 'no '}turns"
    ):
        model(**batch)


def test_presets_and_limits():
    symmetries = {name: StereoVLAConfig.from_preset(name).turn_symmetry for name in ("tiny", "demo", "lab", "full")}
    assert symmetries == {"tiny": 0, "demo": 2, "lab": 2, "full": 0}
    with pytest.raises(StrictDataclassError, match="turn_symmetry is 3; it must be 0"):
        StereoVLAConfig.from_preset("tiny", turn_symmetry=3)
    with pytest.raises(StrictDataclassError, match="num_turns is 0; it must be at least 1"):
        StereoVLAConfig.from_preset("tiny", num_turns=0)


def test_two_arms_have_two_turns():
    model = policy()
    kept = model.pointers.turns.hidden[0].weight.clone()
    model.resize_heads(14, 14, num_turns=2)
    turns = model.pointers.turns
    assert (turns.cosine.out_features, turns.sine.out_features, turns.token[0].in_features) == (2, 2, 2)
    assert model.config.num_turns == 2 and torch.equal(turns.hidden[0].weight, kept)
    batch = sample(model.config) | {
        "turns": torch.tensor([[0.1, 3.0], [float("nan"), 0.2]]),
        "facing": torch.zeros(2, 2),
    }
    assert model(**batch).loss.isfinite()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert sizes_in_tensors(shapes) == {"state_dim": 14, "action_dim": 14, "pose_dim": 14, "num_turns": 2}
