"""The plugin's tests run where LeRobot is installed, beside stereovla, with which they compare (see the README)."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
collect_ignore_glob = [] if find_spec("lerobot") else ["test_*.py"]
sys.path.insert(0, str(ROOT / "tests"))  # of the repository: tiny_checkpoint


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny checkpoint of each kind, with random weights."""
    from tiny_checkpoint import save_tiny_checkpoint, save_tiny_depthvla

    folder = tmp_path_factory.mktemp("models")
    return {
        "stereovla": save_tiny_checkpoint(folder / "stereovla", direct_probability=0.5),
        "depthvla": save_tiny_depthvla(folder / "depthvla", views=["left", "right"]),
    }
