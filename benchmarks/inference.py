"""Time and memory of one action chunk, stage by stage, and transformers' PI0 of equal sizes beside it in the same run.

    python -m benchmarks.inference --preset demo
    python -m benchmarks.inference --preset full --dtype bfloat16 --repeats 1
    python -m benchmarks.inference --preset depthvla-lab --repeats 20

Times are medians over alternating repetitions: only ratios within one run mean something. A denoising step is the time
from one to the next within a chunk (of `predict_action`, and of PI0's `sample_actions`). Of DepthVLA a chunk of equal
sizes without depth expert is timed too. Memory is what a stage needs beyond the weights, and the most that the whole
run took (resident set on a CPU, Linux only; the allocator's on a GPU).
Weights are random: no result depends on them.
"""

import ctypes
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PI0Config, PI0ForConditionalGeneration, PreTrainedConfig
from transformers.utils import ModelOutput

from stereovla.modeling_stereovla import (
    DepthVLAConfig,
    DepthVLAForActionPrediction,
    StereoVLAConfig,
    StereoVLAForActionPrediction,
)
from stereovla.modeling_stereovla.action_expert import Prefix
from stereovla.modeling_stereovla.configuration_depthvla import PRESETS as DEPTHVLA_PRESETS
from stereovla.modeling_stereovla.configuration_stereovla import PRESETS
from stereovla.modeling_stereovla.convert_output import DTYPES
from stereovla.modeling_stereovla.layer_caches import BufferedCache, RecordingCache
from stereovla.modeling_stereovla.policy import Beginning

WORDS = 8  # text tokens of a short instruction


@dataclass
class InferenceOptions:
    """What `python -m benchmarks.inference` can be told."""

    preset: str = field(
        default="demo", metadata={"help": "Sizes of the model.", "choices": [*PRESETS, *DEPTHVLA_PRESETS]}
    )
    dtype: str = field(default="float32", metadata={"help": "Of weights and activations.", "choices": list(DTYPES)})
    device: str = field(default="cpu", metadata={"help": "Where to run: cpu, cuda, cuda:1, ..."})
    repeats: int = field(default=5, metadata={"help": "Measurements of each stage, the median counts."})
    batch_size: int = field(default=1, metadata={"help": "Samples at once."})
    compile: bool = field(default=False, metadata={"help": "Compile the denoising step of ours (one full graph)."})
    pi0: bool = field(default=True, metadata={"help": "Also time PI0 at the same sizes; needs its memory too."})


STEPS = 10  # Euler steps of a chunk
CHUNK, PI0_CHUNK = f"chunk, {STEPS} steps", f"PI0's chunk, {STEPS} steps"
WITHOUT = f"chunk without depth expert, {STEPS} steps"
Config = StereoVLAConfig | DepthVLAConfig
Model = StereoVLAForActionPrediction | DepthVLAForActionPrediction


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def status_mib(key: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1024


def peak_gib(device: str) -> float:
    """The most memory that was held since the last reset."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return status_mib("VmHWM") / 1024


def extra_mib(function: Callable[[], object], device: str) -> float:
    """Peak memory that `function` needs beyond what is held before it, MiB; resets the peak."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # what was freed goes back to the system: a step that finds it in the allocator would need nothing
    ctypes.CDLL(None).malloc_trim(0)
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    function()
    return max(0.0, status_mib("VmHWM") - before)


def build(options: InferenceOptions, **overrides) -> Model:
    of_depthvla = options.preset in DEPTHVLA_PRESETS
    config = (DepthVLAConfig if of_depthvla else StereoVLAConfig).from_preset(options.preset, **overrides)
    kind = DepthVLAForActionPrediction if of_depthvla else StereoVLAForActionPrediction
    with torch.device(options.device):
        return kind._from_config(config, dtype=DTYPES[options.dtype]).eval()


def build_pi0(
    config: Config, options: InferenceOptions, vision: PreTrainedConfig | None = None
) -> PI0ForConditionalGeneration:
    """PI0 with our language model's and expert's sizes and one image of as many tokens, which a SigLIP makes: of one
    layer, where it is no part of what is compared, or that of the config `vision`.
    """
    text = config.text_config
    shared = {
        "model_type": "gemma",
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
    }
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "vision_use_head": False,
    }
    language = {**shared, "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size}
    pi0 = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": language,
            "vision_config": tower if vision is None else vision.to_dict(),
            "projection_dim": text.hidden_size,
            "image_token_id": config.image_token_id,
        },
        dit_config={
            **shared,
            "hidden_size": config.expert_hidden_size,
            "intermediate_size": config.expert_intermediate_size,
        },
        chunk_size=config.chunk_size,
        max_state_dim=config.state_dim,
        max_action_dim=config.action_dim,
    )
    with torch.device(options.device):
        return PI0ForConditionalGeneration._from_config(pi0, dtype=DTYPES[options.dtype]).eval()


def make_inputs(config: Config, options: InferenceOptions) -> dict[str, torch.Tensor]:
    batch, size, device = options.batch_size, config.image_size, options.device
    words = WORDS + (config.state_history * config.state_dim if config.writes_pose else 0)
    ids = torch.full((batch, 1 + config.num_image_tokens + words), 5)
    ids[:, 0] = config.text_config.bos_token_id
    ids[:, 1 : 1 + config.num_image_tokens] = config.image_token_id
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": torch.rand(batch, len(config.pixel_views), 3, size, size).to(device),
        "state": torch.zeros(batch, config.state_history, config.state_dim).to(device),
        **({"facing": torch.zeros(batch, config.num_turns).to(device)} if config.turn_symmetry else {}),
    }


def parameter_table(model: Model) -> list[tuple[str, int]]:
    modules = dict(model.named_modules())
    parts = [(name, modules[path]) for name, path in model.parts.items() if path in modules]
    counts = [(name, sum(p.numel() for p in part.parameters())) for name, part in parts]
    return [*counts, ("all", sum(p.numel() for p in model.parameters()))]


Stages = dict[str, Callable[[], object]]


def expert_stage(
    model: Model, prefix: Prefix, seen: ModelOutput, inputs: dict, noise: torch.Tensor, steps: int
) -> Stages:
    tokens, _ = model._state_tokens(inputs["state"], inputs["input_ids"], None, seen, facing=inputs.get("facing"))
    return {f"action expert, {steps} steps": lambda: model._integrate(prefix, tokens, Beginning(steps, noise))}


def stereovla_stages(model: StereoVLAForActionPrediction, inputs: dict, noise: torch.Tensor, steps: int) -> Stages:
    towers, pixels = model.model.visual_tokens, inputs["pixel_values"].to(model.dtype)
    embeds = model.model.embed(inputs["input_ids"], towers(pixels).tokens)

    def semantic():
        return [encoder(pixels[:, 0]) for encoder in (towers.semantic, towers.spatial) if encoder is not None]

    def prefill(cache):
        return model.model(inputs_embeds=embeds, cache=cache, use_cache=False)

    length = embeds.shape[1]
    cache = BufferedCache(room=length + model.config.pose_dim + 1)
    hidden = prefill(cache).last_hidden_state

    def thought():
        cache.begin = length
        model._generate_pose(cache, hidden, None)

    recorded = RecordingCache()
    seen = model.model(input_ids=inputs["input_ids"], pixel_values=pixels, cache=recorded, use_cache=False)

    return {
        "stereo encoder": lambda: towers.stereo(pixels, output_disparity=False),
        "semantic encoders": semantic,
        "visual tokens, all": lambda: towers(pixels),
        "prefill": lambda: prefill(RecordingCache()),
        f"chain of thought, {model.config.pose_dim + 1} tokens": thought,
        **expert_stage(model, Prefix.of(recorded.stream, None), seen, inputs, noise, steps),
    }


def depthvla_stages(model: DepthVLAForActionPrediction, inputs: dict, noise: torch.Tensor, steps: int) -> Stages:
    inside, expert, pixels = model.model, model.model.depth_expert, inputs["pixel_values"].to(model.dtype)
    tokens = expert.embed(pixels, None)
    given = {name: inputs[name] for name in ("input_ids", "pixel_values")}
    seen = inside(**given)
    return {
        "vision encoder": lambda: inside.embed_views(pixels, None),
        "depth encoder": lambda: expert.embed(pixels, None),
        "depth decoder": lambda: expert.run(tokens, None),
        "prefix, all": lambda: inside(**given),
        **expert_stage(model, seen.prefix, seen, inputs, noise, steps),
    }


def stages_of(model: Model, inputs: dict, noise: torch.Tensor, steps: int = STEPS) -> Stages:
    """The parts of a chunk, which are called without gradients."""
    of_stereovla = isinstance(model, StereoVLAForActionPrediction)
    return (stereovla_stages if of_stereovla else depthvla_stages)(model, inputs, noise, steps)


def pi0_chunk(
    theirs: PI0ForConditionalGeneration, inputs: dict, noise: torch.Tensor, steps: int = STEPS
) -> Callable[[], torch.Tensor]:
    """A chunk of PI0's for the same prompt and the first view."""
    batch, device, dtype = len(noise), noise.device, theirs.dtype
    arguments = {
        "state": inputs["state"][:, -1].to(dtype),
        "input_ids": inputs["input_ids"],
        "pixel_values": inputs["pixel_values"][:, :1].to(dtype),
        "attention_mask": inputs["attention_mask"],
        "pixel_attention_mask": torch.ones(batch, 1, dtype=torch.bool, device=device),
        "noise": noise.to(dtype),
    }
    return lambda: theirs.sample_actions(**arguments, num_steps=steps)


@torch.inference_mode()
def measure(options: InferenceOptions) -> None:
    torch.manual_seed(0)
    begin = time.perf_counter()
    model = build(options)
    config, device = model.config, options.device
    print(f"preset {options.preset}, {options.dtype} on {device}, {torch.get_num_threads()} threads, "
          f"batch {options.batch_size}; built in {time.perf_counter() - begin:.0f} s")  # fmt: skip
    peak = peak_gib(device)
    print("\n| part | parameters, M |\n|---|---|")
    for name, count in parameter_table(model):
        print(f"| {name} | {count / 1e6:,.1f} |")
    inputs = make_inputs(config, options)
    noise = torch.randn(options.batch_size, config.chunk_size, config.action_dim, device=device)

    expert, begins = model.action_expert, defaultdict(list)
    denoise = torch.compile(expert.denoise, fullgraph=True) if options.compile else expert.denoise

    def begin_step(name: str) -> None:
        synchronize(device)
        begins[name].append(time.perf_counter())

    def watched(*arguments):
        begin_step(CHUNK)
        return denoise(*arguments)

    expert.denoise = watched
    stages = stages_of(model, inputs, noise)
    if isinstance(model, StereoVLAForActionPrediction):
        stages[CHUNK] = lambda: model.predict_action(**inputs, noise=noise, num_steps=STEPS, chain_of_thought=False)
    else:
        stages[CHUNK] = lambda: model.predict_action(**inputs, noise=noise, num_steps=STEPS)
        without = build(options, depth_expert=False)
        stages[WITHOUT] = lambda: without.predict_action(**inputs, noise=noise, num_steps=STEPS)
    if options.pi0:
        theirs = build_pi0(config, options)
        theirs.register_forward_pre_hook(lambda *_: begin_step(PI0_CHUNK))  # sample_actions calls it once in each step
        stages[PI0_CHUNK] = pi0_chunk(theirs, inputs, noise)
    memory, runs = {}, defaultdict(list)
    peak = max(peak, peak_gib(device))
    with tqdm(total=(1 + options.repeats) * len(stages)) as progress:
        for repeat in range(1 + options.repeats):
            for name, stage in stages.items():
                progress.set_description(name)
                if repeat == 0:  # also the warm-up
                    memory[name] = extra_mib(stage, device)
                    peak = max(peak, peak_gib(device))
                else:
                    runs[name].append(1e3 * seconds(stage, device))
                progress.update()
    medians = {name: statistics.median(values) for name, values in runs.items()}
    print("\n| stage | ms | MiB beyond the weights |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:,.1f} | {memory[name]:,.0f} |")
    steps = {}
    for name, times in begins.items():
        runs_of_steps = torch.tensor(times, dtype=torch.float64).view(-1, STEPS)[1:]  # without the warm-up
        steps[name] = 1e3 * float(runs_of_steps.diff(dim=1).median())
    if WITHOUT in medians:
        ratios = torch.tensor(runs[CHUNK]) / torch.tensor(runs[WITHOUT])
        print(f"\nwith the depth expert a chunk takes {float(ratios.median()):.2f} of the time without")
    print(f"\none denoising step: {steps[CHUNK]:,.2f} ms")
    if options.pi0:
        print(
            f"PI0's at equal sizes: {steps[PI0_CHUNK]:,.2f} ms; ours takes {steps[CHUNK] / steps[PI0_CHUNK]:.2f} of it"
        )
    print(f"most memory held: {peak:.1f} GiB, weights and building included")


def main(arguments: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(InferenceOptions, description=__doc__).parse_args_into_dataclasses(arguments)
    if options.repeats < 1 or options.batch_size < 1:
        raise SystemExit("--repeats and --batch_size must be at least 1")
    measure(options)


if __name__ == "__main__":
    main()
