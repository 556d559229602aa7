"""Export to LeRobot v3.0, against a dataset that lerobot wrote and readers that know the format."""

import io
import json

import av
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from command_lines import data as main
from datasets import load_dataset
from huggingface_hub import DatasetCard
from lerobot_doctor.dataset_loader import load_dataset as load_doctors
from lerobot_doctor.runner import Severity, run_checks
from lerobot_folder import FPS, TASKS, WRITTEN, import_config, import_folder, rows_of
from PIL import Image
from synthetic_dataset import write_dataset
from views_dataset import SMALL, WRIST, write_views

from stereovla.dataset_builder.dataset import schema, shards


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return import_folder(import_config(WRITTEN, tmp_path_factory.mktemp("imported"), validation_episodes=1))


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "lerobot"
    assert main(["export", "lerobot", "--dataset", str(imported), "--out", str(out)]) == 0
    return out


def test_the_export_has_the_layout_that_lerobot_writes(exported):
    """Names, types and nesting of everything in meta/, compared with lerobot's own files."""
    ours, theirs = (json.loads((folder / "meta/info.json").read_text()) for folder in (exported, WRITTEN))
    assert set(ours) == set(theirs)
    for key in ("codebase_version", "data_path", "video_path", "total_frames", "total_episodes", "total_tasks", "fps"):
        assert ours[key] == theirs[key], key
    assert ours["splits"] == {"train": "0:2", "validation": "2:3"}
    names = {
        "observation.images.left": "observation.images.eye_a",
        "observation.images.right": "observation.images.eye_b",
    }
    for key, feature in ours["features"].items():
        if key.startswith("calibration."):
            continue
        expected = theirs["features"][names.get(key, key)]
        assert set(feature) == set(expected) and set(feature.get("info", ())) == set(expected.get("info", ()))
        assert (feature["dtype"], feature["shape"], feature["names"]) == (
            expected["dtype"],
            expected["shape"],
            expected["names"],
        )

    def layout(folder, path):
        types = {}
        for field in pq.read_schema(folder / path):
            name = field.name.replace("eye_a", "left").replace("eye_b", "right")
            if "calibration." not in name:
                types[name] = str(field.type)
        return types

    for path in ("meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        assert layout(exported, path) == layout(WRITTEN, path), path
    ours, theirs = (json.loads((folder / "meta/stats.json").read_text()) for folder in (exported, WRITTEN))
    assert set(ours["action"]) == set(theirs["action"])
    for name in ("min", "max", "mean", "std"):  # lerobot only estimates quantiles
        np.testing.assert_allclose(ours["observation.state"][name], theirs["observation.state"][name], atol=1e-3)
        left = np.array(ours["observation.images.left"][name])
        assert left.shape == np.array(theirs["observation.images.eye_a"][name]).shape == (3, 1, 1)
    assert ours["timestamp"]["count"] == theirs["timestamp"]["count"] == [18]
    tasks = pd.read_parquet(exported / "meta/tasks.parquet")
    assert set(tasks.index) == set(TASKS) and sorted(tasks["task_index"]) == [0, 1]


def test_plain_readers_find_every_frame_in_the_export(imported, exported):
    """pyarrow and PyAV alone, by the rules of the format: the picture at from_timestamp + timestamp."""
    rows = rows_of(imported, "train") + rows_of(imported, "validation")
    data = [r for path in sorted((exported / "data").glob("*/*.parquet")) for r in pq.read_table(path).to_pylist()]
    episodes = pq.read_table(exported / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["index"] for row in data] == list(range(18))
    pictures = {}
    for path in (exported / "videos").rglob("*.mp4"):
        with av.open(str(path)) as container:
            decoded = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        pictures[path.relative_to(exported / "videos").as_posix()] = decoded
    for row, wanted in zip(data, rows, strict=True):
        assert row["frame_index"] == wanted["frame_index"] and row["timestamp"] == pytest.approx(
            row["frame_index"] / FPS
        )
        np.testing.assert_array_equal(np.float32(row["observation.state"]), wanted["observation.state"])
        np.testing.assert_array_equal(np.float32(row["action"]), wanted["action"])
        entry = episodes[row["episode_index"]]
        assert entry["dataset_from_index"] <= row["index"] < entry["dataset_to_index"]
        for key in ("observation.images.left", "observation.images.right"):
            place = entry[f"videos/{key}/chunk_index"], entry[f"videos/{key}/file_index"]
            when = entry[f"videos/{key}/from_timestamp"] + row["timestamp"]
            times = pictures[f"{key}/chunk-{place[0]:03d}/file-{place[1]:03d}.mp4"]
            time_s, image = min(times, key=lambda item: abs(item[0] - when))
            assert abs(time_s - when) < 1e-4  # lerobot's own tolerance
            assert np.abs(image.astype(float) - wanted[key]).mean() < 6


def test_there_and_back(imported, exported, tmp_path):
    command = ["import", "lerobot", "--source", str(exported), "--config", str(exported / "meta/rig.yaml")]
    assert main([*command, "--out", str(tmp_path / "back")]) == 0
    for split in ("train", "validation"):
        for row, wanted in zip(rows_of(tmp_path / "back", split), rows_of(imported, split), strict=True):
            assert set(row) == set(wanted)
            for key, value in wanted.items():
                if key.startswith("observation.images."):
                    assert np.abs(row[key].astype(float) - value).mean() < 8
                elif isinstance(value, np.ndarray):
                    np.testing.assert_allclose(row[key], value, atol=2e-6)
                else:
                    assert row[key] == pytest.approx(value) if isinstance(value, float) else row[key] == value


def with_depth(folder):
    """An export with depth and masks, and the dataset that it is of."""
    data = write_dataset(folder / "data", [3, 2], 2)
    info = {"fps": 10, "columns": schema.row_columns(), "embodiments": ["franka_panda"], "state_is_pose": True}
    info["vertical_misalignment_px"] = 0.0
    shards.write_json(data / "meta/info.json", {**info, "state_dim": 7, "action_dim": 7})
    out = folder / "lerobot"
    assert main(["export", "lerobot", "--dataset", str(data), "--out", str(out), "--with-depth"]) == 0
    return out, pq.read_table(next((data / "data").glob("*.parquet")))


def test_depth_and_masks_are_exported_as_they_are(tmp_path):
    """To the last bit, and depth as LeRobot marks it: what it takes for whole numbers would be mm."""
    out, table = with_depth(tmp_path)
    exported = pq.read_table(out / "data/chunk-000/file-000.parquet")
    features = json.loads((out / "meta/info.json").read_text())["features"]
    stats = json.loads((out / "meta/stats.json").read_text())
    mask, depth = "observation.segmentation", "observation.depth"
    assert exported.column(mask).to_pylist() == table.column(mask).to_pylist()
    for key in (depth, mask):
        assert (features[key]["dtype"], features[key]["shape"]) == ("image", [32, 32, 1])
    assert features[depth]["info"] == {"is_depth_map": True, "depth_unit": "m"} and "info" not in features[mask]
    maps = []
    for found, stored in zip(exported.column(depth).to_pylist(), table.column(depth).to_pylist(), strict=True):
        with Image.open(io.BytesIO(found["bytes"])) as image:
            assert (image.format, image.mode) == ("TIFF", "F")
            maps.append(np.array(image))
        np.testing.assert_array_equal(maps[-1], shards.decode_image(depth, stored["bytes"]))
    np.testing.assert_allclose(stats[depth]["mean"], np.full((1, 1, 1), np.mean(maps)), rtol=1e-6)  # of all 5 frames
    assert np.shape(stats[mask]["max"]) == (1, 1, 1) and stats[mask]["max"][0][0][0] == pytest.approx(3 / 255)


def test_a_view_that_whole_episodes_lack_is_exported_where_it_is(tmp_path):
    """The first episode, a file of its own, has the wrist's view in its last frames alone, the second in none."""
    dataset, out = tmp_path / "dataset", tmp_path / "lerobot"
    write_views(dataset, [14, 5], wrist=lambda episode, frame: episode == 0 and frame > 11)
    assert main(["export", "lerobot", "--dataset", str(dataset), "--out", str(out)]) == 0
    info = json.loads((out / "meta/info.json").read_text())
    assert info["features"][WRIST]["dtype"] == "image" and info["features"][WRIST]["shape"] == [*SMALL, 3]
    stored = [pq.read_table(path).column(WRIST).to_pylist() for path in sorted((out / "data").rglob("*.parquet"))]
    there = [[frame for frame, value in enumerate(values) if value is not None] for values in stored]
    assert there == [[12, 13], []]
    (episodes,) = (pq.read_table(path).to_pylist() for path in (out / "meta/episodes").rglob("*.parquet"))
    assert [episode[f"stats/{WRIST}/count"] for episode in episodes] == [[2], None]
    assert json.loads((out / "meta/stats.json").read_text())[WRIST]["count"] == [2]


def test_splits_whose_shards_stand_mixed_are_ranges_of_episodes(tmp_path):
    dataset, out = write_views(tmp_path / "dataset", [3, 5, 4]), tmp_path / "lerobot"
    manifest = shards.read_json(dataset / shards.MANIFEST)
    manifest["shards"][1]["split"] = "validation"
    shards.write_json(dataset / shards.MANIFEST, manifest)
    assert main(["export", "lerobot", "--dataset", str(dataset), "--out", str(out)]) == 0
    assert json.loads((out / "meta/info.json").read_text())["splits"] == {"train": "0:2", "validation": "2:3"}
    (episodes,) = (pq.read_table(path).to_pylist() for path in (out / "meta/episodes").rglob("*.parquet"))
    assert [episode["length"] for episode in episodes] == [3, 4, 5]


def test_a_view_that_no_frame_has_is_left_out(tmp_path):
    dataset, out = tmp_path / "dataset", tmp_path / "lerobot"
    write_views(dataset, [3], wrist=lambda episode, frame: False)
    assert main(["export", "lerobot", "--dataset", str(dataset), "--out", str(out), "--with-depth"]) == 0
    info = json.loads((out / "meta/info.json").read_text())
    assert not [key for key in info["features"] if "wrist" in key]


def test_lerobot_doctor_finds_nothing_broken(exported, tmp_path):
    """Its warnings are about short episodes and numbers that stay as they are."""
    for folder in (exported, with_depth(tmp_path)[0]):
        results = run_checks(load_doctors(str(folder))).results
        assert len(results) == 11
        assert [result for result in results if result.severity is Severity.FAIL] == []


def test_wrong_exports_are_named(imported, exported, capsys):
    command = ["export", "lerobot", "--dataset", str(imported), "--out"]
    assert main([*command, str(exported)]) == 2 and "exists; choose another --out" in capsys.readouterr().err
    assert main([*command, "x", "--codec", "mpeg4"]) == 2 and "codec='mpeg4' is unknown" in capsys.readouterr().err
    assert main([*command, "x", "--with-depth"]) == 2 and "has no observation.depth" in capsys.readouterr().err


def test_what_a_crop_moved_off_the_middle_is_exported_and_imported_again(tmp_path):
    """The export's rig accepts what its data has: it was judged when the data was made."""
    cropped = import_folder(import_config(WRITTEN, tmp_path, rig={"crop_px": [24, 0, 72, 96]}))
    out = tmp_path / "lerobot"
    assert main(["export", "lerobot", "--dataset", str(cropped), "--out", str(out)]) == 0
    command = ["import", "lerobot", "--source", str(out), "--config", str(out / "meta/rig.yaml")]
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    for row in rows_of(tmp_path / "again", "train"):
        np.testing.assert_allclose(row["calibration.principal_point_px"], [24, 48])


def test_the_export_has_a_card(exported):
    card = DatasetCard.load(exported / "README.md")
    assert card.data.license == "mit" and card.data.task_categories == [
        "robotics"
    ]  # of the rig that it was imported by
    assert card.data.tags == ["LeRobot", "robotics", "stereo"]
    assert "18 frames in 3 episodes at 12 Hz" in card.text and "| action | float32 | 7 | x, y, z, roll" in card.text
    rows = load_dataset(str(exported), split="train", streaming=True)
    assert len(list(rows)) == 18
