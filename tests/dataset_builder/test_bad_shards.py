"""Damaged shards: cut at every 1,000th byte, with flipped bits, with broken images; named, or skipped and counted. What
is damaged when a dataset is opened is found then, what is damaged later when it is read.
"""

import shutil
import warnings

import numpy as np
import pytest
from synthetic_dataset import list_shards, make_row, write_dataset
from torch.utils.data import DataLoader

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.streaming.lanes import merge_states
from stereovla.dataset_builder.streaming.window_stream import WindowStream

LENGTHS = [5, 6, 4, 7, 5, 6]
SECOND = shards.shard_path("train", 1, 3)


def write_noisy_dataset(folder):
    """Three shards whose images are noise, so that most of their bytes are pixels."""
    rng = np.random.default_rng(1)
    paths = [shards.shard_path("train", index, 3) for index in range(3)]
    for index, path in enumerate(paths):
        rows = []
        for episode in (2 * index, 2 * index + 1):
            for frame in range(LENGTHS[episode]):
                row = make_row(rng, episode, frame)
                for side in ("left", "right"):
                    row[f"observation.images.{side}"] = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                rows.append(shards.encode_row(row))
        shards.write_shard(folder / path, rows, temporary=folder / ".temporary")
    shards.write_manifest(folder, {"train": paths})
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_noisy_dataset(tmp_path_factory.mktemp("noisy"))


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def stream_of(folder, **options):
    defaults = {"lanes": 1, "shuffle": False, "epochs": 1, "retries": 0, "backoff_s": 0.0, "depth_map_share": 0.0}
    return WindowStream(folder, **{**defaults, "mixture": {"action": 1}, **options})


def read_until_error(stream):
    """(windows, message of the ShardError that ended them or None)."""
    windows = []
    try:
        for window in stream:
            windows.append(window)
    except shards.ShardError as error:
        return windows, str(error)
    return windows, None


def assert_prefix(windows, expected):
    for window, wanted in zip(windows, expected, strict=False):
        for key, value in wanted.items():
            np.testing.assert_array_equal(window[key], value, err_msg=key)


def places(windows):
    return [(window["episode_index"], window["frame_index"]) for window in windows]


def test_a_shard_cut_at_every_1000th_byte_is_named_and_gives_no_window(dataset, copy):
    expected = list(stream_of(dataset))
    whole = (copy / SECOND).read_bytes()
    assert len(whole) > 50_000
    for length in range(0, len(whole), 1000):
        (copy / SECOND).write_bytes(whole)
        stream = stream_of(copy)
        (copy / SECOND).write_bytes(whole[:length])
        with pytest.raises(
            shards.ShardError, match=f"1 of 3 shards .*{SECOND.name}: truncated, {length} of {len(whole)}"
        ):
            stream_of(copy)
        windows, message = read_until_error(stream)
        assert message and SECOND.name in message and "truncated or corrupt" in message, (length, message)
        assert len(windows) == sum(LENGTHS[:2])  # those of the first shard, and nothing of the broken one
        assert_prefix(windows, expected)
        with pytest.raises(shards.ShardError, match=SECOND.name):
            shards.read_table(copy / SECOND)


def test_a_flipped_bit_gives_the_named_error_or_changes_nothing(dataset, copy):
    """Page checksums catch what parquet and the image decoders would take for data, in a file that was whole when
    it was opened; in any other the manifest's SHA-256 does, always.
    """
    everything = {"mixture": None, "depth_map_share": 1.0}  # reads nearly all columns
    expected = list(stream_of(dataset, **everything))
    whole = (copy / SECOND).read_bytes()
    caught = 0
    for place in range(500, len(whole), 1000):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place // 1000 % 8)
        (copy / SECOND).write_bytes(whole)
        stream = stream_of(copy, **everything)
        (copy / SECOND).write_bytes(damaged)
        with pytest.raises(shards.ShardError, match=f"{SECOND.name}: its SHA-256 differs from the manifest's"):
            stream_of(copy)
        windows, message = read_until_error(stream)
        caught += message is not None
        assert message is None or SECOND.name in message, (place, message)
        assert message is not None or len(windows) == len(expected), place
        assert_prefix(windows, expected)
    assert caught > 0.85 * len(whole) / 1000  # the others hit metadata that no reader of ours looks at


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_shards_are_skipped_and_counted_only_if_asked(copy, workers):
    (copy / SECOND).write_bytes((copy / SECOND).read_bytes()[:5000])
    stream = stream_of(copy, lanes=3, on_bad_shard="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # raised in the workers, out of reach of pytest.warns
        windows = list(DataLoader(stream, batch_size=None, num_workers=workers))
    good = [(e, f) for e, length in enumerate(LENGTHS) for f in range(length) if e not in (2, 3)]
    assert sorted(places(windows)) == good
    assert stream.skipped_shards == {str(copy / SECOND): 1}


def test_a_skip_warns_and_its_count_survives_a_resume(copy):
    (copy / SECOND).write_bytes(b"")
    streams = [stream_of(copy, lanes=3, on_bad_shard="skip", rank=rank, world_size=2) for rank in range(2)]
    with pytest.warns(RuntimeWarning, match=f"skipped what is left of a shard: shard .*{SECOND.name}"):
        for stream in streams:
            list(stream)
    resumed = stream_of(copy, lanes=3, on_bad_shard="skip")
    resumed.load_state_dict(merge_states([stream.state_dict() for stream in streams]))
    assert list(resumed) == []
    assert resumed.skipped_shards == {str(copy / SECOND): 1}


def test_a_broken_first_shard_can_be_skipped_too(copy):
    first = copy / shards.shard_path("train", 0, 3)
    first.write_bytes(first.read_bytes()[:5000])
    with pytest.raises(shards.ShardError, match=first.name):
        stream_of(copy)
    stream = stream_of(copy, on_bad_shard="skip")
    with pytest.warns(RuntimeWarning, match=first.name):
        assert {episode for episode, _ in places(stream)} == {2, 3, 4, 5}
    for path in (copy / "data").iterdir():
        path.write_bytes(b"PAR1")
    with pytest.raises(shards.ShardError, match="train-00002-of-00003"):  # no shard is left
        stream_of(copy, on_bad_shard="skip")


def test_an_image_that_was_stored_broken_is_named_with_its_frame(tmp_path):
    rows = [shards.encode_row(make_row(np.random.default_rng(0), 0, frame)) for frame in range(3)]
    rows[1]["observation.images.right"] = rows[1]["observation.images.right"][:200]
    shards.write_shard(tmp_path / shards.shard_path("train", 0, 1), rows, temporary=tmp_path / "t")
    windows, message = read_until_error(stream_of(list_shards(tmp_path)))
    assert len(windows) == 1
    for part in ("train-00000-of-00001", "episode_index 0, frame_index 1", "observation.images.right cannot be"):
        assert part in message


def test_wrong_choice_is_named(tmp_path):
    write_dataset(tmp_path, [2], 1)
    with pytest.raises(ValueError, match="on_bad_shard='ignore'; valid: 'raise', 'skip'"):
        stream_of(tmp_path, on_bad_shard="ignore")
