"""The examples of README and docs, run as a stranger would: from another folder, without the package on the path."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent


def examples_of(page: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(("page", "shape"), [("README.md", (1, 8, 7)), ("docs/inference.md", (2, 8, 7))])
def test_examples_run_in_a_fresh_process(page, shape, fresh, tmp_path):
    save_tiny_checkpoint(tmp_path / "demo" / "training" / "model", preset="demo")  # the model that the page names
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    ours = "[name for name in sys.modules if name.startswith('stereovla')]"
    done = fresh.run(f"{examples_of(page)[0]}import sys\nprint(actions.shape, {ours})\n", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == f"{shape} []"


@pytest.mark.slow
def test_the_compiled_example_runs_after_the_first(fresh, tmp_path):
    """A C++ compiler is at work for minutes."""
    save_tiny_checkpoint(tmp_path / "demo" / "training" / "model")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    first, compiled = examples_of("docs/inference.md")
    done = fresh.run(f"{first}{compiled}print(actions.shape)\n", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "torch.Size([2, 8, 7])"


def test_the_readme_keeps_its_promise_of_ten_lines():
    lines = [line for line in examples_of("README.md")[0].splitlines() if line]
    assert len(lines) <= 10, f"the README promises ten lines, these are {len(lines)}"


def test_the_readme_names_every_extra():
    told = re.search(r"the extras are (.*?)\.\n", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert sorted(re.findall(r"`(\w+)`", told)) == sorted(metadata("stereovla").get_all("Provides-Extra"))
