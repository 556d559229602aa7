r"""Writes the processor of a converted model into its folder: tokenizer, image processor, StereoProcessor, their code.

    stereovla convert processor --model StereoVLA --tokenizer internlm2-1_8b

MODEL is a folder of `stereovla convert stereovla` or `stereovla convert parts`; TOKENIZER is that of its language model
as published, with tokenizer.json or sentencepiece's tokenizer.model. Sizes and ids are those of the model's
config.json; a tokenizer with other ids is refused. Statistics are those of its processor_arguments.json, which
convert_stereovla wrote. A model of convert_parts has none: its processor needs norm_stats before it takes states or
gives actions.

Afterwards AutoModel and AutoProcessor load the folder. Files that it has already are never replaced.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from stereovla.processing import StereoImageProcessorPil, StereoProcessor  # registered, so that their code travels

from .convert_tokenizer import IMAGE_TOKEN, convert_tokenizer

SIZES = ("chunk_size", "state_history", "state_dim", "action_dim", "pose_dim", "num_bins", "action_vocab_size")
MARK = "processor_config.json"  # without it a folder has no processor, so it comes last


def read_config(folder: Path) -> dict:
    """config.json of a StereoVLA's folder.

    Raises:
        ValueError: it describes another model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "stereovla":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r}, not a 'stereovla'")
    return config


def build_processor(model: str | Path, tokenizer: str | Path) -> StereoProcessor:
    """The processor of the model in folder `model`, with the tokenizer of folder `tokenizer`.

    Raises:
        ValueError: the tokenizer's ids are not those of the model's config.
    """
    folder = Path(model)
    config, described = read_config(folder), folder / "processor_arguments.json"
    side = config["image_size"]
    return StereoProcessor(
        StereoImageProcessorPil(size={"height": side, "width": side}),
        convert_tokenizer(tokenizer, config),
        num_visual_tokens=(side // config["patch_size"]) ** 2,
        image_token=IMAGE_TOKEN,
        **{name: config[name] for name in SIZES},
        **(json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}),
    )


def write_processor(processor: StereoProcessor, folder: str | Path) -> Path:
    """Writes the processor's files into a folder that exists: all of them, or none.

    Raises:
        FileExistsError: the folder has some of these files, and not all of them with the same content.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".processor-") as scratch:
        unfinished = Path(scratch)
        processor.save_pretrained(unfinished)
        names = sorted((path.name for path in unfinished.iterdir()), key=lambda name: (name == MARK, name))
        if present := [name for name in names if (folder / name).exists()]:
            missing = [name for name in names if name not in present]
            other = [name for name in present if (folder / name).read_bytes() != (unfinished / name).read_bytes()]
            if missing or other:
                raise FileExistsError(
                    f"{folder} has another processor, or a part of one: different {other}, missing {missing}; "
                    f"remove {', '.join(present)} from it to write a new one"
                )
            return folder
        moved = []
        try:
            for name in names:
                moved.append((unfinished / name).rename(folder / name))
        except BaseException:
            for path in moved:
                path.unlink()
            raise
    return folder


@dataclass
class Options:
    """The processor of a converted model: tokenizer, image processor, StereoProcessor and their code.

    stereovla convert processor --model StereoVLA --tokenizer internlm2-1_8b
    """

    model: str = field(metadata={"help": "Folder of the converted model, into which the processor is written."})
    tokenizer: str = field(
        metadata={"help": "Folder of its language model as published: tokenizer.json, or tokenizer.model."}
    )


def convert(options: Options) -> Path:
    """The model's folder with its processor."""
    return write_processor(build_processor(options.model, options.tokenizer), options.model)
