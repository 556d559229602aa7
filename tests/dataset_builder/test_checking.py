"""dataset_builder.dataset.checking: everything that is wrong with a dataset folder is named."""

import shutil

import numpy as np
import pytest
from synthetic_dataset import make_row, write_dataset, write_finished_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.checking import find_problems
from stereovla.dataset_builder.dataset.statistics import compute_statistics

SPLIT = {"episodes": 4, "frames": 14, "shards": 2}
INFO = {"vertical_misalignment_px": 0.0, "splits": {"train": SPLIT}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("dataset"), [3, 4, 2, 5], 2)
    shards.write_json(folder / "meta/info.json", INFO)
    shards.write_json(folder / "meta/stats.json", compute_statistics(sorted((folder / "data").iterdir())))
    (folder / "README.md").write_text("card")
    return folder


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def rewrite(folder, change):
    """Let `change` alter the rows of the last shard, then bring the manifest up to date: wrong from the beginning."""
    paths = [shards.shard_path("train", index, 2) for index in range(2)]
    rows = [shards.encode_row(row) for row in shards.read_rows(folder / paths[1])]
    change(rows)
    shards.write_shard(folder / paths[1], rows, temporary=folder.parent / "temporary")
    shards.write_manifest(folder, {"train": paths})


def test_whole_dataset_has_no_problems(dataset):
    assert find_problems(dataset) == []


def test_truncation_at_any_byte_is_named(copy):
    path = copy / shards.shard_path("train", 1, 2)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 1000), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert find_problems(copy) == [f"data/{path.name}: truncated, {length} of {len(whole)} bytes"]
        with pytest.raises(shards.ShardError, match=f"{path.name} .*truncated"):
            shards.read_table(path)


def test_other_damage_is_named(copy):
    first, second = (copy / shards.shard_path("train", index, 2) for index in range(2))
    whole = bytearray(first.read_bytes())
    whole[200] ^= 1
    first.write_bytes(whole)
    second.rename(copy / "data" / "other.parquet")
    problems = "\n".join(find_problems(copy))
    assert f"data/{first.name}: its SHA-256 differs" in problems
    assert f"data/{second.name}: missing" in problems
    assert "data/other.parquet: not in meta" in problems


def test_lost_and_repeated_episodes_are_named(tmp_path):
    write_dataset(tmp_path, [2, 2, 2], 1)
    paths = [shards.shard_path("train", index, 3) for index in range(3)]
    (tmp_path / paths[1]).write_bytes((tmp_path / paths[0]).read_bytes())
    shards.write_manifest(tmp_path, {"train": paths})
    assert "data/train-00001-of-00003.parquet: episodes [0], expected [1]" in find_problems(tmp_path)


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json is missing: is this folder a finished dataset"):
        find_problems(tmp_path)


def test_wrong_rows_are_all_named_with_their_numbers(copy):
    def change(rows):
        rows[1]["observation.images.right"] = rows[1]["observation.images.right"][:300]
        rows[2]["calibration.baseline_m"] = 7.0
        rows[4]["task"] = " "
        rows[5]["observation.state"] = np.full(7, np.nan, np.float32)

    rewrite(copy, change)
    name = shards.shard_path("train", 1, 2).as_posix()
    problems = find_problems(copy)
    assert len(problems) == 4 and all(problem.startswith(f"{name}: row ") for problem in problems)
    assert "row 1: the 300 bytes of observation.images.right cannot be decoded" in problems[0]
    assert "row 2: calibration.baseline_m spans 7.0" in problems[1]
    assert "row 4: task is empty" in problems[2] and "row 5: observation.state contains NaN" in problems[3]
    assert find_problems(copy, quick=True) == []


def test_damage_in_every_row_is_summed_up(tmp_path):
    rows = [shards.encode_row(make_row(np.random.default_rng(0), 0, frame)) for frame in range(30)]
    for row in rows:
        row["task"] = ""
    path = shards.shard_path("train", 0, 1)
    shards.write_shard(tmp_path / path, rows, temporary=tmp_path / "t")
    shards.write_manifest(tmp_path, {"train": [path]})
    problems = [problem for problem in find_problems(tmp_path) if problem.startswith(path.as_posix())]
    assert len(problems) == 21 and problems[-1].endswith("10 more rows with problems")


def test_missing_columns_are_named(copy):
    import pyarrow.parquet as pq

    path = shards.shard_path("train", 1, 2)
    pq.write_table(pq.read_table(copy / path).drop_columns(["observation.state"]), copy / path)
    shards.write_manifest(copy, {"train": [shards.shard_path("train", 0, 2), path]})
    (problem,) = find_problems(copy)
    assert problem.startswith(f"{path.as_posix()}: the shard has no column observation.state")


def test_descriptions_that_are_missing_or_disagree_are_named(copy):
    (copy / "README.md").unlink()
    (copy / ".partial").mkdir()
    stats = shards.read_json(copy / "meta/stats.json")
    stats["franka_panda"]["action"]["std"][2] = float("nan")
    shards.write_json(copy / "meta/stats.json", stats)
    shards.write_json(copy / "meta/info.json", {"splits": {"train": {**SPLIT, "frames": 15}}})
    problems = "\n".join(find_problems(copy))
    assert "info.json: vertical_misalignment_px is missing" in problems
    for part in ("README.md: missing", ".partial: a build is at work", "'frames': 15", "action of franka_panda is not"):
        assert part in problems
    (copy / "meta/info.json").write_text("{")
    (copy / "meta/stats.json").unlink()
    problems = "\n".join(find_problems(copy))
    assert "info.json is no valid JSON" in problems and "stats.json is missing" in problems


def test_problems_of_one_shard_do_not_hide_those_of_the_next(copy):
    first, second = (shards.shard_path("train", index, 2) for index in range(2))
    (copy / first).unlink()
    assert find_problems(copy) == [f"{first.as_posix()}: missing"]
    (copy / second).write_bytes(b"")
    assert len(find_problems(copy)) == 2


@pytest.fixture
def finished(tmp_path):
    return write_finished_dataset(tmp_path / "finished")


def test_a_finished_dataset_has_no_problems(finished):
    assert find_problems(finished) == find_problems(finished, quick=True) == []


def test_statistics_that_do_not_follow_from_the_data_are_named(finished):
    stats = shards.read_json(finished / "meta/stats.json")
    right = stats["franka_panda"]["state"]["mean"][1]
    stats["franka_panda"]["state"]["mean"][1] += 0.1
    stats["franka_panda"]["action"]["q99"] = stats["franka_panda"]["action"]["q99"][:6]
    stats["other_arm"] = {"state": stats["franka_panda"].pop("keyframe_pose")}
    shards.write_json(finished / "meta/stats.json", stats)
    mean, quantile, lost, foreign = sorted(find_problems(finished), key=lambda line: "mean" not in line)[:4]
    assert mean.startswith("meta/stats.json: mean of state of franka_panda is [") and str(round(right, 6)) in mean
    assert "q99 of action of franka_panda is [" in quantile
    assert "keyframe_pose of franka_panda is not in meta/stats.json" in lost
    assert "state of other_arm is not in the split train" in foreign


def test_statistics_of_another_split_are_named(finished):
    shards.write_json(
        finished / "meta/stats.json", compute_statistics(sorted((finished / "data").glob("validation-*")))
    )
    assert any("std of state of franka_panda" in problem for problem in find_problems(finished))


def test_a_card_that_names_other_files_is_named(finished):
    card = (finished / "README.md").read_text()
    (finished / "README.md").write_text(card.replace("path: data/validation-*", "path: data/train-00001*"))
    assert find_problems(finished) == [
        "README.md: for the split 'validation' it names data/train-00001-of-00002.parquet, unlike meta/manifest.json",
        "README.md: for the split 'validation' it does not name data/validation-00000-of-00001.parquet, unlike "
        "meta/manifest.json",
    ]
    (finished / "README.md").write_text(card.replace("- split: validation", "- split: [1"))
    (problem,) = find_problems(finished)
    assert problem.startswith("README.md: no dataset can be loaded by its metadata: ")


def test_a_validation_split_that_repeats_training_is_named(finished):
    """One episode of three frames, of which two are also frames of episode 1 of the split train."""
    held_out, train = shards.shard_path("validation", 0, 1), shards.shard_path("train", 0, 2)
    rows = list(shards.read_rows(finished / held_out))
    seen = [row for row in shards.read_rows(finished / train) if row["episode_index"] == 1]
    for number in (1, 2):
        rows[number] = {**seen[number], "episode_index": 0, "frame_index": number, "task": "another instruction"}
    encoded = [shards.encode_row(row) for row in rows]
    shards.write_shard(finished / held_out, encoded, temporary=finished / "temporary")
    shards.write_manifest(finished, {"train": [train, shards.shard_path("train", 1, 2)], "validation": [held_out]})
    assert find_problems(finished) == [
        f"{held_out}: episode 0 repeats 2 frames of the split train ({train}, episode 1)"
    ]


def test_shards_that_are_links_are_named(finished, tmp_path):
    path = shards.shard_path("train", 0, 2)
    for kept, words in (
        (finished / "kept.parquet", f"{path} is a link to {finished / 'kept.parquet'}, which nobody else may have"),
        (
            tmp_path / "kept.parquet",
            f"is a link to {tmp_path / 'kept.parquet'}, outside of it; put a copy in its place",
        ),
    ):
        (finished / path).rename(kept)
        (finished / path).symlink_to(kept)
        (problem,) = find_problems(finished)
        assert problem.startswith(f"{path}: ") and words in problem
        (finished / path).unlink()
        kept.rename(finished / path)
    (finished / "data").rename(finished / "other")
    (finished / "data").symlink_to(finished / "other")
    problems = find_problems(finished, quick=True)
    assert [problem.partition(": ")[2] for problem in problems] == [
        f"data is a link to {finished / 'other'}, which nobody else may have"
    ] * 3


@pytest.mark.parametrize("content", ["[]", "{}", '{"splits": 3}', "3"])
def test_descriptions_of_other_kinds_are_named(finished, content):
    for name in ("info", "stats"):
        (finished / f"meta/{name}.json").write_text(content)
    problems = "\n".join(find_problems(finished))
    assert "meta/info.json: split 'train' has None, meta/manifest.json says" in problems
