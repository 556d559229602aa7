"""Latency and throughput of a served policy with 1, 4 and 16 clients, beside calling the model directly, in one run.

    python -m benchmarks.serving --preset demo
    python -m benchmarks.serving --preset full --dtype bfloat16 --device cuda

The server is a process of its own (`stereovla serve`), the clients are threads of this one that ask one request after
the other, as robots do that wait for a chunk. Directly, the model is called in the same process that prepares its
inputs, in batches of as many as there are clients. Weights are random: no result depends on them.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser

from stereovla.modeling_stereovla.configuration_depthvla import PRESETS as DEPTHVLA_PRESETS
from stereovla.modeling_stereovla.configuration_stereovla import PRESETS
from stereovla.serving.client import PolicyClient
from stereovla.sources import DTYPES, load_checkpoint
from stereovla.training.models import untrained

ROBOT, RANGE = "robot", {"q01": [-1.0] * 7, "q99": [1.0] * 7}
META = {
    "tasks": ["pick up the red cube"],
    "stats": {ROBOT: dict.fromkeys(("state", "action", "keyframe_pose"), RANGE)},
    "fps": 10.0,
    "state_dim": 7,
    "action_dim": 7,
}


@dataclass
class ServingBenchmark:
    """What `python -m benchmarks.serving` can be told."""

    preset: str = field(
        default="demo", metadata={"help": "Sizes of the model.", "choices": [*PRESETS, *DEPTHVLA_PRESETS]}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights.", "choices": list(DTYPES)})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu, cuda, cuda:1, ..."})
    clients: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "How many ask at a time."})
    requests: int = field(default=20, metadata={"help": "Requests of each client."})
    size: int = field(default=0, metadata={"help": "Side of the views that are sent, px; 0 = the model's own."})
    compile: bool = field(default=False, metadata={"help": "Compile the server's prediction."})


def views_of(size: int) -> list[np.ndarray]:
    """A textured plane in both views, uint8 (size, size, 3)."""
    noise = np.random.default_rng(0).integers(0, 255, (size // 4 + 1, size // 4 + 2, 3), np.uint8)
    wide = np.kron(noise, np.ones((4, 4, 1), np.uint8))
    return [wide[:size, :size].copy(), wide[:size, 3 : size + 3].copy()]


def direct(model, processor, views: list[np.ndarray], count: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` chunks for `count` robots at once, inputs and decoding included."""
    times = []
    named = hasattr(processor, "views")
    images = {"left": views[0]} if named else views
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        inputs = processor(
            [images] * count, META["tasks"] * count, [np.zeros(7, np.float32)] * count, [ROBOT] * count
        ).to(model.device)
        processor.decode_actions(model.predict_action(**inputs), [ROBOT] * count)
        times.append(time.perf_counter() - begin)
    return times[1:]


def asked(url: str, views: list[np.ndarray], count: int, repeats: int) -> tuple[list[float], float]:
    """Seconds of each request of `count` clients that ask `repeats` times each, and of all together."""
    ready = threading.Barrier(count)

    def ask(_: int) -> list[float]:
        times = []
        with PolicyClient(url, timeout_s=600) as client:
            right = views[1] if "right" in client.metadata["views"] else None
            ready.wait(600)
            for _ in range(repeats):
                begin = time.perf_counter()
                client.predict(views[0], right, META["tasks"][0], np.zeros(7, np.float32))
                times.append(time.perf_counter() - begin)
        return times

    begin = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        found = [seconds for times in pool.map(ask, range(count)) for seconds in times]
    return found, time.perf_counter() - begin


def line(name: str, count: int, times: list[float], per_s: float) -> str:
    low, high = statistics.median(times), float(np.quantile(times, 0.95))
    return f"{name:<10} {count:>7} {1000 * low:>11.1f} {1000 * high:>9.1f} {per_s:>12.1f}"


def main(options: ServingBenchmark, say: Callable[[str], None] = print) -> None:
    """Prints one line for each way and number of clients."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        for part in untrained(options.preset, META):
            part.save_pretrained(folder)
        model, processor = load_checkpoint(str(folder), options.device, dtype=options.dtype)
        views = views_of(options.size or model.config.image_size)
        where = f"{options.device}, {torch.get_num_threads()} threads" if options.device == "cpu" else options.device
        say(
            f"preset {options.preset}, {options.dtype} on {where}, views of {len(views[0])} px, {options.requests} each"
        )
        say(f"{'':<10} {'clients':>7} {'median ms':>11} {'95 % ms':>9} {'chunks/s':>12}")
        for count in options.clients:
            times = direct(model, processor, views, count, options.requests)
            say(line("directly", count, times, count / statistics.mean(times)))
        del model
        command = [sys.executable, "-m", "stereovla", "serve", "--model", str(folder), "--port", "0"]
        command += ["--device", options.device, "--dtype", options.dtype, "--max_batch", str(max(options.clients))]
        command += ["--deadline_s", "600", "--compile", str(options.compile)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
            try:
                url = next(line.split()[-1] for line in server.stdout if line.startswith("serving "))
                for count in options.clients:
                    times, seconds = asked(url, views, count, options.requests)
                    say(line("served", count, times, count * options.requests / seconds))
            finally:
                server.terminate()


if __name__ == "__main__":
    main(HfArgumentParser(ServingBenchmark).parse_args_into_dataclasses()[0])
