"""What is wrong with a dataset folder: compared with its manifest, its own description and the schema."""

import hashlib
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import load_dataset_builder
from tqdm.auto import tqdm

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.folders import INFO, PARTIAL, STATS
from stereovla.dataset_builder.dataset.manifest import Entry, count_problems, read_manifest, size_problem
from stereovla.dataset_builder.dataset.shards import (
    MANIFEST,
    ShardError,
    decode_row,
    numbers,
    open_shard,
    read_json,
    sha256,
)
from stereovla.dataset_builder.dataset.statistics import compute_statistics
from stereovla.untrusted import inside

_IN_ALL = (schema.RIGHT, *schema.CALIBRATION)  # columns that may be missing as a whole
_MOST = 20  # problems of rows that are listed of one shard; damage tends to hit many
_ROUNDING = 1e-4  # of a statistic, as a share of its span: sums in another order, on another processor
_STATISTICS = {"min", "max", "q01", "q99", "mean", "std"}


def find_problems(folder: Path, *, quick: bool = False) -> list[str]:
    """One line per problem, none = the dataset is whole.

    Checked: every shard is there, is no link, has its size and SHA-256, opens, has its rows and columns; no shard too
        many; episodes are contiguous and counted from 0 in each split, frames from 0 in each episode; every row is
        valid with decoded images; counts, statistics and card are there and agree; readers that go by the card find
        the manifest's files; the statistics follow from the rows; no frame is in two splits. ValueError without a
        readable manifest.

    Args:
        quick: look into the first row of each shard only. The SHA-256 say that all rows are those that were recorded;
            whether the statistics follow from them, and splits repeat one another, is not looked at.
    """
    entries = read_manifest(folder)
    listed = {entry["path"] for entry in entries}
    found = {path.relative_to(folder).as_posix() for path in (folder / "data").glob("*.parquet")}
    problems = [f"{path}: not in {MANIFEST}" for path in sorted(found - listed)]
    problems += _description_problems(folder, entries)
    next_episode: dict[str, int] = {}
    for entry in tqdm(entries, desc="checking", unit="shard", disable=None):
        problems += [f"{entry['path']}: {problem}" for problem in _shard_problems(folder, entry, next_episode, quick)]
    problems += _card_problems(folder, entries)
    if not problems and not quick:  # else a wrong row would be told again
        problems += [*_statistics_problems(folder, entries), *_repetition_problems(folder, entries)]
    return problems


def _description_problems(folder: Path, entries: list[Entry]) -> Iterator[str]:
    """Of meta/info.json, meta/stats.json and the card."""
    if (folder / PARTIAL).exists():
        yield f"{PARTIAL}: a build is at work, or was interrupted; the same command goes on"
    if not (folder / "README.md").is_file():
        yield "README.md: missing; `card` writes it"
    try:
        info = read_json(folder / INFO)
    except ValueError as error:
        yield f"{INFO}: {error}"
    else:
        if not isinstance(info, dict):
            yield f"{INFO}: it is {reprlib.repr(info)}, expected keys and values"
            info = {}
        views = info.get("views", ["left", "right"])  # older datasets name none and are pairs
        if not isinstance(views, list):
            yield f"{INFO}: views is {reprlib.repr(views)}, expected a list of names"
        elif "views" in info:
            yield from _view_problems(folder, info, entries)
        if isinstance(views, list) and "right" in views and "vertical_misalignment_px" not in info:
            yield f"{INFO}: vertical_misalignment_px is missing: how many rows apart the views may lie, 0 = none"
        yield from count_problems(info, entries)
    try:
        stats = read_json(folder / STATS)
    except ValueError as error:
        yield f"{STATS}: {error}"
    else:
        entries_of = stats.items() if isinstance(stats, dict) else [("all", stats)]
        quantities = [
            (f"{name} of {embodiment}", values)
            for embodiment, entry in entries_of
            for name, values in (entry.items() if isinstance(entry, dict) else [("everything", entry)])
        ]
        for name, values in quantities:
            good = isinstance(values, dict) and set(values) == _STATISTICS
            if not good or not all(_finite(values[key]) for key in _STATISTICS):
                yield f"{STATS}: {name} is not finite or lacks one of {sorted(_STATISTICS)}"


def _view_problems(folder: Path, info: Mapping[str, Any], entries: list[Entry]) -> Iterator[str]:
    """Views that info names and a shard has not, or the other way round; depth of nobody."""
    for entry in entries:
        try:
            with open_shard(inside(folder, entry["path"])) as file:
                names = file.schema_arrow.names
        except (ShardError, ValueError):  # told of the shard
            continue
        if info["views"] != list(found := schema.views_of(names)):
            yield f"{INFO}: views is {info['views']}, {entry['path']} has {', '.join(found)}"
    said = info.get("depth_source")
    if said is not None and not re.fullmatch(r"sensor|simulation|estimated by .+@\S+", str(said)):
        yield f"{INFO}: depth_source is {said!r}; valid: {', '.join(schema.DEPTH_SOURCES)}"


def _finite(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    numeric = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    return numeric and bool(np.isfinite(values).all())


def _card_problems(folder: Path, entries: list[Entry]) -> Iterator[str]:
    """Of the files that `datasets` and the Hub take for the splits, going by the card's metadata or by their names."""
    if not (folder / "README.md").is_file():  # told already
        return
    try:
        files = load_dataset_builder(str(folder)).config.data_files or {}
    except Exception as error:  # what a card's metadata can make `datasets` raise has no common base
        yield f"README.md: no dataset can be loaded by its metadata: {type(error).__name__}: {error}"
        return
    there = {path.relative_to(folder).as_posix() for path in (folder / "data").glob("*.parquet")}
    unknown = there - {entry["path"] for entry in entries}  # told already, as are those that are missing
    for split in sorted({*files, *(entry["split"] for entry in entries)}):
        named = {_inside(folder, str(name)) for name in files.get(split, [])}
        known = {entry["path"] for entry in entries if entry["split"] == split}
        for what, paths in (("names", named - known - unknown), ("does not name", (known & there) - named)):
            if paths:
                more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
                yield f"README.md: for the split {split!r} it {what} {sorted(paths)[0]}{more}, unlike {MANIFEST}"


def _inside(folder: Path, name: str) -> str:
    """The path within `folder` of a file there; any other as it is."""
    path = Path(name)
    for root in (folder, folder.resolve()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return name


def _statistics_problems(folder: Path, entries: list[Entry]) -> Iterator[str]:
    """Of meta/stats.json beside what follows from the rows of the split train."""
    stats = read_json(folder / STATS)
    expected = compute_statistics([folder / entry["path"] for entry in entries if entry["split"] == "train"])
    for embodiment in sorted({*stats, *expected}):
        said, follows = stats.get(embodiment, {}), expected.get(embodiment, {})
        for name in sorted({*said, *follows}):
            if name not in said or name not in follows:
                lacking = STATS if name in follows else "the split train"
                yield f"{STATS}: {name} of {embodiment} is not in {lacking}"
                continue
            for key in sorted(_STATISTICS):
                ours, theirs = np.array(follows[name][key]), np.array(said[name][key])
                span = np.array(follows[name]["max"]) - np.array(follows[name]["min"])
                if ours.shape != theirs.shape or (np.abs(ours - theirs) > _ROUNDING * (span + np.abs(ours))).any():
                    yield (
                        f"{STATS}: {key} of {name} of {embodiment} is {theirs.round(6).tolist()}, from the rows of the "
                        f"split train follows {ours.round(6).tolist()}"
                    )


def _repetition_problems(folder: Path, entries: list[Entry]) -> Iterator[str]:
    """Episodes of other splits that have frames of the split train: all views, state and action are the same."""
    own = [entry for entry in entries if entry["split"] != "train"]
    held_out = {frame: place for entry in own for frame, place in _frames(folder, entry)}
    if not held_out:
        return
    repeated: dict[tuple[str, int], list[str]] = {}
    for entry in entries:
        if entry["split"] == "train":
            for frame, (path, episode) in _frames(folder, entry):
                if frame in held_out:
                    repeated.setdefault(held_out[frame], []).append(f"{path}, episode {episode}")
    for (path, episode), places in repeated.items():
        yield f"{path}: episode {episode} repeats {len(places)} frames of the split train ({places[0]})"


def _frames(folder: Path, entry: Entry) -> Iterator[tuple[bytes, tuple[str, int]]]:
    """(hash of what a frame shows and holds, (path of its shard, its episode)) of every row."""
    with open_shard(folder / entry["path"]) as file:
        views = [schema.image_key(view) for view in schema.views_of(file.schema_arrow.names)]
        for batch in file.iter_batches(64, columns=[*views, "observation.state", "action", "episode_index"]):
            for row in batch.to_pylist():
                content = hashlib.blake2b(digest_size=16)
                for key in views:
                    content.update(b"" if row[key] is None else row[key]["bytes"])
                content.update(repr((row["observation.state"], row["action"])).encode())
                yield content.digest(), (entry["path"], row["episode_index"])


def _shard_problems(folder: Path, entry: Entry, next_episode: dict[str, int], quick: bool) -> Iterator[str]:
    first = next_episode.get(entry["split"], 0)
    next_episode[entry["split"]] = first + entry["episodes"]  # whatever is wrong here, the next shard is judged alone
    try:
        path = inside(folder, entry["path"])
    except ValueError as error:
        yield str(error)
        return
    if linked := next((part for part in (path, path.parent) if part.is_symlink()), None):
        yield f"{linked.relative_to(folder)} is a link to {linked.readlink()}, which nobody else may have"
    if problem := size_problem(folder, entry):
        yield problem
        return
    if sha256(path) != entry["sha256"]:
        yield "its SHA-256 differs from the manifest's: changed after it was built"
    try:
        with open_shard(path) as file:
            names = file.schema_arrow.names
            schema.check_columns(names, source="the shard")
            table = file.read(columns=["episode_index", "frame_index"])
            yield from _index_problems(table, entry, first)
            known = [column.key for column in schema.columns_of(names)]
            yield from _row_problems(file, [name for name in names if name in known], quick)
    except (ShardError, ValueError, OSError, pa.ArrowException) as error:
        yield str(error)


def _index_problems(table: pa.Table, entry: Entry, first: int) -> Iterator[str]:
    episodes, frames = numbers(table, "episode_index"), numbers(table, "frame_index")
    if len(episodes) != entry["rows"]:
        yield f"{len(episodes)} rows, the manifest says {entry['rows']}"
        return
    starts = np.flatnonzero(np.diff(episodes, prepend=-1))
    expected = first + np.arange(entry["episodes"])
    if not np.array_equal(episodes[starts], expected):
        yield f"episodes {episodes[starts].tolist()}, expected {expected.tolist()}"
        return
    lengths = np.diff(starts, append=len(episodes))
    if not np.array_equal(frames, np.concatenate([np.arange(length) for length in lengths])):
        yield "frame_index does not count from 0 within each episode"


def _row_problems(file: Any, columns: list[str], quick: bool) -> Iterator[str]:
    count, number = 0, 0
    for batch in file.iter_batches(1 if quick else 64, columns=columns):
        for row in batch.to_pylist():
            try:
                if absent := [key for key in _IN_ALL if row.get(key, "") is None]:
                    raise ValueError(f"row {number}: {absent[0]} is null; it is in all rows of a dataset or in none")
                schema.validate_row(decode_row(row), where=f"row {number}")
            except (ShardError, ValueError) as error:
                count += 1
                if count <= _MOST:
                    yield str(error) if str(error).startswith("row ") else f"row {number}: {error}"
            number += 1
        if quick:
            return
    if count > _MOST:
        yield f"{count - _MOST} more rows with problems"
