"""The commands of `stereovla`, in this process: each takes its arguments and returns its exit status."""

import sys

from stereovla.__main__ import main

COMMAND = [sys.executable, "-m", "stereovla"]  # the same in a process of its own


def _command(*words: str):
    return lambda arguments: main([*words, *arguments])


data, evaluate, pretrain, push = (_command(name) for name in ("data", "evaluate", "pretrain", "push"))
