"""Speed and memory of training steps, plain, compiled and checkpointed, and transformers' PI0 of equal sizes in the
same run.

    python -m benchmarks.training --preset demo --dataset DATASET
    python -m benchmarks.training --preset demo --dataset DATASET --before CHECKOUT --ways before shared shared-before

Every way trains from the same stream: forward, backward, clipping and AdamW. PI0 sees the left view, a SigLIP of one
layer giving it as many tokens, and has the flow loss alone, with as many draws as the preset has, one after the other
as its forward takes one. On a CPU times are those that the process has used, over all its threads, so that other work
beside it changes little. They are medians over alternating rounds: only ratios within one run mean something. Memory is
what a step needs beyond weights, gradients and optimizer (resident set on a CPU, Linux only; the allocator's on a GPU).
An earlier version, such as c6cb3aa, takes its turns in a process of its own (`git worktree add CHECKOUT c6cb3aa`).
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from stereovla.benchmarks.inference import build_pi0, extra_mib, synchronize
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla.configuration_stereovla import PRESETS
from stereovla.training.feed import Batches, Feed
from stereovla.training.models import blocks, untrained
from stereovla.training.processes import keep_freed_memory

WAYS = {
    "ours": "ours",
    "same-batch": "ours, the same batch again and again",
    "handed-back": "ours, freed memory handed back",
    "shared": "ours, two questions of a frame",
    "shared-before": "ours, two questions of a frame, losses of the version before",
    "compiled": "ours, compiled",
    "checkpointed": "ours, activations checkpointed",
    "pi0": "PI0 of equal sizes",
    "before": "the version before",
}
# what the demo learnt at c6cb3aa, whose sizes it still has
LOSSES_BEFORE = {
    "language_loss_weight": 0.5,
    "language_pointing_layer": None,
    "language_pointing_loss_weight": 0.0,
    "place_code": False,
    "bin_smoothing": 0.0,
    "turn_symmetry": 0,
}


@dataclass
class TrainingBenchmarkOptions:
    """What `python -m benchmarks.training` can be told."""

    dataset: str = field(metadata={"help": "Folder or Hub id of the dataset that is trained on."})
    preset: str = field(default="demo", metadata={"help": "Sizes of the model.", "choices": list(PRESETS)})
    batch_size: int = field(default=24, metadata={"help": "Samples of a step."})
    steps: int = field(default=4, metadata={"help": "Steps of each way in a round."})
    rounds: int = field(default=5, metadata={"help": "Measurements of each way, in turn."})
    workers: int = field(default=0, metadata={"help": "Processes that prepare batches; 0 = the one that trains."})
    dtype: str = field(default="float32", metadata={"help": "Of all weights.", "choices": ["float32"]})
    device: str = field(default="cpu", metadata={"help": "Where to train: cpu, cuda, cuda:1, ..."})
    ways: list[str] | None = field(
        default=None,
        metadata={"help": "Which to measure; ratios are to the first. Default: all.", "choices": list(WAYS)},
    )
    before: str | None = field(
        default=None, metadata={"help": "A checkout of c6cb3aa, of which the way `before` is; on a CPU."}
    )

    def __post_init__(self):
        if self.ways is None:
            self.ways = [name for name in WAYS if self.before or "before" not in name]
        if ("before" in self.ways) != (self.before is not None):
            raise ValueError("--before CHECKOUT and the way `before` belong together; give both, or none of them")
        if self.before is not None and self.device != "cpu":
            raise ValueError(f"--device is {self.device}; the version before is measured on a cpu")


class Way:
    """One model and its optimizer."""

    def __init__(self, model: torch.nn.Module, losses: Callable[[dict], list]):
        self.model, self.losses = model.train(), losses
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(self, inputs: dict[str, torch.Tensor]) -> None:
        for loss in self.losses(inputs):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class FedWay(Way):
    """A way that takes its batches from a feed, or one of them again and again."""

    def __init__(self, model: torch.nn.Module, losses: Callable[[dict], list], feed: Feed, name: str, device: str):
        super().__init__(model, losses)
        self.feed, self.device, self.keeps = feed, device, name != "handed-back"
        self.held = self.take()
        self.batch = (lambda: self.held) if name == "same-batch" else self.take

    def take(self) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in self.feed.take()[0].items()}

    def warm_up(self) -> float:
        """Compiles, and allocates the optimizer's state; the memory of a step, MiB."""
        keep_freed_memory(self.keeps)
        self.step(self.held)
        return extra_mib(lambda: self.step(self.held), self.device)

    def measure(self, steps: int) -> tuple[float, float]:
        """Seconds of `steps` steps, and those of them that the data took."""
        keep_freed_memory(self.keeps)
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        synchronize(self.device)
        begin, waited = clock(), 0.0
        for _ in range(steps):
            asked = clock()
            inputs = self.batch()
            waited += clock() - asked
            self.step(inputs)
        synchronize(self.device)
        return clock() - begin, waited


class Before:
    """The version in a checkout, in a process of its own, which measures itself as `FedWay` does."""

    def __init__(self, options: TrainingBenchmarkOptions):
        program = Path(__file__).with_name("training_before.py")
        arguments = [options.before, options.dataset, options.preset, str(options.batch_size)]
        self.process = subprocess.Popen(
            [sys.executable, str(program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def warm_up(self) -> None:
        self.measure(2)

    def measure(self, steps: int) -> tuple[float, float]:
        try:
            print(steps, file=self.process.stdin, flush=True)
            seconds, waited = map(float, self.process.stdout.readline().split())
        except (BrokenPipeError, ValueError) as error:
            status = self.process.wait()
            raise RuntimeError(f"the version before ended with status {status}; its error is above") from error
        return seconds, waited

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def our_losses(ours: torch.nn.Module) -> Callable[[dict], list]:
    return lambda inputs: [ours(**inputs).loss]


def their_losses(theirs: torch.nn.Module, draws: int) -> Callable[[dict], list]:
    """Losses of PI0, one for each draw."""

    def losses(inputs: dict[str, torch.Tensor]) -> list:
        ids = inputs["input_ids"]
        return [
            theirs(
                state=inputs["state"][:, -1],
                input_ids=ids,
                pixel_values=inputs["pixel_values"][:, :1],
                attention_mask=inputs["attention_mask"],
                pixel_attention_mask=torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device),
                actions=inputs["actions"],
            ).loss
            for _ in range(draws)
        ]

    return losses


def build_ways(options: TrainingBenchmarkOptions) -> dict[str, FedWay | Before]:
    meta = load_meta(options.dataset)
    ways: dict[str, FedWay | Before] = {}
    feeds: dict[tuple, Feed] = {}
    for name in options.ways:
        if name == "before":
            ways[name] = Before(options)
            continue
        torch.manual_seed(0)
        model, processor = untrained(options.preset, meta, **(LOSSES_BEFORE if name == "shared-before" else {}))
        config, count = model.config, 2 if name.startswith("shared") else 1
        losses = our_losses(model)
        if name == "pi0":
            model = build_pi0(config, options)
            losses = their_losses(model, config.flow_draws)
        model.to(options.device)
        if name == "compiled":
            for block in blocks(model):
                block.compile()
        if name == "checkpointed":
            model.gradient_checkpointing_enable()
        if (kind := (count, config.turn_symmetry)) not in feeds:
            stream = WindowStream(
                options.dataset,
                chunk_size=config.chunk_size,
                history=config.state_history,
                depth_map_share=0.125 * count if config.disparity_loss_weight else 0.0,
                questions_per_frame=count,
            )
            feeds[kind] = Feed(Batches(stream, options.batch_size, processor, config), options.workers, 0)
        ways[name] = FedWay(model, losses, feeds[kind], name, options.device)
    return ways


def main(arguments: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(TrainingBenchmarkOptions, description=__doc__).parse_args_into_dataclasses(arguments)
    ways = build_ways(options)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    waits: dict[str, list[float]] = {name: [] for name in ways}
    memory = {}
    with tqdm(total=(1 + options.rounds) * len(ways), unit="round") as progress:
        for turn in range(1 + options.rounds):
            for name, way in ways.items():
                progress.set_description(WAYS[name])
                if turn == 0:
                    memory[name] = way.warm_up()
                else:
                    seconds, waited = way.measure(options.steps)
                    rates[name].append(options.steps * options.batch_size / seconds)
                    waits[name].append(waited / seconds)
                progress.update()
    if options.before is not None:
        ways["before"].end()
    print(f"\npreset {options.preset} on {options.device}, {torch.get_num_threads()} threads, batch "
          f"{options.batch_size}, {options.workers} workers\n")  # fmt: skip
    per = "samples per core second" if options.device == "cpu" else "samples/s"
    first = next(iter(ways))
    print(f"| way | {per} | of the first | time for data | MiB of a step |\n|---|---|---|---|---|")
    for name in ways:
        rate = statistics.median(rates[name])
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates[first], strict=True))
        waiting = statistics.median(waits[name])
        needed = "not measured" if memory[name] is None else f"{memory[name]:,.0f}"
        print(f"| {WAYS[name]} | {rate:.1f} | {ratio:.2f} | {100 * waiting:.0f} % | {needed} |")


if __name__ == "__main__":
    main()
