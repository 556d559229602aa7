"""Hands mkdocstrings the package: its sources under the name `stereovla`, whatever the clone's folder is called.

Nothing is imported: the reference is read from the sources.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parent.parent
SHARED_LINE = re.compile(r"^ +\w+(?:, \w+)+: ", re.MULTILINE)  # "height, width: px of both" among the Args


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Called by mkdocs once it has read mkdocs.yml."""
    sources = tempfile.TemporaryDirectory(prefix="stereovla-docs-")
    folder = Path(sources.name)
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    for path in [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]:
        copy = folder / "stereovla" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(SHARED_LINE.sub(joined, path.read_text(encoding="utf-8")), encoding="utf-8")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    config.extra["sources"] = sources  # which is removed when nobody holds it any more
    return config


def joined(line: re.Match) -> str:
    """Names that share a line of the Args are one name to the parser, which would take the second for a type."""
    return line[0].replace(", ", ",\N{NO-BREAK SPACE}")
