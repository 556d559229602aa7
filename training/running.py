"""What every training loop does around its steps: its output folder, its log, its learning rate, its end by SIGTERM.

`options` is the dataclass of a command's options.
"""

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


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


def at_least_one(options: Any, *names: str) -> None:
    """ValueError if one of these options is smaller."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")


def seed_step(seed: int, step: int, process: int) -> None:
    """Makes all randomness of a step (dropout) follow from these three, so that there is nothing to save."""
    torch.manual_seed((seed * 1_000_003 + step) * 1009 + process)


def prepare_output(options: Any, accelerator: Accelerator, output: Path) -> None:
    """Writes the options; refuses a folder with a run of other options."""
    record, saved = asdict(options), output / "options.json"
    if saved.exists() and (before := json.loads(saved.read_text())) != record:
        changed = sorted(key for key in before.keys() | record.keys() if before.get(key) != record.get(key))
        raise ValueError(
            f"{output} holds a run with other options ({', '.join(changed)}); choose another --output_dir or delete it"
        )
    parts = accelerator.num_processes * options.accumulation
    if options.batch_size % parts:
        raise ValueError(
            f"--batch_size {options.batch_size} does not divide among {accelerator.num_processes} processes with "
            f"--accumulation {options.accumulation}"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(record, indent=2))


@contextmanager
def told_to_end() -> Iterator[list[str]]:
    """A list that is no longer empty once this process got SIGTERM."""
    told: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append("SIGTERM"))
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
