"""Policies at equal size, data and samples, with the controls beside each: one resumable command, one table.

    python -m benchmarks.comparison --dataset DATASET --out COMPARISON --size demo
    python -m benchmarks.comparison --dataset DATASET --out COMPARISON --policies mono points-base --seeds 3 --cores 0,1

`comparison_policies` has the list. Each policy is trained with each seed by `stereovla train`, and measured on held-out
rows and in rollouts in the dataset's own world or LIBERO's suite, as it is and in the controls that it has (the left
view twice, nothing, another scene). Every part is a process of its own, pinned to a core with one thread; what is
finished is not done again, what was interrupted goes on. COMPARISON/table.md is written anew after each policy.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
from transformers import AutoConfig

from stereovla.benchmarks.comparison_policies import (
    ENCODER_COMES_TRAINED,
    ENCODER_LEARNS_BESIDE,
    SIZES,
    Entry,
    entries,
)
from stereovla.benchmarks.comparison_table import episodes_of, write_table
from stereovla.command_line import execute, json_object, parse
from stereovla.evaluation.episode_log import write_json
from stereovla.evaluation.options import LIBERO_EPISODES, LiberoOptions, RolloutOptions
from stereovla.evaluation.shown_geometry import controls
from stereovla.modeling_stereovla.configuration_stereovla import StereoVLAConfig
from stereovla.train import PRESETS, TrainingOptions

# what says in which world a dataset was recorded: options of `stereovla evaluate rollout`, and of `evaluate libero`
OWN_WORLD = ("camera_range", "image_size", "num_objects")
LIBERO_WORLD = ("suite", "tasks", "camera_range", "image_size", "baseline_m")
OWN_MAX_STEPS = 60
BASELINES = ("expert", "still")
# of all policies, whatever their presets say: some cannot answer in words, some see pictures anew for each question
ALIKE = {"mixture": "1:0:0:0", "questions_per_frame": 1, "tracker": "none"}
# options of a training that are those of its policy, or of all
OF_POLICIES = {"config", "preset", "dataset", "output_dir", "seed", "freeze", "model", "vlm", "views", "depth_input"}
OF_POLICIES |= {"stereo_encoder", "depth_expert", "steps"}
NOT_CONTENT = ("out", "policies", "seeds", "episodes", "control_episodes", "cores", "device")


@dataclass
class ComparisonOptions:
    """Trains and measures policies at equal size, data and samples, with the controls beside each; the same command
    goes on where it was stopped.
    """

    dataset: str = field(metadata={"help": "Folder of a dataset that the simulator recorded; it says in which world."})
    out: str = field(metadata={"help": "Folder of all trainings and results."})
    size: str = field(
        default="demo", metadata={"help": "Sizes and recipe: StereoVLA's preset.", "choices": list(SIZES)}
    )
    policies: list[str] = field(default_factory=list, metadata={"help": "Names of policies; not given: all."})
    seeds: int = field(default=1, metadata={"help": "Trainings of each policy."})
    steps: int = field(default=0, metadata={"help": "Steps of each training; 0 = those of the size's preset."})
    training: str = field(
        default="{}",
        metadata={"help": 'More options of every training, as JSON: {"batch_size": 24, "pool_episodes": 12}.'},
    )
    stereo_encoder: str | None = field(
        default=None, metadata={"help": "Trained stereo encoder that those with one are given, held fixed."}
    )
    depth_expert: str | None = field(default=None, metadata={"help": "Trained depth expert of a single view."})
    stereo_depth_expert: str | None = field(default=None, metadata={"help": "Trained stereo depth expert."})
    rows: int = field(default=300, metadata={"help": "Held-out rows."})
    stride: int = field(default=2, metadata={"help": "Every n-th is taken."})
    episodes: int = field(
        default=100, metadata={"help": "Rollouts of each training, in LIBERO of all tasks together; 0 = none."}
    )
    control_episodes: int = field(default=100, metadata={"help": "Rollouts of each control; 0 = none."})
    max_steps: int = field(
        default=0,
        metadata={
            "help": "Steps after which an episode has failed; 0 = 60 in our own world, the protocol's in LIBERO."
        },
    )
    execution_horizon: int = field(default=3, metadata={"help": "Actions executed of each chunk."})
    world: str = field(
        default="{}", metadata={"help": "Options of the world of the rollouts that are not the dataset's."}
    )
    cores: str = field(default="", metadata={"help": "Cores, one policy at a time on each: 0,1. Not given: any one."})
    device: str = field(default="cpu", metadata={"help": "Where policies are measured; training chooses itself."})

    def __post_init__(self):
        known = entries(self.size)
        if unknown := [name for name in self.policies if name not in known]:
            raise ValueError(f"--policies has {', '.join(unknown)}; there are {', '.join(known)}")
        least = {"seeds": 1, "steps": 0, "rows": 1, "stride": 1, "episodes": 0, "control_episodes": 0}
        for name, limit in (least | {"execution_horizon": 1, "max_steps": 0}).items():
            if getattr(self, name) < limit:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least {limit}")
        chunk = StereoVLAConfig.from_preset(self.size).chunk_size
        if self.execution_horizon > chunk:
            raise ValueError(f"--execution_horizon is {self.execution_horizon}; policies predict {chunk} actions")
        if unknown := [core for core in self.cores.split(",") if self.cores and not core.strip().isdecimal()]:
            raise ValueError(f"--cores has {', '.join(map(repr, unknown))}; it takes numbers of cores, such as 0,1")
        self.chosen = {name: known[name] for name in self.policies or known}
        training = json_object("training", self.training, '{"batch_size": 24}')
        if own := sorted(OF_POLICIES & training.keys()):
            raise ValueError(f"--training has {', '.join(own)}, which the policies and options of a comparison decide")
        self.recipe = {**PRESETS[self.size], **ALIKE, **training}
        self.recipe |= {"steps": self.steps} if self.steps else {}

    def evaluation(self, count: int) -> list[str]:
        """Of `stereovla evaluate`: `count` episodes in the world that the dataset was recorded in, with the changes of
        --world; ValueError where it names none, or where there cannot be so many.
        """
        info = json.loads((Path(self.dataset) / "meta/info.json").read_text())
        world = info.get("build", {}).get("world", {})
        changes = json_object("world", self.world, '{"camera_range": "large"}')
        kind, names = ("libero", LIBERO_WORLD) if "suite" in world else ("rollout", OWN_WORLD)
        if missing := [name for name in names if name not in world]:
            raise ValueError(
                f"{self.dataset} was recorded neither in our own world nor in LIBERO: meta/info.json names no "
                f"{', '.join(missing)}"
            )
        told = (self._in_libero if kind == "libero" else self._in_our_world)(world, changes, count)
        words = [(f"--{name}", *map(str, np.atleast_1d(value))) for name, value in told.items()]
        return [kind, *chain.from_iterable(words)]

    def _in_our_world(self, world: dict[str, Any], changes: dict[str, Any], count: int) -> dict[str, Any]:
        """Options of `stereovla evaluate rollout`."""
        world = world | changes
        told = {name: world.pop(name) for name in OWN_WORLD}  # the rest goes by `--world`
        told |= {"seeds": count, "baseline_seeds": count, "max_steps": self.max_steps or OWN_MAX_STEPS}
        return told | {"world": json.dumps(world)}

    def _in_libero(self, world: dict[str, Any], changes: dict[str, Any], count: int) -> dict[str, Any]:
        """Options of `stereovla evaluate libero`."""
        if unknown := sorted(changes.keys() - {*LIBERO_WORLD}):
            raise ValueError(f"--world names {', '.join(unknown)}; of LIBERO's there are {', '.join(LIBERO_WORLD)}")
        told = {name: world[name] for name in LIBERO_WORLD} | changes
        low, *high = np.atleast_1d(told["baseline_m"])
        if high and high[0] != low:
            raise ValueError(f"--world names no baseline_m, and {self.dataset} has all from {low} to {high[0]} m")
        tasks = np.size(told["tasks"])
        if count % tasks or count > LIBERO_EPISODES * tasks:
            raise ValueError(
                f"{count} episodes of {tasks} tasks: there must be as many of each, and at most {LIBERO_EPISODES}"
            )
        return told | {"baseline_m": low, "episodes": count // tasks, "max_steps": self.max_steps}


def training_arguments(entry: Entry, seed: int, folder: Path, options: ComparisonOptions) -> list[str]:
    """Of `stereovla`, for one training."""
    config, own = dict(entry.config), {**options.recipe, **entry.options, "seed": seed, "freeze": ""}
    given = options.stereo_encoder is not None
    if entry.stereo and given:
        own |= {"stereo_encoder": options.stereo_encoder, "freeze": "stereo"}
    if entry.stereo and entry.depth_expert is None:
        config |= ENCODER_COMES_TRAINED if given else ENCODER_LEARNS_BESIDE
    expert = {"depth": options.depth_expert, "stereo": options.stereo_depth_expert}.get(entry.depth_expert)
    if expert is not None:
        own |= {"depth_expert": expert}
    more = [text for name, value in own.items() for text in (f"--{name}", str(value))]
    files = ["--dataset", options.dataset, "--output_dir", str(folder), "--config", json.dumps(config)]
    return ["train", "--preset", entry.preset, *files, *more]


def rollout_arguments(spec: str, folder: Path, shown: str, options: ComparisonOptions) -> list[str]:
    """Of `stereovla`, for the rollouts of one policy in what `shown` says."""
    kind, *episodes = options.evaluation(options.episodes if shown == "given" else options.control_episodes)
    own = {"execution_horizon": options.execution_horizon, "processes": 1, "shown": shown, "device": options.device}
    words = [text for name, value in own.items() for text in (f"--{name}", str(value))]
    return ["evaluate", kind, "--policies", spec, "--out", str(folder), *words, *episodes]


class Processes:
    """Those that run now, whichever thread started them."""

    def __init__(self):
        self._lock, self._ended = threading.Lock(), False
        self._running: set[subprocess.Popen] = set()

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Of `subprocess.Popen`; RuntimeError once all were told to end."""
        with self._lock:
            if self._ended:
                raise RuntimeError("told to end: nothing more is started")
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        return process

    def wait(self, process: subprocess.Popen) -> resource.struct_rusage:
        """Until it has ended; what it and its children used."""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            self._running.discard(process)
        return usage

    def end(self) -> None:
        """Tells all to end; trainings save a checkpoint first."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


class Runner:
    """Runs parts as processes of their own, and notes what each costs.

    Args:
        core: that they are pinned to; None = any.
    """

    def __init__(self, core: int | None, processes: Processes):
        self.core, self.processes = core, processes

    def run(self, arguments: Sequence[str], folder: Path) -> None:
        """`stereovla` with arguments; RuntimeError with the end of its log where it fails. One line of costs.jsonl in
        `folder` is its seconds, and those of its core.
        """
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "stereovla", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
        if self.core is not None:
            pin = f"import os, sys; os.sched_setaffinity(0, [{self.core}]); os.execv(sys.argv[1], sys.argv[1:])"
            command = [sys.executable, "-c", pin, *command]
        stage, log = "-".join(arguments[: 2 if arguments[0] == "evaluate" else 1]), folder / "log.txt"
        begin = time.perf_counter()
        with log.open("ab") as output:
            process = self.processes.start(command, stdout=output, stderr=output, env=environment)
            usage = self.processes.wait(process)
        cost = {"stage": stage, "seconds": time.perf_counter() - begin, "core_seconds": usage.ru_utime + usage.ru_stime}
        with (folder / "costs.jsonl").open("a") as costs:
            costs.write(json.dumps(cost | {"status": process.returncode}) + "\n")
        if process.returncode:
            raise RuntimeError(f"stereovla {stage} failed; the end of {log}:\n{end_of(log)}")


def end_of(log: Path) -> str:
    """Its last 2,000 bytes."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        return file.read().decode(errors="replace")


def run_policy(runner: Runner, name: str, seed: int, options: ComparisonOptions) -> None:
    """Trains one policy with one seed and measures it; what is there already is kept."""
    folder = Path(options.out) / name / f"seed-{seed}"
    model = folder / "training/model"
    if not (model / "training.json").is_file():
        runner.run(training_arguments(options.chosen[name], seed, folder / "training", options), folder)
    if not (folder / "offline/offline.json").is_file():
        rows = ["--rows", str(options.rows), "--stride", str(options.stride), "--device", options.device]
        where = ["--model", str(model), "--dataset", options.dataset, "--out", str(folder / "offline")]
        runner.run(["evaluate", "offline", *where, *rows], folder)
    for shown in ("given", *controls(AutoConfig.from_pretrained(model, trust_remote_code=True))):
        wanted = options.episodes if shown == "given" else options.control_episodes
        if wanted and len(episodes_of(folder / shown)) < wanted:
            runner.run(rollout_arguments(str(model), folder / shown, shown, options), folder)


def run_baseline(runner: Runner, name: str, options: ComparisonOptions) -> None:
    """Rolls out a policy that needs no training."""
    folder = Path(options.out) / name
    if options.episodes and len(episodes_of(folder / "given")) < options.episodes:
        runner.run(rollout_arguments(name, folder / "given", "given", options), folder)


def check_parts(options: ComparisonOptions) -> None:
    """ValueError for what a part would refuse in its turn, hours later."""
    for name, entry in options.chosen.items():
        parse(TrainingOptions, "train", training_arguments(entry, 0, Path(options.out) / name, options)[1:])
    for shown, count in (("given", options.episodes), ("null", options.control_episodes)):
        if not count:
            continue
        kind, *words = rollout_arguments("MODEL", Path(options.out), shown, options)[1:]
        parse(LiberoOptions if kind == "libero" else RolloutOptions, f"evaluate {kind}", words)


def check_folder(options: ComparisonOptions) -> None:
    """ValueError where the folder holds a comparison of other options; writes them where it is new."""
    saved = Path(options.out) / "comparison.json"
    content = {name: value for name, value in asdict(options).items() if name not in NOT_CONTENT}
    if saved.is_file():
        before = json.loads(saved.read_text())
        if changed := [name for name in content if before.get(name) != content[name]]:
            raise ValueError(
                f"{options.out} holds a comparison with other options ({', '.join(changed)}); take another --out"
            )
    saved.parent.mkdir(parents=True, exist_ok=True)
    write_json(saved, content)


def compare(options: ComparisonOptions) -> Path:
    """Runs what is missing, and returns the table."""
    check_parts(options)
    check_folder(options)
    jobs: Queue = Queue()
    if options.episodes:
        for name in BASELINES:
            jobs.put((run_baseline, name))
    for seed in range(options.seeds):  # all policies once, before the second seeds
        for name in options.chosen:
            jobs.put((run_policy, name, seed))
    cores = [int(core) for core in options.cores.split(",")] if options.cores else [None]
    processes, lock = Processes(), threading.Lock()
    failed: list[Exception] = []

    def work(core: int | None) -> None:
        while not failed:
            try:
                run, *arguments = jobs.get_nowait()
            except Empty:
                return
            try:
                run(Runner(core, processes), *arguments, options)
                with lock:
                    write_table(Path(options.out), entries(options.size))
                print(f"done: {' '.join(map(str, arguments))}", flush=True)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(core,)) for core in cores[1:]]
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for thread in threads:
            thread.start()
        work(cores[0])
        for thread in threads:
            thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
        processes.end()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    if failed:
        raise failed[0]
    return write_table(Path(options.out), entries(options.size))


def run(options: ComparisonOptions) -> None:
    """Compares, and prints the table."""
    path = compare(options)
    print(path.read_text())
    print(f"table: {path}")


if __name__ == "__main__":
    sys.exit(execute(ComparisonOptions, run, "python -m benchmarks.comparison"))
