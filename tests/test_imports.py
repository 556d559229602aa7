"""The import rules of the house, read from the syntax tree: which room may import which."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
SCRIPTS = ("train", "push_to_hub")
ALLOWED = {
    "modeling_stereovla": set(),
    "processing": set(),
    "simulation": set(),
    "dataset_builder": {"simulation", "processing"},
    "evaluation": {"simulation"},
    "serving": set(),
    "training": {"modeling_stereovla", "processing", "dataset_builder"},
    "train": {"modeling_stereovla", "processing", "dataset_builder", "training"},
    "sharing": {"dataset_builder"},
    "push_to_hub": {"dataset_builder", "sharing"},
}
REMOTE_CODE = ("modeling_stereovla", "processing")
# what a stranger's machine has when it loads a model from the Hub
REMOTE_PACKAGES = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors"}


def sources(room: str) -> list[Path]:
    return [ROOT / f"{room}.py"] if room in SCRIPTS else sorted((ROOT / room).glob("**/*.py"))


def absolute_imports(path: Path) -> set[str]:
    """Top-level names of the packages that `path` imports anywhere, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_every_room_has_its_rule():
    assert {*ROOMS, *SCRIPTS} - {*ALLOWED} == {"benchmarks"}  # which may import all of them


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room):
    paths = sources(room)
    assert paths, f"there is no {room}"
    for path in paths:
        ours = absolute_imports(path) & {*ROOMS, *SCRIPTS} - {room}
        assert ours <= ALLOWED[room], f"{path.name} imports {sorted(ours - ALLOWED[room])}"


def test_remote_code_needs_only_what_loading_from_the_hub_may_need():
    import sys

    for room in REMOTE_CODE:
        for path in sources(room):
            # conversion and tokenizer training run on the maker's machine and do not ship
            if path.name == "__init__.py" or path.name.startswith("convert_") or path.name == "text_tokenizer.py":
                continue
            foreign = absolute_imports(path) - REMOTE_PACKAGES - set(sys.stdlib_module_names)
            assert not foreign, f"{path.name} needs {sorted(foreign)}"


def test_remote_code_is_flat_and_its_file_names_are_unique():
    names = [path.name for room in REMOTE_CODE for path in sources(room) if path.name != "__init__.py"]
    assert len(names) == len(set(names))
    for room in REMOTE_CODE:
        assert all(path.parent == ROOT / room for path in sources(room))


def test_remote_code_imports_its_files_in_the_form_that_transformers_finds():
    """transformers ships the files that it finds in this form, line by line, with a regular expression."""
    form = re.compile(r"^\s*from \.(\w+) import [\w, ]+$")
    for room in REMOTE_CODE:
        modules = {path.stem for path in sources(room)}
        for path in sources(room):
            if path.name == "__init__.py":
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.match(r"\s*(from|import) \.", line):
                    match = form.match(line)
                    assert match and match[1] in modules, f"{path.name}:{number}: {line}"


def test_shipped_files_never_import_converters():
    for room in REMOTE_CODE:
        for path in sources(room):
            if not path.name.startswith("convert_"):
                assert "from .convert_" not in path.read_text(), path.name


def test_files_that_read_data_never_import_mujoco():
    makers = {"build.py", "recording.py", "pipeline.py"}
    for path in sources("dataset_builder"):
        if path.name not in makers:
            text = path.read_text()
            assert not absolute_imports(path) & {"mujoco", "simulation"}, path.name
            assert path.name == "__main__.py" or not re.search(r"dataset_builder(\.| import )(build|recording)", text)


def test_no_forbidden_packages():
    for room in ALLOWED:
        for path in sources(room):
            forbidden = {"torchvision", "timm", "pickle", "dill"}
            if path.name == "convert_preprocessor.py":
                # the release's statistics are a pickle; this file derives a reader that looks up next to nothing
                used = {
                    node.attr
                    for node in ast.walk(ast.parse(path.read_text()))
                    if isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "pickle"
                }
                assert used == {"Unpickler"}
                forbidden -= {"pickle"}
            assert not absolute_imports(path) & forbidden, path
