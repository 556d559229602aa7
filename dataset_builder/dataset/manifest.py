"""The manifest of a dataset: which shards it is made of, with their sizes, counts and SHA-256; and what else is there.

A shard is hashed once on each machine: what was found good is kept, with the file's size, inode and time of change, in
the folder that the environment variable STEREOVLA_CACHE names, without it in HF_HOME/stereovla. So opening a dataset
again costs one look at each file.
"""

import fcntl
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from stereovla.dataset_builder.dataset.shards import MANIFEST, read_json, sha256, write_json

Entry = Mapping[str, Any]  # path, split, sha256 (text), bytes, rows, episodes (whole numbers) of one shard
_TEXTS, _NUMBERS = ("path", "split", "sha256"), ("bytes", "rows", "episodes")
_NAMED = 5  # problems that a message lists


def read_manifest(folder: Path) -> list[Entry]:
    """The entries of `folder`'s manifest, in their order; ValueError where it is missing or malformed."""
    return parse_manifest(read_json(folder / MANIFEST), str(folder / MANIFEST))


def parse_manifest(content: Any, where: str) -> list[Entry]:
    """The entries of a manifest that was read; `where` names it in errors."""
    entries = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where} lists no shards: is it a finished dataset's?")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: shard {number} is {entry!r}, expected {', '.join((*_TEXTS, *_NUMBERS))}")
        for key in (*_TEXTS, *_NUMBERS):
            value = entry.get(key)
            text = key in _TEXTS
            if not isinstance(value, str if text else int) or isinstance(value, bool) or (not text and value < 0):
                raise ValueError(
                    f"{where}: {key} of shard {number} is {value!r}, expected {'text' if text else 'a whole number'}"
                )
        if not re.fullmatch(r"data/[^/]+\.parquet", entry["path"]):
            raise ValueError(f"{where}: path of shard {number} is {entry['path']!r}, expected data/NAME.parquet")
    counts = Counter(entry["path"] for entry in entries)
    if twice := [path for path, count in counts.items() if count > 1]:
        raise ValueError(f"{where} names {twice[0]} twice")
    return entries


def count_splits(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """{split: {"episodes", "frames", "shards"}}, as in meta/info.json."""
    splits: dict[str, dict[str, int]] = {}
    for entry in entries:
        counts = splits.setdefault(entry["split"], {"episodes": 0, "frames": 0, "shards": 0})
        counts["episodes"] += entry["episodes"]
        counts["frames"] += entry["rows"]
        counts["shards"] += 1
    return splits


def count_problems(info: Mapping[str, Any], entries: Sequence[Entry]) -> list[str]:
    """Splits of meta/info.json that are not those of the manifest."""
    said, counted = info.get("splits"), count_splits(entries)
    said = said if isinstance(said, dict) else {}
    return [
        f"meta/info.json: split {split!r} has {said.get(split)}, {MANIFEST} says {counted.get(split)}"
        for split in sorted({*said, *counted})
        if said.get(split) != counted.get(split)
    ]


def shard_problems(folder: Path, entries: Sequence[Entry]) -> dict[str, str]:
    """{path: what is wrong} of those shards of `folder` that are not the manifest's: missing, of another size, changed.
    Each is hashed once on this machine, on all cores; other processes wait for the one that does it.
    """
    problems = {entry["path"]: problem for entry in entries if (problem := size_problem(folder, entry))}
    rest = [entry for entry in entries if entry["path"] not in problems]
    with _verified(folder) as known:
        fresh = [entry for entry in rest if known.get(entry["path"]) != _state(folder, entry)]
        states = {entry["path"]: _state(folder, entry) for entry in fresh}  # from before its bytes are read
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock to the others
            hashes = pool.map(lambda entry: sha256(folder / entry["path"]), fresh)
            bar = tqdm(hashes, total=len(fresh), desc="comparing with the manifest", unit="shard", disable=None)
            for entry, found in zip(fresh, bar, strict=True):
                if found == entry["sha256"]:
                    known[entry["path"]] = states[entry["path"]]
                else:
                    problems[entry["path"]] = "its SHA-256 differs from the manifest's: changed after it was built"
    return problems


def size_problem(folder: Path, entry: Entry) -> str | None:
    """What is wrong with a shard at first sight."""
    path = folder / entry["path"]
    if not path.is_file():
        return "missing"
    return compare_size(path.stat().st_size, entry)


def compare_size(size: int, entry: Entry) -> str | None:
    """What the size of a file says."""
    if size == entry["bytes"]:
        return None
    return f"{'truncated' if size < entry['bytes'] else 'too long'}, {size} of {entry['bytes']} bytes"


def listed(problems: Mapping[str, str]) -> str:
    """Problems by path in one line, the first of them."""
    lines = [f"{path}: {problem}" for path, problem in problems.items()]
    return "; ".join(lines[:_NAMED]) + (f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else "")


def _state(folder: Path, entry: Entry) -> list[Any]:
    """What a shard that was found good must still have; its time of change moves with every byte written."""
    found = (folder / entry["path"]).stat()
    return [entry["sha256"], found.st_size, found.st_ino, found.st_ctime_ns]


@contextmanager
def _verified(folder: Path) -> Iterator[dict[str, list[Any]]]:
    """{path: state} of the shards of `folder` that were found good on this machine, to be added to; one process at a
    time. Where it cannot be kept, a warning says so.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    path = Path(os.environ.get("STEREOVLA_CACHE") or Path(HF_HOME) / "stereovla") / "verified" / f"{name}.json"
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(f"{path} cannot be kept ({error}): {folder} is hashed each time it is opened", stacklevel=4)
            yield {}
            return
        try:
            known = dict(read_json(path)["shards"])
        except (ValueError, KeyError, TypeError):  # not there yet, or damaged: everything is hashed
            known = {}
        before = dict(known)
        yield known
        if known != before:
            write_json(path, {"folder": str(folder.resolve()), "shards": known})
