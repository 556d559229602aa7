"""What one GPU does with models of full size, within minutes; nothing is downloaded, weights are random.

    bash benchmarks/on_gpu.sh FOLDER
    python -m benchmarks.on_gpu --out FOLDER --minutes 8

Chunks of both models and of PI0 at its full size, plain, in CUDA graphs, compiled; their stages; training, of all
weights but the towers' and of adapters; equality of bfloat16 and float16 with float32. Each part has a limit of its
time, beyond which it is given up, and parts that compile little come first: what there was no time for, a second run
does (`--parts "StereoVLA, pose tokens, graphs" ...`). Every number is a line of FOLDER/rows.jsonl and of
FOLDER/table.md as soon as it is there.

Ways: "plain" is eager; "graphs" holds eager's kernels in CUDA graphs; "compiled" has kernels of its own; "compiled,
graphs" both (mode="reduce-overhead"). Elsewhere than on a GPU there are no CUDA graphs: their ways measure what is left
of them, and the title of the table says so. Times are medians of single calls, memory is what a call needs beyond all
that is held.
"""

import copy
import gc
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import FrameType

import torch
from peft import get_peft_model
from transformers import HfArgumentParser

from stereovla.benchmarks.inference import (
    STEPS,
    Config,
    InferenceOptions,
    Model,
    build,
    build_pi0,
    extra_mib,
    make_inputs,
    peak_gib,
    pi0_chunk,
    seconds,
    stages_of,
)
from stereovla.benchmarks.training import Way
from stereovla.modeling_stereovla.configuration_depthvla import PRESETS as DEPTHVLA_PRESETS
from stereovla.modeling_stereovla.configuration_stereovla import PRESETS
from stereovla.modeling_stereovla.convert_output import DTYPES
from stereovla.training.adapters import lora_config

COMPILED = {
    "graphs": {"backend": "cudagraphs"},
    "compiled": {},
    "compiled, graphs": {"mode": "reduce-overhead"},
}


@dataclass
class GpuOptions:
    """What `python -m benchmarks.on_gpu` can be told."""

    out: str = field(metadata={"help": "Folder of the results; what it has of an earlier run is replaced."})
    stereovla: str = field(default="full", metadata={"help": "Sizes of StereoVLA.", "choices": list(PRESETS)})
    depthvla: str = field(
        default="depthvla-full",
        metadata={"help": "Sizes of DepthVLA, and of PI0 beside it.", "choices": list(DEPTHVLA_PRESETS)},
    )
    device: str = field(default="cuda", metadata={"help": "Where to run: cuda, cuda:1, cpu, ..."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of chunks.", "choices": list(DTYPES)})
    minutes: float = field(default=8.0, metadata={"help": "After which no part goes on."})
    repeats: int = field(default=20, metadata={"help": "Measurements of each chunk and stage; of training steps 3."})
    batch_size: int = field(default=16, metadata={"help": "Samples of a training step."})
    num_steps: int = field(default=STEPS, metadata={"help": "Euler steps of a chunk."})
    lora_rank: int = field(default=32, metadata={"help": "Of the adapters that are trained."})
    parts: list[str] | None = field(default=None, metadata={"help": "Names of the parts to run, in place of all."})


class OutOfTime(BaseException):
    """A part has taken all of its time; nothing that catches errors shall catch it."""


@contextmanager
def limit(allowed: float) -> Iterator[None]:
    """OutOfTime inside, once so many seconds have passed.

    Python drops what is raised in a finalizer or in a callback of the garbage collector, and a compilation has many of
    both: it is raised again every second until it has come out.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(allowed, 0.001), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Results:
    """Rows of numbers, on disk as soon as they are known."""

    def __init__(self, folder: Path, title: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.table, self.title, self.rows = folder / "rows.jsonl", folder / "table.md", title, []
        self.lines.write_text("")

    def add(self, part: str, way: str, what: str, value: float | str, unit: str = "") -> None:
        row = {"part": part, "way": way, "what": what, "value": value, "unit": unit}
        self.rows.append(row)
        with self.lines.open("a") as file:
            file.write(json.dumps(row) + "\n")
        cells = [[str(cell) for cell in (one["part"], one["way"], one["what"], shown(one["value"]), one["unit"])]
                 for one in self.rows]  # fmt: skip
        head = ["part", "way", "what", "value", "unit"]
        text = "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])
        partial_table = self.table.with_suffix(".partial")
        partial_table.write_text(f"{self.title}\n\n{text}\n")
        os.replace(partial_table, self.table)
        print(f"{part}: {way}: {what}: {shown(value)} {unit}", flush=True)


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


class Bench:
    """Models of one dtype on the device, built when they are first asked for, and what is measured of them."""

    def __init__(self, options: GpuOptions, results: Results):
        self.options, self.results, self.device = options, results, options.device

    def sizes(self, preset: str, dtype: str | None = None, batch_size: int = 1) -> InferenceOptions:
        dtype = dtype or self.options.dtype
        return InferenceOptions(preset=preset, dtype=dtype, device=self.device, batch_size=batch_size)

    @cached_property
    def stereovla(self) -> Model:
        return build(self.sizes(self.options.stereovla))

    @cached_property
    def depthvla(self) -> Model:
        return build(self.sizes(self.options.depthvla))

    def inputs(self, config: Config, batch_size: int = 1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What a chunk is predicted from, and its noise."""
        inputs = make_inputs(config, self.sizes("", batch_size=batch_size))
        return inputs, torch.randn(batch_size, config.chunk_size, config.action_dim, device=self.device)

    def time(self, part: str, way: str, what: str, function: Callable[[], object], memory: bool = False) -> None:
        """Median ms of a call, and where it has to get ready, the seconds of the first."""
        first = seconds(function, self.device)
        if way != "plain":
            self.results.add(part, way, f"{what}: first call", first, "s")
            function()  # CUDA graphs are recorded in the second
        if memory:
            self.results.add(part, way, f"{what}: memory", extra_mib(function, self.device), "MiB")
        runs = [seconds(function, self.device) for _ in range(self.options.repeats)]
        self.results.add(part, way, what, 1e3 * statistics.median(runs), "ms")

    # ------------------------------------------------------------------------------------------------------------------
    # Parts
    # ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def plain(self, name: str, part: str) -> None:
        """Chunks and stages, eager."""
        model = getattr(self, name)
        inputs, noise = self.inputs(model.config)
        count = sum(parameter.numel() for parameter in model.parameters())
        self.results.add(part, "plain", "parameters", count / 1e6, "M")
        for way, chosen in thoughts(model).items():
            chunk = partial(model.predict_action, **inputs, **chosen, noise=noise, num_steps=self.options.num_steps)
            self.time(part, "plain", f"chunk{way}", chunk, memory=True)
        for stage, function in stages_of(model, inputs, noise, self.options.num_steps).items():
            self.time(part, "plain", stage, function)

    @torch.no_grad()
    def chunks(self, name: str, way: str, thought: str, part: str) -> None:
        """One kind of chunk, compiled."""
        model = getattr(self, name)
        inputs, noise = self.inputs(model.config)
        model.compile_predict_action(dynamic=False, **COMPILED[way])
        try:
            chunk = partial(
                model.predict_action,
                **inputs,
                **thoughts(model)[thought],
                noise=noise,
                num_steps=self.options.num_steps,
            )
            self.time(part, way, f"chunk{thought}", chunk, memory=True)
        finally:
            del model._act  # the plain one again
            torch._dynamo.reset()

    @torch.no_grad()
    def stages(self, name: str, way: str, part: str) -> None:
        """Stages, each compiled alone, but for generated words, which write into a cache that is there."""
        model = getattr(self, name)
        inputs, noise = self.inputs(model.config)
        for stage, function in stages_of(model, inputs, noise, self.options.num_steps).items():
            if not stage.startswith("chain of thought"):
                self.time(part, way, stage, torch.compile(function, dynamic=False, **COMPILED[way]))
        torch._dynamo.reset()

    @torch.no_grad()
    def pi0(self, way: str, part: str) -> None:
        """PI0 as large as transformers has it, with the language model, expert and SigLIP of the DepthVLA."""
        config = self.depthvla.config
        theirs = build_pi0(config, self.sizes(self.options.depthvla), config.vlm_config.vision_config)
        inputs, noise = self.inputs(config)
        chunk = pi0_chunk(theirs, inputs, noise, self.options.num_steps)
        if way != "plain":
            chunk = torch.compile(chunk, dynamic=False, **COMPILED[way])
        self.time(part, way, "chunk", chunk, memory=True)
        torch._dynamo.reset()

    def training(self, preset: str, adapted: bool, part: str) -> None:
        """Samples/s and memory of steps with bfloat16 activations, towers frozen, as the full presets train."""
        options = self.options
        self.drop()
        model = build(self.sizes(preset, "float32")).train()
        model.freeze(*(tower for tower in model.towers if model.parts[tower] in dict(model.named_modules())))
        model.gradient_checkpointing_enable()
        config = model.config
        learner = get_peft_model(model, lora_config(model, options.lora_rank)) if adapted else model
        arithmetic = partial(torch.autocast, self.device.partition(":")[0], torch.bfloat16)

        def losses(inputs: dict) -> list:
            with arithmetic():
                return [learner(**inputs).loss]

        way, inputs = Way(learner, losses), training_inputs(config, self.inputs(config, options.batch_size)[0])
        name = f"adapters of rank {options.lora_rank}" if adapted else "all but towers"
        way.step(inputs)  # allocates the optimizer's state
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        runs = [seconds(partial(way.step, inputs), self.device) for _ in range(3)]
        rate = options.batch_size / statistics.median(runs)
        self.results.add(part, name, f"training, batches of {options.batch_size}", rate, "samples/s")
        self.results.add(part, name, "training: most memory held", peak_gib(self.device), "GiB")

    @torch.no_grad()
    def equality(self, preset: str, part: str) -> None:
        """How far chunks in 16 bit are from those in float32, in units of their standard deviation."""
        self.drop()
        model = build(self.sizes(preset, "float32"))
        inputs, noise = self.inputs(model.config)
        predict = {**thoughts(model)[""], **inputs, "noise": noise, "num_steps": self.options.num_steps}
        exact = model.predict_action(**predict).double()
        for name in ("bfloat16", "float16"):
            chunk = copy.deepcopy(model).to(DTYPES[name]).predict_action(**predict).double()
            errors = (chunk - exact).abs() / exact.std()
            self.results.add(part, name, "chunk: mean error", float(errors.mean()), "std of float32's")
            self.results.add(part, name, "chunk: largest error", float(errors.max()), "std of float32's")

    def drop(self) -> None:
        """Frees the models of chunks; who needs them again builds them again."""
        for name in ("stereovla", "depthvla"):
            self.__dict__.pop(name, None)
        free(self.device)


def free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def thoughts(model: Model) -> dict[str, dict[str, bool]]:
    """Kinds of chunks of a model, as they are told, and what `predict_action` is told for them."""
    if not hasattr(model.config, "chain_of_thought"):
        return {"": {}}
    return {"": {"chain_of_thought": False}, ", pose tokens": {"chain_of_thought": True}}


def training_inputs(config: Config, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `forward` learns from: random actions, and a pose or depth where the model tells one."""
    ids, state = inputs["input_ids"], inputs["state"]
    actions = torch.randn(len(ids), config.chunk_size, config.action_dim, device=ids.device)
    if config.writes_pose:
        low = config.action_vocab_size - config.num_bins
        pose = torch.randint(low, config.action_vocab_size, (len(ids), config.pose_dim), device=ids.device)
        answer = torch.cat([pose, pose.new_full((len(ids), 1), config.text_config.eos_token_id)], dim=1)
        labels = torch.cat([torch.full_like(ids, -100), answer], dim=1)
        ids = torch.cat([ids, answer], dim=1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    elif config.depth_config is not None:
        size = (len(ids), len(config.views), config.image_size, config.image_size)
        inputs = {**inputs, "depth_map": 0.5 + torch.rand(size, device=ids.device)}
    return {**inputs, "state": torch.randn_like(state), "actions": actions}


def parts_of(bench: Bench) -> dict[str, tuple[float, Callable[[str], None]]]:
    """{name: (share of all the time, part)}, those first that are done soon."""
    options, pose = bench.options, ", pose tokens"
    return {
        "StereoVLA": (0.12, partial(bench.plain, "stereovla")),
        "DepthVLA": (0.12, partial(bench.plain, "depthvla")),
        "PI0": (0.08, partial(bench.pi0, "plain")),
        "StereoVLA, graphs": (0.3, partial(bench.chunks, "stereovla", "graphs", "")),
        "StereoVLA, adapters": (0.1, partial(bench.training, options.stereovla, True)),
        "StereoVLA, training": (0.1, partial(bench.training, options.stereovla, False)),
        "StereoVLA, 16 bit": (0.08, partial(bench.equality, options.stereovla)),
        "DepthVLA, adapters": (0.1, partial(bench.training, options.depthvla, True)),
        "DepthVLA, training": (0.1, partial(bench.training, options.depthvla, False)),
        "DepthVLA, 16 bit": (0.08, partial(bench.equality, options.depthvla)),
        "StereoVLA, compiled": (0.5, partial(bench.chunks, "stereovla", "compiled, graphs", "")),
        "DepthVLA, graphs": (0.3, partial(bench.chunks, "depthvla", "graphs", "")),
        "StereoVLA, pose tokens, graphs": (0.5, partial(bench.chunks, "stereovla", "graphs", pose)),
        "PI0, graphs": (0.3, partial(bench.pi0, "graphs")),
        "DepthVLA, compiled": (0.5, partial(bench.chunks, "depthvla", "compiled, graphs", "")),
        "PI0, compiled": (0.5, partial(bench.pi0, "compiled, graphs")),
        "StereoVLA, pose tokens, compiled": (0.9, partial(bench.chunks, "stereovla", "compiled, graphs", pose)),
        "StereoVLA, stages": (0.5, partial(bench.stages, "stereovla", "compiled")),
        "DepthVLA, stages": (0.5, partial(bench.stages, "depthvla", "compiled")),
        "StereoVLA, kernels alone": (0.5, partial(bench.chunks, "stereovla", "compiled", "")),
    }


def main(arguments: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(GpuOptions, description=__doc__).parse_args_into_dataclasses(arguments)
    begin = time.monotonic()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device is {options.device}, but there is no GPU here; --device cpu proves the script")
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    title = f"{device}, torch {torch.__version__}; {options.stereovla}, {options.depthvla}, chunks in {options.dtype}"
    title += f", {options.num_steps} Euler steps"
    if not options.device.startswith("cuda"):
        title += "; no CUDA graphs here: graphs is plain by torch.compile, compiled, graphs is compiled"
    results = Results(Path(options.out), title)
    bench = Bench(options, results)
    parts = parts_of(bench)
    if unknown := sorted(set(options.parts or ()) - parts.keys()):
        raise SystemExit(f"--parts {', '.join(unknown)}: there are {'; '.join(parts)}")
    for name, (share, part) in parts.items():
        if options.parts and name not in options.parts:
            continue
        left = 60 * options.minutes - (time.monotonic() - begin)
        if left <= 0:
            results.add(name, "", "left out: no time left", "")
            continue
        allowed = min(left, 60 * options.minutes * share)
        try:
            with limit(allowed):
                part(name)
        except OutOfTime:
            results.add(name, "", "given up after", allowed, "s")
        except Exception as error:  # the other parts are worth having
            results.add(name, "", f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", "")
        free(options.device)
    print(f"{len(results.rows)} rows in {results.table}")


if __name__ == "__main__":
    main()
