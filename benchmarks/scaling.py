"""What training takes on many GPUs, counted without one: operations, memory, traffic; time and data rate from them.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --tflops 312 --utilisation 0.3 --devices 8,16

The parts of the model run on tensors that have shapes and no values. PyTorch counts the operations of their matrix
products, convolutions and attention; the bytes that autograd keeps for the backward pass are counted as it keeps them,
per sample, in bfloat16 autocast. Memory of weights, gradients and optimizer states follows from the number of weights,
as train.py holds them: float32, AdamW. Times are those operations at the given rate and utilisation, which nobody has
measured: they are what to compare a measurement with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser
from transformers.initialization import no_init_weights

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.action_expert import Prefix
from stereovla.modeling_stereovla.configuration_stereovla import PRESETS
from stereovla.modeling_stereovla.layer_caches import CACHE, RecordingCache
from stereovla.training.adapters import lora_config
from stereovla.training.models import blocks

WORDS = 24  # text tokens of a prompt such as "In: What action should the robot take to pick up the red cube?\nOut: "
FLOAT = 4  # bytes
GIGA = 1e9
TOWERS = ("semantic", "spatial", "stereo")


@dataclass
class ScalingOptions:
    """What `python -m benchmarks.scaling` can be told."""

    preset: str = field(default="full", metadata={"help": "Sizes of the model.", "choices": list(PRESETS)})
    devices: str = field(default="8,32,64", metadata={"help": "Numbers of GPUs."})
    batch_size: int = field(default=384, metadata={"help": "Samples of one step, over all GPUs."})
    steps: int = field(default=160_000, metadata={"help": "Optimizer steps."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters in the rows about them."})
    tflops: float = field(default=989.0, metadata={"help": "10^12 operations per second of a GPU, bfloat16, dense."})
    utilisation: float = field(default=0.35, metadata={"help": "Share of them that is reached."})
    windows_per_core: float = field(default=303.0, metadata={"help": "Windows that a core prepares per second."})


@dataclass
class Cost:
    """Of one part and one sample: operations forward and backward, bytes kept for the backward pass."""

    forward: float
    backward: float = 0.0
    kept: int = 0


def number_of_tokens(config: StereoVLAConfig) -> int:
    """Of an action sample: BOS, visual tokens, prompt, past and present state, keyframe pose, EOS."""
    return 1 + config.num_visual_tokens + WORDS + config.state_history * config.state_dim + config.pose_dim + 1


def part_costs(model: StereoVLAForActionPrediction) -> dict[str, Cost]:
    """{part: cost}; the towers, if frozen, without gradients. For tensors without values (`FakeTensorMode`)."""
    costs = {}
    with sdpa_kernel(SDPBackend.MATH):  # as products of matrices: PyTorch has no count for the fused kernel of a CPU
        for name, run in parts(model, 1).items():
            learns = name not in model.frozen
            with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16):
                with FlopCounterMode(display=False) as forward:
                    outputs = run()
            cost = costs[name] = Cost(forward.get_total_flops())
            if learns:
                with FlopCounterMode(display=False) as backward:
                    sum(output.float().sum() for output in outputs).backward()
                cost.backward = backward.get_total_flops()
    for sign, batch in (
        (-1, 1),
        (1, 2),
    ):  # the difference leaves out weights and their casts, kept once for all samples
        for name, run in parts(model, batch).items():
            if name not in model.frozen:
                costs[name].kept += sign * kept_bytes(run)
    return costs


def parts(model: StereoVLAForActionPrediction, batch: int) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """{part: what computes its outputs}, to be called in this order."""
    config, visual, expert = model.config, model.model.visual_tokens, model.action_expert
    tokens, labelled = number_of_tokens(config), config.state_dim + config.pose_dim + 1
    pixels = torch.rand(batch, 2, 3, config.image_size, config.image_size)
    fused = torch.rand(batch, config.num_visual_tokens, config.fused_size)
    hidden = torch.rand(batch, tokens, config.text_config.hidden_size, requires_grad=True)
    recorder = RecordingCache()

    def read() -> list[torch.Tensor]:
        positions = torch.arange(tokens).expand(batch, -1)
        output = model.model.language_model(
            inputs_embeds=hidden, position_ids=positions, use_cache=False, **{CACHE: recorder}
        )
        return [output.last_hidden_state, *(state for pair in recorder.states.values() for state in pair)]

    def denoise() -> list[torch.Tensor]:
        prefix = [tuple(state.detach().requires_grad_() for state in pair) for pair in recorder.states.values()]
        state = expert.state_proj(torch.rand(batch, config.state_history, config.state_dim))
        actions = torch.rand(batch, config.flow_draws, config.chunk_size, config.action_dim)
        mask = torch.ones(batch, tokens, dtype=torch.long)
        return [expert(Prefix.of(prefix, mask), state, actions, torch.rand(batch, config.flow_draws))]

    return {
        "semantic": lambda: [visual.semantic(pixels[:, 0])],
        "spatial": lambda: [visual.spatial(pixels[:, 0])],
        "stereo": lambda: [visual.stereo(pixels, output_disparity=False).features],
        "projector": lambda: [visual.projector(fused)],
        "language_model": read,
        "lm_head": lambda: [model.lm_head(hidden[:, :labelled]).float()],
        "action_expert": denoise,
    }


def kept_bytes(run: Callable[[], list[torch.Tensor]]) -> int:
    """Of everything that the backward pass of `run` needs, each storage counted once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        outputs = run()
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def weights_of(model: torch.nn.Module, learning: bool = False) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not learning)


def checkpointed_bytes(config: StereoVLAConfig, costs: dict[str, Cost]) -> float:
    """Activations of one sample with --gradient_checkpointing: what enters each layer, the keys and values that the
    expert reads, and one layer's own while it is computed again; the projector keeps all.
    """
    text, tokens = config.text_config, number_of_tokens(config)
    layers = text.num_hidden_layers
    own = config.state_history + config.flow_draws * config.chunk_size
    entering = layers * FLOAT * (tokens * text.hidden_size + own * config.expert_hidden_size)
    read = layers * 2 * 2 * tokens * text.num_key_value_heads * text.head_dim  # bfloat16
    again = (costs["language_model"].kept + costs["action_expert"].kept) / layers
    return entering + read + again + costs["projector"].kept + costs["lm_head"].kept


def state_bytes(model: torch.nn.Module, devices: int, split: bool) -> float:
    """Weights, gradients and AdamW's two means on each GPU, float32; what is gathered at the same time, where split."""
    whole, learning = weights_of(model), weights_of(model, learning=True)
    held = FLOAT * (whole + 3 * learning)
    if not split:
        return held
    units = blocks(model)
    outside = whole - sum(weights_of(unit) for unit in units)
    outside_learning = weights_of(model, True) - sum(weights_of(unit, True) for unit in units)
    # beside its share: all that is outside of the blocks, two blocks (one computes, the next one comes), gradients
    two = 2 * max(weights_of(unit) for unit in units)
    return held / devices + FLOAT * (outside + outside_learning + 2 * two)


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def report(options: ScalingOptions) -> None:
    # the lengths of texts, on which a dynamic rotary embedding depends, are values; operations do not depend on it
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = StereoVLAConfig.from_preset(options.preset, text_config=rotary)
    with FakeTensorMode(), no_init_weights():
        model = StereoVLAForActionPrediction(config).train().freeze(*TOWERS)
        costs = part_costs(model)
        again = sum(costs[name].forward for name in ("language_model", "action_expert"))
        sample = sum(cost.forward + cost.backward for cost in costs.values()) + again
        lines = []
        for name, cost in costs.items():
            own = weights_of(model.get_submodule(model.parts[name]))
            cells = [f"{value / GIGA:,.0f}" for value in (cost.forward, cost.backward)]
            lines.append([name, f"{own / 1e6:,.1f}", *cells, f"{cost.kept / 2**20:,.0f}"])
        lines.append(["computed again", "", f"{again / GIGA:,.0f}", "", ""])
        lines.append(["all", f"{weights_of(model) / 1e6:,.1f}", f"{sample / GIGA:,.0f} in all", "", ""])
        print(f"One sample, {number_of_tokens(config)} tokens:\n")
        print(table(["part", "weights, M", "GFLOP forward", "GFLOP backward", "MiB kept"], lines))
        print_times(options, sample)
        kept = {False: sum(cost.kept for cost in costs.values()), True: checkpointed_bytes(config, costs)}
    with torch.device("meta"):
        print_memory(options, StereoVLAForActionPrediction(config).freeze(*TOWERS), kept)


def print_times(options: ScalingOptions, sample: float) -> None:
    work, lines = sample * options.batch_size * options.steps, []
    for devices in map(int, options.devices.split(",")):
        step = sample * options.batch_size / (devices * options.tflops * 1e12 * options.utilisation)
        rate = options.batch_size / step
        cores = f"{rate / options.windows_per_core:.1f}"
        lines.append([str(devices), f"{step:.2f}", f"{step * options.steps / 86400:.1f}", f"{rate:,.0f}", cores])
    print(
        f"{options.steps:,} steps of {options.batch_size} samples: {work:.2e} FLOP, at {options.tflops:g} TFLOP/s of "
        f"which {options.utilisation:.0%} are reached:\n"
    )
    print(table(["GPUs", "s per step", "days", "windows/s, all GPUs", "cores that prepare them"], lines))


def print_memory(options: ScalingOptions, model: torch.nn.Module, kept: dict[bool, float]) -> None:
    """Of the whole training, then of adapters; `kept`: activations of one sample without and with checkpointing."""
    lines, whole = [], weights_of(model)
    learning = weights_of(model, learning=True)
    for what in ("all but towers", f"adapters of rank {options.lora_rank}"):
        if what.startswith("adapters"):
            model = get_peft_model(model, lora_config(model, options.lora_rank))
        for split in (False, True):
            for devices in map(int, options.devices.split(",")):
                states = state_bytes(model, devices, split)
                samples = options.batch_size / devices
                cells = [states, *(states + samples * kept[again] for again in (True, False))]
                how = "FSDP2" if split else "DDP"
                lines.append([what, how, str(devices), f"{samples:g}", *(f"{cell / 2**30:,.1f}" for cell in cells)])
    head = ["trained", "how", "GPUs", "samples per GPU", "GiB of states", "with checkpointing", "without"]
    print("Memory of each GPU, activations of its samples at once; kernels' own not counted:\n")
    print(table(head, lines))
    gathered, reduced = 2 * FLOAT * whole / GIGA, FLOAT * learning / GIGA
    print(
        f"Each GPU receives in a step: {2 * reduced:.1f} GB with DDP, {gathered + reduced:.1f} GB with FSDP2. A "
        f"checkpoint is {3 * reduced:.1f} GB, the result {FLOAT * whole / GIGA:.1f} GB."
    )


def main(arguments: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(ScalingOptions, description=__doc__).parse_args_into_dataclasses(arguments)
    if not 0 < options.utilisation <= 1:
        raise SystemExit(f"--utilisation is {options.utilisation}; it must be above 0 and at most 1")
    report(options)


if __name__ == "__main__":
    main()
