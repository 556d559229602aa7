"""The one command: every entry of its table exists, what is wrong is told in words, faults keep their traceback."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
from house import ROOT

from stereovla.__main__ import COMMANDS, main
from stereovla.command_line import Command, execute, named, option, parse, with_flags
from stereovla.extras import extra


def entries(table: dict, *words: str) -> Iterator[tuple[tuple[str, ...], Command]]:
    for name, entry in table.items():
        if isinstance(entry, Command):
            yield (*words, name), entry
        else:
            yield from entries(entry[1], *words, name)


ALL = dict(entries(COMMANDS))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_explains_itself_and_all_its_options(words, capsys):
    command = ALL[words]
    assert callable(named(command.run))
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    shown, options = capsys.readouterr().out, named(command.options)
    assert f"usage: stereovla {' '.join(words)} " in shown and "can be told" not in shown
    names = {item.name for item in fields(options)}
    for item in fields(options):
        assert f"--{item.name}" in shown and item.metadata["help"]
    assert {*command.positional} <= names
    assert all({*values} <= names for values in getattr(options, "presets", {}).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command stereovla trian; did you mean train?"),
        (["data", "import", "hdf5"], "unknown command stereovla data import hdf5; there are: lerobot, droid"),
        (["evaluate", "report", "--outt", "x"], "unknown option --outt; did you mean --out?"),
        (["evaluate", "rollout", "--preset", "huge"], "--preset 'huge' is not one of tiny, demo, lab"),
        (["data", "check"], "DIR is missing"),
        (["serve"], "--model is missing"),
        (["serve", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_what_is_wrong_is_told_in_words(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_without_a_command_the_list_is_shown(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert main(["pretrain"]) == 2 and main(["pretrain", "-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in (*COMMANDS, "grounding"))


@dataclass
class Options:
    """What the tests below are told."""

    presets: ClassVar = {"small": {"size": 1}, "large": {"size": 9}}

    size: int = option(5, "Of it (preset).")
    preset: str = option("small", "Values.", choices=["small", "large"])
    names: list[str] = option([], "Some.")
    fast: bool = option(False, "Whether.")


def test_options_go_over_the_preset_and_that_over_the_defaults():
    assert parse(Options, "x", []).size == 1
    assert parse(Options, "x", ["--preset", "large"]).size == 9
    assert parse(Options, "x", ["--preset=large", "--size", "3"]).size == 3
    assert parse(Options, "x", ["--fast"]).fast and not parse(Options, "x", ["--fast", "False"]).fast


def test_leading_arguments_take_their_flags():
    assert with_flags(["a", "b", "c", "--fast"], ("dir", "parts")) == ["--dir", "a", "--parts", "b", "c", "--fast"]
    assert with_flags(["a"], ("dir", "parts")) == ["--dir", "a"] and with_flags(["--dir", "a"], ("dir",)) == [
        "--dir",
        "a",
    ]


def raised(error: BaseException):
    def run(options):
        raise error

    return run


def test_errors_in_words_are_shown_and_faults_keep_their_traceback(capsys):
    run = {"__name__": "stereovla.made_up", "error": ValueError("--size is 3; it must be 4")}
    exec("def ours(options): raise error\ndef fault(options): return options['size']", run)
    assert execute(Options, run["ours"], "x", []) == 2
    assert capsys.readouterr().err == "error: --size is 3; it must be 4\n"
    with pytest.raises(TypeError):
        execute(Options, run["fault"], "x", [])
    elsewhere = {"__name__": "torch.made_up", "error": RuntimeError("shapes do not match")}
    exec("def theirs(options): raise error", elsewhere)
    with pytest.raises(RuntimeError, match="shapes"):
        execute(Options, elsewhere["theirs"], "x", [])
    assert execute(Options, raised(KeyboardInterrupt()), "x", []) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert execute(Options, lambda options: 1, "x", []) == 1


def test_a_config_that_cannot_be_is_told_in_words(capsys):
    """transformers' strict configs raise what is no ValueError, whether a value or its type is wrong."""

    def made(**fields):
        from stereovla.modeling_stereovla import StereoVLAConfig

        return lambda options: StereoVLAConfig.from_preset("tiny", **fields)

    for wrong, words in ((0, "chunk_size is 0; it must be"), ("x", "'chunk_size'")):
        assert execute(Options, made(chunk_size=wrong), "x", []) == 2
        assert words in capsys.readouterr().err


def test_a_missing_extra_is_named():
    with pytest.raises(ModuleNotFoundError, match=r'no_such_package is not installed.*pip install "stereovla\[sim\]"'):
        with extra("sim"):
            import no_such_package  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="stereovla.no_such_room"), extra("sim"):
        import stereovla.no_such_room  # noqa: F401


# for each extra a command that needs it, and one of its packages
NEEDS = {
    "sim": (["data", "build", "--out", "x"], "mujoco"),
    "data": (["data", "import", "lerobot", "--source", "x", "--config", "x", "--out", "x"], "av"),
    "report": (["evaluate", "report", "--out", "x"], "matplotlib"),
    "serve": (["serve", "--model", "x"], "websockets"),
}
BARE = "import sys\nsys.modules[sys.argv[1]] = None\nfrom stereovla.__main__ import main\nsys.exit(main(sys.argv[2:]))"


@pytest.mark.parametrize("name", NEEDS)
def test_a_command_without_its_extra_says_what_to_install(name, fresh):
    arguments, package = NEEDS[name]
    done = fresh.run(BARE, package, *arguments, check=False)
    assert done.returncode == 2 and f'pip install "stereovla[{name}]"' in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_lerobot_is_imported_without_h5py(fresh):
    fresh.run("import sys\nsys.modules['h5py'] = None\nimport stereovla.dataset_builder.formats.lerobot_source")


@pytest.mark.parametrize(("script", "command"), [("train.py", "train"), ("push_to_hub.py", "push")])
def test_the_scripts_of_a_clone_are_the_commands(script, command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage = [text.partition("usage: ")[2] for text in (shown.stdout, capsys.readouterr().out)]
    assert usage[0].startswith(f"{script} ") and usage[1].startswith(f"stereovla {command} ")
    assert usage[0].partition("\n\n")[2] == usage[1].partition("\n\n")[2]
