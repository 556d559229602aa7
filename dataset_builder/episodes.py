"""Whole episodes, still encoded, out of a dataset that is streamed from a folder or from the Hub."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import IterableDataset, load_dataset_builder

from dataset_builder import schema
from dataset_builder.shards import ShardError, numbers

ROWS_PER_READ = 256


class EpisodeSource:
    """The shards of one split, read one after the other through `datasets` streaming, images as bytes.

    A shard that fails is tried again `retries` times, after `backoff_s`, twice that, and so on, from the last whole
    episode on; then ShardError names it.

    Args:
        path: folder or Hub id of a dataset with the columns of `schema.ROW`.
        split: "train", "validation", ...
        columns: optional columns that must be there; of the other optional ones only those in `wanted` are read, where
            present.
        revision: of a dataset on the Hub.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        *,
        columns: Sequence[str] = (),
        wanted: Sequence[str] = (),
        revision: str | None = None,
        retries: int = 3,
        backoff_s: float = 0.5,
    ):
        self.path, self.split, self.revision = str(path), split, revision
        self.retries, self.backoff_s = retries, backoff_s
        if Path(path).is_dir() and not any(Path(path).glob("**/*.parquet")):
            raise ValueError(f"{path} has no parquet files: is this folder a dataset?")
        present = list(self._open(None).features)
        schema.check_columns(present, source=f"dataset {path}, split {split!r},", needed=columns)
        required = [column.key for column in schema.ROW if not column.optional]
        self.columns = [key for key in present if key in {*required, *columns, *wanted}]
        self._dataset = self._open(self.columns)
        if len(self.shards) != self._dataset.num_shards:
            raise ShardError(f"{path}: {len(self.shards)} files are listed, {self._dataset.num_shards} can be streamed")

    def _open(self, columns: list[str] | None) -> IterableDataset:
        """The split as an iterable dataset; fills `self.shards`, the names of its files."""
        builder = load_dataset_builder(self.path, revision=self.revision, **({"columns": columns} if columns else {}))
        files = builder.config.data_files or {}
        if self.split not in files:
            raise ValueError(f"dataset {self.path} has no split {self.split!r}; it has: {', '.join(files) or 'none'}")
        self.shards = [str(name) for name in files[self.split]]
        try:
            return builder.as_streaming_dataset(split=self.split)
        except (pa.ArrowException, OSError) as error:  # the columns are read from the first file of each split
            firsts = ", ".join(str(names[0]) for names in files.values())
            raise ShardError(f"shard {self._first_broken(files)} (one of {firsts}) cannot be read: {error}") from error

    @staticmethod
    def _first_broken(files: dict[str, list[str]]) -> str:
        """Name of the first local shard without a parquet footer, to name the culprit among the first files of all
        splits.
        """
        for names in files.values():
            path = Path(str(names[0]))
            if path.is_file() and path.read_bytes()[-4:] != b"PAR1":
                return str(path)
        return "unknown"

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
                if failures > self.retries:
                    raise ShardError(
                        f"shard {self.shards[shard]} of {self.path} is unreachable, truncated or corrupt (row {row}, "
                        f"{failures} tries): {type(error).__name__}: {error}"
                    ) from error
                time.sleep(self.backoff_s * 2 ** (failures - 1))

    def _read_once(self, shard: int, row: int) -> Iterator[tuple[int, pa.Table]]:
        stream = self._dataset.shard(num_shards=len(self.shards), index=shard).with_format("arrow")
        position, pending = 0, None
        for batch in stream.iter(batch_size=ROWS_PER_READ):
            before, position = position, position + batch.num_rows
            if position <= row:
                continue
            batch = batch.slice(max(0, row - before))
            pending = batch if pending is None else pa.concat_tables([pending, batch])
            begin = position - pending.num_rows
            starts = np.flatnonzero(np.diff(numbers(pending, "episode_index"))) + 1
            for start, stop in zip(
                [0, *starts[:-1]], starts, strict=False
            ):  # the last episode may go on in the next batch
                yield begin + int(stop), self._checked(pending.slice(start, stop - start), shard)
            if len(starts):
                pending = pending.slice(starts[-1])
        if pending is not None and pending.num_rows:
            yield position, self._checked(pending, shard)

    def _checked(self, table: pa.Table, shard: int) -> pa.Table:
        frames = numbers(table, "frame_index")
        if not np.array_equal(frames, np.arange(len(frames))):
            raise ShardError(
                f"shard {self.shards[shard]}: episode {table['episode_index'][0]} has the frames {frames[:5].tolist()}"
                " ...; an episode must start at frame 0, be contiguous and lie in one shard"
            )
        return table
