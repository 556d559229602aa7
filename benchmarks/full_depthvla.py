"""A full-size DepthVLA put together from parts of random weights, and one chunk of it, within 24 GiB.

    python -m benchmarks.full_depthvla --folder SCRATCH

Writes a PaliGemma-3B and a Depth Anything V2 Large of random bfloat16 weights, shard by shard, in the layouts of the
Hub (6.5 GB), converts them by `stereovla convert depthvla` (7.7 GB), loads the result in bfloat16 and predicts one
chunk. Prints parameters, seconds and the most memory of each step, which has a process of its own (resident set, Linux
only; mapped files count as far as they were read), and deletes what it wrote. Weights are random: no result depends on
them.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    HfArgumentParser,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
)

from benchmarks.inference import peak_gib
from stereovla.modeling_stereovla import DepthVLAForActionPrediction
from stereovla.modeling_stereovla.configuration_depthvla import dinov2_large, paligemma_3b
from stereovla.modeling_stereovla.convert_output import outline_model

SHARD_BYTES, LIMIT_GIB = 10**9, 24
WORDS = 8  # text tokens of a short instruction
# as in Depth-Anything-V2-Large-hf
DEPTH_ANYTHING = {
    "reassemble_hidden_size": 1024,
    "neck_hidden_sizes": [256, 512, 1024, 1024],
    "fusion_hidden_size": 256,
}


@dataclass
class FullOptions:
    """What `python -m benchmarks.full_depthvla` can be told."""

    folder: str = field(metadata={"help": "Where 15 GB may be written for a while; it must not exist."})
    step: str | None = field(default=None, metadata={"help": "Run this step alone: write, convert or predict."})


def write_random(folder: Path, model: PreTrainedModel, rename: dict[str, str]) -> None:
    """Random bfloat16 weights of a model without memory, in shards.

    Args:
        rename: beginnings of our names -> those that the Hub has.
    """
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    generator, shard, weight_map = torch.Generator().manual_seed(0), {}, {}

    def close() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, outline in model.state_dict().items():
        if key in model.all_tied_weights_keys:
            continue
        for ours, theirs in rename.items():
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        scale = max(outline.shape[1:].numel(), 1) ** -0.5 if outline.ndim > 1 else 0.02
        shard[key] = scale * torch.randn(outline.shape, dtype=torch.bfloat16, generator=generator)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            close()
    close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write(folder: Path) -> None:
    vlm = outline_model(PaliGemmaForConditionalGeneration, PaliGemmaConfig(**paligemma_3b()))
    names = {"model.vision_tower.": "vision_tower.vision_model.", "model.language_model.": "language_model.model."}
    write_random(folder / "paligemma", vlm, names | {"model.": ""})
    backbone = dinov2_large() | {"out_indices": [5, 12, 18, 24], "reshape_hidden_states": False}
    config = DepthAnythingConfig(backbone_config=backbone, **DEPTH_ANYTHING)
    write_random(folder / "depth_anything", outline_model(DepthAnythingForDepthEstimation, config), {})


def convert(folder: Path) -> None:
    from stereovla.__main__ import main

    given = ["--vlm", str(folder / "paligemma"), "--depth_encoder", str(folder / "depth_anything")]
    assert main(["convert", "depthvla", *given, "--out", str(folder / "depthvla")]) == 0


def predict(folder: Path) -> None:
    begin = time.perf_counter()
    model, report = DepthVLAForActionPrediction.from_pretrained(
        folder / "depthvla", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model.eval()
    print(f"loaded in {time.perf_counter() - begin:.1f} s")
    modules, config = dict(model.named_modules()), model.config
    for name, path in model.parts.items():
        if path in modules:
            print(f"{name:<14} {sum(p.numel() for p in modules[path].parameters()) / 1e6:8.1f} M")
    print(f"{'all':<14} {sum(p.numel() for p in model.parameters()) / 1e6:8.1f} M, each tensor once")
    generator = torch.Generator().manual_seed(0)
    ids = [config.image_token_id] * config.num_visual_tokens + [2] + [5] * WORDS
    size = config.image_size
    inputs = {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.rand(1, 1, 3, size, size, generator=generator),
        "state": torch.zeros(1, 1, config.state_dim),
    }
    begin = time.perf_counter()
    chunk = model.predict_action(**inputs, generator=generator)
    assert chunk.shape == (1, config.chunk_size, config.action_dim) and chunk.isfinite().all()
    print(f"a chunk of {config.chunk_size} steps in {time.perf_counter() - begin:.1f} s, {model.dtype}")


STEPS = {"write": write, "convert": convert, "predict": predict}


def main(options: FullOptions) -> None:
    folder = Path(options.folder)
    if options.step is not None:
        begin = time.perf_counter()
        STEPS[options.step](folder)
        peak = peak_gib("cpu")
        print(f"{options.step}: {time.perf_counter() - begin:.0f} s, at most {peak:.1f} GiB", flush=True)
        if peak > LIMIT_GIB:
            raise MemoryError(f"{options.step} took {peak:.1f} GiB; the limit is {LIMIT_GIB}")
        return
    folder.mkdir(parents=True)  # FileExistsError: nothing of others is deleted
    try:
        for step in STEPS:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.full_depthvla", *sys.argv[1:], "--step", step], check=True
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*HfArgumentParser(FullOptions).parse_args_into_dataclasses())
