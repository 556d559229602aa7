"""Trains one part or one stage; train.py trains the policy itself.

    python -m training stereo --dataset DATASET --output_dir OUT    the stereo encoder alone, from true disparity

The same command goes on where an interrupted one stopped. `python -m training COMMAND --help` lists its options.
"""

import sys
from typing import Any

from transformers import HfArgumentParser

from training import stereo

# what runs, its options, and their values by preset
COMMANDS: dict[str, tuple[Any, type, dict[str, dict[str, Any]]]] = {
    "stereo": (stereo.train, stereo.StereoOptions, stereo.PRESETS),
}


def parse(command: str, arguments: list[str]) -> Any:
    """Options of a command: those given, over the preset's values, over the defaults."""
    _, options, presets = COMMANDS[command]
    parser = HfArgumentParser(options, prog=f"python -m training {command}", description=options.__doc__)
    parser.set_defaults(**presets[parser.parse_args(arguments).preset])
    return options(**vars(parser.parse_args(arguments)))


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    COMMANDS[command][0](parse(command, rest))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
