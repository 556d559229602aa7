"""What pip installs: one top-level name, one command, which run from any folder without this repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house import OUTSIDE, ROOT, RULES

NOT_COPIED = (*OUTSIDE, ".*", "build", "*.egg-info", "demo", "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, as a build leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_COPIED))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    target = wheel.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    return target


def run(installed: Path, tmp_path: Path, *command: str) -> subprocess.CompletedProcess:
    """In another folder, with the installed package before the one of this repository."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)


def test_one_name_is_installed(installed):
    names = {path.name for path in installed.iterdir()} - {"bin"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"stereovla"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["stereovla"]
    rooms = {path.name for path in (installed / "stereovla").iterdir() if path.is_dir()} - {"__pycache__"}
    assert rooms == {*(room.partition(".")[0] for room in RULES if (ROOT / room).is_dir() or "." in room), "configs"}


def test_every_file_of_every_room_travels(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    rooms = {room.partition(".")[0] for room in RULES if (ROOT / room.partition(".")[0]).is_dir()}
    wanted = {name for name in tracked if name.split("/")[0] in {*rooms, "configs"}}
    wanted |= {name for name in tracked if name.endswith(".py") and "/" not in name and name != "setup.py"}
    assert packed == {f"stereovla/{name}" for name in wanted}


EVERY_HELP = """
from stereovla.__main__ import COMMANDS
from stereovla.command_line import Command
def run(table, prog):
    for name, entry in table.items():
        if isinstance(entry, Command):
            try:
                entry(f"{prog} {name}", ["--help"])
            except SystemExit:
                pass
        else:
            run(entry[1], f"{prog} {name}")
run(COMMANDS, "stereovla")
"""


def test_its_commands_run_from_another_folder(installed, tmp_path):
    command = str(installed / "bin" / "stereovla")
    shown = run(installed, tmp_path, command, "--help")
    assert shown.returncode == 0 and "  evaluate " in shown.stdout, shown.stderr
    helps = run(installed, tmp_path, sys.executable, "-c", EVERY_HELP)
    for words in (
        "train",
        "pretrain stereo",
        "pretrain depth",
        "data import lerobot",
        "evaluate offline",
        "serve",
        "push",
        "convert parts",
    ):
        assert f"usage: stereovla {words} " in helps.stdout, helps.stderr
    where = run(installed, tmp_path, sys.executable, "-c", "import stereovla; print(stereovla.__file__)")
    assert where.stdout.strip() == str(installed / "stereovla" / "__init__.py")
    own = ["--preset", "tiny", "--train_episodes", "1", "--validation_episodes", "0", "--out", "data"]
    built = run(installed, tmp_path, command, "data", "build", *own)
    assert built.returncode == 0 and built.stdout == "dataset: data\n", built.stderr
