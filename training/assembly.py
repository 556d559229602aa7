"""The folder of a DepthVLA to be trained: published parts, from folders or the Hub, and the processor beside them."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download

from stereovla.modeling_stereovla.convert_depthvla import Options, gather
from stereovla.modeling_stereovla.convert_files import weight_files
from stereovla.modeling_stereovla.convert_output import check_output, write_model
from stereovla.processing.convert_processor import build_processor, read_paligemma_tokenizer, write_processor
from stereovla.sources import source_of

TOKENIZER = "tokenizer.json"


def part_folder(source: str, weights: bool = True) -> Path:
    """The folder `source`, or that of the Hub's repository of this id, downloaded: descriptions, tokenizer, weights."""
    with source_of(source, "published model") as folder:
        if folder is not None:
            return folder
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "tokenizer.model"]))
        if not weights:
            return folder
        index = folder / "model.safetensors.index.json"
        names = [file.name for file in weight_files(folder)] if index.is_file() else ["model.safetensors"]
        return Path(snapshot_download(source, allow_patterns=["*.json", "tokenizer.model", *names]))


def assemble(options: Options) -> Path:
    """The folder, which appears when it is complete; with the processor where one of the parts has a tokenizer.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: what does not fit, before any weight is read.
    """
    folder = check_output(options.out)
    model, parts, what = gather(options, part_folder)
    tokenizer = options.tokenizer or options.vlm or options.pi0
    words = part_folder(tokenizer, weights=False)
    has_words = options.tokenizer is not None or (words / TOKENIZER).is_file()
    if has_words:
        read_paligemma_tokenizer(words, model.config.to_dict())  # to know that it fits
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        written = write_model(replace(options, out=str(unfinished / "model")), model, parts, what)
        if has_words:
            write_processor(build_processor(written, words), written)
        written.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not has_words:
        print(
            f"{tokenizer} has no {TOKENIZER}, so the model is without its processor; "
            f"stereovla convert processor --model {folder} --tokenizer FOLDER adds that of a folder that has it"
        )
    return folder
