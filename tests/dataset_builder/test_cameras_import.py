"""Import of datasets of one camera and of several: what they say, who can learn from them, and the way back."""

import re
import shutil

import numpy as np
import pytest
from command_lines import data as main
from command_lines import push
from huggingface_hub import DatasetCard
from lerobot_folder import (
    PLACE,
    RIG,
    WRITTEN,
    camera_picture,
    import_cameras,
    import_config,
    import_folder,
    rows_of,
    write_cameras,
)

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.formats.importing import ProblemsFound
from stereovla.dataset_builder.formats.rig import make_rig

AGENT, WRIST = "observation.images.image", "observation.images.wrist_image"
SIZES = {AGENT: (64, 48), WRIST: (40, 40)}
CAMERAS = {"left": AGENT, "wrist": WRIST}
ABSENT = {(WRIST, 1), (WRIST, 5), (WRIST, 6)}
CANNOT = "StereoVLA cannot train on it, DepthVLA can"


def close(picture, wanted, most=6.0):
    return picture.shape == wanted.shape and np.abs(picture.astype(float) - wanted).mean() < most


@pytest.fixture(scope="module")
def libero(tmp_path_factory):
    """Two cameras, of which the wrist's is absent in some frames."""
    return write_cameras(tmp_path_factory.mktemp("libero"), SIZES, absent=ABSENT)


@pytest.fixture(scope="module")
def imported(libero, tmp_path_factory):
    return import_cameras(libero, tmp_path_factory.mktemp("imported"), CAMERAS)


def test_every_picture_of_two_cameras_is_imported(imported):
    rows = rows_of(imported, "train")
    assert len(rows) == 7
    for number, row in enumerate(rows):
        schema.validate_row(row)
        assert close(row[schema.LEFT], camera_picture(0, number, SIZES[AGENT]))
        assert ("observation.images.wrist" in row) == ((WRIST, number) not in ABSENT)
        if "observation.images.wrist" in row:
            assert close(row["observation.images.wrist"], camera_picture(1, number, SIZES[WRIST]))
        np.testing.assert_array_equal(row["observation.state"], np.full(8, number))
        assert not {schema.RIGHT, *schema.CALIBRATION} & set(row)
    info = shards.read_json(imported / "meta/info.json")
    assert info["views"] == ["left", "wrist"] and "vertical_misalignment_px" not in info and "depth_source" not in info
    assert info["columns"][:2] == [schema.LEFT, "observation.images.wrist"] and info["not_judged"] == []
    assert main(["check", str(imported)]) == 0


def test_card_and_summary_say_who_cannot_learn_from_it(libero, imported, tmp_path, capsys):
    card = DatasetCard.load(imported / "README.md")
    assert "stereo" not in card.data.tags and card.data.pretty_name == "test_arm demonstrations"
    assert f"2 cameras (left, wrist), but no right view: {CANNOT}." in " ".join(card.text.split())
    assert "| `observation.images.wrist` | image (H of wrist, W of wrist, 3) |" in card.text
    assert "rectif" not in card.text.replace("rectified pair of it", "")
    rig = {"cameras": {"left": AGENT}, "calibration": None, "state": {"column": "observation.state"}}
    options = import_config(libero, tmp_path, rig={**rig, "action": {"column": "action"}})
    command = ["import", "lerobot", "--source", str(libero), "--config", options.config, "--out", options.out]
    assert main(command) == 0
    assert f"one camera: {CANNOT}\n" in capsys.readouterr().out
    assert f"One camera: {CANNOT}." in " ".join((tmp_path / "out/README.md").read_text().split())
    assert main(["check", options.out]) == 0


def test_it_is_published_as_it_is_and_no_part_of_a_recording(imported, tmp_path, capsys):
    folder = shutil.copytree(imported, tmp_path / "data")
    assert push(["--folder", str(folder), "--license", "mit", "--dry_run"]) == 0
    assert "by load_dataset, streaming; first rows of train compared" in capsys.readouterr().out
    assert (folder / "README.md").read_bytes() == (imported / "README.md").read_bytes()
    assert main(["merge", str(folder)]) == 2
    assert "is no part that `build` recorded, but a whole dataset" in capsys.readouterr().err


def test_pictures_in_videos_and_in_rows_and_their_parts_and_sizes(tmp_path):
    source = write_cameras(tmp_path / "source", {"a": (64, 48), "b": (80, 60)}, videos=["a"])
    rig = {"resize_px": {"left": [32, 24], "hand": [20, 20]}, "parts_px": {"hand": [10, 0, 60, 60]}}
    rig |= {"crop_px": [0, 0, 64, 24]}
    out = import_cameras(
        source,
        tmp_path,
        {"left": "a", "hand": "b", "whole": "b"},
        rig=rig | {"parts_px": {"hand": [10, 0, 60, 60], "whole": [0, 0, 80, 60]}},
    )
    for number, row in enumerate(rows_of(out, "train")):
        assert row[schema.LEFT].shape == (24, 32, 3) and row["observation.images.hand"].shape == (20, 20, 3)
        assert close(row["observation.images.whole"], camera_picture(1, number, (80, 60)))
        means = camera_picture(0, number, (64, 48))[:24].mean(), camera_picture(1, number, (80, 60))[:, 10:70].mean()
        assert np.allclose([row[schema.LEFT].mean(), row["observation.images.hand"].mean()], means, atol=3)


def test_one_camera_with_its_calibration(tmp_path):
    """The left camera of a pair, and what points at the tool with it."""
    calibration = {key: value for key, value in RIG["calibration"].items() if key != "baseline_m"}
    rig = {"cameras": {"left": "observation.images.eye_a"}, "calibration": calibration, "resize_px": [48, 48]}
    out = import_folder(import_config(WRITTEN, tmp_path, rig=rig, validation_episodes=1))
    row = rows_of(out, "train")[0]
    schema.validate_row(row)
    np.testing.assert_allclose(row["calibration.focal_length_px"], [50, 50])
    assert schema.BASELINE not in row and schema.RIGHT not in row
    assert main(["check", str(out)]) == 0
    lerobot = tmp_path / "lerobot"
    assert main(["export", "lerobot", "--dataset", str(out), "--out", str(lerobot)]) == 0
    command = ["import", "lerobot", "--source", str(lerobot), "--config", str(lerobot / "meta/rig.yaml")]
    assert main([*command, "--out", str(tmp_path / "back")]) == 0
    again = rows_of(tmp_path / "back", "train")[0]
    assert set(again) == set(row) and close(again[schema.LEFT], row[schema.LEFT], 8)
    np.testing.assert_allclose(again["calibration.focal_length_px"], [50, 50])


def test_there_and_back_with_absent_views(imported, tmp_path):
    """A camera that is absent in some frames is stored in the rows, one that never is becomes a video."""
    out = tmp_path / "lerobot"
    assert main(["export", "lerobot", "--dataset", str(imported), "--out", str(out)]) == 0
    features = shards.read_json(out / "meta/info.json")["features"]
    assert features[schema.LEFT]["dtype"] == "video" and features[schema.LEFT]["shape"] == [48, 64, 3]
    assert features["observation.images.wrist"]["dtype"] == "image"
    assert features["observation.images.wrist"]["shape"] == [40, 40, 3]
    command = ["import", "lerobot", "--source", str(out), "--config", str(out / "meta/rig.yaml")]
    assert main([*command, "--out", str(tmp_path / "back")]) == 0
    for row, wanted in zip(rows_of(tmp_path / "back", "train"), rows_of(imported, "train"), strict=True):
        assert set(row) == set(wanted) and close(row[schema.LEFT], wanted[schema.LEFT], 8)
        if "observation.images.wrist" in wanted:
            assert close(row["observation.images.wrist"], wanted["observation.images.wrist"], 4)


def test_sizes_that_change_and_main_views_that_lack_are_named(tmp_path):
    source = write_cameras(tmp_path / "lacking", SIZES, absent={(AGENT, 2)})
    with pytest.raises(ProblemsFound, match=f"episode 0: frame 2: {AGENT}.* holds neither a picture nor the path"):
        import_cameras(source, tmp_path, CAMERAS)
    with pytest.raises(
        ProblemsFound, match=re.escape("parts_px [30, 0, 20, 40] does not lie within the picture of 40x40")
    ):
        import_cameras(
            write_cameras(tmp_path / "parts", SIZES),
            tmp_path,
            CAMERAS,
            "a",
            rig={"parts_px": {"wrist": [30, 0, 20, 40]}},
        )
    with pytest.raises(
        ProblemsFound, match=re.escape("crop_px [0, 0, 99, 9] does not lie within the picture of 64x48")
    ):
        import_cameras(tmp_path / "parts", tmp_path, CAMERAS, "b", rig={"crop_px": [0, 0, 99, 9]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": {"wrist": "a"}}, r"cameras is .* it needs left, the main view"),
        ({"cameras": {"left": "a", "Top Cam": "b"}}, "cameras has the view 'Top Cam'; a name has"),
        ({"cameras": {"left": "a", "stereo": "b"}}, "it needs left, the main view"),
        ({"calibration": {**RIG["calibration"]}}, "has a baseline_m, but cameras names no right view"),
        ({"cameras": RIG["cameras"]}, "lacks calibration: without one a pair says nothing about depth"),
        ({"calibration": {"size_px": [9, 9]}}, "lacks focal_length_px, .*: give all of them or no calibration"),
        ({"parts_px": {"right": [0, 0, 9, 9]}}, "parts_px is .* of left"),
        ({"resize_px": {"right": [9, 9]}}, r"expected \[width, height\], or these of left by name"),
        ({"vertical_misalignment_px": 1}, r"vertical_misalignment_px is 1, expected 0 ... 0 rows"),
    ],
)
def test_wrong_rigs_of_one_camera_are_named(change, message):
    rig = {"embodiment": "arm", "license": "mit", "cameras": {"left": "a"}}
    assert make_rig(rig, "rig.yaml").views == ("left",)
    with pytest.raises(ValueError, match=message):
        make_rig({**rig, "state": {"column": "s", **PLACE}, **change}, "rig.yaml")
