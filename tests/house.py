"""The plan of the house: which room may import which, and what the code imports, read from the syntax tree."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# files of the root that every room may use, but for what ships to the Hub
BASE = {"command_line", "extras", "sources", "untrusted"}
# arithmetic on numpy's arrays alone, which ships, so that it cannot stand in the base: every room may use it
SHARED = ROOT / "processing" / "rotations.py"
WINGS = {f"dataset_builder.{wing}" for wing in ("dataset", "recording", "streaming", "formats")}
# room, wing of a room, or file of the root: what it may import beside itself
RULES: dict[str, set[str]] = {
    "extras": set(),
    "command_line": set(),
    "sources": set(),
    "untrusted": set(),
    "modeling_stereovla": set(),
    "processing": set(),
    "simulation": BASE,
    "dataset_builder.dataset": {*BASE, "processing"},
    "dataset_builder.recording": {*BASE, "dataset_builder.dataset", "simulation"},
    "dataset_builder.streaming": {*BASE, "dataset_builder.dataset", "processing"},
    "dataset_builder.formats": {*BASE, *WINGS - {"dataset_builder.formats"}, "processing"},
    "dataset_builder": {*BASE, *WINGS},
    "serving": BASE,
    "training": {*BASE, *WINGS, "modeling_stereovla", "processing"},
    "evaluation": {*BASE, "serving", "simulation"},
    "app": {
        *BASE,
        "dataset_builder.dataset",
        "dataset_builder.streaming",
        "evaluation",
        "processing",
        "serving",
        "simulation",
    },
    "sharing": {*BASE, "dataset_builder.dataset", "dataset_builder.formats", "dataset_builder.streaming"},
    "train": {*BASE, *WINGS, "modeling_stereovla", "processing", "training"},
    "push_to_hub": {*BASE, "dataset_builder.dataset", "dataset_builder.formats", "sharing"},
    "__main__": BASE,
    "__init__": set(),
}
# folders of the repository that are not installed; all but the plugins may import all of it
OUTSIDE = ("benchmarks", "docs", "plugins", "tests")
# distributions of their own, and what of ours they may import: the folder of a model is their interface
PLUGINS = {"lerobot_policy_stereovla": set(), "lerobot_env_stereovla": {"simulation"}}


@cache
def sources() -> tuple[Path, ...]:
    """The files that are installed."""
    rooms = sorted({room.partition(".")[0] for room in RULES if (ROOT / room.partition(".")[0]).is_dir()})
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return (*(path for path in sorted(ROOT.glob("*.py")) if path.name != "setup.py"), *files)


def room_of(path: Path) -> str:
    """Key of `RULES` for a file: its wing where it is in one, else its room, or its own name at the root."""
    *folders, name = path.relative_to(ROOT).parts
    wing = ".".join(folders[:2])
    return wing if wing in RULES else folders[0] if folders else name.removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, function bodies included; ours begin with "stereovla."."""
    names: set[str] = set()
    package = ["stereovla", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> Path | None:
    """The file that a dotted name of ours is in: a.b of stereovla.a.b, or the name b in stereovla/a.py."""
    parts = name.split(".")
    if parts[0] != "stereovla":
        return None
    for length in (len(parts), len(parts) - 1):
        place = ROOT.joinpath(*parts[1:length])
        for candidate in (place.with_suffix(".py"), place / "__init__.py"):
            if candidate.is_file() and length > 1:
                return candidate
    return ROOT / "__init__.py"


@cache
def file_graph() -> dict[Path, set[Path]]:
    """Each file and the files of ours that it imports."""
    graph = {}
    for path in sources():
        found = {file for name in imported_names(path) if (file := file_of(name)) is not None}
        graph[path] = found - {path}
    return graph


def circle(graph: dict) -> list | None:
    """A circle of a directed graph, {node: its successors}; None where there is none."""
    finished: set = set()

    def walk(node, trail: list) -> list | None:
        if node in trail:
            return trail[trail.index(node) :]
        if node in finished:
            return None
        for after in sorted(graph.get(node, ())):
            if (found := walk(after, [*trail, node])) is not None:
                return found
        finished.add(node)
        return None

    return next((found for node in sorted(graph) if (found := walk(node, [])) is not None), None)
