"""Samples about one frame that share its pictures: the numbers are those of samples with pictures of their own."""

from itertools import islice

import numpy as np
import pytest
import torch
from synthetic_dataset import write_training_dataset

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.questions import questions_of
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.train import TrainingOptions
from stereovla.training.feed import OF_FRAMES, Batches
from stereovla.training.models import untrained
from stereovla.training.terms import Questions, questions_per_frame

MIXTURE = {"action": 5.0, "depth": 2.0, "box": 2.0, "pose": 1.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_training_dataset(tmp_path_factory.mktemp("shared") / "dataset")


def batch_of(dataset, **changes):
    """A model in float64, and a batch of 8 samples about 4 frames."""
    torch.manual_seed(0)
    model, processor = untrained("tiny", load_meta(dataset), **changes)
    config = model.config
    stream = WindowStream(
        dataset,
        mixture=MIXTURE,
        chunk_size=config.chunk_size,
        history=config.state_history,
        depth_map_share=0.5 if config.disparity_loss_weight else 0.0,
        questions_per_frame=2,
        names=config.naming_loss_weight > 0,
    )
    batches = Batches(stream, 8, processor, config)
    inputs, names = next((inputs, names) for inputs, names, _ in batches if inputs is not None)
    return model.double(), {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}, names


WAYS = {
    "as the paper": {},
    "learns to point": {
        "use_pointers": True,
        "turn_symmetry": 2,
        "pointing_loss_weight": 1.0,
        "keyframe_loss_weight": 1.0,
        "naming_loss_weight": 1.0,
        "disparity_loss_weight": 1.0,
        "stereo_learns_from": "disparity",
        "language_pointing_layer": 1,
        "language_pointing_loss_weight": 1.0,
        "direct_probability": 0.5,
    },
    "points in the base frame": {"use_pointers": True, "points_frame": "base", "calibration_dropout": 0.0},
}


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_those_of_pictures_of_their_own(dataset, way):
    model, inputs, names = batch_of(dataset, **WAYS[way])
    model.train()
    assert len(inputs["pixel_values"]) == 4 and inputs["frames"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(names) == len(inputs["input_ids"]) == 8 and names.count("action") == 4
    first_word = 1 + model.config.num_image_tokens  # which is predicted from the last image token
    inputs["labels"][:, first_word] = inputs["input_ids"][:, first_word]
    alone = {name: value[inputs["frames"]] if name in OF_FRAMES else value for name, value in inputs.items()}
    del alone["frames"]
    counts = model.loss_counts(**inputs)
    if "disparity" in inputs:  # of which each map is there twice
        assert model.loss_counts(**alone)["disparity"] == 2 * counts["disparity"]
    found, gradients = [], []
    for given, counted in ((inputs, counts), (alone, model.loss_counts(**alone))):
        model.zero_grad()
        output = model(**given, counts=counted, generator=torch.Generator().manual_seed(1))
        output.loss.backward()
        found.append({name: value for name, value in output.items() if name.endswith(("loss", "accuracy"))})
        gradients.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_samples_that_do_not_begin_alike_are_refused(dataset):
    model, inputs, _ = batch_of(dataset)
    inputs["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="must all begin with BOS and the image tokens: pad on the right"):
        model(**inputs)


def test_labels_of_image_tokens_are_refused(dataset):
    model, inputs, _ = batch_of(dataset)
    inputs["labels"][0, model.config.num_image_tokens] = 5
    with pytest.raises(ValueError, match="image tokens must have no labels"):
        model(**inputs)


def test_questions_of_a_frame_differ_and_keep_their_shares(dataset):
    stream = WindowStream(dataset, mixture=MIXTURE, depth_map_share=0.0, questions_per_frame=2, depth_points="uniform")
    # where the right box is not seen, the action has more than half of what can be asked, and may be drawn twice
    seen = (window for window in stream if np.isfinite(window["boxes"]).all())
    asked = [questions_of(window) for window in islice(seen, 400)]
    names = [[sample["objective"] for sample in of_frame] for of_frame in asked]
    assert all(len(set(of_frame)) == 2 and "action" in of_frame for of_frame in names)
    counted = [name for of_frame in names for name in of_frame]
    for name, share in {"action": 0.5, "depth": 0.2, "box": 0.2, "pose": 0.1}.items():
        assert abs(counted.count(name) / 800 - share) < 0.06
    for first, second in asked:
        assert first["left"] is second["left"] and first["seed"] != second["seed"]
        assert first["episode_index"] == second["episode_index"] and "further" not in {**first, **second}
        for sample in (first, second):
            assert ("points_px" in sample) == (sample["objective"] == "depth")
    # one question is what it was
    single = WindowStream(dataset, mixture=MIXTURE, depth_map_share=0.0, depth_points="uniform")
    assert all("further" not in window for window in islice(single, 50))
    with pytest.raises(ValueError, match="questions_per_frame=2, but the mixture asks for action alone"):
        WindowStream(dataset, mixture={"action": 1}, depth_map_share=0.0, questions_per_frame=2)


def test_a_stream_of_frames_goes_on_where_it_was(dataset):
    options = {"mixture": MIXTURE, "depth_map_share": 0.2, "questions_per_frame": 2}
    whole = WindowStream(dataset, **options)
    windows = list(islice(whole, 20))
    first = WindowStream(dataset, **options)
    assert len(list(islice(first, 7))) == 7
    resumed = WindowStream(dataset, **options)
    resumed.load_state_dict(first.state_dict())
    for window, other in zip(windows[7:], islice(resumed, 13), strict=True):
        assert [q["seed"] for q in questions_of(window)] == [q["seed"] for q in questions_of(other)]
        assert [q["objective"] for q in questions_of(window)] == [q["objective"] for q in questions_of(other)]


def test_pictures_are_shared_where_they_can_be():
    many = Questions({"action": 5, "depth": 2, "box": 2}, "uniform")
    one = Questions({"action": 1, "depth": 0, "box": 0}, "uniform")
    assert questions_per_frame(2, 1, many, 6, True) == 2
    with pytest.raises(ValueError, match="must divide the 3 samples that a process takes at once"):
        questions_per_frame(2, 1, many, 3, True)
    with pytest.raises(ValueError, match="--questions_per_frame is 2, but a DepthVLA reads its pictures together"):
        questions_per_frame(2, 1, many, 6, False)
    # without a wish: what is usual for the preset, where it can be
    for usual, asked, size, stereovla, count in (
        (2, many, 24, True, 2),
        (1, many, 24, True, 1),
        (2, one, 24, True, 1),
        (2, many, 3, True, 1),
        (2, many, 24, False, 1),
    ):
        assert questions_per_frame(None, usual, asked, size, stereovla) == count
    with pytest.raises(ValueError, match="--questions_per_frame is 0; it must be at least 1"):
        TrainingOptions(dataset=["x"], output_dir="y", questions_per_frame=0)
