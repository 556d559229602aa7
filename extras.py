"""What a room needs beyond the core packages, and what to install where it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports within need the extra `name` of setup.py; ModuleNotFoundError says so where one of them fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] == "stereovla":
            raise
        raise ModuleNotFoundError(
            f'{error.name} is not installed; it comes with the extra "{name}": pip install "stereovla[{name}]"',
            name=error.name,
        ) from error
