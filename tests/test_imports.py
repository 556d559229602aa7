"""The import rules of the house, read from the syntax tree: which room may import which, and that no circle exists."""

import re
import sys

import pytest
from house import (
    BASE,
    OUTSIDE,
    PLUGINS,
    ROOT,
    RULES,
    SHARED,
    WINGS,
    circle,
    file_graph,
    imported_names,
    room_of,
    sources,
)

REMOTE_CODE = ("modeling_stereovla", "processing")
# what a stranger's machine has when it loads a model from the Hub
REMOTE_PACKAGES = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors"}


def files_of(room: str) -> list:
    return [path for path in sources() if room_of(path) == room]


def packages(path) -> set[str]:
    """Top-level names of the packages that a file imports."""
    return {name.partition(".")[0] for name in imported_names(path)}


def test_every_folder_has_its_rule():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {*OUTSIDE}
    assert folders == {room.partition(".")[0] for room in RULES if (ROOT / room.partition(".")[0]).is_dir()}
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"setup"}
    assert scripts == {room for room in RULES if (ROOT / f"{room}.py").is_file()}


@pytest.mark.parametrize("room", RULES)
def test_rooms_import_only_what_they_may(room):
    assert files_of(room), f"there is no {room}"
    for path in files_of(room):
        others = {room_of(file) for file in file_graph()[path] - {SHARED}} - {room}
        assert others <= RULES[room], f"{path.name} imports {sorted(others - RULES[room])}"


def test_the_rules_have_a_lowest_room_and_no_circle():
    assert circle(RULES) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]  # the search finds one where there is one


def test_no_file_imports_itself_by_way_of_others():
    found = circle(file_graph())
    assert found is None, " -> ".join(str(path.relative_to(ROOT)) for path in found)


def test_plugins_import_what_they_may():
    assert {path.name for path in (ROOT / "plugins").iterdir()} == {*PLUGINS}
    for plugin, allowed in PLUGINS.items():
        files = sorted((ROOT / "plugins" / plugin / plugin).glob("*.py"))
        assert files, f"there is no {plugin}"
        for path in files:
            ours = {name.split(".")[1] for name in imported_names(path) if name.startswith("stereovla.")}
            assert ours - {"plugins"} <= allowed, path.name  # "plugins" is itself


def test_no_room_stands_apart():
    tied = {room for path, files in file_graph().items() for other in files for room in (room_of(path), room_of(other))}
    assert {*RULES} - {"__init__", "dataset_builder"} <= {*tied}  # their files are named by the table of commands
    used = {room_of(file) for files in file_graph().values() for file in files}
    ends = {"train", "push_to_hub", "__main__", "__init__", "dataset_builder", "evaluation", "dataset_builder.formats"}
    assert {*RULES} - used <= ends, f"nobody uses {sorted({*RULES} - used - ends)}"


def test_the_data_room_is_its_wings_and_its_commands():
    loose = [path.name for path in sorted((ROOT / "dataset_builder").glob("*.py"))]
    assert loose == ["__init__.py", "commands.py"]
    assert WINGS == {f"dataset_builder.{path.parent.name}" for path in (ROOT / "dataset_builder").glob("*/__init__.py")}


def test_remote_code_needs_only_what_loading_from_the_hub_may_need():
    for room in REMOTE_CODE:
        assert not RULES[room], "what ships to the Hub imports nothing of ours"
        for path in files_of(room):
            # conversion and tokenizer training run on the maker's machine and do not ship
            if path.name == "__init__.py" or path.name.startswith("convert_") or path.name == "text_tokenizer.py":
                continue
            foreign = packages(path) - REMOTE_PACKAGES - set(sys.stdlib_module_names) - {"stereovla"}
            assert not foreign, f"{path.name} needs {sorted(foreign)}"


def test_remote_code_is_flat_and_its_file_names_are_unique():
    names = [path.name for room in REMOTE_CODE for path in files_of(room) if path.name != "__init__.py"]
    assert len(names) == len(set(names))
    for room in REMOTE_CODE:
        assert all(path.parent == ROOT / room for path in files_of(room))


def test_remote_code_imports_its_files_in_the_form_that_transformers_finds():
    """transformers ships the files that it finds in this form, line by line, with a regular expression."""
    form = re.compile(r"^\s*from \.(\w+) import [\w, ]+$")
    for room in REMOTE_CODE:
        modules = {path.stem for path in files_of(room)}
        for path in files_of(room):
            if path.name == "__init__.py":
                continue
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.match(r"\s*(from|import) \.", line):
                    match = form.match(line)
                    assert match and match[1] in modules, f"{path.name}:{number}: {line}"


def test_shipped_files_never_import_converters():
    for room in REMOTE_CODE:
        for path in files_of(room):
            if not path.name.startswith("convert_"):
                assert "from .convert_" not in path.read_text(), path.name


def test_files_that_read_data_never_import_mujoco():
    makers = {"build.py", "recorder.py", "pipeline.py"}
    makers |= {f"libero{part}.py" for part in ("", "_recorder", "_demonstrations", "_replayer")}
    for room in ("dataset_builder", *WINGS):
        for path in files_of(room):
            if path.name not in makers:
                assert "mujoco" not in packages(path), path.name
                reached = {room_of(file) for file in reach(path)} if path.name != "commands.py" else set()
                assert "simulation" not in reached, f"{path.name} reaches the simulator"


def reach(path) -> set:
    """Files that are imported with `path`, and with these."""
    found, todo = set(), [path]
    while todo:
        for file in file_graph()[todo.pop()] - found:
            found.add(file)
            todo.append(file)
    return found


def test_the_files_below_the_rooms_import_none_of_them():
    assert all(not file_graph()[ROOT / f"{name}.py"] for name in BASE)
    assert not file_graph()[SHARED] and packages(SHARED) <= {"numpy", *sys.stdlib_module_names}


def test_no_forbidden_packages():
    for path in sources():
        # the release's statistics are a pickle, which convert_pickle.py reads without unpickling
        assert not packages(path) & {"torchvision", "timm", "pickle", "dill"}, path
