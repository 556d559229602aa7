"""Stereo pairs with known disparity that others published: folders of the classic layouts, and datasets with a column
for each view and one for the disparity.

A *pair* is {"left", "right": uint8 (H, W, 3) RGB, "disparity": float32 (H, W) px of the left view, 0 = unknown}.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Image, config, get_dataset_split_names, load_dataset, load_dataset_builder

from stereovla.dataset_builder.streaming.episodes import split_revision
from stereovla.dataset_builder.streaming.lanes import LaneStream
from stereovla.sources import existing_folder, source_of
from stereovla.untrusted import check_parquet_files, inside, open_image

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Layout:
    """Where a published set keeps its files: `views` finds the left ones; in their paths `right` and `disparity`, each
    (pattern, replacement), lead to the other two. `unit` is px per step of the disparity's values.
    """

    views: str
    right: tuple[str, str]
    disparity: tuple[str, str]
    unit: float


LAYOUTS = {
    # cvlibs.net/datasets/kitti: 16-bit PNG, 256 steps per px, 0 = unknown; occluded pixels included
    "kitti2015": Layout("training/image_2/*_10.png", ("image_2/", "image_3/"), ("image_2/", "disp_occ_0/"), 1 / 256),
    # vision.middlebury.edu/stereo, the sets of 2014 and 2021: PFM, infinite = unknown
    "middlebury": Layout("**/im0.png", ("im0.png", "im1.png"), ("im0.png", "disp0.pfm"), 1.0),
    # lmb.informatik.uni-freiburg.de: FlyingThings3D, Driving, Monkaa; clean and final pass share their disparity
    "sceneflow": Layout(
        "frames_*pass/**/left/*.png",
        ("/left/", "/right/"),
        (r"frames_\w+pass/(.+)\.png", r"disparity/\1.pfm"),
        1.0,
    ),
}
FORMATS = ("columns", *LAYOUTS)


def decode_view(data: bytes, name: str) -> np.ndarray:
    """Image file -> uint8 (H, W, 3) RGB; grey is repeated, transparency dropped. ValueError names what cannot be."""
    try:
        with open_image(data) as image:
            if image.mode not in ("RGB", "RGBA", "L", "P"):
                raise ValueError(f"Pillow's mode is {image.mode}; valid: RGB, RGBA, L, P")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}, {len(data)} bytes, is no view: {error}") from error


def read_pfm(data: bytes) -> np.ndarray:
    """A PFM of one channel -> float (H, W): three tokens of text, each with one white space after it, then rows from
    the bottom to the top, little-endian where the scale is below 0. (Pillow's reader takes no token above 10 letters,
    and Middlebury's scales can be longer.)
    """
    head = re.match(rb"Pf\s(\d+)\s+(\d+)\s([-+.\deE]+)\s", data)
    if head is None:
        raise ValueError("its header is not that of a PFM of one channel: Pf, width, height, scale")
    width, height, scale = int(head[1]), int(head[2]), float(head[3])
    if len(data) != head.end() + 4 * width * height:
        raise ValueError(f"it has {len(data) - head.end()} bytes of numbers; {width} x {height} need 4 each")
    return np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=head.end()).reshape(height, width)[::-1]


def decode_disparity(data: bytes | Sequence[Any], unit: float, name: str) -> np.ndarray:
    """File or numbers -> float32 (H, W) px, 0 = unknown.

    Args:
        data: bytes of a PFM (Pf, one channel), of a TIFF of floats or of a PNG or TIFF of integers; or numbers (H, W).
            What is 0, negative, infinite or NaN is unknown; the scale in a PFM's header is not applied: Middlebury's
            values are px whatever theirs says.
        unit: px per step; negative where a set stores disparities below 0.
        name: for errors.
    """
    if isinstance(data, bytes):
        try:
            if data.startswith(b"Pf"):
                values = read_pfm(data)
            else:
                with open_image(data, ("PNG", "TIFF")) as image:
                    if image.mode not in ("F", "I", "I;16", "L"):
                        raise ValueError(f"Pillow's mode is {image.mode}; valid: one channel, F, I, I;16 or L")
                    values = np.array(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}, {len(data)} bytes, is no disparity: {error}") from error
    else:
        values = np.asarray(data)
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {values.dtype} {values.shape}; expected numbers (height, width), or a file")
    disparity = values.astype(np.float32) * np.float32(unit)
    known = np.isfinite(disparity) & (disparity > 0)
    if not known.any() and (disparity < 0).any():
        raise ValueError(f"{name} has no positive disparity, but negative ones: is the sign of the unit {unit} right?")
    return np.where(known, disparity, np.float32(0))


def _pair(left: np.ndarray, right: np.ndarray, disparity: np.ndarray, name: str) -> dict[str, np.ndarray]:
    if not left.shape[:2] == right.shape[:2] == disparity.shape:
        shapes = f"left {left.shape[:2]}, right {right.shape[:2]}, disparity {disparity.shape}"
        raise ValueError(f"{name}: sizes (height, width) differ: {shapes}")
    return {"left": left, "right": right, "disparity": disparity}


class FilePairs:
    """Pairs of three files each: (left view, right view, disparity), read when they are asked for."""

    def __init__(self, files: Sequence[tuple[Path, Path, Path]], unit: float):
        self.files, self.unit = files, unit

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        left, right, disparity = self.files[index]
        views = [decode_view(path.read_bytes(), str(path)) for path in (left, right)]
        return _pair(*views, decode_disparity(disparity.read_bytes(), self.unit, str(disparity)), str(left))


class ColumnPairs:
    """Pairs of a dataset with columns `names` = (left, right, disparity).

    The views are images. The disparity is an image, the bytes of a file, or numbers; see `decode_disparity`. Images
    that are not in the dataset but beside it lie in `folder`.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str], unit: float, source: str, folder: Path):
        if missing := [name for name in names if name not in dataset.column_names]:
            raise ValueError(f"{source} has no column {', '.join(missing)}; it has: {', '.join(dataset.column_names)}")
        self.names, self.unit, self.source, self.folder = names, unit, source, folder
        self.dataset = dataset.select_columns(list(names))
        for name in names:
            if isinstance(dataset.features[name], Image):
                self.dataset = self.dataset.cast_column(name, Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row, data = self.dataset[int(index)], []
        for name in self.names:
            value = row[name]
            if isinstance(value, dict):  # an image that is not decoded: its file, in the dataset or beside it
                stored, path = value["bytes"], value["path"]
                if stored is None:
                    stored = inside(self.folder, os.path.relpath(path, self.folder)).read_bytes()
                value = stored
            data.append(value)
        where = [f"{self.source}, row {index}, {name}" for name in self.names]
        views = [decode_view(value, name) for value, name in zip(data[:2], where, strict=False)]
        return _pair(*views, decode_disparity(data[2], self.unit, where[2]), f"{self.source}, row {index}")


def list_files(folder: str | Path, form: str) -> list[tuple[Path, Path, Path]]:
    """(left, right, disparity) of every pair under `folder`, in the order of the left views' paths; ValueError names
    the first file that is missing and their number.
    """
    layout, folder = LAYOUTS[form], existing_folder(folder, f"set of {form}")
    files, missing = [], []
    for left in sorted(folder.glob(layout.views)):
        name = left.relative_to(folder).as_posix()
        others = [inside(folder, re.sub(*rule, name)) for rule in (layout.right, layout.disparity)]
        files.append((inside(folder, name), *others))
        missing += [path for path in others if not path.is_file()]
    if not files:
        raise ValueError(f"{folder} has no file {layout.views}: is it a folder of {form}?")
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} files of {form}, the first is {missing[0]}")
    return files


def open_pairs(
    sources: Sequence[str], form: str, split: Split, held_out: float, columns: Sequence[str], unit: float
) -> FilePairs | ColumnPairs:
    """Pairs of one split of a set.

    Args:
        sources: folders of one layout, taken together; or for "columns" one dataset, folder or Hub id (`id@revision`).
        form: one of `FORMATS`.
        held_out: share of the disparities, the last ones in the order of paths or rows, whose pairs are the split
            "validation" where the dataset has none of its own.
        columns: names of (left, right, disparity) for "columns".
        unit: px per step of the disparity for "columns"; the layouts know their own.
    """
    if form in LAYOUTS:
        files = [file for source in sources for file in list_files(source, form)]
        # by disparity: two renderings of a scene are not to be on both sides
        maps = list(dict.fromkeys(disparity for *_, disparity in files))
        chosen = {maps[index] for index in _range(len(maps), split, held_out, ", ".join(sources))}
        return FilePairs([file for file in files if file[2] in chosen], LAYOUTS[form].unit)
    if len(sources) != 1:
        raise ValueError(f"{len(sources)} datasets with columns are given ({', '.join(sources)}); give one")
    name, revision = split_revision(sources[0])
    with source_of(sources[0], "dataset"):
        names = get_dataset_split_names(name, revision=revision)
        files = load_dataset_builder(name, revision=revision).config.data_files or {}
        check_parquet_files(file for files_of_split in files.values() for file in files_of_split)
    whole = "validation" in names
    dataset = load_dataset(name, revision=revision, split=split if whole else "train")
    if not whole:
        dataset = dataset.select(_range(len(dataset), split, held_out, name))
    folder = Path(name) if Path(name).is_dir() else Path(config.HF_CACHE_HOME)
    return ColumnPairs(dataset, columns, unit, f"{name}, split {split}", folder)


def _range(count: int, split: Split, held_out: float, source: str) -> range:
    last = max(1, round(held_out * count))
    if last >= count:
        raise ValueError(f"{source} has {count} pairs; with {held_out:g} of them held out none is left to learn from")
    return range(count - last, count) if split == "validation" else range(count - last)


class PairStream(LaneStream):
    """Endless stream of the pairs of a set, each with a `seed` of what is drawn for it; every epoch in another order.

    Args:
        pairs: what is streamed.
        seed: everything follows from it and from how many pairs came before.
        lanes, rank, world_size: see `LaneStream`; sample n of the stream belongs to lane n % lanes.
    """

    def __init__(
        self, pairs: FilePairs | ColumnPairs, *, seed: int = 0, lanes: int = 8, rank: int = 0, world_size: int = 1
    ):
        super().__init__(lanes, rank, world_size)
        self.pairs, self.seed = pairs, seed

    def _identity(self) -> dict[str, Any]:
        return {"pairs": len(self.pairs), "seed": self.seed, "lanes": self.lanes}

    def _start(self) -> dict[str, Any]:
        return {"drawn": 0}

    def _lane(self, lane: int, position: dict[str, Any]) -> Iterator[dict[str, Any]]:
        shuffled, order = -1, None
        while True:
            number = position["drawn"] * self.lanes + lane
            epoch, place = divmod(number, len(self.pairs))
            if epoch != shuffled:
                shuffled, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs))
            position["drawn"] += 1
            seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0] >> 1)
            yield {**self.pairs[int(order[place])], "seed": seed}
