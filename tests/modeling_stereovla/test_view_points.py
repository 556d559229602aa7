"""Points against the geometry of the cameras in float64, what the pointers read of them, and what a model without
calibration sees.
"""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from stereovla.evaluation.pointed_keyframes import noted
from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.pointing import Anchors, cells_of_points
from stereovla.modeling_stereovla.view_points import CELLS, POINT_LIMIT, in_tokens, point_channels, points_of_disparity
from stereovla.processing.camera_geometry import Calibration, disparity_to_depth, unproject_points
from stereovla.processing.point_transforms import CAMERA_UNIT_M, point_transform
from stereovla.processing.rotations import rpy_to_matrix


def camera(**changes) -> Calibration:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rpy_to_matrix([2.5, 0.3, -1.2]), [0.6, -0.4, 0.5]
    values = {
        "focal_length_px": [80.0, 82.0],
        "principal_point_px": [33.0, 30.0],
        "baseline_m": 0.063,
        "transform_camera_to_base": pose,
    }
    return Calibration.from_mapping(values | changes)


def small_model(**changes) -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    fields = {"use_pointers": True, "keyframe_loss_weight": 1.0, "pointing_loss_weight": 1.0, "state_history": 1}
    fields |= {"stereo_config": {"refinement_channels": 8}, "points_frame": "base"}
    config = StereoVLAConfig.from_preset("tiny", **fields | changes)
    return StereoVLAForActionPrediction(config).eval()


def batch(config, size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[1] + [config.image_token_id] * config.num_visual_tokens + [20, 21, 22]] * size)
    transform = point_transform(camera(), "base", [0.3, 0.3, 0.2], [0.5, 0.0, 0.1])[0]
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(size, 2, 3, config.image_size, config.image_size, generator=generator),
        "state": torch.rand(size, 1, 7, generator=generator),
        "point_transform": torch.from_numpy(np.stack([transform] * size)).float(),
        "point_frame": torch.full((size,), 2),
    }


# ---- geometry


@pytest.mark.parametrize("side", [32, 16])
def test_points_are_those_of_the_cameras_in_the_units_of_the_state(side):
    """Against `unproject_points` of the depth, pixel by pixel."""
    disparity = np.random.default_rng(0).uniform(3, 20, (1, 1, side, side))
    scale, shift = np.array([0.3, 0.25, 0.2]), np.array([0.5, 0.1, 0.05])
    transform, frame = point_transform(camera(), "base", scale, shift)
    assert frame == 2
    points = points_of_disparity(
        torch.from_numpy(disparity), torch.from_numpy(transform)[None], torch.tensor([frame]), 64
    )[0].numpy()
    step = 64 / side
    for y in range(0, side, 5):
        for x in range(0, side, 5):
            depth = disparity_to_depth(disparity[0, 0, y, x], camera())
            expected = (unproject_points([(x + 0.5) * step, (y + 0.5) * step], depth, camera()) - shift) / scale
            expected = np.array([*expected, depth])
            np.testing.assert_allclose(points[:, y, x], expected.clip(-POINT_LIMIT, POINT_LIMIT), atol=1e-4)


@pytest.mark.parametrize(
    "given, frame, scale",
    [({}, "camera", [1.0] * 3), ({"transform_camera_to_base": None}, "base", [1.0] * 3), ({}, "base", None)],
)
def test_without_a_base_frame_points_are_those_of_the_camera(given, frame, scale):
    transform, found = point_transform(camera(**given), frame, scale, scale)
    assert found == 1
    depth = 80 * 0.063 / 9.0
    expected = [*(np.array([(10 - 33) / 80, (20 - 30) / 82, 1]) * depth / CAMERA_UNIT_M), depth]
    np.testing.assert_allclose(transform @ [10 / 9.0, 20 / 9.0, 1 / 9.0, 1], expected)


@pytest.mark.parametrize("calibration", [None, camera(baseline_m=None)])
def test_without_a_baseline_there_are_no_points(calibration):
    transform, frame = point_transform(calibration, "base", [1.0] * 3, [0.0] * 3)
    assert frame == 0 and not transform.any()
    points = points_of_disparity(torch.ones(1, 1, 4, 4), torch.ones(1, 4, 4), torch.tensor([0]), 16)
    assert not points.any()


def test_a_point_stays_where_it_is_when_the_camera_moves():
    """Seen by two cameras, one point of the world has the same coordinates."""
    moved = camera().transform_camera_to_base.copy()
    moved[:3, 3] += 0.1 * moved[:3, 0] + 0.05 * moved[:3, 1]
    found = []
    for seen in (camera(), camera(transform_camera_to_base=moved)):
        pose = seen.transform_camera_to_base
        in_camera = np.linalg.inv(pose) @ [0.5, 0.1, 0.0, 1]
        pixel = in_camera[:2] / in_camera[2] * seen.focal_length_px + seen.principal_point_px
        disparity = 80 * 0.063 / in_camera[2]
        transform, _ = point_transform(seen, "base", [0.3] * 3, [0.5, 0.0, 0.1])
        found.append((transform @ [*(pixel / disparity), 1 / disparity, 1])[:3])
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)
    np.testing.assert_allclose(found[0], [0, 0.1 / 0.3, -0.1 / 0.3], atol=1e-9)


def test_channels_of_a_token_are_the_means_of_its_quarters():
    points = torch.rand(2, 4, 8, 8)
    channels = point_channels(points, torch.tensor([1, 2]), grid=2)
    assert channels.shape == (2, 4, 4 * CELLS**2 + 2)
    for row in range(2):
        for column in range(2):
            token = points[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            for axis in range(4):
                for v in range(2):
                    for u in range(2):
                        part = token[:, axis, 2 * v : 2 * v + 2, 2 * u : 2 * u + 2].mean((1, 2))
                        torch.testing.assert_close(channels[:, 2 * row + column, 4 * axis + 2 * v + u], part)
    assert channels[0, :, -2:].tolist() == [[1, 0]] * 4 and channels[1, :, -2:].tolist() == [[0, 1]] * 4
    cells = in_tokens(points, 2)
    assert torch.equal(cells[1, 3, 6], points[1, :, 5, 6])  # row 1, column 2 of the last token's 16


def test_a_pixel_is_in_the_cell_where_in_tokens_has_it():
    points = torch.rand(1, 3, 8, 8)
    cells = in_tokens(points, 2)
    for x, y in [(3.0, 1.0), (30.9, 17.0), (16.0, 15.9)]:
        token, cell = cells_of_points(torch.tensor([x, y]), 2, 16, 4)
        assert torch.equal(cells[0, token, cell], points[0, :, int(y // 4), int(x // 4)])


# ---- the model


def test_pointers_read_the_mean_point_around_the_peak_of_their_attention():
    model = small_model()
    seen = model.model(**{name: value for name, value in batch(model.config).items() if name != "state"})
    assert seen.points.shape == (2, 3, 32, 32)
    state = batch(model.config)["state"]
    tokens, pointed = model._state_tokens(
        state, batch(model.config)["input_ids"], torch.ones(2, 20), seen, torch.tensor([2, 2])
    )
    grid, cells = model.config.image_size // model.config.patch_size, model.config.point_cells
    for sample, pointer in np.ndindex(2, 2):
        row, column = divmod(int(pointed.logits[sample, pointer].argmax()), grid)
        near = [(y, x) for y, x in np.ndindex(grid, grid) if abs(y - row) <= 1 and abs(x - column) <= 1]
        shares = [pointed.logits[sample, pointer, y * grid + x].exp() for y, x in near]
        expected = torch.zeros(3)
        for (y, x), share in zip(near, shares, strict=True):
            in_token = pointed.cells[sample, pointer, y * grid + x].softmax(-1)
            for cell in range(cells**2):
                at = seen.points[sample, :, y * cells + cell // cells, x * cells + cell % cells]
                expected += share / sum(shares) * in_token[cell] * at
        torch.testing.assert_close(pointed.points[sample, pointer], expected)
    assert tokens.shape[1] == 1 + 3


@pytest.mark.parametrize("destination", [False, True])
def test_the_way_to_the_keyframe_is_a_share_of_the_ways_whatever_the_position(destination):
    """Moved by a step in the plane, the tool is told as much less as target and destination share, and the rest of the
    way is where the tool is. Without points in the base frame the network of the state says all of it, as it says
    whatever is no position.
    """
    torch.manual_seed(0)
    config = small_model(points_at_destination=destination).config
    count, width = config.num_pointers, config.expert_hidden_size
    anchors = Anchors(config, count)
    seen, state = torch.randn(2, count, width), torch.rand(2, 7)
    points, guess = torch.randn(2, count, 3), torch.randn(2, 7)

    def told(at: torch.Tensor, base: float = 1.0, at_points: torch.Tensor = points) -> torch.Tensor:
        ways = torch.cat([at_points - at[:, None, :3], torch.full((2, count, 2), base)], -1)
        return anchors(guess, seen, ways, at)

    step = torch.tensor([[0.1, -0.2, 0, 0, 0, 0, 0]])
    before, after = told(state), told(state + step)
    shares = -(after - before)[:, :2] / step[:, :2]
    assert ((0 < shares) & (shares < 1)).all() and (shares.std(1) < 1e-4).all()  # one share for x and y
    assert torch.equal(after[:, 2:], before[:, 2:]) and torch.equal(after[:, 3:], guess[:, 3:])
    # as much as the shares of the anchors by themselves; the gripper's point has no part
    parts = []
    for index in range(count):
        moved = points.clone()
        moved[:, index, :3] += 1
        parts.append((told(state, at_points=moved) - before)[:, :3])
    assert parts[1].abs().max() == 0
    torch.testing.assert_close(sum(parts)[:, :2], shares)
    for axis in range(2, 7):  # how high, turned how, open how far: what it is about to do
        other = state.clone()
        other[:, axis] += 1
        assert (told(other) - before)[:, :2].abs().min() > 0
    assert torch.equal(told(state, base=0.0), guess)


def test_where_it_goes_depends_on_whether_something_is_carried_and_not_on_the_place():
    model = small_model(points_at_destination=True)
    inputs = batch(model.config)
    torch.nn.init.normal_(model.pointers.carried_query.weight)

    def logits(axis: int) -> torch.Tensor:
        state = inputs["state"].clone()
        state[..., axis] += 0.5
        with noted(model.pointers, lambda pointed: pointed.logits) as said:
            model.predict_action(**inputs | {"state": state, "noise": torch.zeros(2, 8, 7)})
        return said[0]

    for axis in range(7):
        differs = [not torch.equal(a, b) for a, b in zip(logits(axis).unbind(1), logits(0).unbind(1), strict=True)]
        assert differs == [False, False, axis >= 2]


def test_a_model_without_calibration_acts_as_with_an_unknown_frame():
    model = small_model()
    inputs = batch(model.config) | {"noise": torch.zeros(2, 8, 7)}
    told = model.predict_action(**inputs)
    unknown = model.predict_action(**inputs | {"point_frame": torch.tensor([0, 0])})
    absent = {name: value for name, value in inputs.items() if not name.startswith("point_")}
    torch.testing.assert_close(model.predict_action(**absent), unknown, rtol=0, atol=0)
    assert (told - unknown).abs().max() > 1e-4
    other = inputs["point_transform"] + 0.2
    assert (model.predict_action(**inputs | {"point_transform": other}) - told).abs().max() > 1e-4


def test_calibration_is_dropped_in_training_alone_and_by_its_share():
    model = small_model(calibration_dropout=0.25)
    frames = torch.full((4000,), 2)
    assert torch.equal(model._told_frame(frames, None), frames)
    told = model.train()._told_frame(frames, torch.Generator().manual_seed(0))
    assert 900 < int((told == 0).sum()) < 1100 and set(told.tolist()) == {0, 2}


def test_the_disparity_of_points_learns_from_its_own_loss_alone():
    model = small_model().train()
    actions = {"actions": torch.rand(2, 8, 7), "points": torch.rand(2, 2, 2) * 64, "displacement": torch.rand(2, 7)}
    output = model(**batch(model.config), **actions, generator=torch.Generator().manual_seed(0))
    output.keyframe_loss.backward()
    assert all(weight.grad is None for weight in model.model.visual_tokens.stereo.refinement.parameters())
    assert model.pointers.cell.weight.grad.abs().sum() > 0
    model.zero_grad()
    truth = torch.full((2, 64, 64), 9.0)
    model(**batch(model.config), **actions, disparity=truth).disparity_loss.backward()
    assert model.model.visual_tokens.stereo.refinement.score.weight.grad.abs().sum() > 0


def test_points_of_a_given_disparity_need_it_and_no_stereo_encoder():
    model = small_model(stereo_config=None, points_of="given")
    assert model.config.reads_depth and model.config.point_cells == 8
    inputs = batch(model.config) | {"noise": torch.zeros(2, 8, 7)}
    with pytest.raises(ValueError, match="disparity is missing"):
        model.predict_action(**inputs)
    near, far = (model.predict_action(**inputs, disparity=torch.full((2, 64, 64), px)) for px in (20.0, 5.0))
    assert (near - far).abs().max() > 1e-4
    output = model(**batch(model.config), actions=torch.rand(2, 8, 7), disparity=torch.full((2, 64, 64), 9.0))
    assert output.disparity_loss is None


def test_saved_and_loaded_it_acts_alike(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = StereoVLAForActionPrediction.from_pretrained(tmp_path).eval()
    inputs = batch(model.config) | {"noise": torch.zeros(2, 8, 7)}
    torch.testing.assert_close(loaded.predict_action(**inputs), model.predict_action(**inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"points_frame": "world"}, "points_frame is 'world'; it must be None, 'camera' or 'base'"),
        ({"points_of": "lidar"}, "points_of is 'lidar'; it must be 'encoder' or 'given'"),
        ({"stereo_config": None}, "points_frame needs a disparity"),
        ({"calibration_dropout": 1.0}, r"calibration_dropout is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        StereoVLAConfig.from_preset("tiny", **{"points_frame": "base"} | changes)
