"""The examples of README and docs, run as a stranger would: from another folder, without the package on the path."""

import re
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent


def example_of(page: str) -> str:
    """The one Python example of a page."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return example


@pytest.mark.parametrize(("page", "shape"), [("README.md", (1, 8, 7)), ("docs/inference.md", (2, 8, 7))])
def test_examples_run_in_a_fresh_process(page, shape, fresh, tmp_path):
    save_tiny_checkpoint(tmp_path / "demo" / "training" / "model", preset="demo")  # the model that the page names
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    ours = "[name for name in sys.modules if name.startswith('stereovla')]"
    done = fresh.run(f"{example_of(page)}import sys\nprint(actions.shape, {ours})\n", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == f"{shape} []"


def test_the_readme_keeps_its_promise_of_ten_lines():
    lines = [line for line in example_of("README.md").splitlines() if line]
    assert len(lines) <= 10, f"the README promises ten lines, these are {len(lines)}"
