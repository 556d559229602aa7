"""One JSON object per finished episode, appended to a file that survives an interruption at any moment."""

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


class EpisodeLog:
    """The finished episodes of one policy in `folder`: options.json, which must not change, and episodes.jsonl.

    A last line that an interruption cut off is dropped, so its seed is run again. Damage anywhere else is an error.

    Args:
        options: what results depend on, as JSON; other options than those in the folder are an InputError.
        restart: forget the results that are there.
    """

    def __init__(self, folder: Path, options: dict[str, Any], restart: bool = False):
        self.path = folder / "episodes.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "options.json"
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
        self.records = {record["seed"]: record for record in self._read()}

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_bytes(whole)
            os.replace(temporary, self.path)
        records = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise InputError(
                    f"{str(self.path)!r}, line {number}: no JSON ({error}); --restart True begins anew"
                ) from error
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Keeps the record of one finished episode; it is on the disk when this returns."""
        self.records[record["seed"]] = record
        with self.path.open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
