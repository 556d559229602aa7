"""Whole episodes, still encoded, out of a dataset that is streamed from a folder or from the Hub."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.manifest import (
    Entry,
    compare_size,
    listed,
    parse_manifest,
    read_manifest,
    shard_problems,
)
from stereovla.dataset_builder.dataset.shards import MANIFEST, ShardError, decode_row, numbers, read_json
from stereovla.sources import source_of
from stereovla.untrusted import inside, open_parquet

ROWS_PER_READ = 256


def split_revision(path: str | Path) -> tuple[str, str | None]:
    """ "owner/name@revision" -> ("owner/name", "revision"); the revision of a folder, or of a plain id, is None.
    InputError for what is neither a folder nor such an id.
    """
    with source_of(path, "dataset") as folder:
        if folder is not None:
            return str(path), None
    name, _, revision = str(path).partition("@")
    return name, revision or None


def filled_columns(file: pq.ParquetFile) -> frozenset[str]:
    """Columns that are not null in all rows, from the file's own statistics; those that it has none of count too."""
    filled: set[str] = set()
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            known = chunk.statistics is not None and chunk.statistics.has_null_count
            if not known or chunk.statistics.null_count < chunk.num_values:
                filled.add(chunk.path_in_schema)
    # a list or an image is stored in parts below its name; our names have dots themselves
    return frozenset(
        name for name in file.schema_arrow.names if any(f"{part}.".startswith(f"{name}.") for part in filled)
    )


@dataclass(frozen=True)
class OpenedShards:
    """The shards of one split as the dataset's manifest lists them: where they are, how many rows they have, and what
    is wrong with those that are not what it says, by `urls`; and the names of all splits.
    """

    splits: tuple[str, ...]
    urls: list[str]
    rows: list[int]
    bad: dict[str, str]


def open_shards(path: str | Path, split: str) -> OpenedShards:
    """Compare the files of `split` with the manifest of the dataset `path`, a folder or Hub id; ValueError where it has
    no manifest, no such split, or files of that split that the manifest does not know.
    """
    with source_of(path, "dataset") as folder:
        return _open_shards(path, folder, split)


def _open_shards(path: str | Path, folder: Path | None, split: str) -> OpenedShards:
    whole, name = _manifest(path, folder)
    entries = _of_split(whole, split, path)
    if folder is not None:
        found = {file.relative_to(folder).as_posix() for file in (folder / "data").glob("*.parquet")}
        for entry in entries:
            inside(folder, entry["path"])
        problems, start = shard_problems(folder, entries), f"{folder}/"
    else:
        repository, _, sha = name.partition("@")
        tree = HfApi().list_repo_tree(repository, "data", repo_type="dataset", revision=sha)
        files = {item.path: item for item in tree if isinstance(item, RepoFile)}
        found, start = set(files), f"hf://datasets/{name}/"
        problems = {entry["path"]: text for entry in entries if (text := _remote_problem(files, entry))}
    known = {entry["path"] for entry in entries}
    more = sorted(name for name in found if name.startswith(f"data/{split}-") and name not in known)
    if more:
        raise ValueError(f"dataset {path} has {', '.join(more[:5])}, which {MANIFEST} does not list: `check` names all")
    return OpenedShards(
        splits=_splits(whole),
        urls=[start + entry["path"] for entry in entries],
        rows=[entry["rows"] for entry in entries],
        bad={start + name: text for name, text in problems.items()},
    )


def _manifest(path: str | Path, folder: Path | None) -> tuple[list[Entry], str]:
    """The entries of a dataset's manifest, and the folder's name, or of one on the Hub owner/name@commit: what is read
    later is of this state too.
    """
    if folder is not None:
        return read_manifest(folder), str(folder)
    name, revision = split_revision(path)
    sha = HfApi().dataset_info(name, revision=revision).sha
    file = hf_hub_download(name, MANIFEST.as_posix(), repo_type="dataset", revision=sha)
    return parse_manifest(read_json(Path(file)), f"{MANIFEST} of {path}"), f"{name}@{sha}"


def _splits(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry["split"] for entry in entries))


def open_splits(path: str | Path) -> tuple[str, ...]:
    """Names of the splits of a dataset, a folder or Hub id, by its manifest; ValueError where it has none."""
    with source_of(path, "dataset") as folder:
        return _splits(_manifest(path, folder)[0])


def _of_split(entries: Sequence[Entry], split: str, path: str | Path) -> list[Entry]:
    own = sorted((entry for entry in entries if entry["split"] == split), key=lambda entry: entry["path"])
    if not own:
        splits = ", ".join(dict.fromkeys(entry["split"] for entry in entries))
        raise ValueError(f"dataset {path} has no split {split!r}; it has: {splits}")
    return own


def _remote_problem(files: Mapping[str, RepoFile], entry: Entry) -> str | None:
    """What is wrong with a shard on the Hub, which knows the SHA-256 of large files."""
    file = files.get(entry["path"])
    if file is None:
        return "missing"
    if problem := compare_size(file.size, entry):
        return problem
    if file.lfs is not None and file.lfs.sha256 != entry["sha256"]:
        return "its SHA-256 differs from the manifest's"
    return None


class EpisodeSource:
    """The shards of one split, as the dataset's manifest lists them, read one after the other, images as bytes. Those
    that are missing, or not what was built, are found when it is opened (ShardError).

    A shard that fails is tried again `retries` times, after `backoff_s`, twice that, and so on, from the last whole
    episode on; then ShardError names it. Where the shard has checksums (ours have), they are verified.

    Args:
        path: folder or Hub id (`id@revision` for one revision) of a dataset with the columns of `schema.ROW`.
        split: "train", "validation", ...
        columns: optional columns that must be there; of the other optional ones only those in `wanted` are read, where
            present; None = all.
        skip: whether shards that are not the manifest's may be there, and be passed over; reading one of them is
            ShardError at once.

    Attributes:
        splits: names of all splits.
        views: names of the views, of which only left and right are in every row.
        filled: columns of the first shard that hold anything but null.
        shards: their paths or URLs.
        rows: as many as the manifest says that each has.
        bad: {shard: what is wrong with it} of those that are not the manifest's.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        columns: Sequence[str] = (),
        wanted: Sequence[str] | None = (),
        retries: int = 3,
        backoff_s: float = 0.5,
        skip: bool = False,
    ):
        self.path, self.split, self.retries, self.backoff_s = str(path), split, retries, backoff_s
        opened = open_shards(path, split)
        self.shards, self.rows, self.bad = opened.urls, opened.rows, opened.bad
        if self.bad and not skip:
            raise ShardError(
                f"{len(self.bad)} of {len(self.shards)} shards of dataset {path}, split {split!r}, are not those of "
                f"its manifest: {listed(self.bad)}. Fetch or build them again, or skip bad shards"
            )
        self.splits = opened.splits
        self._fields, self.filled = self._first_schema(skip)
        self.views = schema.views_of(self._fields.names)
        schema.check_columns(self._fields.names, source=f"dataset {path}, split {split!r},", needed=columns)
        if wanted is not None:
            chosen = {column.key for column in schema.ROW if not column.optional} | {*columns, *wanted}
            self._fields = pa.schema([field for field in self._fields if field.name in chosen])

    def _first_schema(self, skip: bool) -> tuple[pa.Schema, frozenset[str]]:
        """Columns of the first shard, and those that hold anything; with `skip`, of the first one that can be read."""
        for number in range(len(self.shards)):
            if self.shards[number] in self.bad and number < len(self.shards) - 1:
                continue
            for failures in range(1, self.retries + 2):
                try:
                    with self._open(number) as file:
                        return file.schema_arrow, filled_columns(file)
                except ShardError:
                    raise
                except Exception as error:  # see read
                    try:
                        self._wait_or_raise(number, 0, failures, error)
                    except ShardError:
                        if not skip or number == len(self.shards) - 1:
                            raise
        raise ValueError(f"split {self.split!r} of {self.path} has no shards")

    @contextmanager
    def _open(self, shard: int) -> Iterator[pq.ParquetFile]:
        name = self.shards[shard]
        if name in self.bad:
            raise ShardError(f"shard {name} of {self.path} is not that of the manifest: {self.bad[name]}")
        with fsspec.open(self.shards[shard], "rb") as file:
            try:
                opened = open_parquet(file, page_checksum_verification=True, pre_buffer=True)
            except pa.ArrowException:  # as of other damage, which another try may not find
                raise
            except ValueError as error:
                raise ShardError(f"shard {name} of {self.path}: {error}") from error
            yield opened

    def _wait_or_raise(self, shard: int, row: int, failures: int, error: Exception) -> None:
        """Wait longer with every failure; ShardError after the last try."""
        if failures > self.retries:
            raise ShardError(
                f"shard {self.shards[shard]} of {self.path} is unreachable, truncated or corrupt (row {row}, "
                f"{failures} tries): {type(error).__name__}: {error}"
            ) from error
        time.sleep(self.backoff_s * 2 ** (failures - 1))

    def find(self, episode: int) -> tuple[int, int]:
        """(shard, row) that episode number `episode` begins at, found without its pictures; ValueError where the split
        has none of this number.
        """
        there: set[int] = set()
        for shard in range(len(self.shards)):
            numbers_there = self._episode_numbers(shard)
            if len(rows := np.flatnonzero(numbers_there == episode)):
                return shard, int(rows[0])
            there |= set(numbers_there.tolist())
        raise ValueError(
            f"split {self.split!r} of {self.path} has no episode {episode}; it has {len(there)}, from {min(there)} to "
            f"{max(there)}"
        )

    def _episode_numbers(self, shard: int) -> np.ndarray:
        """Column episode_index of a shard."""
        failures = 0
        while True:
            try:
                with self._open(shard) as file:
                    return numbers(file.read(columns=["episode_index"]), "episode_index")
            except ShardError:
                raise
            except Exception as error:  # see read
                failures += 1
                self._wait_or_raise(shard, 0, failures, error)

    def read(self, shard: int, row: int = 0) -> Iterator[tuple[int, pa.Table]]:
        """Episodes of shard number `shard` from row `row` on, which must be the first row of an episode.

        Yields:
            (row after the episode, encoded rows of the episode).
        """
        failures = 0
        while True:
            try:
                for end, table in self._read_once(shard, row):
                    yield end, table
                    row, failures = end, 0
                return
            except ShardError:
                raise
            except Exception as error:  # what a file system, pyarrow or an HTTP client raise has no common base
                failures += 1
                self._wait_or_raise(shard, row, failures, error)

    def _read_once(self, shard: int, row: int) -> Iterator[tuple[int, pa.Table]]:
        pending = None
        with self._open(shard) as file:
            self._check_schema(file.schema_arrow, shard)
            if file.metadata.num_rows != self.rows[shard]:
                raise ShardError(
                    f"shard {self.shards[shard]} has {file.metadata.num_rows} rows, the manifest of {self.path} says "
                    f"{self.rows[shard]}"
                )
            ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
            groups = np.flatnonzero(ends > row).tolist()  # a resumed stream need not read what lies before
            position = int(ends[groups[0] - 1]) if groups and groups[0] else 0
            batches = file.iter_batches(ROWS_PER_READ, row_groups=groups, columns=self._fields.names, use_threads=False)
            for batch in batches:
                before, position = position, position + batch.num_rows
                if position <= row:
                    continue
                table = pa.Table.from_batches([batch.slice(max(0, row - before))])
                pending = table if pending is None else pa.concat_tables([pending, table])
                begin = position - pending.num_rows
                starts = np.flatnonzero(np.diff(numbers(pending, "episode_index"))) + 1
                # the last episode may go on in the next batch
                for start, stop in zip([0, *starts[:-1]], starts, strict=False):
                    yield begin + int(stop), self._checked(pending.slice(start, stop - start), shard)
                if len(starts):
                    pending = pending.slice(starts[-1])
        if pending is not None and pending.num_rows:
            yield position, self._checked(pending, shard)

    def _check_schema(self, found: pa.Schema, shard: int) -> None:
        for field in self._fields:
            kind = found.field(field.name).type if field.name in found.names else None
            if kind != field.type:
                raise ShardError(
                    f"shard {self.shards[shard]}: column {field.name} is {kind or 'missing'}, in the other shards of "
                    f"{self.path} it is {field.type}"
                )

    def _checked(self, table: pa.Table, shard: int) -> pa.Table:
        frames = numbers(table, "frame_index")
        if not np.array_equal(frames, np.arange(len(frames))):
            raise ShardError(
                f"shard {self.shards[shard]}: episode {table['episode_index'][0]} has the frames {frames[:5].tolist()}"
                " ...; an episode must start at frame 0, be contiguous and lie in one shard"
            )
        return table


def read_episode(path: str | Path, split: str, episode: int) -> list[dict[str, Any]]:
    """All rows of one episode of a folder or Hub dataset, in their order, with every column that they have; images as
    the bytes of their files, the rest as `shards.decode_row` gives it. ValueError where there is no such episode.
    """
    source = EpisodeSource(path, split, wanted=None)
    _, table = next(source.read(*source.find(episode)))
    return [decode_row(row, images=False) for row in table.to_pylist()]
