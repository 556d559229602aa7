"""Trains one part or one stage; train.py trains the policy itself.

    python -m training stereo --dataset DATASET --output_dir OUT    the stereo encoder alone, from true disparity
    python -m training grounding --dataset DATASET --output_dir OUT    answers: boxes, depths, poses, camera parameters
    python -m training reward --model MODEL --dataset DATASET --output_dir OUT    better boxes and depths, by rewards

The same command goes on where an interrupted one stopped. `python -m training COMMAND --help` lists its options.
"""

import importlib
import sys
from typing import Any

from transformers import HfArgumentParser

# each a module with `train(options)` and `PRESETS`, imported when it is asked for, and the name of its options
COMMANDS = {
    "stereo": ("training.stereo", "StereoOptions"),
    "grounding": ("training.grounding", "GroundingOptions"),
    "reward": ("training.reward", "RewardOptions"),
}


def parse(command: str, arguments: list[str]) -> tuple[Any, Any]:
    """The command's module and its options: those given, over the preset's values, over the defaults."""
    name, kind = COMMANDS[command]
    module = importlib.import_module(name)
    options = getattr(module, kind)
    parser = HfArgumentParser(
        options, prog=f"python -m training {command}", description=options.__doc__, allow_abbrev=False
    )
    parser.set_defaults(**module.PRESETS[parser.parse_args(arguments).preset])
    return module, options(**vars(parser.parse_args(arguments)))


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
        module, options = parse(command, rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        module.train(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
