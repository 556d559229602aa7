"""What the page says of a frame is what the model itself says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_dataset import write_dataset
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, save_tiny_depthvla, stereo_pair

from stereovla.app.frames import Carried, Frame, dataset_frame
from stereovla.app.look import look_at
from stereovla.processing.camera_geometry import Calibration
from stereovla.serving.served_model import ServedModel
from stereovla.sources import load_checkpoint

STATE = np.array([0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0], np.float32)
KNOWN = {
    "focal_length_px": [60.0, 60.0],
    "principal_point_px": [32.0, 32.0],
    "baseline_m": 0.06,
    "transform_camera_to_base": [[0, 0, 1, -0.3], [-1, 0, 0, 0], [0, -1, 0, 0.2], [0, 0, 0, 1]],
}
KINDS = {
    "block": {},
    "pi0": {"depth_config": None, "depth_map_loss_weight": 0.0},
    "depth": {"depth_config": {"input": "depth"}},
}
POINTS = {"points_frame": "base", "use_pointers": True, "points_at_destination": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, ServedModel]:
    folder = tmp_path_factory.mktemp("models")
    paths = {
        name: save_tiny_depthvla(folder / name, use_pointers=name == "block", **own) for name, own in KINDS.items()
    }
    paths["stereovla"] = save_tiny_checkpoint(folder / "stereovla", preset="demo")  # with pointers
    paths["points"] = save_tiny_checkpoint(folder / "points", **POINTS)
    return {name: ServedModel(*load_checkpoint(str(path), run_code=True), name) for name, path in paths.items()}


def frame_for(model: ServedModel, **changes) -> Frame:
    pair = dict(zip(("left", "right"), stereo_pair(), strict=True))
    views = {name: pair[name] for name in model.keys.views}
    given = {"views": views, "instruction": "pick up the red cube", "embodiment": EMBODIMENT, "states": STATE[None]}
    given["calibration"] = Calibration.from_mapping(KNOWN)
    return Frame(**{**given, **changes})


def direct(model: ServedModel, frame: Frame, seed: int) -> tuple[dict, np.ndarray]:
    """Inputs and chunk, without what serves."""
    images = dict(frame.views) if model.named else list(frame.views.values())
    given = {"images": images, "text": frame.instruction, "state": frame.states, "embodiment": EMBODIMENT}
    if model.model.config.reads_depth:
        given["depth_map"] = dict(frame.carried.depths)
    if model.keys.calibration:
        given["calibration"] = KNOWN
    inputs = dict(model.processor(**given))
    shape = (1, model.model.config.chunk_size, 7)
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
    return inputs, model.processor.decode_actions(model.model.predict_action(**inputs, noise=noise), EMBODIMENT)[0]


@pytest.mark.parametrize("name", ["stereovla", "points", *KINDS])
def test_the_answer_is_the_model_s(served, name):
    model = served[name]
    frame = frame_for(model)
    if model.model.config.reads_depth:
        frame = replace(frame, carried=Carried({"left": np.full((64, 64), 0.7, np.float32)}))
    look = look_at(model, frame, seed=5)
    inputs, chunk = direct(model, frame, seed=5)
    np.testing.assert_allclose(look.actions, chunk, atol=1e-6)
    alike = np.allclose(look.actions, look_at(model, frame, seed=6).actions)
    assert alike == (model.model.config.noise_scale == 0)  # some presets start from no noise
    assert look.chunk_ms > 0
    with torch.inference_mode():
        if name in ("stereovla", "points"):
            expected = model.model(**inputs, output_disparity=True).disparity[0]
            np.testing.assert_allclose(look.disparity, expected, atol=1e-5)
        else:
            assert look.disparity is None
        if name in ("block", "depth"):
            np.testing.assert_allclose(look.depth, model.model(**inputs, output_depth=True).depth[0, 0], atol=1e-5)
        else:
            assert look.depth is None


@pytest.mark.parametrize("name", ["stereovla", "block", "points"])
def test_where_it_points(served, name):
    """Keys of zero look everywhere alike; a displacement of zero says that the keyframe is where the tool is."""
    model, pointers = served[name], served[name].model.pointers
    look = look_at(model, frame_for(model))
    grid = model.model.config.image_size // model.model.config.patch_size
    assert tuple(look.attention) == ("target", "gripper", "destination")[: 3 if name == "points" else 2]
    for pointer in look.attention:
        assert look.attention[pointer].shape == (grid, grid)
        assert look.attention[pointer].sum() == pytest.approx(1, abs=1e-5) and look.attention[pointer].std() > 0
    kept = {key: value.clone() for key, value in pointers.state_dict().items()}
    with torch.no_grad():
        pointers.key.weight.zero_(), pointers.key.bias.zero_()
        last = pointers.displacement[-1]
        last.weight.zero_(), last.bias.zero_()
        # half of the scale of x, whose middle 98 % are 0.4 m; with points x is the ways' alone, and z has 0.45 m
        axis, middle = (2, 0.45) if name == "points" else (0, 0.4)
        last.bias[axis] = 0.5
        if pointers.anchors is not None:
            share = pointers.anchors.share  # all of it where the tool is
            share.weight.zero_(), share.bias.copy_(torch.arange(len(share.bias)) == 1).mul_(1e9)
            pointers.anchors.offset.weight.zero_(), pointers.anchors.offset.bias.zero_()
    try:
        look = look_at(model, frame_for(model))
    finally:
        pointers.load_state_dict(kept)
    for pointer in look.attention:
        np.testing.assert_allclose(look.attention[pointer], 1 / grid**2, rtol=1e-5)
    np.testing.assert_allclose(look.pointed - STATE[:3], np.eye(3)[axis] * 0.5 * middle / 2, atol=1e-6)


def test_a_model_without_pointers_points_nowhere(served):
    look = look_at(served["pi0"], frame_for(served["pi0"]))
    assert look.attention == {} and look.pointed is None


def test_a_frame_of_a_dataset(served, tmp_path):
    folder = str(write_dataset(tmp_path, [6], 1, size=64))
    frame = dataset_frame(folder, "train", 0, 5, ("left",), served["depth"].model.config.state_history)
    _, chunk = direct(served["depth"], frame, 1)
    np.testing.assert_allclose(look_at(served["depth"], frame, 1).actions, chunk, atol=1e-6)


def test_what_cannot_be_asked_is_told(served):
    left, right = stereo_pair()
    model = served["stereovla"]
    with pytest.raises(ValueError, match="swapped"):
        look_at(model, frame_for(model, views={"left": right, "right": left}))
    drawn = frame_for(model, views={"left": right, "right": left}, carried=Carried(drawn=True))
    assert look_at(model, drawn).actions.shape == (8, 7)  # nobody looks at what a renderer has drawn
    with pytest.raises(ValueError, match="needs the calibration of its cameras, with focal_length_px"):
        look_at(served["points"], frame_for(served["points"], calibration=None))
    with pytest.raises(ValueError, match="the robot is 'arm'; this model knows franka_panda"):
        look_at(model, frame_for(model, embodiment="arm"))
    with pytest.raises(ValueError, match="shown depth maps of left, which pictures alone have not"):
        look_at(served["depth"], frame_for(served["depth"]))
