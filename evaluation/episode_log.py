"""One JSON object per finished episode, appended to a file that survives an interruption at any moment."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from stereovla.sources import InputError


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON in one step: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_records(path: Path) -> dict[int, dict[str, Any]]:
    """{seed: record} of an episodes.jsonl, {} where there is none; without a last line that is not whole. InputError
    for a damaged one.
    """
    records = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else (), 1):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{str(path)!r}, line {number}: no JSON ({error}); --restart True begins anew"
                ) from error
            records[record["seed"]] = record
    return records


def episodes_wanted(folder: Path) -> int:
    """How many episodes were last to be rolled out into `folder`; 0 where run.json, or one of older versions, does not
    say.
    """
    run = folder / "run.json"
    return json.loads(run.read_text(encoding="utf-8")).get("wanted", 0) if run.is_file() else 0


class EpisodeLog:
    """The finished episodes of one policy in `folder`: options.json, which must not change, and episodes.jsonl.

    A last line that an interruption cut off is dropped, so its seed is run again. Damage anywhere else is an error, and
    so is another process that writes there.

    Args:
        options: what results depend on, as JSON; other options than those in the folder are an InputError.
        restart: forget the results that are there.
    """

    def __init__(self, folder: Path, options: dict[str, Any], restart: bool = False):
        self.path = folder / "episodes.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "options.json"
        self._lock = (folder / "lock").open("a")  # until this process ends, however it does
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{str(folder)!r}: another process rolls out there; wait for it or end it") from error
        if restart:
            self.path.unlink(missing_ok=True)
            saved.unlink(missing_ok=True)
        if saved.is_file():
            before = json.loads(saved.read_text(encoding="utf-8"))
            changed = [
                f"{key} was {before.get(key)!r} and is now {options.get(key)!r}"
                for key in sorted({*before, *options})
                if before.get(key) != options.get(key)
            ]
            if changed:
                raise InputError(
                    f"{str(folder)!r} holds results under other options: {'; '.join(changed)}. Take another --out or "
                    "--label, or --restart True to replace them"
                )
        write_json(saved, options)
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_bytes(whole)
            os.replace(temporary, self.path)
        self.records = read_records(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Keeps the record of one finished episode; it is on the disk when this returns."""
        self.records[record["seed"]] = record
        with self.path.open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
