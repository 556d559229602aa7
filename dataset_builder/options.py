"""Options of the commands: dataclass fields that carry their help text."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str, **more: Any) -> Any:
    """Dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text, **more})
