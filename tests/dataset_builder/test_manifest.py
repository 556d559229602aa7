"""dataset.manifest: what is opened is what was built; every other folder is refused, or its bad shards are skipped."""

import json
import os
import shutil

import pytest
from synthetic_dataset import write_training_dataset

from stereovla.dataset_builder.dataset import manifest, shards
from stereovla.dataset_builder.dataset.manifest import count_splits, read_manifest, shard_problems
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream

FIRST, SECOND = (shards.shard_path("train", index, 2) for index in range(2))
HELD_OUT = shards.shard_path("validation", 0, 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_training_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def copy(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("STEREOVLA_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(dataset, tmp_path / "copy")


def stream_of(folder, split="train", **options):
    plain = {"mixture": {"action": 1}, "depth_map_share": 0.0, "epochs": 1, "lanes": 2, "shuffle": False}
    return WindowStream(folder, split, **{**plain, **options})


def episodes(stream):
    return sorted({window["episode_index"] for window in stream})


def exchange(folder):
    """The shards of training and validation under one another's names."""
    (folder / FIRST).rename(folder / "kept")
    (folder / HELD_OUT).rename(folder / FIRST)
    (folder / "kept").rename(folder / HELD_OUT)


def test_the_whole_dataset_opens(copy):
    assert episodes(stream_of(copy)) == list(range(8)) and episodes(stream_of(copy, "validation")) == [0, 1]
    assert load_meta(copy)["splits"]["train"] == {"episodes": 8, "frames": 48, "shards": 2}


def test_a_missing_shard_is_named_or_skipped_and_counted(copy):
    (copy / SECOND).unlink()
    with pytest.raises(
        shards.ShardError, match=f"1 of 2 shards of dataset .*copy, split 'train', .*{SECOND.name}: missing"
    ):
        stream_of(copy)
    stream = stream_of(copy, on_bad_shard="skip")
    with pytest.warns(RuntimeWarning, match=f"{SECOND.name} of .* is not that of the manifest: missing"):
        assert episodes(stream) == [0, 1, 2, 3]
    assert stream.skipped_shards == {str(copy / SECOND): 1}
    assert episodes(stream_of(copy, "validation")) == [0, 1]  # whose files are whole


def test_exchanged_train_and_validation_files_do_not_stream(copy):
    exchange(copy)
    for split, name in (("train", FIRST.name), ("validation", HELD_OUT.name)):
        with pytest.raises(shards.ShardError, match=f"{name}: (truncated|too long), [0-9]+ of [0-9]+ bytes"):
            stream_of(copy, split)


def test_a_shard_of_equal_size_with_other_bytes_is_refused(copy):
    content = bytearray((copy / SECOND).read_bytes())
    content[1000] ^= 1
    (copy / SECOND).write_bytes(content)
    with pytest.raises(shards.ShardError, match=f"{SECOND.name}: its SHA-256 differs from the manifest's"):
        stream_of(copy)


def test_files_that_the_manifest_does_not_list_are_refused(copy):
    shutil.copy(copy / SECOND, copy / "data/train-00002-of-00003.parquet")
    with pytest.raises(
        ValueError, match="has data/train-00002-of-00003.parquet, which meta/manifest.json does not list"
    ):
        stream_of(copy)


def test_counts_that_are_not_the_manifests_are_refused(copy):
    info = shards.read_json(copy / "meta/info.json")
    info["splits"]["train"]["frames"] = 96
    shards.write_json(copy / "meta/info.json", info)
    with pytest.raises(ValueError, match="split 'train' has .*'frames': 96.*, meta/manifest.json says .*'frames': 48"):
        load_meta(copy)
    content = shards.read_json(copy / "meta/manifest.json")
    content["shards"][0]["rows"] = 25
    shards.write_json(copy / "meta/manifest.json", content)
    with pytest.raises(
        shards.ShardError, match=r"train-00000-of-00002.parquet has 24 rows, the manifest of .* says 25"
    ):
        list(stream_of(copy))


def test_a_shard_is_hashed_once_until_it_changes(copy, monkeypatch):
    hashed = []
    monkeypatch.setattr(manifest, "sha256", lambda path: hashed.append(path.name) or shards.sha256(path))
    entries = read_manifest(copy)
    for _ in range(3):
        assert shard_problems(copy, entries) == {}
    assert sorted(hashed) == sorted(entry["path"][5:] for entry in entries)
    hashed.clear()
    content, times = (copy / SECOND).read_bytes(), (copy / SECOND).stat()
    (copy / SECOND).write_bytes(content[:2000] + b"x" + content[2001:])
    os.utime(copy / SECOND, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had been written
    for _ in range(2):
        assert "SHA-256 differs" in shard_problems(copy, entries)[SECOND.as_posix()]
    assert hashed == [SECOND.name] * 2
    (copy / SECOND).write_bytes(content)
    assert shard_problems(copy, entries) == {}


def test_what_was_verified_may_be_damaged_or_out_of_reach(copy, tmp_path, monkeypatch):
    entries = read_manifest(copy)
    assert shard_problems(copy, entries) == {}
    (kept,) = (tmp_path / "cache/verified").glob("*.json")
    for content in ("", "[]", '{"shards": 3}', "{"):
        kept.write_text(content)
        assert shard_problems(copy, entries) == {}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEREOVLA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is hashed each time it is opened"):
        assert shard_problems(copy, entries) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [], "lists no shards"),
        (lambda content: {"shards": []}, "lists no shards"),
        (lambda content: {"shards": [3]}, "shard 0 is 3, expected path, split, sha256, bytes, rows, episodes"),
        (
            lambda content: content["shards"][1].pop("rows") and content,
            "rows of shard 1 is None, expected a whole number",
        ),
        (lambda content: content["shards"][1].update(bytes=-1) or content, "bytes of shard 1 is -1, expected a whole"),
        (lambda content: content["shards"][1].update(split=3) or content, "split of shard 1 is 3, expected text"),
        (
            lambda content: content["shards"][1].update(path="../x") or content,
            r"path of shard 1 is '\.\./x', expected data",
        ),
        (lambda content: {"shards": content["shards"] * 2}, "names data/train-00000-of-00002.parquet twice"),
    ],
)
def test_malformed_manifests_are_named(copy, change, message):
    path = copy / "meta/manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"manifest.json.*{message}"):
        stream_of(copy)


def test_splits_are_counted(dataset):
    assert count_splits(read_manifest(dataset)) == {
        "train": {"episodes": 8, "frames": 48, "shards": 2},
        "validation": {"episodes": 2, "frames": 12, "shards": 1},
    }
