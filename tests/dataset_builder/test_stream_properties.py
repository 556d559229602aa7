"""Properties of windows and of their distribution over ranks and workers, on random datasets."""

import json
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from synthetic_dataset import make_row, write_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.streaming import lanes as lane_streams
from stereovla.dataset_builder.streaming.lanes import merge_states
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.dataset_builder.streaming.windows import WindowPool

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
PLANS = ("action_plan", "action_plan_length")


def episode_rows(lengths, seed):
    rng = np.random.default_rng(seed)
    return [[make_row(rng, e, f, size=16) for f in range(n)] for e, n in enumerate(lengths)]


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    history=st.integers(1, 6),
    chunk=st.integers(1, 12),
    plans=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_windows_are_what_the_definition_says(lengths, history, chunk, plans, seed):
    """Frame by frame in plain Python: the history repeats the first state, the chunk ends with the episode."""
    episodes = episode_rows(lengths, seed)
    tables = [shards.rows_to_table([shards.encode_row(row) for row in rows]) for rows in episodes]
    pool = WindowPool(tables if plans else [t.drop_columns(list(PLANS)) for t in tables], history, chunk)
    assert pool.size == sum(lengths)
    index = 0
    for rows in episodes:
        for frame, row in enumerate(rows):
            window = pool.window(index)
            index += 1
            wanted = [rows[max(0, frame - back)]["observation.state"] for back in reversed(range(history))]
            np.testing.assert_array_equal(window["state_history"], wanted)
            if plans:
                actions, valid = row["action_plan"][:chunk], min(chunk, row["action_plan_length"])
            else:
                actions, valid = [r["action"] for r in rows[frame : frame + chunk]], min(chunk, len(rows) - frame)
            assert window["actions"].shape == (chunk, 7)
            assert window["action_mask"].tolist() == [True] * valid + [False] * (chunk - valid)
            np.testing.assert_array_equal(window["actions"][:valid], actions[:valid])
            assert np.isfinite(window["actions"]).all()  # padding too is a number
            assert (window["episode_index"], window["frame_index"]) == (row["episode_index"], frame)
            np.testing.assert_array_equal(window["keyframe_pose"], row["keyframe_pose"])


def test_a_pool_does_not_look_beyond_its_episodes():
    """The same episode gives the same windows whatever stands before and behind it."""
    episodes = episode_rows([3, 4, 2], 0)
    tables = [shards.rows_to_table([shards.encode_row(r) for r in rows]).drop_columns(list(PLANS)) for rows in episodes]
    alone, among = WindowPool(tables[1:2], 3, 5), WindowPool(tables, 3, 5)
    for frame in range(4):
        for key, value in alone.window(frame).items():
            np.testing.assert_array_equal(among.window(3 + frame)[key], value, err_msg=key)
    assert isinstance(tables[0], pa.Table)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """{(lengths, episodes per shard): folder}, made once each."""
    made = {}

    def get(lengths, per_shard):
        key = (tuple(lengths), per_shard)
        if key not in made:
            made[key] = write_dataset(tmp_path_factory.mktemp("property"), list(lengths), per_shard, size=16)
        return made[key]

    return get


def consume(folder, rank, world_size, worker, workers, state=None, count=None, **options):
    """(places, state) of one DataLoader worker of one rank, run in this process: torch tells a worker its number only
    through get_worker_info.
    """
    stream = WindowStream(
        folder, rank=rank, world_size=world_size, depth_map_share=0.0, mixture={"action": 1}, epochs=1, **options
    )
    if state is not None:
        stream.load_state_dict(state)
    original = lane_streams.get_worker_info
    lane_streams.get_worker_info = lambda: SimpleNamespace(id=worker, num_workers=workers) if workers else None
    try:
        windows = list(islice(stream, count))
        return [(w["episode_index"], w["frame_index"]) for w in windows], json.loads(json.dumps(stream.state_dict()))
    finally:
        lane_streams.get_worker_info = original


@settings(max_examples=15, phases=QUICK)
@given(data=st.data())
def test_ranks_times_workers_partition_the_epoch_and_any_others_can_go_on(datasets, data):
    lengths = data.draw(st.sampled_from([(3, 1, 4, 2, 5), (2,) * 9, (6, 1, 1, 1, 7, 2, 3)]))
    folder = datasets(lengths, data.draw(st.integers(1, 4)))
    lanes = data.draw(st.integers(6, 9))
    options = {
        "lanes": lanes,
        "pool_episodes": data.draw(st.integers(1, 4)),
        "seed": data.draw(st.integers(0, 9)),
        "shuffle": data.draw(st.booleans()),
    }
    everything = sorted((e, f) for e, length in enumerate(lengths) for f in range(length))

    def consumers():
        world, workers = data.draw(st.sampled_from([(1, 0), (1, 2), (2, 0), (2, 3), (3, 2), (6, 1), (1, 5)]))
        return [(rank, world, worker, workers) for rank in range(world) for worker in range(max(1, workers))]

    state, seen = None, []
    for _ in range(data.draw(st.integers(0, 2))):  # interrupted so often, each time with other consumers
        parts = [consume(folder, *c, state=state, count=data.draw(st.integers(0, 6)), **options) for c in consumers()]
        seen += sum((windows for windows, _ in parts), [])
        state = merge_states([part for _, part in parts])
    seen += sum((consume(folder, *c, state=state, **options)[0] for c in consumers()), [])
    assert sorted(seen) == everything
