"""Commands that are killed at random moments, start-up included, and started again until they come to their end.

docs/reliability.md has the figures of these campaigns.
"""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

KILLS = int(os.environ.get("STEREOVLA_KILLS", "100"))  # of each campaign; of those on a small scale a tenth


def kill(process: subprocess.Popen, alone: bool, rng: np.random.Generator) -> None:
    """SIGKILL for a command and all of its processes, or for one of these `alone`, after which the command ends the
    others; returns once none is left.
    """
    leader = psutil.Process(process.pid)
    leader.suspend()  # it is not to start another one meanwhile
    family = leader.children(recursive=True)
    if alone and family:
        family[int(rng.integers(len(family)))].kill()
        leader.resume()
    else:
        for member in (leader, *family):
            member.kill()
    process.wait(timeout=120)
    psutil.wait_procs(family, timeout=120)


def kill_and_start_again(
    folder: Path,
    start: Callable[[Path, Path], subprocess.Popen],
    begun: str,
    check: Callable[[Path], None],
    result: Callable[[Path], Any],
    *,
    kills: int,
    seed: int,
    alone: float = 0.0,
) -> None:
    """Asserts that a command, killed at random moments and started again until it comes to its end, gives what it gives
    undisturbed; then it begins anew in another output, until the kills are done. Prints the figures after each run.

    Three moments in ten lie in the start-up, the others after it: exponentially distributed, with a mean of half of
    what an undisturbed run takes from there, and a tenth more with every kill of a run, so that each comes to its end
    also where the machine has more to do than at first.

    Args:
        folder: for all outputs.
        start: begins the command into an output, or goes on there, with the file of what it prints.
        begun: name of the file in an output that the command writes first, with which its start-up ends.
        check: asserts what may lie in an output at any moment.
        result: what is compared of a finished output.
        alone: share of the kills that hit one of the processes and leave the rest to the command.
    """
    reference, log = folder / "reference", folder / "log"
    begin = time.monotonic()
    process = start(reference, log)
    while not (reference / begun).exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    startup = time.monotonic() - begin
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    length = time.monotonic() - begin
    expected = result(reference)
    rng, done, before_begun, runs = np.random.default_rng(seed), 0, 0, 0
    while done < kills:
        output, finished, mean = folder / f"run-{runs}", False, (length - startup) / 2
        while not finished:
            early = rng.random() < 0.3
            moment = rng.uniform(0, startup) if early else startup + rng.exponential(mean)
            process = start(output, log)
            try:
                code = process.wait(timeout=moment if done < kills else 600)
                assert code == 0, log.read_text()[-3000:]
                finished = True
            except subprocess.TimeoutExpired:
                kill(process, rng.random() < alone, rng)
                done, mean = done + 1, mean * 1.1
                before_begun += not (output / begun).exists()
            check(output)
        assert result(output) == expected, f"{output} ends otherwise than {reference}"
        runs += 1
        print(f"{done} kills, {before_begun} of them before {begun} was written, {runs} runs", flush=True)
    assert done == kills
