"""formats.lerobot_metadata: every legal form is read, anything else is named with its file and key."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_lines import data as main
from lerobot_folder import WRITTEN, contents, import_config, import_folder
from mutations import ODD, mutate

from stereovla.dataset_builder.formats.lerobot_metadata import read_episodes, read_info, read_tasks

SENTENCES = {0: "pick up the cup", 1: "open the drawer"}


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(WRITTEN, tmp_path / "source")


def as_column(frame):
    return frame.rename_axis("task").reset_index(), False


def index_of_numbers(frame):
    return frame.rename_axis("task").reset_index().set_index("task_index"), True


def named_index(frame):
    return frame.rename_axis("task"), True


def other_name(frame):
    return frame.rename_axis("instruction").reset_index(), False


def categories(frame):
    frame = frame.rename_axis("task").reset_index()
    return frame.assign(task=frame["task"].astype("category"), number=1.5), False


@pytest.mark.parametrize("form", [as_column, index_of_numbers, named_index, other_name, categories])
def test_every_legal_form_of_tasks_is_read(copy, tmp_path, form):
    frame, index = form(pd.read_parquet(copy / "meta/tasks.parquet"))
    frame.to_parquet(copy / "meta/tasks.parquet", index=index)
    assert read_tasks(copy) == SENTENCES


def test_an_import_does_not_depend_on_the_form_of_tasks(copy, tmp_path):
    frame, _ = as_column(pd.read_parquet(copy / "meta/tasks.parquet"))
    frame.to_parquet(copy / "meta/tasks.parquet", index=False)
    found = import_folder(import_config(copy, tmp_path, "found"))
    expected = import_folder(import_config(WRITTEN, tmp_path, "expected"))
    shards = [name for name in contents(expected) if name.startswith("data/")]
    assert len(shards) == 3 and all(contents(found)[name] == contents(expected)[name] for name in shards)


def info(key, value, delete=False):
    def change(folder):
        path = folder / "meta/info.json"
        content = json.loads(path.read_text())
        *parts, last = key.split("/")
        place = content
        for part in parts:
            place = place[part]
        if delete:
            del place[last]
        else:
            place[last] = value
        path.write_text(json.dumps(content))

    return change


def text(name, value):
    return lambda folder: (folder / "meta" / name).write_bytes(value)


def tasks(**columns):
    return lambda folder: pq.write_table(pa.table(columns), folder / "meta/tasks.parquet")


def episodes(key, value=None):
    """The column `key` of meta/episodes without a value for row 1, with another one, or of other kinds."""

    def change(folder):
        path = folder / "meta/episodes/chunk-000/file-000.parquet"
        columns = pq.read_table(path).to_pydict()
        if isinstance(value, list):
            columns[key] = value
        elif value == "gone":
            del columns[key]
        else:
            columns[key][1] = value
        pq.write_table(pa.table(columns), path)

    return change


def empty(folder):
    shutil.rmtree(folder / "meta/episodes")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (text("info.json", b"[]"), ["info.json is [], expected keys and values"]),
        (text("info.json", b"{"), ["info.json is no valid JSON"]),
        (text("info.json", b"\xff\xfe"), ["info.json is no valid JSON"]),
        (text("info.json", b"[" * 100_000), ["info.json is no valid JSON"]),
        (text("info.json", b"1" * 5000), ["info.json is no valid JSON"]),
        (info("codebase_version", 3), ["is a LeRobot dataset of version 3; v3.0 is needed"]),
        (info("fps", 0, delete=True), ["info.json has no key 'fps'; it has: codebase_version"]),
        (info("fps", float("nan")), ["info.json: fps is nan, expected a number above 0 and up to 1000"]),
        (info("fps", float("inf")), ["info.json: fps is inf, expected"]),
        (info("fps", 0), ["info.json: fps is 0.0, expected"]),
        (info("fps", "12"), ["info.json: fps is '12', expected a number"]),
        (info("fps", 10**400), ["info.json: fps is 1000", "expected a number"]),
        (info("features", []), ["info.json: features is [], expected keys and values"]),
        (info("features/action", None), ["info.json: features: action is None, expected keys and values"]),
        (info("features/action", {}), ["info.json: features: action has no key 'dtype'; it has: nothing"]),
        (info("splits", None), ["info.json: splits is None, expected keys and values"]),
        (info("splits/train", "all"), ['info.json: splits: train is \'all\', expected "first:end" such as "0:50"']),
        (info("splits/train", "3:0"), ["splits: train is '3:0', expected"]),
        (info("splits/train", "0:2"), ["meta/episodes holds 3, the splits {'train': '0:2'} 2; each must be in one"]),
        (info("splits/validation", "0:1"), ["{'train': '0:3', 'validation': '0:1'} 4; each must be in one split"]),
        (info("total_episodes", "3"), ["info.json: total_episodes is '3', expected a whole number"]),
        (info("total_episodes", True), ["info.json: total_episodes is True, expected a whole number"]),
        (info("data_path", 7), ["info.json: data_path is 7, expected text"]),
        (
            info("data_path", "data/{episode}.parquet"),
            ["info.json: data_path: the path 'data/{episode}.parquet' cannot be"],
        ),
        (info("data_path", "data/{file_index:0999999d}"), ["data_path: the path 'data/{file_index:0999999d}'"]),
        (info("data_path", "{chunk_index.__class__}"), ["data_path: the path '{chunk_index.__class__}'"]),
        (info("data_path", "data/{"), ["info.json: data_path: the path 'data/{' cannot be filled"]),
        (info("video_path", None), ["info.json: video_path is None, expected text"]),
        (lambda folder: (folder / "meta/tasks.parquet").unlink(), ["meta/tasks.parquet is missing in"]),
        (text("tasks.parquet", b"PAR1"), ["meta/tasks.parquet cannot be read"]),
        (tasks(task=["a", "b"]), ["tasks.parquet: expected the column task_index and", "it has: task (string)"]),
        (tasks(task_index=[0, 1]), ["tasks.parquet: expected the column task_index and", "it has: task_index (int64)"]),
        (tasks(task_index=[0, 1], a=["x", "y"], b=["x", "y"]), ["it has: task_index (int64), a (string), b (string)"]),
        (
            tasks(task_index=[0.0, 1.0], task=["a", "b"]),
            ["tasks.parquet: task_index is of type double, expected whole"],
        ),
        (
            tasks(task_index=[0, None], task=["a", "b"]),
            ["tasks.parquet: task_index of row 1 is None, expected a whole"],
        ),
        (tasks(task_index=[0, 1], task=["a", None]), ["tasks.parquet: task of task_index 1 is None, expected a"]),
        (tasks(task_index=[0, 0], task=["a", "b"]), ["tasks.parquet: task_index 0 stands for 'a' and for 'b'"]),
        (empty, ["has no meta/episodes/*/*.parquet"]),
        (episodes("length", "gone"), ["episodes/chunk-000/file-000.parquet has no column 'length'; it has: episode_i"]),
        (episodes("length"), ["file-000.parquet: length of row 1 is None, expected a whole number from 0 on"]),
        (episodes("length", -5), ["file-000.parquet: length of row 1 is -5, expected a whole number from 0 on"]),
        (episodes("length", ["7", "5", "6"]), ["file-000.parquet: length is of type string, expected whole numbers"]),
        (episodes("episode_index", 0), ["meta/episodes: episode_index 0 stands there 2 times"]),
        (episodes("tasks", ["a", "b", "c"]), ["file-000.parquet: tasks of row 0 is 'a', expected a list of sentences"]),
        (
            episodes("videos/observation.images.eye_a/from_timestamp", ["0", "1", "2"]),
            ["videos/observation.images.eye_a/from_timestamp is of type string, expected numbers"],
        ),
    ],
)
def test_malformed_metadata_is_named_with_file_and_key(copy, tmp_path, capsys, damage, words):
    damage(copy)
    options = import_config(copy, tmp_path)
    assert (
        main(["import", "lerobot", "--source", options.source, "--config", options.config, "--out", options.out]) == 2
    )
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and all(word in printed for word in words), printed
    assert not (tmp_path / "out/data").exists()


def test_the_metadata_that_lerobot_wrote(copy):
    it = read_info(WRITTEN)
    assert (it.version, it.fps, it.total_episodes, dict(it.splits)) == ("v3.0", 12.0, 3, {"train": range(0, 3)})
    assert set(it.features) >= {"observation.images.eye_a", "observation.state", "action"}
    assert read_tasks(WRITTEN) == SENTENCES
    entries = read_episodes(WRITTEN, ["observation.images.eye_a"])
    assert [(entry["length"], entry["tasks"]) for entry in entries] == [
        (7, ["pick up the cup"]),
        (5, ["open the drawer"]),
        (6, ["pick up the cup"]),
    ]
    times = [entry["videos/observation.images.eye_a/from_timestamp"] for entry in entries]
    assert times == pytest.approx([0, 7 / 12, 1])


# ----------------------------------------------------------------------------------------------------------------------
# 1,000 mutated metadata files
# ----------------------------------------------------------------------------------------------------------------------

MUTATIONS = 1000
META = ("info.json", "tasks.parquet", "episodes/chunk-000/file-000.parquet")


def mutate_json(path, rng):
    content = json.loads(path.read_text())
    mutate(content, rng)
    path.write_text(json.dumps(content))


def mutate_table(path, rng):
    table = pq.read_table(path).replace_schema_metadata(None)
    # of the statistics that lerobot keeps there nothing is read
    table = table.select([name for name in table.column_names if not name.startswith("stats/")])
    columns, names = table.to_pydict(), table.column_names
    key, row, what = names[rng.integers(len(names))], rng.integers(table.num_rows), rng.integers(7)
    if what == 0:
        del columns[key]
    elif what == 1:
        columns[f"{key}_"] = columns.pop(key)
    elif what == 2:
        columns[key] = [ODD[rng.integers(len(ODD))]] * table.num_rows
    elif what == 3:  # of the column's own kind
        values = (-1, 1, 2, 7, 2**40, None) if pa.types.is_integer(table.schema.field(key).type) else (None,)
        values = (-1.0, 0.04, 0.083, 0.5, 1e300, float("nan"), None) if "timestamp" in key else values
        columns[key][row] = values[rng.integers(len(values))]
    elif what == 4:
        other = rng.integers(table.num_rows)
        columns[key][row], columns[key][other] = columns[key][other], columns[key][row]
    elif what == 5:
        columns = {name: [*values, values[row]] for name, values in columns.items()}
    else:
        columns = {name: [*values[:row], *values[row + 1 :]] for name, values in columns.items()}
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), path)


def mutate_bytes(path, rng):
    whole = bytearray(path.read_bytes())
    what = rng.integers(3)
    if what == 0:
        whole = whole[: rng.integers(len(whole))]
    else:
        for _ in range(1 if what == 1 else 20):
            whole[rng.integers(len(whole))] ^= 1 << rng.integers(8)
    path.write_bytes(whole)


@pytest.mark.slow
def test_a_thousand_mutated_metadata_files_give_an_error_in_words_or_the_same_rows(tmp_path, capsys):
    """Whatever stands in the metadata: status 1 or 2 with words, or the shards of the unharmed source, bit for bit."""
    original = import_folder(import_config(WRITTEN, tmp_path, "original"))
    expected = {name: data for name, data in contents(original).items() if name.startswith("data/")}
    rng = np.random.default_rng(20)
    counts = {0: 0, 1: 0, 2: 0}
    for number in range(MUTATIONS):
        source = shutil.copytree(WRITTEN, tmp_path / "mutated/source")
        path = source / "meta" / META[number % 3]
        kinds = [mutate_bytes, mutate_json if path.suffix == ".json" else mutate_table]
        try:
            kinds[min(1, rng.integers(4))](path, rng)
        except (pa.ArrowException, OverflowError):  # values that no table can hold
            path.write_bytes(b"")
        options = import_config(source, tmp_path / "mutated")
        command = ["--source", options.source, "--config", options.config, "--out", options.out]
        status = main(["import", "lerobot", *command, "--episodes_per_shard", "1"])  # what it raises is a traceback
        said = capsys.readouterr()
        counts[status] += 1
        if status == 0:
            found = {name: data for name, data in contents(tmp_path / "mutated/out").items() if name[:5] == "data/"}
            assert found == expected, (number, path)
        else:
            assert "error: " in said.err or "nothing was imported" in said.out, (number, path, said)
            assert not (tmp_path / "mutated/out/data").exists()
        shutil.rmtree(tmp_path / "mutated")
    print(f"{MUTATIONS} mutated files: {counts[0]} imported alike, {counts[1] + counts[2]} refused in words")
    assert counts[0] > 50 and counts[1] > 50 and counts[2] > 50
