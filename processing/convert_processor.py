r"""Writes the processor of a converted model into its folder: tokenizer, image processor, processor, their code.

    stereovla convert processor --model StereoVLA --tokenizer internlm2-1_8b
    stereovla convert processor --model DepthVLA --tokenizer paligemma-3b-pt-224

MODEL is a folder of a StereoVLA (`stereovla convert stereovla` or `stereovla convert parts`) or of a DepthVLA;
TOKENIZER is that of its language model as published: of InternLM2 tokenizer.json or sentencepiece's tokenizer.model, of
PaliGemma or PI0 tokenizer.json. Sizes and ids are those of the model's config.json; a tokenizer with other ids is
refused. Statistics are those of its processor_arguments.json, which convert_stereovla wrote. Other models have none:
their processor needs norm_stats before it takes states or gives actions.

Afterwards AutoModel and AutoProcessor load the folder. Files that it has already are never replaced.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# registered, so that their code travels
from stereovla.processing import DepthVLAProcessor, StereoImageProcessorPil, StereoProcessor

from .convert_tokenizer import IMAGE_TOKEN, convert_tokenizer

SIZES = ("chunk_size", "state_history", "state_dim", "action_dim", "pose_dim", "num_bins", "action_vocab_size")
MARK = "processor_config.json"  # without it a folder has no processor, so it comes last


def read_config(folder: Path) -> dict:
    """config.json of a StereoVLA's or DepthVLA's folder.

    Raises:
        ValueError: it describes another model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in ("stereovla", "depthvla"):
        raise ValueError(f"{folder} holds a {config.get('model_type')!r}, not a 'stereovla' or 'depthvla'")
    return config


def read_paligemma_tokenizer(folder: str | Path, config: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of a published PaliGemma or PI0, as it is.

    Args:
        config: the DepthVLA's config.json, which says the ids of <image> and, where they are not Gemma's, of others.

    Raises:
        ValueError: the ids are others in this tokenizer.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = config.get("vlm_config", {}).get("text_config", {})
    expected = {f"{name}_token_id": text.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    expected = {name: index for name, index in expected.items() if index is not None}
    found = {name: getattr(tokenizer, name) for name in expected}
    expected["image_token_id"] = config["image_token_id"]
    found["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != expected:
        raise ValueError(f"the model's config has the ids {expected}; the tokenizer of {folder} has {found}")
    return tokenizer


def build_processor(model: str | Path, tokenizer: str | Path) -> StereoProcessor | DepthVLAProcessor:
    """The processor of the model in folder `model`, with the tokenizer of folder `tokenizer`.

    Raises:
        ValueError: the tokenizer's ids are not those of the model's config.
    """
    folder = Path(model)
    config, described = read_config(folder), folder / "processor_arguments.json"
    side = config["image_size"]
    options = {name: config[name] for name in SIZES} | {"image_token": IMAGE_TOKEN}
    options["num_visual_tokens"] = (side // config["patch_size"]) ** 2
    options |= json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    size = {"height": side, "width": side}
    if config["model_type"] == "stereovla":
        return StereoProcessor(StereoImageProcessorPil(size=size), convert_tokenizer(tokenizer, config), **options)
    return DepthVLAProcessor(
        StereoImageProcessorPil(size=size, resample=Image.Resampling.BICUBIC),  # as PaliGemma and pi0 were trained
        read_paligemma_tokenizer(tokenizer, config),
        views=config["views"],
        stereo=bool((config.get("depth_config") or {}).get("stereo_config")),
        **options,
    )


def write_processor(processor: StereoProcessor | DepthVLAProcessor, folder: str | Path) -> Path:
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
    """The processor of a converted model: tokenizer, image processor, processor and their code.

    stereovla convert processor --model StereoVLA --tokenizer internlm2-1_8b
    """

    model: str = field(metadata={"help": "Folder of the converted model, into which the processor is written."})
    tokenizer: str = field(
        metadata={"help": "Folder of its language model as published: tokenizer.json, or InternLM2's tokenizer.model."}
    )


def convert(options: Options) -> Path:
    """The model's folder with its processor."""
    return write_processor(build_processor(options.model, options.tokenizer), options.model)
