"""Sets of pictures with a true number for each pixel that others published: folders of files, and datasets with
columns; streamed in a random order that resumes.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from datasets import Dataset, Image, config, get_dataset_split_names, load_dataset, load_dataset_builder

from stereovla.dataset_builder.formats.pixel_maps import MAP_SUFFIXES
from stereovla.dataset_builder.streaming.episodes import split_revision
from stereovla.dataset_builder.streaming.lanes import LaneStream
from stereovla.sources import existing_folder, source_of
from stereovla.untrusted import check_parquet_files, inside

Split = Literal["train", "validation"]
# contents of a sample's files or columns, the true numbers last, and their names for errors -> the sample
Decode = Callable[[Sequence[Any], Sequence[str]], dict[str, np.ndarray]]


class Samples(Protocol):
    """What can be asked for by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class FileSamples:
    """Samples of some files each, the true numbers last, read when they are asked for."""

    def __init__(self, files: Sequence[tuple[Path, ...]], decode: Decode):
        self.files, self.decode = files, decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        paths = self.files[index]
        return self.decode([path.read_bytes() for path in paths], [str(path) for path in paths])


class ColumnSamples:
    """Samples of a dataset with columns `names`, the true numbers last.

    Views are images. The true numbers are an image, the bytes of a file, or numbers. Images that are not in the dataset
    but beside it lie in `folder`.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str], decode: Decode, source: str, folder: Path):
        if missing := [name for name in names if name not in dataset.column_names]:
            raise ValueError(f"{source} has no column {', '.join(missing)}; it has: {', '.join(dataset.column_names)}")
        self.names, self.decode, self.source, self.folder = names, decode, source, folder
        self.dataset = dataset.select_columns(list(names))
        for name in names:
            if isinstance(dataset.features[name], Image):
                self.dataset = self.dataset.cast_column(name, Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row, contents = self.dataset[int(index)], []
        for name in self.names:
            value = row[name]
            if isinstance(value, dict):  # an image that is not decoded: its file, in the dataset or beside it
                stored, path = value["bytes"], value["path"]
                if stored is None:
                    stored = inside(self.folder, os.path.relpath(path, self.folder)).read_bytes()
                value = stored
            contents.append(value)
        return self.decode(contents, [f"{self.source}, row {index}, {name}" for name in self.names])


def list_files(folder: str | Path, form: str, views: str, rules: Sequence[tuple[str, str]]) -> list[tuple[Path, ...]]:
    """The files of every sample under `folder`, in the order of their views' paths; ValueError names the first file
    that is missing and their number.

    Args:
        form: name of the layout, for errors.
        views: finds the first file of each sample.
        rules: (pattern, replacement) that lead from its path to the others'. A replacement that ends in ".*" stands for
            the one file there with a suffix of `MAP_SUFFIXES`.
    """
    folder, files, missing = existing_folder(folder, f"set of {form}"), [], []
    for view in sorted(path for path in folder.glob(views) if path.is_file()):
        name = view.relative_to(folder).as_posix()
        others = [_file(folder, re.sub(*rule, name)) for rule in rules]
        files.append((inside(folder, name), *others))
        missing += [path for path in others if not path.is_file()]
    if not files:
        raise ValueError(f"{folder} has no file {views}: is it a folder of {form}?")
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} files of {form}, the first is {missing[0]}")
    return files


def _file(folder: Path, name: str) -> Path:
    path = inside(folder, name)
    if path.suffix == ".*":
        stem = name.removesuffix(".*")
        there = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
        found = [other.suffix for other in there if other.suffix in MAP_SUFFIXES]
        if len(found) > 1:
            raise ValueError(f"{folder} has several files {name} ({', '.join(found)}); leave one of them there")
        path = inside(folder, stem + found[0]) if found else path
    return path


def split_files(
    files: Sequence[tuple[Path, ...]], split: Split, held_out: float, source: str
) -> list[tuple[Path, ...]]:
    """Those of one split. They are divided by the files of the true numbers: two renderings of a scene are not to be on
    both sides.
    """
    maps = list(dict.fromkeys(truth for *_, truth in files))
    chosen = {maps[index] for index in _range(len(maps), split, held_out, source)}
    return [file for file in files if file[-1] in chosen]


def open_columns(
    sources: Sequence[str], split: Split, held_out: float, names: Sequence[str], decode: Decode
) -> ColumnSamples:
    """Samples of one split of a dataset, folder or Hub id (`id@revision`); the last rows where it has no split
    validation of its own.
    """
    if len(sources) != 1:
        raise ValueError(f"{len(sources)} datasets with columns are given ({', '.join(sources)}); give one")
    name, revision = split_revision(sources[0])
    with source_of(sources[0], "dataset"):
        there = get_dataset_split_names(name, revision=revision)
        files = load_dataset_builder(name, revision=revision).config.data_files or {}
        check_parquet_files(file for files_of_split in files.values() for file in files_of_split)
    whole = "validation" in there
    dataset = load_dataset(name, revision=revision, split=split if whole else "train")
    if not whole:
        dataset = dataset.select(_range(len(dataset), split, held_out, name))
    folder = Path(name) if Path(name).is_dir() else Path(config.HF_CACHE_HOME)
    return ColumnSamples(dataset, names, decode, f"{name}, split {split}", folder)


def _range(count: int, split: Split, held_out: float, source: str) -> range:
    last = max(1, round(held_out * count))
    if last >= count:
        raise ValueError(f"{source} has {count} samples; with {held_out:g} of them held out none is left to learn from")
    return range(count - last, count) if split == "validation" else range(count - last)


def spread(samples: Samples, count: int) -> Iterator[dict[str, Any]]:
    """`count` of the samples, or all where there are fewer, evenly spaced."""
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), count)).round()
    return (samples[int(index)] for index in chosen)


class SampleStream(LaneStream):
    """Endless stream of the samples of a set, each with a `seed` of what is drawn for it; every epoch in another order.

    Args:
        samples: what is streamed.
        seed: everything follows from it and from how many samples came before.
        lanes, rank, world_size: see `LaneStream`; sample n of the stream belongs to lane n % lanes.
    """

    def __init__(self, samples: Samples, *, seed: int = 0, lanes: int = 8, rank: int = 0, world_size: int = 1):
        super().__init__(lanes, rank, world_size)
        self.samples, self.seed = samples, seed

    def _identity(self) -> dict[str, Any]:
        return {"samples": len(self.samples), "seed": self.seed, "lanes": self.lanes}

    def _start(self) -> dict[str, Any]:
        return {"drawn": 0}

    def _lane(self, lane: int, position: dict[str, Any]) -> Iterator[dict[str, Any]]:
        shuffled, order = -1, None
        while True:
            number = position["drawn"] * self.lanes + lane
            epoch, place = divmod(number, len(self.samples))
            if epoch != shuffled:
                shuffled, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))
            position["drawn"] += 1
            seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0] >> 1)
            yield {**self.samples[int(order[place])], "seed": seed}
