"""The documentation: its commands are ones that exist, its links lead somewhere, its pages are in the site, and what is
drawn or written from the code is up to date.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from stereovla.__main__ import COMMANDS
from stereovla.command_line import Command, check_flags, named, with_flags

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PLACEHOLDER = re.compile(r"[A-Z_]+|\.\.\.")  # NAME, ... : what the reader fills in
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def quoted(page: Path) -> Iterator[list[str]]:
    """The words of every command that a page quotes, in blocks and within lines."""
    text = page.read_text(encoding="utf-8")
    lines = [line.strip() for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))]:
        if re.match(r"(stereovla|python|accelerate|ACCELERATE_USE_CPU=true accelerate|\.venv/bin/python) ", line):
            yield shlex.split(line, comments=True)


def check_command(words: list[str], commands: dict | Command) -> None:
    """ValueError where the words that follow `stereovla` are no command with options of its own."""
    while isinstance(commands, dict):
        if not words or words[0] == "--help" or PLACEHOLDER.fullmatch(words[0]):
            return
        if words[0] not in commands:
            raise ValueError(f"{words[0]} is none of {', '.join(commands)}")
        entry = commands[words[0]]
        words, commands = words[1:], entry if isinstance(entry, Command) else entry[1]
    check_flags(with_flags([word for word in words if word != "..."], commands.positional), named(commands.options))


def check_words(words: list[str]) -> bool:
    """Whether the words hold something of ours that was checked; ValueError where it is wrong."""
    if "stereovla" in words:
        check_command(words[words.index("stereovla") + 1 :], COMMANDS)
    elif "train.py" in words or "push_to_hub.py" in words:
        script = next(word for word in words if word in ("train.py", "push_to_hub.py"))
        check_command(words[words.index(script) + 1 :], COMMANDS["train" if script == "train.py" else "push"])
    elif "-m" in words:
        parts = words[words.index("-m") + 1].removeprefix("stereovla.").split(".")
        if parts != ["pytest"] and not PLACEHOLDER.fullmatch(parts[0]):
            if not ROOT.joinpath(*parts).with_suffix(".py").is_file():
                raise ValueError(f"there is no module {'.'.join(parts)}")
    else:
        return False
    return True


# what users gave before is in the changelog, but only there
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_commands_exist_with_their_options(page):
    for words in quoted(page):
        try:
            check_words(words)
        except ModuleNotFoundError as error:
            if error.__cause__ is None:  # not the words of `extras.extra`
                raise
        except ValueError as error:
            pytest.fail(f"{name_of(page)}: {shlex.join(words)}: {error}")


def test_what_is_wrong_is_found():
    for wrong in ("stereovla dat build", "stereovla serve --modell M", "python -m benchmarks.nothing"):
        with pytest.raises(ValueError):
            check_words(shlex.split(wrong))
    assert sum(len(list(quoted(page))) for page in PAGES) > 60


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{name_of(page)} leads to {target}, which is not there"
        assert not anchor or anchor in anchors(found), f"{name_of(page)}: {path} has no heading {anchor}"


def test_every_page_is_in_the_site():
    def pages(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for below in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(below)

    nav = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.fixture
def draw_house(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import draw_house

    yield draw_house
    sys.modules.pop("draw_house")


def test_the_picture_and_the_rules_are_those_of_the_code(draw_house):
    advice = "`python docs/draw_house.py` writes it anew"
    assert draw_house.described(draw_house.arrows()) in draw_house.PICTURE.read_text(encoding="utf-8"), advice
    page = draw_house.PAGE.read_text(encoding="utf-8")
    assert draw_house.with_rules(page) == page, advice


def test_every_room_has_a_page_of_the_reference():
    from house import RULES

    rooms = {room for room in RULES if (ROOT / room.replace(".", "/")).is_dir()} - {"dataset_builder"}
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    assert set(re.findall(r"^::: stereovla\.(.+)$", text, re.MULTILINE)) == rooms
