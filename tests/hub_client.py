"""Processes that talk to the local Hub with the libraries as they are."""

import os
from contextlib import contextmanager
from pathlib import Path

from fresh_process import forks


def environment(url: str, home: Path) -> dict[str, str]:
    """Environment in which the libraries take `url` for the Hub and `home` for their caches."""
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "writer", "HF_HUB_DISABLE_XET": "1"}
    ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | ours | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


@contextmanager
def client(url: str, folder: Path, ours: bool):
    """A `fresh_process.Client` whose caches and working folder are in `folder`.

    Args:
        ours: whether the modules of this project can be imported, as where it is installed.
    """
    with forks(folder, environment(url, folder / "home"), isolated=not ours) as found:
        yield found
