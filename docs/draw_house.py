"""Draws docs/images/house.svg, the rooms and what they import, from the code itself, and writes the table of rules into
docs/house.md: `python docs/draw_house.py`.

Where boxes stand is decided here. Which arrows there are is read from the code: an import between two boxes that have
no place for its arrow in `ARROWS` is an error, and so is an arrow for which there is no import any more.
"""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "house.svg"
PAGE = ROOT / "docs" / "house.md"
MARKS = ("<!-- written by docs/draw_house.py -->\n", "<!-- to here -->\n")
# one box for what belongs together; the command names what it runs, and every room may use the files of the base
SHARES_BOX = {"train": "training", "push_to_hub": "sharing"}
NOT_DRAWN = {"__main__", "__init__", "command_line", "extras", "sources", "untrusted"}
DATA = "#dbe9f6"
# box: (left, bottom, right, top), colour, what it does
BOXES = {
    "__main__": (
        (0.3, 12.75, 16.4, 13.75),
        "#eceff1",
        "the command names what it runs, and imports it when it is asked for",
    ),
    "command_line": ((0.3, 0.3, 16.4, 1.3), "#eceff1", "for every room but the two that ship to the Hub"),
    "modeling_stereovla": ((0.3, 2.0, 3.4, 3.5), "#f7e3d4", "the model and its losses;\nships to the Hub"),
    "processing": ((3.7, 2.0, 7.2, 3.5), "#f7e3d4", "samples <-> tensors;\nships to the Hub"),
    "simulation": ((7.8, 2.0, 13.0, 3.5), "#e0efdc", "the world: robots, objects,\nstereo rig, expert"),
    "serving": ((13.4, 2.0, 16.4, 3.5), "#ece2f3", "a policy behind\na WebSocket"),
    "dataset_builder": ((4.2, 4.3, 11.9, 10.0), "#eff5fb", ""),
    "dataset_builder.dataset": ((5.1, 4.6, 9.1, 5.8), DATA, "schema, shards, checks, card"),
    "dataset_builder.streaming": ((5.1, 6.3, 7.6, 7.5), DATA, "shards -> windows"),
    "dataset_builder.recording": ((8.4, 6.3, 11.6, 7.5), DATA, "simulation -> shards"),
    "dataset_builder.formats": ((4.45, 8.0, 11.6, 9.2), DATA, "LeRobot, DROID, stereo sets: in and out"),
    "training": (
        (0.3, 10.8, 6.4, 12.3),
        "#fbf0c9",
        "one loop, top to bottom, for policies and adapters;\nthe stages beside it",
    ),
    "sharing": ((6.8, 10.8, 10.6, 12.3), "#ece2f3", "cards, checks, upload,\nloading back"),
    "app": ((11.0, 10.8, 16.4, 12.3), "#ece2f3", "a page to look at a policy,\nhere or as a Space"),
    "evaluation": ((12.3, 7.6, 16.4, 9.1), "#ece2f3", "policies, rollouts,\nmetrics, report"),
}
TITLES = {
    "__main__": "stereovla",
    "command_line": "command_line.py, extras.py, sources.py, untrusted.py",
    "training": "train.py, training",
    "sharing": "push_to_hub.py, sharing",
}
# (from, to): where the arrow goes down; what imports a wing from outside has one arrow to the whole room
ARROWS = {
    ("dataset_builder.dataset", "processing"): 6.2,
    ("dataset_builder.recording", "dataset_builder.dataset"): 8.75,
    ("dataset_builder.recording", "simulation"): 10.2,
    ("dataset_builder.streaming", "dataset_builder.dataset"): 6.2,
    ("dataset_builder.streaming", "processing"): None,  # goes the way of the wing below
    ("dataset_builder.formats", "dataset_builder.dataset"): 8.0,
    ("dataset_builder.formats", "dataset_builder.recording"): 10.2,
    ("dataset_builder.formats", "dataset_builder.streaming"): 6.2,
    ("dataset_builder.formats", "processing"): 4.77,
    ("training", "modeling_stereovla"): 1.85,
    ("training", "processing"): 3.95,
    ("training", "dataset_builder"): 5.3,
    ("sharing", "dataset_builder"): 9.4,
    ("app", "dataset_builder"): 11.45,
    ("app", "evaluation"): 14.35,
    # these go the way of the two above
    ("app", "processing"): None,
    ("app", "serving"): None,
    ("app", "simulation"): None,
    ("evaluation", "simulation"): 12.65,
    ("evaluation", "serving"): 14.85,
}
OPTIONAL = {("dataset_builder.streaming", "processing")}


def plan() -> ModuleType:
    """tests/house.py: the rules, and the imports of the code."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return importlib.import_module("house")
    finally:
        sys.path.pop(0)


def rules_table() -> str:
    """The rules as a table of Markdown."""
    house = plan()
    lines = ["| room | may import |", "|---|---|"]
    for room, allowed in house.RULES.items():
        if room in NOT_DRAWN:
            continue
        wings = house.WINGS <= allowed and not room.startswith("dataset_builder")
        names = sorted(allowed - house.BASE - (house.WINGS if wings else set())) + ["dataset_builder"] * wings
        lines.append(f"| `{room}` | {', '.join(f'`{name}`' for name in sorted(names)) or 'nothing'} |")
    shipped = " and ".join(
        f"`{room}`" for room, allowed in house.RULES.items() if not allowed and room not in NOT_DRAWN
    )
    *first, last = (f"`{name}.py`" for name in sorted(house.BASE))
    base = f"{', '.join(first)} and {last}"
    return "\n".join([*lines, "", f"All but {shipped} may also import {base}.", ""])


def with_rules(page: str) -> str:
    """The page with the present table between the marks."""
    (before, _, rest), end = page.partition(MARKS[0]), MARKS[1]
    return before + MARKS[0] + "\n" + rules_table() + "\n" + end + rest.partition(end)[2]


def imports() -> set[tuple[str, str]]:
    """(from, to) for every two boxes of which one imports the other."""
    house = plan()
    found = set()
    for path, targets in house.file_graph().items():
        for target in targets:
            source, end = house.room_of(path), house.room_of(target)
            # what is "dataset_builder" itself is its commands, of all its wings
            if {source, end} & NOT_DRAWN or target == house.SHARED or source == "dataset_builder":
                continue
            source, end = SHARES_BOX.get(source, source), SHARES_BOX.get(end, end)
            found.add((source, end if source.startswith("dataset_builder") else end.partition(".")[0]))
    return {(source, end) for source, end in found if source != end}


def arrows() -> list[tuple[str, str]]:
    """The imports, each with a place in `ARROWS`; ValueError for those that have none, and for places without one."""
    found = imports()
    if lost := found - set(ARROWS):
        raise ValueError(f"no place for the arrows {sorted(lost)}; give them one in ARROWS of docs/draw_house.py")
    if left := set(ARROWS) - found - OPTIONAL:
        raise ValueError(f"nothing imports along the arrows {sorted(left)}; remove them from docs/draw_house.py")
    return sorted(found)


def described(found: Iterable[tuple[str, str]]) -> str:
    """What the picture shows, in words; it is written into the file, so that a test sees a picture that is outdated."""
    return "; ".join(f"{source} imports {end}" for source, end in found)


def draw(path: Path) -> None:
    """Writes the picture, SVG or PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "house"  # the same picture is the same file
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    ink, line = "#1f2933", "#5b6b7b"
    figure, axes = plt.subplots(figsize=(11, 9.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 16.7), ylim=(0, 14))
    axes.axis("off")

    for name, ((left, bottom, right, top), colour, text) in BOXES.items():
        shape = "round,pad=0,rounding_size=0.14"
        axes.add_patch(FancyBboxPatch((left, bottom), right - left, top - bottom, shape, fc=colour, ec=line, lw=1.1))
        middle, lines = (left + right) / 2, text.count("\n") + bool(text)
        head = (bottom + top) / 2 + 0.17 * lines if lines else top - 0.36
        title = TITLES.get(name, name.removeprefix("dataset_builder."))
        axes.text(middle, head, title, ha="center", va="center", size=11, weight="bold", color=ink)
        axes.text(middle, head - 0.27, text, ha="center", va="top", size=9, color=ink, linespacing=1.25)
    found = arrows()
    for source, end in found:
        across = ARROWS[source, end]
        if across is None:
            continue
        axes.annotate(
            "",
            xy=(across, BOXES[end][0][3]),
            xytext=(across, BOXES[source][0][1]),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.22,head_length=0.5",
                "color": line,
                "lw": 1.4,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    svg = path.suffix == ".svg"
    figure.savefig(path, dpi=110, metadata={"Date": None, "Description": described(found)} if svg else None)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        draw(Path(sys.argv[1]))  # somewhere else, such as a PNG to look at
    else:
        draw(PICTURE)
        PAGE.write_text(with_rules(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
