"""Processes as fresh as new ones, without the seconds that the libraries take to import.

A process is started once with the libraries imported, none of this project's, and forks for every program that it is
given. What is in the environment when it is started (the Hub's address and caches) holds for all of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FORKS = """
import json, os, sys, traceback
import datasets, huggingface_hub, peft, torch, transformers
import transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
for line in sys.stdin:
    told = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            for number, path in ((1, told["stdout"]), (2, told["stderr"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(told["environment"])
            os.chdir(told["folder"])
            sys.argv = ["program", *told["arguments"]]
            exec(compile(told["program"], "program", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(status or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


class Client:
    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process, self.folder, self.pid = process, folder, 0

    def run(
        self, program: str, *arguments: str, check: bool = True, folder: Path | None = None, **environment: str
    ) -> Done:
        """Runs a program, in `folder` if one is given; `pid` is its process while it runs."""
        out, err = self.folder / "stdout", self.folder / "stderr"
        told = {
            "program": program,
            "arguments": arguments,
            "environment": environment,
            "folder": str(folder or self.folder),
        }
        self.process.stdin.write(json.dumps(told | {"stdout": str(out), "stderr": str(err)}) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        done = Done(int(self.process.stdout.readline()), out.read_text(), err.read_text())
        assert not check or done.returncode == 0, done.stderr
        return done


@contextmanager
def forks(folder: Path, environment: dict[str, str], isolated: bool = True) -> Iterator[Client]:
    """A `Client` whose programs run in `folder` unless told otherwise.

    Args:
        isolated: they do not see PYTHONPATH and the folder that they run in, as with `python -I`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *(["-I"] if isolated else []), "-c", FORKS]
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=-1, stdout=-1, text=True) as process:
        yield Client(process, folder)
        process.stdin.close()


def offline(home: Path) -> dict[str, str]:
    """Environment without a Hub, with caches in `home`."""
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
