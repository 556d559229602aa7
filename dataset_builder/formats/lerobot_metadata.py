"""What a LeRobot dataset v3.0 says of itself, read strictly: an error names file, key, value, and what is valid.

Facts of the format, from lerobot's own dataset code (https://github.com/huggingface/lerobot): meta/info.json names
`fps`, `features`, `splits` ("train": "0:50" are episodes) and the templates `data_path` and `video_path`;
meta/tasks.parquet maps sentences to `task_index`; meta/episodes/*/*.parquet says per episode its `length`, in which
data file it is, and per video the file and `from_timestamp`, `to_timestamp` (s) in it.
"""

import math
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stereovla.dataset_builder.dataset import shards
from stereovla.untrusted import fill_template, inside, open_parquet, split_name

INFO, TASKS, EPISODES = "meta/info.json", "meta/tasks.parquet", "meta/episodes"
_KINDS = {dict: "keys and values", str: "text", int: "a whole number", float: "a number"}
_HIGHEST_FPS = 1000.0
# where pandas puts an index without a name; lerobot's sentences are such an index
_SENTENCES = ("task", "__index_level_0__")


@dataclass(frozen=True)
class Info:
    """meta/info.json.

    Args:
        features: {column: {"dtype": ...}}.
        splits: {name: numbers of its episodes}.
        data_path, video_path: templates for `untrusted.fill_template`; None where there are no videos.
    """

    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    splits: Mapping[str, range]
    total_episodes: int
    data_path: str
    video_path: str | None


def read_info(folder: Path) -> Info:
    """Read and check meta/info.json of the dataset in `folder`; ValueError says what is wrong."""
    where = str(folder / INFO)
    content = shards.read_json(folder / INFO)
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {_short(content)}, expected keys and values")
    version = str(content.get("codebase_version"))
    if not version.startswith("v3."):
        raise ValueError(
            f"{folder} is a LeRobot dataset of version {version}; v3.0 is needed (lerobot converts older ones)"
        )
    fps = float(_value(content, "fps", float, where))
    if not 0 < fps <= _HIGHEST_FPS:  # NaN included
        raise ValueError(f"{where}: fps is {fps}, expected a number above 0 and up to {_HIGHEST_FPS:g}")
    features = _value(content, "features", dict, where)
    for key in features:
        _value(_value(features, key, dict, f"{where}: features"), "dtype", str, f"{where}: features: {key}")
    splits = _value(content, "splits", dict, where)
    total = _value(content, "total_episodes", int, where)
    video_path = None
    if any(feature["dtype"] == "video" for feature in features.values()):
        video_path = _template(content, "video_path", ("video_key", "chunk_index", "file_index"), where)
    return Info(
        version=version,
        fps=fps,
        features=features,
        splits={name: _episodes_of(splits, name, f"{where}: splits") for name in splits},
        total_episodes=total,
        data_path=_template(content, "data_path", ("chunk_index", "file_index"), where),
        video_path=video_path,
    )


def read_tasks(folder: Path) -> dict[int, str]:
    """{task_index: sentence} of meta/tasks.parquet, whose sentences are the index (as lerobot writes them) or the
    column "task", of a table with any index.
    """
    where = folder / TASKS
    table = read_columns(where, TASKS)
    sentences = [name for name in table.column_names if _is_text(table.schema.field(name).type)]
    chosen = next((name for name in _SENTENCES if name in sentences), sentences[0] if len(sentences) == 1 else None)
    if "task_index" not in table.column_names or chosen is None:
        raise ValueError(
            f"{where}: expected the column task_index and the sentences as index or column 'task'; it has: "
            + ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        )
    tasks: dict[int, str] = {}
    indices = whole_numbers(table, "task_index", str(where))
    for index, sentence in zip(indices, table.column(chosen).to_pylist(), strict=True):
        if not isinstance(sentence, str):
            raise ValueError(f"{where}: {chosen} of task_index {index} is {sentence!r}, expected a sentence")
        if tasks.setdefault(index, sentence) != sentence:
            raise ValueError(f"{where}: task_index {index} stands for {tasks[index]!r} and for {sentence!r}")
    return tasks


def read_episodes(folder: Path, videos: Sequence[str]) -> list[dict[str, Any]]:
    """Entries of meta/episodes in the order of their `episode_index`: those keys that the module names, of the cameras
    `videos`; and the sentences `tasks`, None where the dataset does not list them. Times may be NaN.
    """
    files = sorted((folder / EPISODES).glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{folder} has no {EPISODES}/*/*.parquet")
    whole = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    whole += [f"videos/{key}/{place}" for key in videos for place in ("chunk_index", "file_index")]
    times = [f"videos/{key}/{place}" for key in videos for place in ("from_timestamp", "to_timestamp")]
    entries = []
    for path in files:
        table = read_columns(path, str(path.relative_to(folder)), [*whole, *times], optional=["tasks"])
        columns: dict[str, list] = {key: whole_numbers(table, key, str(path)) for key in whole}
        columns |= {key: _floats(table, key, str(path)) for key in times}
        columns["tasks"] = table.column("tasks").to_pylist() if "tasks" in table.column_names else [None] * len(table)
        for row, sentences in enumerate(columns["tasks"]):
            known = isinstance(sentences, list) and all(isinstance(sentence, str) for sentence in sentences)
            if sentences is not None and not known:
                raise ValueError(f"{path}: tasks of row {row} is {_short(sentences)}, expected a list of sentences")
        entries += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    counts = Counter(entry["episode_index"] for entry in entries)
    if twice := [index for index, count in counts.items() if count > 1]:
        raise ValueError(f"{folder / EPISODES}: episode_index {twice[0]} stands there {counts[twice[0]]} times")
    return sorted(entries, key=lambda entry: entry["episode_index"])


def check_whole(folder: Path) -> None:
    """ValueError where what meta/ says does not fit together, or a file that it leads to is not there."""
    info, content = read_info(folder), shards.read_json(folder / INFO)
    read_tasks(folder)
    videos = [key for key, feature in info.features.items() if feature["dtype"] == "video"]
    entries = read_episodes(folder, videos)
    counts = {"total_episodes": len(entries), "total_frames": sum(entry["length"] for entry in entries)}
    for key, found in counts.items():
        if content.get(key) != found:
            raise ValueError(f"{folder / INFO}: {key} is {_short(content.get(key))}, but {EPISODES} has {found}")
    for entry in entries:
        places = {info.data_path: {"data"}, **({info.video_path: set(videos)} if videos else {})}
        for template, keys in places.items():
            for key in sorted(keys):
                start = "data" if key == "data" else f"videos/{key}"
                numbers = {name: entry[f"{start}/{name}"] for name in ("chunk_index", "file_index")}
                name = fill_template(template, **({} if key == "data" else {"video_key": key}), **numbers)
                if not inside(folder, name).is_file():
                    raise ValueError(f"{name}, with episode {entry['episode_index']}, is missing in {folder}")


def read_columns(path: Path, name: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """A parquet file, or those columns of it; ValueError calls it `name` and says why it cannot be read, or which
    column it lacks.
    """
    try:
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            missing = [key for key in columns or () if key not in names]
            if not missing:
                wanted = None if columns is None else [*columns, *(key for key in optional if key in names)]
                return file.read(columns=wanted)
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing in {path.parent}") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    raise ValueError(f"{name} has no column {missing[0]!r}; it has: {', '.join(names)}")


def whole_numbers(table: pa.Table, key: str, where: str) -> list[int]:
    """A column of whole numbers from 0 on, none missing."""
    if not pa.types.is_integer(table.schema.field(key).type):
        raise ValueError(f"{where}: {key} is of type {table.schema.field(key).type}, expected whole numbers")
    values = table.column(key).to_pylist()
    for row, value in enumerate(values):
        if value is None or value < 0:
            raise ValueError(f"{where}: {key} of row {row} is {value}, expected a whole number from 0 on")
    return values


def _floats(table: pa.Table, key: str, where: str) -> list[float]:
    kind = table.schema.field(key).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ValueError(f"{where}: {key} is of type {kind}, expected numbers")
    return [math.nan if value is None else float(value) for value in table.column(key).to_pylist()]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _value(content: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in content:
        raise ValueError(f"{where} has no key {key!r}; it has: {', '.join(map(str, content)) or 'nothing'}")
    value = content[key]
    good = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if good and isinstance(value, int):
        good = abs(value) < 2**53  # what a float holds exactly
    if not good:
        raise ValueError(f"{where}: {key} is {_short(value)}, expected {_KINDS[kind]}")
    return value


def _episodes_of(splits: Mapping[str, Any], name: str, where: str) -> range:
    try:
        split_name(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    found = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", _value(splits, name, str, where))
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(f'{where}: {name} is {_short(splits[name])}, expected "first:end" such as "0:50"')
    return range(int(found[1]), int(found[2]))


def _template(content: Mapping[str, Any], key: str, fields: Sequence[str], where: str) -> str:
    text = _value(content, key, str, where)
    try:
        fill_template(text, **{field: "a" if field == "video_key" else 0 for field in fields})
    except ValueError as error:
        raise ValueError(f"{where}: {key}: {error}") from error
    return text


def _short(value: Any) -> str:
    return reprlib.repr(value)
