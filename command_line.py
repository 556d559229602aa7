"""What every command shares: options that carry their help, presets, and errors in words."""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INTERRUPTED = 130  # exit statuses, as shells have them
USAGE = 2
# modules whose errors are written for the user: ours, as a package, as a script, and as remote code of a checkpoint
OWN = ("stereovla", "__main__", "transformers_modules")


def option(default: Any, text: str, **more: Any) -> Any:
    """Dataclass field with the help text that the command line shows; a list is copied for each instance."""
    metadata = {"help": text, **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def json_object(name: str, text: str, example: str) -> dict[str, Any]:
    """What the option `name` says, a JSON object such as `example`; ValueError for what is none."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{name} {text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--{name} is {text!r}; it must be a JSON object, such as {example}")
    return found


@dataclass(frozen=True)
class Command:
    """A command by the names of what it is made of, so that nothing is imported before it is asked for.

    Args:
        options: "module:class" within stereovla, a dataclass whose fields carry their help and whose docstring says
            what the command does. Where it has a field `preset`, its class attribute `presets` maps each name to values
            of other fields.
        run: "module:function" within stereovla that is called with them; an int that it returns is the exit status.
        summary: one line for the list of commands.
        done: printed in the end, with {} for what `run` returned.
        positional: fields that may be given without their flag, in this order; the last one takes all that is left.
    """

    options: str
    run: str
    summary: str
    done: str = ""
    positional: Sequence[str] = ()

    def __call__(self, prog: str, arguments: Sequence[str]) -> int:
        try:
            options, run = named(self.options), named(self.run)
        except ModuleNotFoundError as error:
            if not is_for_user(error):
                raise
            return complain(error)
        return execute(options, run, prog, with_flags(arguments, self.positional), self.done)


def named(reference: str) -> Any:
    """What "module:name" within stereovla is."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(f"stereovla.{module}"), name)


def with_flags(arguments: Sequence[str], positional: Sequence[str]) -> list[str]:
    """Puts the flags before leading arguments that come without: ["a", "b", "--c"] -> ["--dir", "a", "--parts", "b",
    "--c"].
    """
    arguments, flagged = list(arguments), []
    for number, name in enumerate(positional):
        values = []
        while arguments and not arguments[0].startswith("-") and not (values and number < len(positional) - 1):
            values.append(arguments.pop(0))
        if values:
            flagged += [f"--{name}", *values]
    return flagged + arguments


def execute(
    options: type, run: Callable[[Any], Any], prog: str, arguments: Sequence[str] | None = None, done: str = ""
) -> int:
    """Reads the options, runs the command and returns the exit status. What is wrong with them is told in words."""
    try:
        result = run(parse(options, prog, arguments))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_for_user(error):
            raise
        return complain(error)
    if done:
        print(done.format(result))
    return result if isinstance(result, int) else 0


def parse(options: type, prog: str, arguments: Sequence[str] | None = None) -> Any:
    """Options of a command line: those given, over the preset's values, over the defaults; ValueError or SystemExit
    for what is wrong.
    """
    from transformers import HfArgumentParser  # takes a second

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    check_flags(arguments, options)
    parser = HfArgumentParser(
        options,
        prog=prog,
        description=inspect.cleandoc(options.__doc__),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    presets: Mapping[str, Mapping[str, Any]] | None = getattr(options, "presets", None)
    if presets is not None:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=options.preset)
        preset = first.parse_known_args(arguments)[0].preset
        if preset not in presets:
            raise ValueError(f"--preset {preset!r} is not one of {', '.join(presets)}")
        parser.set_defaults(**presets[preset])
    return options(**vars(parser.parse_args(arguments)))


def check_flags(arguments: Sequence[str], options: type) -> None:
    """ValueError for a flag that `options` has not, naming the nearest one."""
    known = [item.name for item in dataclasses.fields(options) if item.init]
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name not in (*known, "help") and name.removeprefix("no_") not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else f"there are: --{', --'.join(known)}"
            raise ValueError(f"unknown option {argument.partition('=')[0]}; {hint}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, the lines of the docstring as they are."""


def is_for_user(error: BaseException) -> bool:
    """Whether an error was raised in words, by our own code or by the file system or the network, rather than by a
    fault in the program, whose traceback is wanted.
    """
    if isinstance(error, OSError) or any(kind.__name__ == "StrictDataclassError" for kind in type(error).__mro__):
        return True  # the latter says which field of a config cannot be so, and is no ValueError
    if isinstance(error, ModuleNotFoundError):
        return error.__cause__ is not None  # the words of `extras.extra`
    if not isinstance(error, (ValueError, RuntimeError, ArithmeticError)):
        return False
    trace: types.TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] in OWN


def complain(error: BaseException) -> int:
    print(f"error: {error}", file=sys.stderr)
    return USAGE


def dispatch(commands: Mapping[str, Any], about: str, prog: str, arguments: Sequence[str]) -> int:
    """Runs the command that the first of `arguments` names in a table of commands and of further tables, (text, table);
    returns the exit status.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(help_of(commands, about, prog))
        return 0 if arguments else USAGE
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(commands)}"
        return complain(ValueError(f"unknown command {prog} {name}; {hint}"))
    entry = commands[name]
    if isinstance(entry, Command):
        return entry(f"{prog} {name}", rest)
    return dispatch(entry[1], entry[0], f"{prog} {name}", rest)


def help_of(commands: Mapping[str, Any], about: str, prog: str) -> str:
    width = max(map(len, commands))
    lines = [
        f"{name:<{width}}  {entry.summary if isinstance(entry, Command) else entry[0]}"
        for name, entry in commands.items()
    ]
    return "\n".join(
        [
            f"usage: {prog} COMMAND ...",
            "",
            about,
            "",
            "commands:",
            *(f"  {line}" for line in lines),
            "",
            f"{prog} COMMAND --help explains each.",
        ]
    )
