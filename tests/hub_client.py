"""Processes that talk to the local Hub with the libraries as they are.

A process is started once with the libraries imported and the address of the Hub in its environment, and forks for every
program that it is given: as fresh as a new process, without 8 s of imports.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

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

    def run(self, program: str, *arguments: str, check: bool = True, **environment: str) -> Done:
        """Runs a program; `pid` is its process while it runs."""
        out, err = self.folder / "stdout", self.folder / "stderr"
        told = {"program": program, "arguments": arguments, "environment": environment}
        self.process.stdin.write(json.dumps(told | {"stdout": str(out), "stderr": str(err)}) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        done = Done(int(self.process.stdout.readline()), out.read_text(), err.read_text())
        assert not check or done.returncode == 0, done.stderr
        return done


def environment(url: str, home: Path) -> dict[str, str]:
    """Environment in which the libraries take `url` for the Hub and `home` for their caches."""
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "writer", "HF_HUB_DISABLE_XET": "1"}
    ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | ours | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


@contextmanager
def client(url: str, folder: Path, ours: bool):
    """A `Client` whose caches and working folder are in `folder`.

    Args:
        ours: whether the modules of this project can be imported, as where it is installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = environment(url, folder / "home")
    command = [sys.executable, *([] if ours else ["-I"]), "-c", FORKS]
    with subprocess.Popen(command, cwd=folder, env=known, stdin=-1, stdout=-1, text=True) as process:
        yield Client(process, folder)
        process.stdin.close()
