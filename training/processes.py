"""How the processes of a training share its work: each with the whole model (DDP), or with a part of it (FSDP2)."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy


def join(mixed_precision: str, **options) -> Accelerator:
    """This process's part in what `accelerate launch` or torchrun started, by their environment variables.

    Args:
        mixed_precision: "no", "bf16" or "fp16".
        options: further ones of `Accelerator`.
    """
    sharding = None
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        sharding = sharding_plugin(mixed_precision)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        fsdp_plugin=sharding,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        **options,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise RuntimeError(
            f"{started} processes were started, but Accelerate sees {accelerator.num_processes}: without GPUs set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"the processes were started for {accelerator.distributed_type.value}, whose weights our checkpoints "
            "cannot hold; use configs/ddp.yaml or configs/fsdp2.yaml"
        )
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate sets this for GPUs alone and would train without sharding; PyTorch shards on both
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding
    return accelerator


def sharding_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the environment describes it, with our precision: Accelerate's own would add up gradients, and give
    the model its times, noise and disparities and take its losses, in 8 bits of mantissa.
    """
    if mixed_precision == "fp16":
        raise ValueError("--mixed_precision is fp16, which is not supported with FSDP2; choose bf16 or no")
    policy = None
    if mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version is {plugin.fsdp_version}; only version 2 is supported, see configs/fsdp2.yaml")
    return plugin
