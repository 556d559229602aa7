"""Whole episodes, still encoded, out of a dataset that is streamed from a folder or from the Hub."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset_builder

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.shards import ShardError, numbers
from stereovla.untrusted import inside

ROWS_PER_READ = 256


def split_revision(path: str | Path) -> tuple[str, str | None]:
    """ "owner/name@revision" -> ("owner/name", "revision"); the revision of a folder, or of a plain id, is None."""
    if Path(path).is_dir():
        return str(path), None
    name, _, revision = str(path).partition("@")
    return name, revision or None


class EpisodeSource:
    """The shards of one split, read one after the other, images as bytes.

    A shard that fails is tried again `retries` times, after `backoff_s`, twice that, and so on, from the last whole
    episode on; then ShardError names it. Where the shard has checksums (ours have), they are verified.

    Args:
        path: folder or Hub id (`id@revision` for one revision) of a dataset with the columns of `schema.ROW`.
        split: "train", "validation", ...
        columns: optional columns that must be there; of the other optional ones only those in `wanted` are read, where
            present.
        skip: whether a first shard that cannot be read may be passed over when looking for the columns.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        columns: Sequence[str] = (),
        wanted: Sequence[str] = (),
        retries: int = 3,
        backoff_s: float = 0.5,
        skip: bool = False,
    ):
        self.path, self.split, self.retries, self.backoff_s = str(path), split, retries, backoff_s
        if Path(path).is_dir() and not any(Path(path).glob("**/*.parquet")):
            raise ValueError(f"{path} has no parquet files: is this folder a dataset?")
        name, revision = split_revision(path)
        files = load_dataset_builder(name, revision=revision).config.data_files or {}
        if split not in files:
            raise ValueError(f"dataset {path} has no split {split!r}; it has: {', '.join(files) or 'none'}")
        self.shards = [str(shard) for shard in files[split]]
        if Path(path).is_dir():  # the card of a dataset says where its shards are
            for shard in self.shards:
                inside(path, os.path.relpath(shard, path))
        self._fields = self._first_schema(skip)
        schema.check_columns(self._fields.names, source=f"dataset {path}, split {split!r},", needed=columns)
        chosen = {column.key for column in schema.ROW if not column.optional} | {*columns, *wanted}
        self._fields = pa.schema([field for field in self._fields if field.name in chosen])

    def _first_schema(self, skip: bool) -> pa.Schema:
        """Columns of the first shard; with `skip`, of the first one that can be read."""
        for number in range(len(self.shards)):
            for failures in range(1, self.retries + 2):
                try:
                    with self._open(number) as file:
                        return file.schema_arrow
                except Exception as error:  # see read
                    try:
                        self._wait_or_raise(number, 0, failures, error)
                    except ShardError:
                        if not skip or number == len(self.shards) - 1:
                            raise
        raise ValueError(f"split {self.split!r} of {self.path} has no shards")

    @contextmanager
    def _open(self, shard: int) -> Iterator[pq.ParquetFile]:
        with fsspec.open(self.shards[shard], "rb") as file:
            yield pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)

    def _wait_or_raise(self, shard: int, row: int, failures: int, error: Exception) -> None:
        """Wait longer with every failure; ShardError after the last try."""
        if failures > self.retries:
            raise ShardError(
                f"shard {self.shards[shard]} of {self.path} is unreachable, truncated or corrupt (row {row}, "
                f"{failures} tries): {type(error).__name__}: {error}"
            ) from error
        time.sleep(self.backoff_s * 2 ** (failures - 1))

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
