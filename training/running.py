"""What every training loop does around its steps: its output folder, its log, its learning rate, its end by a signal.

`options` is the dataclass of a command's options.
"""

import fcntl
import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from stereovla.dataset_builder.dataset.shards import read_json, write_json
from stereovla.training.checkpoint_folders import checkpoints, remove_partial


def append_line(path: Path, record: dict) -> None:
    with path.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Removes the lines of `path` that a resumed run will write again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                break  # cut off by a kill
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, path)


def learning_rate(step: int, options: Any) -> float:
    """Linear warm-up, flat, cosine to zero; `step` counts from 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    start = options.warmup_steps + options.flat_share * (options.steps - options.warmup_steps)
    if step < start:
        return options.learning_rate
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, options.steps - start)))


def seed_step(seed: int, step: int, process: int) -> None:
    """Makes all randomness of a step (dropout) follow from these three, so that there is nothing to save."""
    torch.manual_seed((seed * 1_000_003 + step) * 1009 + process)


@contextmanager
def own_folder(options: Any, state: Accelerator | PartialState) -> Iterator[Path | None]:
    """Holds the folder of a run for this training alone, with its options in it.

    Every process of the training holds a lock, which the operating system frees however the process ends.

    Args:
        state: this process among those of the training, all of which come here.

    Yields:
        The folder of the result where the run is complete, which is told; else None.

    Raises:
        ValueError: for a folder with a run of other options, whether complete or not. RuntimeError: while another
            training runs there.
    """
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "lock", "a") as lock:
        refused: list[Exception | None] = [None]
        if state.is_main_process:
            try:
                hold(lock, output, fcntl.LOCK_EX)
                begin_run(options, state.num_processes, output)
                hold(lock, output, fcntl.LOCK_SH)  # before the other processes of this training want the same
            except (ValueError, RuntimeError, OSError) as error:
                refused = [error]
        if (error := broadcast_object_list(refused)[0]) is not None:
            raise error
        if not state.is_main_process:
            hold(lock, output, fcntl.LOCK_SH)
        complete = output / "model" if (output / "model/training.json").exists() else None
        if complete is not None:
            state.print(f"{complete} is complete; delete {output} to train again")
        yield complete


def hold(lock: IO, output: Path, how: int) -> None:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(
            f"another process is training in {output}; wait for it or end it, or choose another --output_dir"
        ) from error


def begin_run(options: Any, processes: int, output: Path) -> None:
    """Writes the options, which stay once anything was trained, and removes what a kill left; ValueError for a
    folder in which this run cannot go on.
    """
    parts = processes * options.accumulation
    if options.batch_size % parts:
        raise ValueError(
            f"--batch_size {options.batch_size} does not divide among {processes} processes with "
            f"--accumulation {options.accumulation}"
        )
    record, saved, result = json.loads(json.dumps(asdict(options))), output / "options.json", output / "model"
    finished = (result / "training.json").exists()
    # until then a mistyped command may be corrected, and nothing is lost with options that cannot be read
    begun = finished or (output / "losses.jsonl").exists() or bool(checkpoints(output))
    before = None
    if begun and saved.exists():
        before = read_json(saved)
    elif finished:  # the result alone was kept, which says the same
        before = read_json(result / "training.json").get("options")
    if before is not None:
        # a run that began before an option existed went by the option's default
        before = {item.name: item.default for item in fields(options) if item.name not in before} | before
    keys = set() if before is None else before.keys() | record.keys()
    if changed := sorted(key for key in keys if before.get(key) != record.get(key)):
        raise ValueError(
            f"{output} holds a run with other options ({', '.join(changed)}); choose another --output_dir or delete it"
        )
    if result.exists() and not finished:
        raise ValueError(
            f"{result} is in the way of the trained model and is none itself (it lacks training.json); move it away"
        )
    remove_partial(output)
    if not (begun and saved.exists()):
        write_json(saved, record)


@contextmanager
def told_to_end() -> Iterator[list[int]]:
    """A list that is no longer empty once this process got SIGTERM or SIGINT: the numbers of the signals."""
    told: list[int] = []

    def note(number: int, _) -> None:
        if not told and os.environ.get("RANK", "0") == "0":
            # unbuffered: a signal may come in the middle of a print
            os.write(2, b"\ntold to end: a checkpoint is saved after this step\n")
        told.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(told: list[int]) -> NoReturn:
    """Ends this process as shells expect of one that was told to; by another process, where `told` is empty."""
    raise SystemExit(128 + (told[0] if told else signal.SIGTERM))
