"""Rollouts in several processes, one thread each; finished episodes are logged as they come."""

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from stereovla.command_line import is_for_user
from stereovla.evaluation.episode_log import EpisodeLog
from stereovla.evaluation.policies import Policy
from stereovla.evaluation.policy_specs import make_policy
from stereovla.evaluation.rollouts import RolloutConfig, run_episodes

# One thread per process: rollouts scale over processes. Read when numpy, torch and Mesa load, so set before the start.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LP_NUM_THREADS": "0",
    "MUJOCO_GL": "egl",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # the weights' bars would garble ours
}


def _shared_seeds(seeds: Sequence[int], counter: Any) -> Iterator[int]:
    """The seeds that no other process has taken yet."""
    while True:
        with counter.get_lock():
            number = counter.value
            counter.value += 1
        if number >= len(seeds):
            return
        yield seeds[number]


def _work(
    connection: Connection,
    counter: Any,
    seeds: list[int],
    spec: str,
    config: RolloutConfig,
    environments: int,
    options: dict[str, Any],
) -> None:
    """Body of a worker: sends the record of each episode, None at the end, or what went wrong, with its traceback where
    that is not told in words.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        policy = make_policy(spec, **options)
        for record in run_episodes(policy, _shared_seeds(seeds, counter), config, environments):
            connection.send(record)
        connection.send(None)
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)  # the parent is gone, or stops us all
    except Exception as error:
        connection.send(str(error) if is_for_user(error) else f"a rollout process failed:\n{traceback.format_exc()}")


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, which would go on rolling out for nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def roll_out(
    spec: str,
    seeds: Sequence[int],
    config: RolloutConfig,
    log: EpisodeLog,
    processes: int = 2,
    environments: int = 8,
    policy_options: dict[str, Any] | None = None,
    policy: Policy | None = None,
) -> list[dict[str, Any]]:
    """Runs the seeds that `log` lacks and returns the records of all of `seeds`, in their order.

    Args:
        spec: see `policy_specs`; every process makes its own policy of it, with `policy_options`.
        processes: 1 rolls out in this process, with as many threads as torch likes; more use one thread each.
        environments: worlds in lockstep per process.
        policy: that of `spec` where it is made already; for one process.
    """
    todo = [seed for seed in seeds if seed not in log.records]
    with tqdm(total=len(seeds), initial=len(seeds) - len(todo), desc=f"rollouts, {spec}", unit="episode") as bar:
        successes = [log.records[seed]["success"] for seed in seeds if seed in log.records]
        processes = 1 if policy is not None else min(processes, len(todo))
        for record in _records(spec, todo, config, processes, environments, policy_options or {}, policy):
            log.append(record)
            successes.append(record["success"])
            bar.set_postfix_str(f"{sum(successes)}/{len(successes)} succeeded", refresh=False)
            bar.update()
    return [log.records[seed] for seed in seeds]


def _records(
    spec: str,
    seeds: list[int],
    config: RolloutConfig,
    processes: int,
    environments: int,
    options: dict[str, Any],
    policy: Policy | None,
) -> Iterator[dict[str, Any]]:
    if processes <= 1:
        if seeds:
            policy = policy or make_policy(spec, **options)
            yield from run_episodes(policy, iter(seeds), config, min(environments, len(seeds)))
        return
    context = multiprocessing.get_context("spawn")  # OpenGL contexts and torch's threads do not survive a fork
    counter = context.Value("q", 0)
    environments = min(environments, -(-len(seeds) // processes))
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    workers, connections = [], []
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, counter, seeds, spec, config, environments, options)
            workers.append(context.Process(target=_work, args=arguments, daemon=True))
            workers[-1].start()
            theirs.close()  # so that a worker's death ends the pipe
            connections.append(ours)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    try:
        while connections:
            for connection in wait(connections):
                try:
                    message = connection.recv()
                except EOFError:
                    raise RuntimeError(
                        "a rollout process was killed; the same command does the missing seeds"
                    ) from None
                if message is None:
                    connections.remove(connection)
                elif isinstance(message, str):
                    raise RuntimeError(message)
                else:
                    yield message
    except BaseException:  # whatever ends the loop early, GeneratorExit and Ctrl-C too, ends the workers
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join()
