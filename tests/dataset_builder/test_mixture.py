"""Several datasets with weights in one stream: shares, completeness, exact resume, and their common statistics."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from synthetic_dataset import make_row, write_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.manifest import count_splits, read_manifest
from stereovla.dataset_builder.dataset.statistics import compute_statistics, mix_statistics
from stereovla.dataset_builder.streaming.lanes import merge_states
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream

FIRST, SECOND = [3, 5, 4, 6], [4, 2, 7, 3, 5, 4, 3]  # the robot of the second is called other_robot


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_dataset(folder / "first", FIRST, 2)
    rng, paths = np.random.default_rng(5), []
    for index in range(2):
        episodes = range(len(SECOND))[index * 4 : index * 4 + 4]
        rows = [
            shards.encode_row(make_row(rng, e, f) | {"embodiment": "other_robot"})
            for e in episodes
            for f in range(SECOND[e])
        ]
        paths.append(shards.shard_path("train", index, 2))
        shards.write_shard(folder / "second" / paths[-1], rows, temporary=folder / "temporary")
    shards.write_manifest(folder / "second", {"train": paths})
    for name, task in (("first", "pick up the red cube"), ("second", "stack it")):
        splits = count_splits(read_manifest(folder / name))
        meta = {"fps": 10, "state_dim": 7, "action_dim": 7, "tasks": [task], "splits": splits}
        shards.write_json(folder / name / "meta/info.json", meta)
        stats = compute_statistics(sorted((folder / name / "data").iterdir()))
        shards.write_json(folder / name / "meta/stats.json", stats)
    return folder / "first", folder / "second"


def stream_of(datasets, weights=(1.0, 1.0), **options):
    defaults = {"lanes": 3, "pool_episodes": 2, "depth_map_share": 0.0, "mixture": {"action": 1}}
    return WindowStream(list(zip(datasets, weights, strict=True)), **{**defaults, **options})


def places(windows):
    return [(w["embodiment"], w["episode_index"], w["frame_index"]) for w in windows]


EVERYTHING = sorted(
    [("franka_panda", e, f) for e, length in enumerate(FIRST) for f in range(length)]
    + [("other_robot", e, f) for e, length in enumerate(SECOND) for f in range(length)]
)


@pytest.mark.parametrize("weights", [(1, 1), (1, 9), (20, 1)])
def test_an_epoch_holds_every_window_of_every_dataset_once(datasets, weights):
    assert sorted(places(stream_of(datasets, weights, epochs=1))) == EVERYTHING


def test_weights_are_the_shares_of_an_endless_stream(datasets):
    windows = places(islice(stream_of(datasets, (3, 1)), 600))
    share = sum(name == "franka_panda" for name, _, _ in windows) / len(windows)
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 600)
    # and within each dataset, passes are complete before the next begins, up to the lanes' lead
    first = [place for place in windows if place[0] == "franka_panda"]
    counts = [first.count(place) for place in set(first)]
    assert len(counts) == sum(FIRST) and max(counts) - min(counts) <= 20


def test_one_dataset_in_a_list_is_that_dataset(datasets):
    alone = WindowStream(datasets[0], lanes=3, pool_episodes=2, depth_map_share=0.0, mixture={"action": 1}, epochs=2)
    assert places(stream_of(datasets[:1], (5.0,), epochs=2)) == places(alone)


@settings(max_examples=6, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data(), before=st.integers(1, 4), after=st.integers(1, 4), epochs=st.integers(1, 2))
def test_resume_at_any_point_on_any_number_of_consumers(datasets, data, before, after, epochs):
    options = {"lanes": 4, "epochs": epochs, "weights": (2, 1), "seed": data.draw(st.integers(0, 99))}
    streams = [stream_of(datasets, rank=rank, world_size=before, **options) for rank in range(before)]
    seen = sum((places(islice(s, data.draw(st.integers(0, 60)))) for s in streams), [])
    state = json.loads(json.dumps(merge_states([stream.state_dict() for stream in streams])))
    for rank in range(after):
        stream = stream_of(datasets, rank=rank, world_size=after, **options)
        stream.load_state_dict(state)
        seen += places(stream)
    assert sorted(seen) == sorted(EVERYTHING * epochs)


@pytest.mark.parametrize("cut", [0, 1, 17, 40, 48, 60])
def test_resume_on_the_same_consumers_gives_the_same_order(datasets, cut):
    """Also where one dataset has ended and the other goes on: 18 + 28 windows an epoch."""
    options = {"weights": (5, 1), "epochs": 2}
    whole = places(stream_of(datasets, **options))
    stream = stream_of(datasets, **options)
    assert places(islice(stream, cut)) == whole[:cut]
    resumed = stream_of(datasets, **options)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert places(resumed) == whole[cut:]


def test_a_state_of_other_weights_is_refused(datasets):
    with pytest.raises(ValueError, match=r"weights=\[1.0, 1.0\], this one weights=\[1.0, 2.0\]"):
        stream_of(datasets, (1, 2)).load_state_dict(stream_of(datasets).state_dict())


def test_wrong_mixtures_are_named(datasets):
    with pytest.raises(ValueError, match="the weight of .*second is 0.0; it must be above 0"):
        stream_of(datasets, (1, 0))
    with pytest.raises(ValueError, match="named twice: .*first"):
        stream_of([datasets[0], datasets[0]])
    with pytest.raises(ValueError, match="no datasets"):
        WindowStream([])


def test_meta_of_a_mixture(datasets):
    meta = load_meta([(datasets[0], 1), (datasets[1], 2)])
    assert meta["tasks"] == ["pick up the red cube", "stack it"] and meta["fps"] == 10
    assert set(meta["stats"]) == {"franka_panda", "other_robot"}
    assert meta["stats"]["franka_panda"] == load_meta(datasets[0])["stats"]["franka_panda"]


def test_one_model_has_one_size_of_states(datasets, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(datasets[1], other)
    info = json.loads((other / "meta/info.json").read_text())
    (other / "meta/info.json").write_text(json.dumps(info | {"state_dim": 14}))
    with pytest.raises(ValueError, match="different state sizes: .* 14"):
        load_meta([(datasets[0], 1), (other, 1)])


def test_statistics_of_one_robot_in_two_datasets_are_those_of_the_mixture():
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, 1, (300, 2)), rng.normal(3, 2, (300, 2))]

    def describe(values):
        numbers = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        numbers |= {name: np.quantile(values, q, axis=0) for name, q in (("q01", 0.01), ("q99", 0.99))}
        return {"robot": {"action": {name: value.tolist() for name, value in numbers.items()}}}

    mixed = mix_statistics([(describe(parts[0]), 1.0), (describe(parts[1]), 3.0)])["robot"]["action"]
    drawn = np.concatenate([parts[0], *[parts[1]] * 3])  # 1 : 3
    for name, wanted in describe(drawn)["robot"]["action"].items():
        if name in ("q01", "q99"):
            continue
        np.testing.assert_allclose(mixed[name], wanted, rtol=1e-9)
    for part in parts:
        assert ((part >= mixed["q01"]) & (part <= mixed["q99"])).mean(0).min() >= 0.98
    other = {"robot": {"action": {name: values[:1] for name, values in describe(parts[0])["robot"]["action"].items()}}}
    with pytest.raises(ValueError, match="'robot' have different quantities"):
        mix_statistics([(describe(parts[0]), 1.0), (other, 1.0)])
