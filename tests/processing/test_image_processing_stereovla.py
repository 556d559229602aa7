"""One geometry for both views: against the recorded letterbox, PIL, and where drawn dots really end up."""

import importlib.util
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stereovla.processing import StereoImageProcessorPil
from stereovla.processing.camera_geometry import Calibration
from stereovla.processing.image_processing_stereovla import ViewGeometry, view_array

GOLDENS = Path(__file__).parents[2] / ".." / "shared" / "goldens" / "stereovla_miniature"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="recorded reference tensors are not here")


def processor(size=64, **options):
    return StereoImageProcessorPil(size={"height": size, "width": size}, **options)


def random_view(seed=0, height=48, width=80):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@needs_goldens
def test_letterbox_is_the_released_one():
    from safetensors.numpy import load_file

    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDENS / "inputs.py")
    inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inputs)
    case = json.loads((GOLDENS / "case.json").read_text())
    source = inputs.integers("letterbox", 0, 256, (30, 40, 3), case["case"]["seed"]).numpy().astype(np.uint8)
    recorded = load_file(GOLDENS / "tensors.safetensors")["letterbox_out"]
    views, (geometry,) = processor(28).prepare([(source, source)])
    np.testing.assert_array_equal(views[0, 0], recorded)
    # The released code rounds boxes down to whole px, we do not.
    box = geometry.boxes(case["letterbox_box"]["box_in"])
    assert np.floor(box).astype(int).tolist() == case["letterbox_box"]["box_out"]


def test_output():
    left, right = random_view(0), random_view(1)
    out = processor()([left, right])
    values = out["pixel_values"]
    assert values.shape == (1, 2, 3, 64, 64) and values.dtype == torch.float32 and values.is_contiguous()
    reference = np.zeros((64, 64, 3), np.uint8)  # 80 x 48 -> 64 x 38, 13 rows of bars
    reference[13:51] = np.asarray(Image.fromarray(right).resize((64, 38), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(values[0, 1].permute(1, 2, 0).numpy(), reference / 255, atol=1e-6)
    assert isinstance(processor()([left, right], return_tensors="np")["pixel_values"], np.ndarray)


def test_same_size_is_not_resampled(monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: pytest.fail("resampled"))
    left, right = random_view(0, 64, 64), random_view(1, 64, 64)
    values = processor()([left, right])["pixel_values"]
    assert (values[0, 0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy().tolist() == left.tolist()
    # A crop to the target size only cuts.
    wide = random_view(2, 64, 100)
    cropped = processor(do_center_crop=True, crop_size={"height": 64, "width": 64}).prepare([(wide, wide)])[0]
    np.testing.assert_array_equal(cropped[0, 0], wide[:, 18:82])


def test_kinds_of_input_agree():
    left, right = random_view(0), random_view(1)
    expected = processor()([left, right])["pixel_values"]
    tensors = [torch.from_numpy(view) for view in (left, right)]
    for pair in (
        [Image.fromarray(left), Image.fromarray(right)],
        (left.transpose(2, 0, 1), right.transpose(2, 0, 1)),
        tensors,
        [tensor.permute(2, 0, 1) for tensor in tensors],
        np.stack([left, right]),
    ):
        assert torch.equal(processor()(pair)["pixel_values"], expected)
    batch = processor()([[left, right], [right, left]])["pixel_values"]
    assert torch.equal(batch[:1], expected) and torch.equal(batch[1], expected[0].flip(0))
    mixed = processor()([[left, right], [random_view(2, 64, 64)] * 2])["pixel_values"]
    assert mixed.shape == (2, 2, 3, 64, 64) and torch.equal(mixed[:1], expected)


VIEW = random_view()


@pytest.mark.parametrize(
    "images, error, message",
    [
        (None, ValueError, "images is nothing; expected a pair"),
        (VIEW, ValueError, "images is a single view"),
        ([VIEW], ValueError, "images has 1 of 2 views"),
        ([VIEW, None], ValueError, "images has 1 of 2 views"),
        ([VIEW] * 3, ValueError, "images has 3 of 2 views"),
        ([], ValueError, "images is empty"),
        ([[VIEW, VIEW], [VIEW]], ValueError, r"images\[1\] has 1 of 2 views"),
        ([VIEW, VIEW[:40]], ValueError, r"left view is \(48, 80\) \(height, width\), the right view \(40, 80\)"),
        ([VIEW / 255, VIEW / 255], ValueError, r"left view has dtype float64 in \[0.0, 1.0\]; expected uint8"),
        ([VIEW, VIEW.astype(np.int64)], ValueError, "right view has dtype int64"),
        ([VIEW[..., :2], VIEW[..., :2]], ValueError, r"shape \(48, 80, 2\); expected RGB"),
        ([VIEW[..., 0], VIEW[..., 0]], ValueError, r"shape \(48, 80\); expected RGB"),
        ([Image.fromarray(VIEW).convert("RGBA")] * 2, ValueError, "mode 'RGBA'; expected 'RGB'"),
        ([VIEW, "right.png"], TypeError, "right view is a str"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        processor()(images)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"do_normalize": True}, "each encoder normalises inside"),
        ({"do_resize": False}, "do_resize and do_rescale True"),
        ({"size": {"shortest_edge": 64}}, "size must be"),
        ({"do_center_crop": True}, "do_center_crop needs crop_size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        StereoImageProcessorPil(**options)
    with pytest.raises(TypeError, match=r"unknown arguments \['size'\]"):
        processor()([VIEW, VIEW], size=3)
    with pytest.raises(ValueError, match=r"crop_size \(96, 96\) .* larger than the image \(48, 80\)"):
        processor(do_center_crop=True, crop_size={"height": 96, "width": 96})([VIEW, VIEW])


sides = st.integers(20, 300)


@settings(max_examples=100)
@given(source=st.tuples(sides, sides), target=st.tuples(sides, sides), data=st.data())
def test_geometry_inverts_and_fits(source, target, data):
    crop = data.draw(st.none() | st.tuples(st.integers(5, source[0]), st.integers(5, source[1])))
    geometry = ViewGeometry.fit(source, target, crop)
    assert 0 <= geometry.pad_left and geometry.pad_left + geometry.scaled_width <= target[1]
    assert 0 <= geometry.pad_top and geometry.pad_top + geometry.scaled_height <= target[0]
    assert geometry.scaled_width == target[1] or geometry.scaled_height == target[0]
    points = np.random.default_rng(0).uniform(-10, 310, (7, 2))
    np.testing.assert_allclose(geometry.source_points(geometry.points(points)), points, atol=1e-9)
    corner = [geometry.crop_left, geometry.crop_top]
    opposite = [geometry.crop_left + geometry.crop_width, geometry.crop_top + geometry.crop_height]
    box = geometry.boxes([*corner, *opposite])
    np.testing.assert_allclose(box[:2], [geometry.pad_left, geometry.pad_top], atol=1e-9)
    np.testing.assert_allclose(box[2:] - box[:2], [geometry.scaled_width, geometry.scaled_height], atol=1e-9)
    np.testing.assert_allclose(geometry.source_boxes(box), [*corner, *opposite], atol=1e-9)


@pytest.mark.parametrize("crop", [None, (40, 60)])
@pytest.mark.parametrize("size", [31, 64, 150])
def test_points_follow_the_pixels(size, crop):
    """A dot is drawn, the view is processed, and its centre of mass is where `points` says."""
    options = {} if crop is None else {"do_center_crop": True, "crop_size": {"height": crop[0], "width": crop[1]}}
    resample = Image.Resampling.BOX if size < 48 else Image.Resampling.BILINEAR  # both keep the centre of mass
    view = np.zeros((48, 80, 3), np.uint8)
    view[20:26, 30:38] = 200
    views, (geometry,) = processor(size, resample=resample, **options).prepare([(view, view)])
    weights = views[0, 0, ..., 0].astype(float)
    v, u = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij")
    centre = [(weights * u).sum() / weights.sum(), (weights * v).sum() / weights.sum()]
    np.testing.assert_allclose(geometry.points([34.0, 23.0]), centre, atol=0.12)


def test_calibration_follows():
    """A camera point projects to the same place before and after, whatever its depth; the baseline stays."""
    calibration = Calibration(np.array([90.0, 95.0]), np.array([41.0, 22.0]), 0.063, np.eye(4))
    geometry = processor(64, do_center_crop=True, crop_size={"height": 40, "width": 60}).geometry((48, 80))
    moved = geometry.calibration(calibration)
    for x, y, z in np.random.default_rng(0).uniform([-0.1, -0.1, 0.3], [0.1, 0.1, 1.0], (5, 3)):
        before = calibration.focal_length_px * [x / z, y / z] + calibration.principal_point_px
        after = moved.focal_length_px * [x / z, y / z] + moved.principal_point_px
        np.testing.assert_allclose(geometry.points(before), after, atol=1e-9)
    assert moved.baseline_m == 0.063 and moved.transform_camera_to_base is calibration.transform_camera_to_base


@pytest.mark.parametrize("size", [30, 64, 128])
def test_labels_are_nearest(size):
    labels = np.random.default_rng(0).integers(1, 9, (48, 80)).astype(np.uint8)
    geometry = processor(size).geometry((48, 80))
    out = geometry.labels(labels)
    inner = out[geometry.pad_top : geometry.pad_top + geometry.scaled_height]
    # The centre of each processed pixel lies in the source pixel that it shows; in exact arithmetic, there are ties.
    for row in range(geometry.scaled_height):
        source_row = int((Fraction(row) + Fraction(1, 2)) * 48 / geometry.scaled_height)
        for column in range(size):
            source_column = int((Fraction(column) + Fraction(1, 2)) * 80 / size)
            assert inner[row, column] == labels[source_row, source_column]
    assert (out == 0).sum() == out.size - inner.size and out.dtype == np.uint8
    depth = labels / np.float32(7)
    np.testing.assert_array_equal(geometry.labels(depth)[out > 0], out[out > 0] / np.float32(7))
    with pytest.raises(ValueError, match=r"labels have shape \(47, 80\), the image has \(48, 80\)"):
        geometry.labels(labels[1:])


def test_shows():
    geometry = processor(64).geometry((48, 80))
    shown = geometry.shows([[0, 13], [63.9, 50.9], [10, 12.9], [10, 51], [64, 20], [np.nan, 20]])
    assert shown.tolist() == [True, True, False, False, False, False]


def test_boxes_are_cut_at_the_crop():
    geometry = processor(40, do_center_crop=True, crop_size={"height": 40, "width": 40}).geometry((48, 80))
    assert geometry.boxes([[0, 0, 30, 30], [0, 0, 10, 10]]).tolist() == [[0, 0, 10, 26], [0, 0, 0, 6]]


def test_save_and_load(tmp_path):
    ours = processor(96, do_center_crop=True, crop_size={"height": 40, "width": 40})
    ours.save_pretrained(tmp_path)
    again = StereoImageProcessorPil.from_pretrained(tmp_path)
    assert again.geometry((48, 80)) == ours.geometry((48, 80)) and again.resample == ours.resample
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"]["AutoImageProcessor"] == "image_processing_stereovla.StereoImageProcessorPil"


@pytest.mark.parametrize(
    ("shape", "accepted"),
    [
        ((1, 200_000, 3), False),
        ((200_000, 1, 3), False),
        ((3, 1, 200_000), False),
        ((1, 16_384, 3), True),
        ((16_384, 1, 3), True),
        ((16_384, 2049, 3), False),
        ((4320, 7680, 3), True),
    ],
)
def test_views_larger_than_a_camera_s_are_refused(shape, accepted):
    view = np.broadcast_to(np.uint8(7), shape)  # without the memory
    as_images = {"array": view, "tensor": torch.from_numpy(np.zeros(1, np.uint8)).expand(shape)}
    for image in as_images.values():
        if accepted:
            assert view_array(image, "left view").shape == shape
        else:
            with pytest.raises(
                ValueError, match=r"left view has the shape .*16,384 px a side and 33,554,432 px in all"
            ):
                view_array(image, "left view")


def test_a_large_picture_is_refused_before_it_is_decoded():
    picture = Image.new("RGB", (20_000, 1))
    picture.load = None  # decoding would call it
    with pytest.raises(ValueError, match=r"\(20000, 1\)"):
        view_array(picture, "left view")


def test_a_large_picture_within_the_sides_is_refused_before_it_is_decoded():
    """8192 x 8192 px: as an array it has three numbers a pixel, as a picture one."""
    picture = Image.new("RGB", (1, 1))
    picture._size, picture.load = (8192, 8192), None
    with pytest.raises(ValueError, match=r"\(8192, 8192\); a view has at most .* 33,554,432 px in all"):
        view_array(picture, "left view")


def test_sets_of_views():
    """Views of free sizes, each by its own geometry; zeros where one is absent."""
    left, wrist = random_view(0), random_view(1, 64, 64)
    views, (first, second) = processor().prepare([(left, None), (wrist, left)])
    assert views.shape == (2, 2, 64, 64, 3) and not views[0, 1].any()
    np.testing.assert_array_equal(views[1, 0], wrist)
    np.testing.assert_array_equal(views[0, 0], views[1, 1])
    assert (first.source_height, second.source_height) == (48, 64)
