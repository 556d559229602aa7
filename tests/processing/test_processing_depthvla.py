"""DepthVLAProcessor: every output against values worked out here, absent views, PaliGemma's layout, errors, loading."""

import inspect
import json

import numpy as np
import pytest
import torch
from gemma_tokenizer import gemma_tokenizer
from PIL import Image
from transformers.models.pi0.processing_pi0 import PI0Processor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from stereovla.processing import DepthVLAProcessor, StereoImageProcessorPil, StereoProcessor, build_tokenizer
from stereovla.processing.camera_geometry import StereoPairError

SIDE, PATCHES, BINS = 32, 4, 64
LOW, HIGH = np.array([0.2, -0.4, 0.0, -0.5, -0.5, -1.0, 0.0]), np.array([0.8, 0.4, 0.5, 0.5, 0.5, 1.0, 1.0])
POSE = np.array([0.5, 0.1, 0.2, 0.0, 0.1, -0.3, 1.0])
POSE_UNIT = 2 * (POSE - LOW) / (HIGH - LOW) - 1
INSTRUCTION = "pick up the red cube"
STATS = {
    "arm": {
        "state": {"q01": LOW.tolist(), "q99": HIGH.tolist()},
        "action": {"q01": [-0.05] * 7, "q99": [0.05] * 7},
        "keyframe_pose": {"q01": LOW.tolist(), "q99": HIGH.tolist()},
    }
}
CALIBRATION = {
    "focal_length_px": [60.0, 60.0],
    "principal_point_px": [16.0, 16.0],
    "baseline_m": 0.063,
    "transform_camera_to_base": np.eye(4).tolist(),
}
BOX = [4, 6, 20, 28]
# the question of each objective, as the model of PaliGemma's layout is asked
QUESTIONS = {
    "action": (INSTRUCTION, {"text": INSTRUCTION, "state": POSE, "embodiment": "arm"}),
    "pose": (
        f"What action should the robot take to {INSTRUCTION}?",
        {"text": INSTRUCTION, "state": POSE, "embodiment": "arm"},
    ),
    "box": ("What is the bounding box of red cube in the images?", {"text": "red cube"}),
    "depth": ("What is the depth at (5, 9) in the image?", {"points_px": [5.5, 9.5]}),
    "camera": ("What are the camera parameters of the images?", {}),
}
ANSWERS = {
    "action": {"actions": np.full((3, 7), 0.025)},
    "pose": {"keyframe_pose": POSE},
    "box": {"boxes": [BOX, BOX]},
    "depth": {"depths_m": 0.532},
    "camera": {"calibration": CALIBRATION},
}
TEXTS = [question for question, _ in QUESTIONS.values()]


@pytest.fixture(scope="module", params=["small", "gemma"])
def tokenizer(request):
    if request.param == "gemma":
        return gemma_tokenizer(TEXTS)
    return build_tokenizer([INSTRUCTION, "red cube"], num_bins=BINS, images_first=True)


@pytest.fixture(scope="module")
def small():
    return build_tokenizer([INSTRUCTION, "red cube"], num_bins=BINS, images_first=True)


def make(tokenizer, **options):
    image_options = options.pop("image_options", {})
    image_processor = StereoImageProcessorPil(size={"height": SIDE, "width": SIDE}, **image_options)
    defaults = {"num_visual_tokens": PATCHES, "num_bins": BINS, "norm_stats": STATS, "check_stereo": False}
    return DepthVLAProcessor(image_processor, tokenizer, **(defaults | {"views": ["left", "wrist"]} | options))


def picture(seed=0, height=SIDE, width=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def robot(**more):
    return {"text": INSTRUCTION, "state": POSE, "embodiment": "arm"} | more


def letterbox(view):
    """By PIL alone; for views that are wider than high."""
    height = SIDE * view.shape[0] // view.shape[1]
    out, top = np.zeros((SIDE, SIDE, 3), np.uint8), (SIDE - height) // 2
    out[top : top + height] = np.asarray(Image.fromarray(view).resize((SIDE, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(out).permute(2, 0, 1) / 255


def nearest(labels, size):
    """Label at the centre of each processed pixel, pixel by pixel; for views that are wider than high."""
    height = size * labels.shape[0] // labels.shape[1]
    out = np.zeros((size, size))
    for row in range(height):
        for column in range(size):
            v = int((row + 0.5) * labels.shape[0] / height)
            out[(size - height) // 2 + row, column] = labels[v, int((column + 0.5) * labels.shape[1] / size)]
    return out


# ------------------------------------------------------------------------------------------------- views and pictures


def test_pixel_values_and_view_mask(small):
    """Views of different sizes, each in its place; zeros where one is absent."""
    wide, wrist = picture(0, 24, 48), picture(1)
    processor = make(small, views=["left", "agent", "wrist"])
    batch = processor([{"left": wide, "wrist": wrist}, {"wrist": None, "left": wrist, "agent": wide}], **two(robot()))
    assert processor.pixel_views == ("left", "agent", "wrist")
    assert batch["pixel_values"].shape == (2, 3, 3, SIDE, SIDE) and batch["pixel_values"].dtype == torch.float32
    as_it_is = torch.from_numpy(wrist).permute(2, 0, 1) / 255
    for row, place, expected in ((0, 0, letterbox(wide)), (0, 2, as_it_is), (1, 0, as_it_is), (1, 1, letterbox(wide))):
        torch.testing.assert_close(batch["pixel_values"][row, place], expected, atol=1e-6, rtol=0)
    assert not batch["pixel_values"][0, 1].any() and not batch["pixel_values"][1, 2].any()
    assert batch["view_mask"].tolist() == [[True, False, True], [True, True, False]]
    assert batch["view_mask"].dtype == torch.bool


def two(sample):
    return {key: [value, value] for key, value in sample.items()}


def test_the_right_view_of_a_stereo_depth_expert(small):
    """It comes last, and is seen by the depth expert alone: no image tokens, nothing in view_mask."""
    left, right, wrist = (picture(seed) for seed in range(3))
    processor = make(small, stereo=True)
    assert processor.pixel_views == ("left", "wrist", "right")
    batch = processor({"left": left, "right": right}, **robot())
    assert batch["pixel_values"].shape[1] == 3 and batch["view_mask"].tolist() == [[True, False]]
    assert (batch["pixel_values"][0, 2] * 255).round().permute(1, 2, 0).tolist() == right.tolist()
    assert not batch["pixel_values"][0, 1].any()
    assert (batch["input_ids"] == processor.image_token_id).sum() == PATCHES
    # as one of the views of a model without a stereo encoder it has its tokens, as every view
    both = make(small, views=["left", "right"])
    assert both.pixel_views == ("left", "right")
    batch = both([left, right], **robot())
    assert batch["view_mask"].tolist() == [[True, True]]
    assert (batch["input_ids"] == both.image_token_id).sum() == 2 * PATCHES


def test_forms_of_one_sample_agree(small):
    left, wrist = picture(0), picture(1)
    processor = make(small)
    expected = processor({"left": left, "wrist": wrist}, **robot())
    forms = [
        {"wrist": torch.from_numpy(wrist), "left": Image.fromarray(left)},
        [left, wrist],
        (Image.fromarray(left), wrist.transpose(2, 0, 1)),
        np.stack([left, wrist]),
    ]
    for form in forms:
        found = processor(form, **robot())
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    of_a_list = processor([{"left": left, "wrist": wrist}], **{key: [value] for key, value in robot().items()})
    assert all(torch.equal(of_a_list[name], expected[name]) for name in expected)
    alone = make(small, views=["left"])
    expected = alone({"left": left}, **robot())
    for form in (left, [left], Image.fromarray(left)):
        assert torch.equal(alone(form, **robot())["pixel_values"], expected["pixel_values"])
    absent = processor([left, None], **robot())
    assert absent["view_mask"].tolist() == [[True, False]]


VIEW = picture()


@pytest.mark.parametrize(
    "images, error, message",
    [
        (None, ValueError, r"images is nothing; expected a dict of the views \['left', 'wrist', 'right'\]"),
        ([], ValueError, "images is empty"),
        ({}, ValueError, r"images has the views \[\], without \['left', 'right'\]"),
        ({"left": VIEW, "wirst": VIEW}, ValueError, r"unknown views \['wirst'\]; this model's views are \['left', 'w"),
        ({"wrist": VIEW, "right": VIEW}, ValueError, r"the views \['wrist', 'right'\], without \['left'\]; every"),
        ({"left": VIEW, "wrist": VIEW}, ValueError, r"without \['right'\]; every sample needs \['left', 'right'\]"),
        ({"left": VIEW, "right": None}, ValueError, r"without \['right'\]"),
        (VIEW, ValueError, "images has 1 views without names, this model has 3"),
        ([VIEW] * 2, ValueError, r"images has 2 views without names, this model has 3, \['left', 'wrist', 'right'\]"),
        ([{"left": VIEW, "right": VIEW}, None], ValueError, r"images\[1\] has 1 views without names"),
        ([{"left": VIEW, "right": VIEW}, {"right": VIEW}], ValueError, r"images\[1\] has the views \['right'\], with"),
        ({"left": VIEW, "right": VIEW[:9]}, ValueError, r"the left view is \(32, 32\) \(height, width\), the right v"),
        ({"left": VIEW, "right": VIEW, "wrist": VIEW / 255}, ValueError, "images: wrist view has dtype float64 in"),
        ({"left": "left.png", "right": VIEW}, TypeError, "images: left view is a str"),
        (
            {name: np.broadcast_to(np.uint8(0), (4096, 5500, 3)) for name in ("left", "right", "wrist")},
            ValueError,
            r"\['left', 'wrist', 'right'\] have 67,584,000 px together; a sample has at most 67,108,864",
        ),
        (
            {name: np.broadcast_to(np.uint8(0), (8192, 4097, 3)) for name in ("left", "right")},
            ValueError,
            "67,125,248 px together",
        ),
        (
            {"left": VIEW, "right": VIEW, "wrist": np.broadcast_to(np.uint8(0), (8192, 4097, 3))},
            ValueError,
            "wrist view has the shape .* 33,554,432 px in all",
        ),
    ],
)
def test_bad_views(small, images, error, message):
    with pytest.raises(error, match=message):
        make(small, stereo=True)(images, **robot())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"views": []}, r"views are \[\]; the first must be 'left'"),
        ({"views": ["wrist", "left"]}, r"views are \['wrist', 'left'\]; the first must be 'left'"),
        ({"views": ["left", "left"]}, "every name be there once"),
        ({"views": "left"}, "views is 'left'; expected a list of names"),
        ({"views": ["left", ""]}, "expected a list of names"),
        ({"stereo": "yes"}, "stereo is 'yes'; expected True or False"),
        ({"stereo": True, "views": ["left", "right"]}, "'right' is then the depth expert's, not a view"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_bad_options(small, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(small, **options)
    processor = make(small)
    for name, value in options.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError, match=message):
        processor.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    if "chunk_size" not in options:
        with pytest.raises(ValueError, match=message):
            processor(picture(), **robot())


def test_what_counts_after_an_edit_is_what_is_saved(small, tmp_path):
    """Views and stereo may be assigned later, as every option."""
    processor = make(small)
    processor.views, processor.stereo = ("left", "agent"), True
    images = {"left": picture(0), "agent": picture(1), "right": picture(2)}
    batch = processor(images, **robot())
    assert batch["pixel_values"].shape[1] == 3 and batch["view_mask"].tolist() == [[True, True]]
    processor.save_pretrained(tmp_path)
    again = DepthVLAProcessor.from_pretrained(tmp_path)
    assert again.views == ["left", "agent"] and again.stereo is True
    assert all(torch.equal(value, batch[name]) for name, value in again(images, **robot()).items())


def test_pairs_are_checked_where_there_is_one(small):
    left = picture()
    with pytest.raises(StereoPairError, match=r"images: the left and the right view are the same"):
        make(small, stereo=True)({"left": left, "right": left, "wrist": picture(1)}, **robot(check_stereo=True))
    make(small, stereo=True, check_stereo=True)({"left": left, "right": picture(1), "wrist": left}, **robot())
    make(small, check_stereo=True)({"left": left, "wrist": left}, **robot())
    with pytest.raises(ValueError, match=r"check_stereo=True needs a right view; this model's views are \['left', 'wr"):
        make(small)({"left": left}, **robot(check_stereo=True))


# ------------------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("objective", QUESTIONS)
def test_prompt_and_answer(tokenizer, objective):
    """Image tokens of the views that are there, BOS, question, newline; then the answer and EOS, which alone are
    supervised and causal.
    """
    processor = make(tokenizer, stereo=True)
    question, asked = QUESTIONS[objective]
    views = {"left": picture(0), "right": picture(1), "wrist": picture(2)}
    ids = tokenizer(question + "\n", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == question + "\n"
    prompt = [tokenizer.convert_tokens_to_ids("<image>")] * 2 * PATCHES + [tokenizer.bos_token_id, *ids]

    batch = processor(views, objective=objective, **asked)
    names = {"pixel_values", "view_mask", "input_ids", "token_type_ids", "attention_mask", "state"}
    assert set(batch) == set(processor.model_input_names) == names
    assert batch["input_ids"].tolist() == [prompt] and not batch["token_type_ids"].any()
    assert batch["attention_mask"].all()

    last = processor.action_vocab_size
    edges = np.linspace(-1, 1, BINS)
    box = np.array([2 * value / SIDE - 1 for value in BOX] * 2)
    text = "[0.53]" if objective == "depth" else "f [1.875,1.875] c [0.500,0.500] b [0.063] t [0.000,0.000,0.000] q "
    text += "" if objective == "depth" else "[1.000,0.000,0.000,0.000]"
    numbers = {"pose": POSE_UNIT, "box": box}.get(objective)
    if numbers is not None:  # the bin b has edges[b - 1] <= value < edges[b]
        answer = [last - max(b for b in range(1, BINS + 1) if edges[b - 1] <= value + 1e-12) for value in numbers]
    else:
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = [] if objective == "action" else [*answer, tokenizer.eos_token_id]

    trained = processor(views, objective=objective, **asked, **ANSWERS[objective], return_labels=True)
    assert trained["input_ids"].tolist() == [prompt + answer]
    assert trained["token_type_ids"].tolist() == [[0] * len(prompt) + [1] * len(answer)]
    assert trained["labels"].tolist() == [[-100] * len(prompt) + answer]
    assert all(trained[name].dtype == torch.int64 for name in ("input_ids", "token_type_ids", "labels"))
    assert trained["is_action"].tolist() == [objective == "action"]


def test_bins_are_the_end_of_the_places(tokenizer):
    """bin b is <bin_b> or, in PaliGemma's tokenizer, <loc(1024 - b)>, whatever stands after them."""
    processor = make(tokenizer)
    first, last = ("<loc1023>", "<loc0960>") if "<loc0000>" in tokenizer.get_vocab() else ("<bin_1>", "<bin_64>")
    ids = processor.bins.encode([-1.0, 1.0])
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == [first, last]


def test_words_at_the_beginning_are_whole(small):
    tokens = small.convert_ids_to_tokens(small(INSTRUCTION + "\n", add_special_tokens=False)["input_ids"])
    assert tokens == ["pick", "Ġup", "Ġthe", "Ġred", "Ġcube", "Ċ"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_equal_samples(tokenizer, side):
    """Every objective, some with absent views, padded to one length; only the padding differs."""
    processor = make(tokenizer, stereo=True, state_history=2)
    samples, images = [], []
    for number, (objective, (_, asked)) in enumerate(QUESTIONS.items()):
        samples.append({"objective": objective, "embodiment": "arm"} | asked | ANSWERS[objective])
        images.append({"left": picture(number, 24, 48), "right": picture(number + 9, 24, 48), "wrist": picture(20)})
        if number % 2:
            images[-1]["wrist"] = None
    samples[0] |= {"target_px": [3.0, 4.0], "keyframe_pose": POSE + 0.01, "depth_map": np.full((24, 48), 0.5)}
    samples[3] |= {"gripper_px": [5.0, 6.0], "depth_map": {"left": np.full((24, 48), 5000, np.uint16)}}
    names = sorted(set().union(*samples))
    columns = {name: [sample.get(name) for sample in samples] for name in names}
    batch = processor(images, return_labels=True, padding_side=side, **columns)
    per_token = ("input_ids", "labels", "attention_mask", "token_type_ids")
    assert batch["input_ids"].shape[1] == max(batch["attention_mask"].sum(1))
    for row, sample in enumerate(samples):
        single = processor(images[row], return_labels=True, **sample)
        kept = batch["attention_mask"][row] == 1
        length = int(kept.sum())
        assert kept[-length:].all() if side == "left" else kept[:length].all()
        for name in per_token:
            assert torch.equal(batch[name][row][kept], single[name][0]), (row, name)
        assert (batch["input_ids"][row][~kept] == tokenizer.pad_token_id).all()
        assert (batch["labels"][row][~kept] == -100).all() and not batch["token_type_ids"][row][~kept].any()
        for name in set(single) - set(per_token):
            torch.testing.assert_close(batch[name][row], single[name][0], equal_nan=True, rtol=0, atol=0)
    assert batch["points"].isnan().all(-1).tolist() == [[False, True], *[[True, True]] * 2, [True, False], [True] * 2]
    assert batch["displacement"].isnan().all(-1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("side", ["left", "right"])
def test_against_pi0(side):
    """transformers' PI0Processor on the same pictures and prompts, one of whose samples lacks its second view."""
    tokenizer, image_processor = gemma_tokenizer(TEXTS), SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    image_processor.image_seq_length = PATCHES
    theirs = PI0Processor(image_processor, tokenizer, state_mean=[0.0], state_std=[1.0], max_state_dim=7)
    ours = make(gemma_tokenizer(TEXTS), normalization="mean_std", norm_stats=MEAN_STD)
    pictures = [[picture(0), picture(1)], [picture(2)]]
    prompts = [INSTRUCTION, "put the {blue} ball into the bowl"]
    states = np.random.default_rng(0).normal(size=(2, 7))
    expected = theirs(
        [[Image.fromarray(view) for view in views] for views in pictures],
        text=prompts,
        state=states,
        padding="longest",
        padding_side=side,
    )
    images = [dict(zip(("left", "wrist"), views, strict=False)) for views in pictures]
    found = ours(images, prompts, list(states), "arm", padding_side=side)
    for name, theirs_name in (("view_mask", "pixel_attention_mask"), ("input_ids",) * 2, ("attention_mask",) * 2):
        assert torch.equal(found[name], expected[theirs_name]), name
    there = found["view_mask"]
    # each view as it is; theirs of an absent view are zeros, which are grey
    torch.testing.assert_close(found["pixel_values"][there] * 2 - 1, expected["pixel_values"][there], atol=1e-6, rtol=0)
    torch.testing.assert_close(found["state"][:, 0], expected["state"], atol=1e-6, rtol=1e-6)
    assert found["state"].shape == (2, 1, 7)


MEAN_STD = {"arm": {key: {"mean": [0.0] * 7, "std": [1.0] * 7} for key in ("state", "action")}}


def test_resizing_like_paligemma_s(small):
    """A square picture with PaliGemma's resampling is its picture. Others differ on purpose: it stretches them, we keep
    their shape between black bars.
    """
    processor = make(small, views=["left"], image_options={"resample": Image.Resampling.BICUBIC})
    view = picture(0, 80, 80)
    theirs = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})(Image.fromarray(view), return_tensors="pt")
    found = processor(view, **robot())["pixel_values"][0]
    torch.testing.assert_close(found * 2 - 1, theirs["pixel_values"], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------- states, actions, geometry


def test_states_and_actions(small):
    processor = make(small, chunk_size=4, state_history=2)
    actions = np.random.default_rng(0).uniform(-0.05, 0.05, (3, 7))
    batch = processor([picture(), None], **robot(actions=actions, action_mask=[True, True, False], return_labels=True))
    assert batch["state"].shape == (1, 2, 7)
    np.testing.assert_allclose(batch["state"][0], [POSE_UNIT, POSE_UNIT], atol=1e-6)
    np.testing.assert_allclose(batch["actions"][0], [*(actions / 0.05), np.zeros(7)], atol=1e-6)
    assert batch["action_mask"].tolist() == [[True, True, False, False]] and batch["is_action"].all()
    np.testing.assert_allclose(processor.decode_actions(batch["actions"], "arm")[0, :3], actions, atol=1e-7)
    assert (batch["labels"] == -100).all() and "displacement" not in batch


def test_points_and_displacement(small):
    """Points in the left view, through its own geometry: half the size, 8 rows of bars above."""
    wide = picture(0, 32, 64)
    keyframe = POSE + [0.03, -0.02, 0.01, 0, 0, 0, -1]
    sample = robot(actions=np.zeros((1, 7)), keyframe_pose=keyframe, target_px=[10.0, 20.0], gripper_px=[70.0, 3.0])
    batch = make(small)({"left": wide, "wrist": picture(1)}, **sample, return_labels=True)
    assert batch["points"][0, 0].tolist() == [5.0, 18.0] and batch["points"][0, 1].isnan().all()
    expected = 2 * (keyframe - POSE) / (HIGH - LOW)
    np.testing.assert_allclose(batch["displacement"][0], expected, atol=1e-6)
    # "action" does not ask for the keyframe: it may be missing, and so may its statistics
    without = {"arm": {key: value for key, value in STATS["arm"].items() if key != "keyframe_pose"}}
    again = make(small, norm_stats=without)({"left": wide, "wrist": picture(1)}, **sample, return_labels=True)
    assert torch.equal(again["displacement"], batch["displacement"])
    del sample["keyframe_pose"]
    assert make(small)({"left": wide}, **sample, return_labels=True)["displacement"].isnan().all()


def test_depth_maps_of_views(small):
    """Metres in the processed views, nearest pixel, 0 where it is not known or not given."""
    processor = make(small, views=["left", "agent", "wrist"])
    rng = np.random.default_rng(0)
    left, wrist = rng.uniform(0.4, 1.0, (24, 48)), rng.integers(4000, 9000, (32, 32)).astype(np.uint16)
    for corner, unknown in ((3, np.nan), (6, np.inf), (9, -1.0), (12, 0.0)):
        left[corner : corner + 2, corner : corner + 2] = unknown  # of which one at least is the nearest of a pixel
    wrist[7, 7] = 0
    images = {"left": picture(0, 24, 48), "wrist": picture(1), "agent": picture(2)}
    batch = processor(images, **robot(depth_map={"left": left, "wrist": wrist, "agent": None}))
    assert batch["depth_map"].shape == (1, 3, SIDE, SIDE) and batch["depth_map"].dtype == torch.float32
    known = np.where(np.isfinite(left) & (left > 0), left, 0)
    np.testing.assert_allclose(batch["depth_map"][0, 0], nearest(known, SIDE), rtol=1e-6)
    np.testing.assert_allclose(batch["depth_map"][0, 2], wrist * 1e-4, rtol=1e-6)
    assert not batch["depth_map"][0, 1].any() and batch["depth_map"].isfinite().all()
    alone = processor(images, **robot(depth_map=left))
    assert torch.equal(alone["depth_map"][:, 0], batch["depth_map"][:, 0]) and not alone["depth_map"][:, 1:].any()
    some = processor([images, images], **two(robot()), depth_map=[None, {"left": left}])
    assert not some["depth_map"][0].any() and torch.equal(some["depth_map"][1], alone["depth_map"][0])
    coarse = make(small, depth_unit_m=1e-3)(
        {"left": picture(0)}, **robot(depth_map=np.full((SIDE, SIDE), 700, np.uint16))
    )
    np.testing.assert_allclose(coarse["depth_map"][0, 0], 0.7, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ answers back


def answer_ids(batch):
    labels = batch["labels"][0]
    return labels[labels != -100].tolist()


def test_poses_and_depths_come_back(tokenizer):
    processor = make(tokenizer)
    images = [picture(), None]
    ids = answer_ids(processor(images, **robot(keyframe_pose=POSE, objective="pose"), return_labels=True))
    poses, valid = processor.decode_poses([ids], "arm")
    np.testing.assert_allclose(poses[0], POSE, atol=((HIGH - LOW) / (2 * (BINS - 1))).max() + 1e-6)
    assert valid.tolist() == [True]
    question = {"points_px": [[1, 2], [3, 4]], "depths_m": [0.532, 1.2]}
    ids = answer_ids(processor(images, objective="depth", **question, return_labels=True))
    assert processor.decode_depths([ids, ids[1:], []]) == [[0.53, 1.2], None, None]


@pytest.mark.parametrize("stereo", [False, True])
def test_boxes_come_back(tokenizer, stereo):
    """One box of the left view, or one of each view of the pair; in the pixels of the source views if asked for."""
    processor = make(tokenizer, stereo=stereo)
    boxes = np.array([[10, 4, 40, 20], [6, 4, 36, 20.0]])
    images = {"left": picture(0, 24, 48)} | ({"right": picture(1, 24, 48)} if stereo else {})
    ids = answer_ids(processor(images, "red cube", objective="box", boxes=boxes, return_labels=True))
    assert len(ids) == (9 if stereo else 5) and ids[-1] == tokenizer.eos_token_id
    decoded, valid = processor.decode_boxes([ids], source_size=(24, 48))
    np.testing.assert_allclose(decoded[0], boxes if stereo else boxes[:1], atol=48 / (2 * (BINS - 1)) + 1e-3)
    assert valid.tolist() == [True] and decoded.dtype == np.float32
    assert processor.decode_boxes([[ids[2], *ids[1:-1]]])[1].tolist() == [False]  # no width
    if not stereo:
        for form in (boxes[0], boxes[:1]):
            again = processor(images, "red cube", objective="box", boxes=form, return_labels=True)
            assert answer_ids(again) == ids


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call, message",
    [
        (robot(text=" "), "text is ' '; objective 'action' needs an instruction"),
        (robot(text="pick <image>"), "contains the reserved token '<image>'"),
        (robot(state=None), "objective 'action' needs state"),
        (robot(state=np.zeros((2, 7))), r"state has shape \(2, 7\); expected \(7,\) or \(k, 7\) with k = 1 ... 1"),
        (robot(embodiment="leg"), r"unknown embodiment 'leg'; valid embodiments: \['arm'\]"),
        (robot(objective="act"), "unknown objective 'act'; valid objectives"),
        (robot(return_labels=True), "objective 'action' needs actions"),
        (robot(objective="pose", return_labels=True), "objective 'pose' needs keyframe_pose"),
        (robot(objective="depth", points_px=[40, 3]), r"points_px \[\[40.0, 3.0\]\] are not in the processed part"),
        (robot(objective="box", return_labels=True), "objective 'box' needs boxes"),
        (
            robot(objective="box", return_labels=True, boxes=[[1, 2, 3]]),
            r"boxes has shape \(1, 3\); expected \(2, 4\): .* or \(4,\), left alone",
        ),
        (
            robot(objective="box", return_labels=True, boxes=[5, 5, 5, 9]),
            r"boxes \[\[5, 5, 5, 9\]\] \(left\) are empty",
        ),
        (
            robot(objective="camera", calibration=CALIBRATION),
            r"objective 'camera' asks for the baseline .* this model sees the views \['left', 'wrist'\]; it answers",
        ),
        (robot(padding_side="middle"), "padding_side='middle'"),
        (
            robot(depth_map={"wrist": np.ones((SIDE, SIDE))}),
            r"depth_map has the views \['wrist'\]; of this sample it may have \['left'\]",
        ),
        (robot(depth_map={"top": np.ones((SIDE, SIDE))}), r"depth_map has the views \['top'\]"),
        (
            robot(depth_map=np.ones((9, SIDE))),
            r"depth_map of the view 'left': labels have shape \(9, 32\), the image has",
        ),
        (robot(depth_map={"left": np.ones((SIDE, SIDE), bool)}), "depth_map of the view 'left' is bool"),
    ],
)
def test_bad_samples(small, call, message):
    processor = make(small)
    with pytest.raises(ValueError, match=message) as single:
        processor({"left": picture()}, **call)
    assert not str(single.value).startswith("sample 0")
    if not any(part in message for part in ("padding_side", "reserved", "'act'")):
        shared = {"return_labels": call.get("return_labels", False)}
        good = robot(objective="pose", keyframe_pose=POSE)
        columns = {
            name: [good.get(name), call.get(name, "action" if name == "objective" else None)]
            for name in ({*good, *call} - {*shared})
        }
        with pytest.raises(ValueError, match=f"sample 1: .*{message}"):
            processor([{"left": picture()}] * 2, **columns, **shared)


def test_a_batch_needs_a_list_per_argument(small):
    with pytest.raises(ValueError, match="text has 'pick up the red cube', but there are 2 samples; a batch needs a"):
        make(small)([{"left": picture()}] * 2, **robot())
    with pytest.raises(ValueError, match="depth_map has {.*, but there are 2 samples"):
        make(small)([{"left": picture()}] * 2, **two(robot()), depth_map={"left": 0})


def test_too_long_is_an_error(small):
    """With the answer that is still to be generated: of a pose 7 bins and EOS, of an action none."""
    length = make(small)([picture(), picture(1)], **robot(objective="pose"))["input_ids"].shape[1]
    processor = make(small, max_length=length + 7)
    message = rf"has {length + 8} tokens \({2 * PATCHES} of them visual, 8 for the answer\), the limit is {length + 7}"
    with pytest.raises(ValueError, match=message):
        processor([picture(), picture(1)], **robot(objective="pose"))
    processor([picture(), picture(1)], **robot())
    assert make(small, max_length=length + 8)([picture(), picture(1)], **robot(objective="pose"))


# ---------------------------------------------------------------------------------------------------------- save, load


def test_options_are_those_of_every_processor():
    """transformers reads the signature of the class itself: what `ProcessorOptions` takes must stand there too."""
    ours = inspect.signature(DepthVLAProcessor.__init__).parameters
    common = inspect.signature(StereoProcessor.__init__).parameters
    common = {name: option for name, option in common.items() if name != "points_frame"}  # StereoVLA's alone
    assert list(ours) == [*common, "views", "stereo"]
    other = {name for name in common if ours[name].default != common[name].default}
    assert other == {"state_history"}


def test_save_and_load(tokenizer, tmp_path):
    ours = make(tokenizer, stereo=True, chunk_size=5, state_history=3, depth_decimals=3)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["views"] == ["left", "wrist"] and saved["stereo"] is True and saved["norm_stats"] == STATS
    assert saved["auto_map"]["AutoProcessor"] == "processing_depthvla.DepthVLAProcessor"
    again = DepthVLAProcessor.from_pretrained(tmp_path)
    assert again.to_dict() | {"auto_map": ours.auto_map} == ours.to_dict()
    images = {"left": picture(0), "right": picture(1)}
    one, other = (processor(images, **robot()) for processor in (ours, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    code = {path.stem for path in tmp_path.glob("*.py")}
    shared = {"policy_processor", "processor_options", "image_processing_stereovla", "prompt_tokens", "sample_values"}
    assert {"processing_depthvla", *shared} <= code and not code & {"processing_stereovla", "text_tokenizer"}


def test_the_processor_of_another_policy_is_refused(small, tmp_path):
    make(small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this folder has a DepthVLAProcessor, not a StereoProcessor; AutoProcessor"):
        StereoProcessor.from_pretrained(tmp_path)


def test_remote_code_in_a_fresh_process(fresh, tokenizer, tmp_path):
    """Loads through AutoProcessor in another folder, in an interpreter that cannot import our packages."""
    folder = tmp_path / "checkpoint"
    ours = make(tokenizer, stereo=True)
    ours.save_pretrained(folder)
    left, right = picture(0, 24, 48), picture(1, 24, 48)
    np.savez(tmp_path / "views.npz", left=left, right=right)
    script = """
import json, sys
import numpy as np
from transformers import AutoProcessor
views = np.load("views.npz")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
processor.save_pretrained("again")
processor = AutoProcessor.from_pretrained("again", trust_remote_code=True)
assert type(processor).__name__ == "DepthVLAProcessor"
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert type(processor.image_processor).__module__.startswith("transformers_modules.")
assert "stereovla" not in sys.modules and "torchvision" not in sys.modules
images = {"left": views["left"], "right": views["right"], "wrist": None}
sample = {"text": "pick up the red cube", "state": json.loads(sys.argv[2]), "embodiment": "arm"}
batch = processor(images, **sample, depth_map=np.full((24, 48), 0.5), keyframe_pose=sample["state"], objective="pose",
                  return_labels=True)
actions = processor.decode_actions(np.full((1, 8, 7), 0.5), "arm")
np.savez("out.npz", decoded=actions, **{name: value.numpy() for name, value in batch.items()})
"""
    fresh.run(script, str(folder), json.dumps(POSE.tolist()), folder=tmp_path)
    out = np.load(tmp_path / "out.npz")
    sample = robot(depth_map=np.full((24, 48), 0.5), keyframe_pose=POSE, objective="pose", return_labels=True)
    expected = ours({"left": left, "right": right}, **sample)
    assert set(out) == {*expected, "decoded"}
    for name in expected:
        np.testing.assert_array_equal(out[name], expected[name].numpy())
    np.testing.assert_array_equal(out["decoded"], ours.decode_actions(np.full((1, 8, 7), 0.5), "arm"))
