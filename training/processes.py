"""How the processes of a training share its work: each with the whole model (DDP), or with a part of it (FSDP2)."""

import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import AutocastKwargs, DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from stereovla.training.models import blocks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h


def share_cores() -> int:
    """Gives this process its share of the cores that it may run on, and returns it; what OMP_NUM_THREADS says stays.

    PyTorch counts the machine's cores, not those that a process is pinned to. Threads that wait for each other on one
    core make a step of a small model ten times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()


def keep_freed_memory(keep: bool = True) -> None:
    """Whether the allocator keeps what is freed for the next step, where it is glibc's.

    By itself it hands large tensors back to the operating system, which gives them out again page by page: a tenth of
    the time of a small model's step.
    """
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_MMAP_MAX, 0 if keep else 65_536)  # glibc's own: as many, from 128 KiB on
        allocator.mallopt(M_MMAP_THRESHOLD, 2**17)
        allocator.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**17)


def warn_of_load(threads: int) -> None:
    """Warns where other programs keep the cores busy, on which this one's threads will wait for each other."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads > 1 and load > cores - threads + 1:
        warnings.warn(
            f"the load of this machine is {load:.1f} on {cores} cores: with {threads} threads training may be many "
            "times slower than with one; set OMP_NUM_THREADS=1",
            stacklevel=2,
        )


def join(mixed_precision: str, **options) -> Accelerator:
    """This process's part in what `accelerate launch` or torchrun started, as their environment variables tell.

    Args:
        mixed_precision: "no", "bf16" or "fp16".
        options: further ones of `Accelerator`.
    """
    # gradients live in the buckets that are exchanged, instead of a second time beside them
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)]
    sharding = None
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if mixed_precision == "fp16":
            raise ValueError("--mixed_precision fp16 is not supported with FSDP; choose bf16 or no")
        version = os.environ.get("FSDP_VERSION")
        if version != "2":
            raise ValueError(f"FSDP_VERSION is {version}; it must be 2, as in configs/fsdp2.yaml")
        # weights are gathered in float32 and cast where they are used, as without FSDP. Accelerate's own policy would
        # add up gradients in bfloat16, cast times, noise and disparities to it, and break batch norm on a CPU.
        sharding = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
        handlers.append(AutocastKwargs(cache_enabled=False))  # the cache would keep what was gathered
    accelerator = Accelerator(
        mixed_precision=mixed_precision, fsdp_plugin=sharding, kwargs_handlers=handlers, **options
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise RuntimeError(
            f"{started} processes were started, but Accelerate sees {accelerator.num_processes}: without GPUs set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"the processes were started for {accelerator.distributed_type.value}, which our checkpoints do not "
            "support; use configs/ddp.yaml or configs/fsdp2.yaml"
        )
    if sharding is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate takes the plugin up on GPUs alone and would train without it; PyTorch shards on both
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding
    if accelerator.device.type == "cpu":
        warn_of_load(share_cores())
    keep_freed_memory()
    return accelerator


@contextmanager
def in_float32(model) -> Iterator[None]:
    """Meanwhile a prepared model computes as it does where it was saved and loaded, without mixed precision."""
    mixed = model.__dict__.pop("forward", None)  # `prepare` and Accelerate put it before that of the class
    try:
        yield
    finally:
        if mixed is not None:
            model.forward = mixed


def prepare(accelerator: Accelerator, model, optimizer) -> tuple:
    """Model and optimizer, shared among the processes."""
    if accelerator.is_fsdp2:
        # Accelerate refuses a class that the model happens not to have, such as the layer of a tower left out
        present = {type(block).__name__ for block in blocks(model)}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(present)
        model.forward = accelerator.autocast()(model.forward)  # which Accelerate does in all other cases
    model, optimizer = accelerator.prepare(model, optimizer)
    if hasattr(model, "predict_action"):
        register_fsdp_forward_method(model, "predict_action")  # gathers split weights; nothing to do for whole ones
    weights = list(model.parameters())
    held = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)
    accelerator.print(
        f"{accelerator.num_processes} processes ({accelerator.distributed_type.value}), "
        f"{held:,} of {sum(weight.numel() for weight in weights):,} weights in the first"
    )
    return model, optimizer
