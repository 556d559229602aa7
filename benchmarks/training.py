"""Speed and memory of training steps, plain, compiled and checkpointed, and transformers' PI0 of equal sizes in the
same run.

    python -m benchmarks.training --preset demo --dataset DATASET

Every way trains from the same stream: forward, backward, clipping and AdamW. PI0 sees the left view, a SigLIP of one
layer giving it as many tokens, and has the flow loss alone, with as many draws as the preset has, one after the other
as its forward takes one. On a CPU times are those that the process has used, over all its threads, so that other work
beside it changes little. They are medians over alternating rounds: only ratios within one run mean something. Memory is
what a step needs beyond weights, gradients and optimizer (resident set on a CPU, Linux only; the allocator's on a GPU).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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

NO_FEED = "ours, the same batch again and again"
HANDED_BACK = "ours, freed memory handed back"
SHARED = "ours, two questions of a frame"


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


def build_ways(options: TrainingBenchmarkOptions, meta: dict) -> tuple[dict[str, Way], object, object]:
    """{name: way}, and the processor and config of ours."""
    ways = {}
    for name in (NO_FEED, "ours", HANDED_BACK, SHARED, "ours, compiled", "ours, activations checkpointed"):
        torch.manual_seed(0)
        model, processor = untrained(options.preset, meta)
        model.to(options.device)
        if name.endswith("compiled"):
            for block in blocks(model):
                block.compile()
        if name.endswith("checkpointed"):
            model.gradient_checkpointing_enable()
        ways[name] = Way(model, lambda inputs, model=model: [model(**inputs).loss])
    config = model.config
    theirs = build_pi0(config, options)

    def their_losses(inputs: dict[str, torch.Tensor]) -> list:
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
            for _ in range(config.flow_draws)
        ]

    ways["PI0 of equal sizes"] = Way(theirs, their_losses)
    return ways, processor, config


def main(arguments: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(TrainingBenchmarkOptions, description=__doc__).parse_args_into_dataclasses(arguments)
    meta = load_meta(options.dataset)
    ways, processor, config = build_ways(options, meta)
    feeds = {}
    for count in (1, 2):
        stream = WindowStream(
            options.dataset,
            chunk_size=config.chunk_size,
            history=config.state_history,
            depth_map_share=0.125 * count if config.disparity_loss_weight else 0.0,
            questions_per_frame=count,
        )
        feeds[count] = Feed(Batches(stream, options.batch_size, processor, config), options.workers, 0)

    def take(count: int = 1) -> dict[str, torch.Tensor]:
        return {name: value.to(options.device) for name, value in feeds[count].take()[0].items()}

    clock = time.process_time if options.device == "cpu" else time.perf_counter
    held = take()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    waits: dict[str, list[float]] = {name: [] for name in ways}
    memory = {}
    with tqdm(total=(1 + options.rounds) * len(ways), unit="round") as progress:
        for turn in range(1 + options.rounds):
            for name, way in ways.items():
                progress.set_description(name)
                keep_freed_memory(name != HANDED_BACK)
                if turn == 0:  # compiles, and allocates the optimizer's state
                    way.step(held)
                    memory[name] = extra_mib(lambda way=way: way.step(held), options.device)
                else:
                    synchronize(options.device)
                    begin, waited = clock(), 0.0
                    for _ in range(options.steps):
                        asked = clock()
                        inputs = held if name == NO_FEED else take(2 if name == SHARED else 1)
                        waited += clock() - asked
                        way.step(inputs)
                    synchronize(options.device)
                    seconds = clock() - begin
                    rates[name].append(options.steps * options.batch_size / seconds)
                    waits[name].append(waited / seconds)
                progress.update()
    print(f"\npreset {options.preset} on {options.device}, {torch.get_num_threads()} threads, batch "
          f"{options.batch_size}, {options.workers} workers, {config.flow_draws} flow draws\n")  # fmt: skip
    per = "samples per core second" if options.device == "cpu" else "samples/s"
    print(f"| way | {per} | of ours | time for data | MiB of a step |\n|---|---|---|---|---|")
    for name in ways:
        rate = statistics.median(rates[name])
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["ours"], strict=True))
        waiting = statistics.median(waits[name])
        print(f"| {name} | {rate:.1f} | {ratio:.2f} | {100 * waiting:.0f} % | {memory[name]:,.0f} |")


if __name__ == "__main__":
    main()
