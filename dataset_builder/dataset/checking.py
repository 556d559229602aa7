"""What is wrong with a dataset folder: compared with its manifest, its own description and the schema."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.folders import INFO, PARTIAL, STATS
from stereovla.dataset_builder.dataset.shards import (
    MANIFEST,
    ShardError,
    decode_row,
    numbers,
    open_shard,
    read_json,
    sha256,
)
from stereovla.untrusted import inside

_MOST = 20  # problems of rows that are listed of one shard; damage tends to hit many
_STATISTICS = {"min", "max", "q01", "q99", "mean", "std"}


def find_problems(folder: Path, *, quick: bool = False) -> list[str]:
    """One line per problem, none = the dataset is whole.

    Checked: every shard is there, has its size and SHA-256, opens, has its rows and columns; no shard too many;
        episodes are contiguous and counted from 0 in each split, frames from 0 in each episode; every row is valid with
        decoded images; counts, statistics and card are there and agree. ValueError without a readable manifest.

    Args:
        quick: look into the first row of each shard only. The SHA-256 say that all rows are those that were recorded.
    """
    entries = read_json(folder / MANIFEST)["shards"]
    listed = {entry["path"] for entry in entries}
    found = {path.relative_to(folder).as_posix() for path in (folder / "data").glob("*.parquet")}
    problems = [f"{path}: not in {MANIFEST}" for path in sorted(found - listed)]
    problems += _description_problems(folder, entries)
    next_episode: dict[str, int] = {}
    for entry in tqdm(entries, desc="checking", unit="shard", disable=None):
        problems += [f"{entry['path']}: {problem}" for problem in _shard_problems(folder, entry, next_episode, quick)]
    return problems


def _description_problems(folder: Path, entries: list[Mapping[str, Any]]) -> Iterator[str]:
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
        if "vertical_misalignment_px" not in info:
            yield f"{INFO}: vertical_misalignment_px is missing: how many rows apart the views may lie, 0 = none"
        for split in sorted({*info["splits"], *(entry["split"] for entry in entries)}):
            own = [entry for entry in entries if entry["split"] == split]
            counted = {
                "episodes": sum(entry["episodes"] for entry in own),
                "frames": sum(entry["rows"] for entry in own),
                "shards": len(own),
            }
            if info["splits"].get(split) != counted:
                yield f"{INFO}: split {split!r} has {info['splits'].get(split)}, {MANIFEST} says {counted}"
    try:
        stats = read_json(folder / STATS)
    except ValueError as error:
        yield f"{STATS}: {error}"
    else:
        for embodiment, entry in stats.items():
            for name, values in entry.items():
                if set(values) != _STATISTICS or not all(np.isfinite(values[key]).all() for key in _STATISTICS):
                    yield f"{STATS}: {name} of {embodiment} is not finite or lacks one of {sorted(_STATISTICS)}"


def _shard_problems(folder: Path, entry: Mapping[str, Any], next_episode: dict[str, int], quick: bool) -> Iterator[str]:
    first = next_episode.get(entry["split"], 0)
    next_episode[entry["split"]] = first + entry["episodes"]  # whatever is wrong here, the next shard is judged alone
    try:
        path = inside(folder, entry["path"])
    except ValueError as error:
        yield str(error)
        return
    if not path.is_file():
        yield "missing"
        return
    size = path.stat().st_size
    if size != entry["bytes"]:
        what = "truncated" if size < entry["bytes"] else "too long"
        yield f"{what}, {size} of {entry['bytes']} bytes"
        return
    if sha256(path) != entry["sha256"]:
        yield "its SHA-256 differs from the manifest's: changed after it was built"
    try:
        with open_shard(path) as file:
            names = file.schema_arrow.names
            schema.check_columns(names, source="the shard")
            table = file.read(columns=["episode_index", "frame_index"])
            yield from _index_problems(table, entry, first)
            yield from _row_problems(file, [name for name in names if name in schema.row_columns()], quick)
    except (ShardError, ValueError, OSError, pa.ArrowException) as error:
        yield str(error)


def _index_problems(table: pa.Table, entry: Mapping[str, Any], first: int) -> Iterator[str]:
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
