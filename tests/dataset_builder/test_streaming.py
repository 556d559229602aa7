"""streaming.window_stream: which windows come, in which order, on which consumer, and after which interruption."""

import inspect
import json
import shutil
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from synthetic_dataset import list_shards, make_row, write_dataset
from torch.utils.data import DataLoader

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.statistics import compute_statistics
from stereovla.dataset_builder.streaming import window_stream
from stereovla.dataset_builder.streaming.episodes import EpisodeSource
from stereovla.dataset_builder.streaming.lanes import merge_states
from stereovla.dataset_builder.streaming.questions import calibration_of, processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.dataset_builder.streaming.windows import WindowPool
from stereovla.processing import StereoImageProcessorPil, StereoProcessor, build_tokenizer
from stereovla.processing.camera_geometry import Calibration, project_points

LENGTHS = [3, 7, 4, 5, 6, 3, 8, 4, 5, 9, 3, 4]
FRAMES = {(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"), LENGTHS, 3)


def stream_of(dataset, **options):
    return WindowStream(
        dataset,
        **{
            "lanes": 3,
            "pool_episodes": 2,
            "backoff_s": 0.01,
            "mixture": {"action": 1},
            "depth_map_share": 0.0,
            **options,
        },
    )


def places(windows):
    return [(window["episode_index"], window["frame_index"]) for window in windows]


def test_windows_hold_the_frames_numbers(dataset):
    windows = {place: w for w in stream_of(dataset, epochs=1, chunk_size=5, history=3) for place in places([w])}
    assert set(windows) == FRAMES
    for (_, frame), window in windows.items():
        schema.validate_window(window)
        np.testing.assert_allclose(window["state_history"][:, 0], np.maximum(0, [frame - 2, frame - 1, frame]) / 100)
        np.testing.assert_allclose(window["actions"][:, 0], np.arange(5) / 1000)
        assert window["action_mask"].all()
        assert np.isnan(window["boxes"][1]).all() == (frame % 5 == 4)
        np.testing.assert_allclose(window["points"][0], [8.5, 15])
        assert window["left"].shape == (32, 32, 3) and window["left"].dtype == np.uint8
    np.testing.assert_array_equal(windows[1, 4]["state_history"][-1], windows[1, 6]["state_history"][0])
    assert np.abs(windows[4, 5]["left"][0, 0].astype(int) - [160, 100, 128]).max() <= 3


def test_plan_length_becomes_the_mask(dataset):
    for window in stream_of(dataset, epochs=1, chunk_size=16):
        assert window["action_mask"].sum() == 16 - window["frame_index"] % 3
    with pytest.raises(ValueError, match="chunk_size=17 is longer than the data's action_plan of 16"):
        next(iter(stream_of(dataset, chunk_size=17)))


def test_a_destination_is_under_the_tool_where_it_lets_go_of_what_it_carried():
    """Two things carried in one episode, and a grasp that missed; frames about another task say nothing."""
    rng, rows = np.random.default_rng(0), []
    commands = [1, 1, -1, 1, 1, -1, 0, -1, 1, 1, -1, -1, 1, 0]  # misses, carries to x = 0.09, to 0.15, stays
    steps = [0, 1, 1, 0, 1, 1, 1, 3, 1, 0, 1, 4, 1, 1]
    for frame, (command, x) in enumerate(zip(commands, np.cumsum(steps) / 100, strict=True)):
        row = make_row(rng, 0, frame, size=64)
        row["observation.state"][:3] = [x, 0.0, 0.1]
        row["action"][-1], row["task"] = command, "other" if frame == 1 else row["task"]
        rows.append(shards.encode_row(row))
    rows += [shards.encode_row(make_row(rng, 1, frame, size=64)) for frame in range(3)]  # never closes
    pool = WindowPool([shards.rows_to_table(rows)], history=1, chunk=1)
    calibration = calibration_of(pool.window(0))
    for frame in range(len(commands)):
        expected = project_points([0.09 if frame <= 8 else 0.15, 0.0, 0.08], Calibration.from_mapping(calibration))
        found = pool.window(frame)["points"][2]
        assert np.isnan(found).all() if frame == 1 else np.allclose(found, expected, atol=1e-3), frame
    assert all(np.isnan(pool.window(frame)["points"][2]).all() for frame in range(len(commands), len(rows)))


def test_without_plans_the_actions_that_follow_are_taken(tmp_path):
    write_dataset(tmp_path, [4, 6], 2, without=("action_plan", "action_plan_length"))
    rng = np.random.default_rng(0)
    actions = [[make_row(rng, e, f)["action"] for f in range(length)] for e, length in enumerate([4, 6])]
    for window in stream_of(tmp_path, epochs=1, chunk_size=3):
        episode, frame = window["episode_index"], window["frame_index"]
        valid = min(3, len(actions[episode]) - frame)
        np.testing.assert_array_equal(window["action_mask"], np.arange(3) < valid)
        np.testing.assert_array_equal(window["actions"][:valid], actions[episode][frame : frame + valid])


def test_shuffling_differs_by_epoch_and_seed_and_mixes_episodes(dataset):
    def order(**options):
        return places(islice(stream_of(dataset, **options), len(FRAMES)))

    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)
    assert places(stream_of(dataset, shuffle=False, lanes=1, epochs=1)) == sorted(FRAMES)
    two = places(stream_of(dataset, epochs=2))
    assert sorted(two) == sorted([*FRAMES, *FRAMES])
    assert len({episode for episode, _ in order(pool_episodes=4)[:10]}) >= 4


@settings(max_examples=8, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    shards_of=st.integers(1, 5),
    lanes=st.integers(1, 9),
    pool=st.integers(1, 5),
    cut=st.integers(0, 90),
    seed=st.integers(0, 99),
)
def test_resume_gives_exactly_what_would_have_followed(tmp_path_factory, shards_of, lanes, pool, cut, seed):
    folder = tmp_path_factory.getbasetemp() / f"resume-{shards_of}"
    if not folder.exists():
        write_dataset(folder, LENGTHS, shards_of)
    options = {"lanes": lanes, "pool_episodes": pool, "seed": seed, "mixture": None}
    whole = list(islice(stream_of(folder, **options), len(FRAMES) + 40))
    stream = stream_of(folder, **options)
    iterator = iter(stream)
    for _ in range(cut):
        next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = stream_of(folder, **options)
    resumed.load_state_dict(state)
    rest = list(islice(resumed, len(whole) - cut))
    assert places(rest) == places(whole[cut:])
    assert [w["objective"] for w in rest] == [w["objective"] for w in whole[cut:]]
    for a, b in zip(rest, whole[cut:], strict=True):
        np.testing.assert_array_equal(a.get("points_px", 0), b.get("points_px", 0))


def test_an_epoch_is_complete_for_any_lanes(dataset):
    for lanes in range(1, 13):
        assert sorted(places(stream_of(dataset, lanes=lanes, epochs=1))) == sorted(FRAMES)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_epoch_without_overlap(dataset, world_size):
    parts = [places(stream_of(dataset, lanes=6, epochs=1, rank=r, world_size=world_size)) for r in range(world_size)]
    assert sorted(sum(parts, [])) == sorted(FRAMES)


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_resume_on_another_number_of_consumers_loses_and_repeats_nothing(dataset, before, after):
    streams = [stream_of(dataset, lanes=4, epochs=1, rank=r, world_size=before) for r in range(before)]
    seen = sum((places(islice(stream, 11)) for stream in streams), [])
    state = merge_states([stream.state_dict() for stream in streams])
    for rank in range(after):
        stream = stream_of(dataset, lanes=4, epochs=1, rank=rank, world_size=after)
        stream.load_state_dict(state)
        seen += places(stream)
    assert sorted(seen) == sorted(FRAMES)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_workers_share_the_epoch(dataset, workers):
    loader = DataLoader(stream_of(dataset, epochs=1), batch_size=None, num_workers=workers)
    assert sorted(places(loader)) == sorted(FRAMES)


def test_stateful_data_loader_resumes_exactly(dataset):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        return loaders.StatefulDataLoader(
            stream_of(dataset, epochs=1), batch_size=4, num_workers=2, collate_fn=places, snapshot_every_n_steps=1
        )

    first = loader()
    batches = list(islice(first, 5))
    second = loader()
    second.load_state_dict(first.state_dict())
    assert sorted(sum(batches + list(second), [])) == sorted(FRAMES)


def test_states_of_another_stream_are_refused(dataset):
    state = stream_of(dataset, seed=3).state_dict()
    with pytest.raises(ValueError, match="the saved stream has seed=3, this one seed=4"):
        stream_of(dataset, seed=4).load_state_dict(state)
    part = stream_of(dataset, rank=0, world_size=2)
    next(iter(part))
    alone = stream_of(dataset)
    alone.load_state_dict(part.state_dict())
    with pytest.raises(ValueError, match=r"lacks lanes \[1\].*merge_states"):
        next(iter(alone))
    with pytest.raises(ValueError, match=r"two states hold the lanes \['0', '2'\]"):
        merge_states([part.state_dict(), part.state_dict()])


def test_depth_maps_come_with_the_share_asked_for(dataset):
    assert not any("depth" in window for window in stream_of(dataset, epochs=1, mixture=None))
    assert all("depth" in window for window in stream_of(dataset, epochs=1, depth_map_share=1.0))
    some = sum("depth" in window for window in stream_of(dataset, epochs=10, depth_map_share=0.3))
    assert 0.22 < some / (10 * len(FRAMES)) < 0.38


def test_questions_carry_their_answers(dataset):
    rows = {}
    for path in sorted((dataset / "data").iterdir()):
        rows |= {(row["episode_index"], row["frame_index"]): row for row in shards.read_rows(path)}
    seen = set()
    for window in stream_of(dataset, epochs=3, mixture=None, points_per_question=2):
        seen.add(window["objective"])
        assert ("points_px" in window) == (window["objective"] == "depth")
        if window["objective"] == "box":
            assert np.isfinite(window["boxes"]).all()
        if window["objective"] == "depth":
            depth = rows[places([window])[0]]["observation.depth"]
            columns, lines = window["points_px"].astype(int).T
            np.testing.assert_array_equal(depth[lines, columns], window["depths_m"])
    assert seen == {"action", "depth", "box", "pose"}


def test_processor_makes_a_batch_of_the_windows(dataset):
    """Windows of every objective go through the real processor; its outputs are those of the frames."""
    accepted = inspect.signature(StereoProcessor.__call__).parameters
    windows = list(stream_of(dataset, epochs=1, mixture=None, depth_map_share=1.0, names=True))
    arguments = processor_arguments(windows, ("left", "right"))
    assert set(accepted) - set(arguments) == {"self", "padding_side", "check_stereo", "return_tensors"}
    processor = StereoProcessor(
        StereoImageProcessorPil(size={"height": 32, "width": 32}),
        build_tokenizer(["pick up the red cube", "red cube"]),
        norm_stats=compute_statistics(sorted((dataset / "data").iterdir())),
    )
    batch = processor(**arguments)
    assert {window["objective"] for window in windows} == {"action", "depth", "box", "pose"}
    for number, window in enumerate(windows):
        product = float(window["calibration.focal_length_px"][0] * window["calibration.baseline_m"])
        depth = window["depth"]
        wanted = np.divide(product, depth, out=np.zeros_like(depth), where=depth > 0)
        np.testing.assert_allclose(batch["disparity"][number], wanted, rtol=1e-5)
        np.testing.assert_allclose(batch["points"][number, 1], window["points"][1], rtol=1e-5)
        # the other object, a blue ball, is in no picture
        assert window["names"] in (["red cube"], ["cube"])
        np.testing.assert_allclose(batch["name_points"][number], [[8.5, 15.0]])
        assert bool(batch["is_action"][number]) == (window["objective"] == "action")
        text = processor.tokenizer.decode(batch["input_ids"][number])
        asks = {"box": "bounding box of red cube", "depth": "the depth at"}.get(
            window["objective"], "to pick up the red cube"
        )
        assert asks in text


def test_broken_shard_is_named_after_retries(dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "copy")
    path = folder / shards.shard_path("train", 2, 4)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole)
        stream = stream_of(folder, epochs=1, retries=2)
        path.write_bytes(whole[:length])
        with pytest.raises(shards.ShardError, match=rf"{path.name}.*truncated or corrupt.*3 tries"):
            list(stream)


def test_a_position_in_another_dataset_is_refused(dataset, tmp_path):
    fewer = write_dataset(tmp_path, LENGTHS[:9], 3)
    with pytest.raises(ValueError, match=r"num_shards=\[3\]"):
        stream_of(dataset).load_state_dict(stream_of(fewer).state_dict())


def test_first_shard_broken_is_named_when_opening(dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "copy")
    path = folder / shards.shard_path("train", 0, 4)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(shards.ShardError, match=path.name):
        stream_of(folder)


def test_shard_that_comes_back_is_read_on(dataset, tmp_path):
    """A shard that vanishes and comes back while its readers wait costs a retry, not a window."""
    import threading

    folder = shutil.copytree(dataset, tmp_path / "copy")
    path = folder / shards.shard_path("train", 1, 4)
    hidden = path.with_suffix(".hidden")
    stream = stream_of(folder, epochs=1, retries=6, backoff_s=0.05)
    path.rename(hidden)
    threading.Timer(0.4, lambda: hidden.rename(path)).start()
    assert sorted(places(stream)) == sorted(FRAMES)


def test_episode_that_begins_in_the_middle_is_named(tmp_path):
    rng = np.random.default_rng(0)
    rows = [shards.encode_row(make_row(rng, 0, frame)) for frame in (3, 4, 5)]
    shards.write_shard(tmp_path / shards.shard_path("train", 0, 1), rows, temporary=tmp_path / "t")
    list_shards(tmp_path)
    with pytest.raises(shards.ShardError, match=r"episode 0 has the frames \[3, 4, 5\]"):
        next(iter(stream_of(tmp_path)))


def test_bad_arguments_are_named(dataset, tmp_path):
    with pytest.raises(ValueError, match="no split 'test'; it has: train"):
        stream_of(dataset, split="test")
    with pytest.raises(ValueError, match="manifest.json is missing: is this folder a finished dataset"):
        stream_of(tmp_path)
    with pytest.raises(ValueError, match=r"rank=2 must be in \[0, world_size=2\)"):
        stream_of(dataset, rank=2, world_size=2)
    with pytest.raises(ValueError, match="4 consumers .* share 3 lanes"):
        next(iter(stream_of(dataset, rank=0, world_size=4)))
    write_dataset(tmp_path, [2], 1, without=("observation.depth", "task"))
    with pytest.raises(ValueError, match="no column task"):
        stream_of(tmp_path)


def test_missing_optional_column_is_named_only_where_needed(tmp_path):
    write_dataset(tmp_path, [2], 1, without=("observation.segmentation",))
    assert len(list(stream_of(tmp_path, epochs=1, lanes=1, depth_map_share=1.0))) == 2
    assert len(list(stream_of(tmp_path, epochs=1, lanes=1, mixture=None, depth_points="uniform"))) == 2
    with pytest.raises(ValueError, match=r"no column observation\.segmentation"):
        stream_of(tmp_path, mixture=None)


def test_more_lanes_than_episodes_is_an_error_not_a_hang(tmp_path):
    write_dataset(tmp_path, [2], 1)
    with pytest.raises(ValueError, match="finds no episodes"):
        list(islice(stream_of(tmp_path, shuffle=False, lanes=3), 100))


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_of_which_nothing_can_be_asked_are_left_out_and_counted(dataset, workers):
    """Every fifth frame of an episode shows no box in the right view."""
    boxed = {place for place in FRAMES if place[1] % 5 != 4}
    stream = stream_of(dataset, mixture={"box": 1}, epochs=1)
    context = "forkserver" if workers else None
    loader = DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=context)
    windows = list(loader)
    assert sorted(places(windows)) == sorted(boxed) and len(windows) == len(boxed)
    assert stream.left_out_windows == len(FRAMES) - len(boxed) == 6


def test_what_was_left_out_is_counted_over_an_interruption(dataset):
    whole = places(stream_of(dataset, mixture={"box": 1}, epochs=1))
    first = stream_of(dataset, mixture={"box": 1}, epochs=1)
    begun = places(islice(first, 20))
    resumed = stream_of(dataset, mixture={"box": 1}, epochs=1)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + places(resumed) == whole
    assert resumed.left_out_windows == 6


def test_a_mixture_of_which_nothing_is_ever_in_view_is_refused(tmp_path, monkeypatch):
    boxes = ("target.box_left_px", "target.box_right_px")
    blank = write_dataset(tmp_path, [4, 4], 1)
    for path in (tmp_path / "data").glob("*.parquet"):
        table = pq.read_table(path)
        for name in boxes:
            column = pa.nulls(len(table), table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        pq.write_table(table.replace_schema_metadata(pq.read_schema(path).metadata), path)
    shards.write_manifest(tmp_path, {"train": sorted(p.relative_to(tmp_path) for p in (tmp_path / "data").iterdir())})
    monkeypatch.setattr(window_stream, "_UNASKED_WINDOWS", 20)  # instead of 10,000
    with pytest.raises(ValueError, match=r"21 windows of .* in a row show nothing that the mixture asks for"):
        next(iter(stream_of(blank, mixture={"box": 1})))
    source = EpisodeSource(blank, "train")
    assert not set(boxes) & source.filled and {"observation.depth", "keyframe_pose", "task"} <= source.filled
