"""Pseudo-labels: the depth that a metric Depth Anything checkpoint estimates from the pictures of a dataset.

The result is the same dataset with depth columns, shard by shard, each written under a temporary name and renamed. So
the same command goes on where it was stopped, and the finished bytes are those of an undisturbed run.
"""

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, Image
from huggingface_hub import HfApi
from PIL import Image as Picture
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.folders import INFO, PLAN, STATS, check_folder, describe_folder, work_folder
from stereovla.dataset_builder.dataset.manifest import listed, read_manifest, shard_problems
from stereovla.sources import InputError, existing_folder, source_of
from stereovla.untrusted import inside

METRIC = ", ".join(
    f"depth-anything/Depth-Anything-V2-Metric-{place}-{size}-hf"
    for place in ("Indoor", "Outdoor")
    for size in ("Small", "Base", "Large")
)


@dataclass
class DepthOptions:
    """Writes a copy of a dataset in which every view but the right one of a pair has the depth that a metric Depth
    Anything checkpoint estimates from its pictures, one by one: pseudo-labels, named as such in meta/info.json and the
    card. Depth that the dataset has is replaced in the copy. The same command goes on after interruptions.
    """

    dataset: str = option("", "Folder of a dataset of ours.")
    model: str = option("", f"Folder or Hub id of a metric Depth Anything checkpoint: {METRIC}.")
    revision: str | None = option(None, "Of a checkpoint on the Hub.")
    out: str = option(
        "", "Folder of the new dataset; one that an unfinished run of the same options left is gone on with."
    )
    batch_size: int = option(8, "Pictures that the model sees at once.")

    def __post_init__(self):
        for name in ("dataset", "model", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


class DepthEstimator:
    """A metric Depth Anything model with the image processor of its checkpoint, on the accelerator if there is one.

    Args:
        source: folder or Hub id; InputError for one that cannot be read, or whose depth is not in metres.
        revision: of a checkpoint on the Hub.
    """

    def __init__(self, source: str, revision: str | None = None):
        with source_of(source, "checkpoint") as folder:
            if folder is None:
                revision = HfApi().model_info(source, revision=revision).sha  # what is read later is of this state too
            elif revision is not None:
                raise InputError(f"--revision is {revision!r}, but {source!r} is a folder; leave the option out")
            try:
                config = AutoConfig.from_pretrained(source, revision=revision)
            except ValueError as error:  # a model type that transformers does not know
                raise InputError(f"{source!r} is no checkpoint of transformers: {error}") from error
            kind = getattr(config, "depth_estimation_type", None)
            if config.model_type != "depth_anything" or kind != "metric":
                what = f"depth is {kind}, not metric" if config.model_type == "depth_anything" else "no Depth Anything"
                raise InputError(f"{source!r} ({config.model_type}): {what}; metric checkpoints are {METRIC}")
            self.processor = AutoImageProcessor.from_pretrained(source, backend="pil", revision=revision)
            model = AutoModelForDepthEstimation.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, revision=revision
            )
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.model = model.eval().to(self.device)
        self.name = f"{source}@{revision}" if folder is None else f"{folder.resolve().name}@{_digest(folder)}"

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures of one size, uint8 (h, w, 3) RGB -> their depth, float32 (h, w) m, 0 = none."""
        inputs = self.processor(images=[Picture.fromarray(picture) for picture in pictures], return_tensors="pt")
        outputs = self.model(pixel_values=inputs["pixel_values"].to(self.device))
        sizes = [picture.shape[:2] for picture in pictures]
        found = self.processor.post_process_depth_estimation(outputs, target_sizes=sizes)
        depths = [entry["predicted_depth"].reshape(size) for entry, size in zip(found, sizes, strict=True)]
        if not all(depth.isfinite().all() for depth in depths):
            raise ValueError(f"{self.name} estimates depths that are no numbers: are its weights whole?")
        return [depth.clamp(min=0).cpu().numpy() for depth in depths]  # interpolation may fall below 0


def _digest(folder: Path) -> str:
    """What a checkpoint in a folder is recognised by: the first digits of a SHA-256 of its weights and settings."""
    names = ["config.json", "preprocessor_config.json", *sorted(path.name for path in folder.glob("*.safetensors"))]
    there = [name for name in names if (folder / name).is_file()]
    content = "\n".join(f"{name} {shards.sha256(folder / name)}" for name in there)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def estimate_depth(options: DepthOptions) -> Path:
    """Write, or go on writing, the dataset in `options.out`; returns the folder. A finished one is left as it is."""
    folder, out = existing_folder(options.dataset, "dataset"), Path(options.out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"--out is {out}, the dataset itself; its files stay as they are: choose another folder")
    info, entries = shards.read_json(folder / INFO), read_manifest(folder)
    if problems := shard_problems(folder, entries):
        raise shards.ShardError(f"{folder} is not what was built: {listed(problems)}")
    estimator = DepthEstimator(options.model, options.revision)
    versions = ("torch", "transformers", "numpy", "pillow", "pyarrow", "datasets")
    content = {
        "dataset_sha256": shards.sha256(folder / shards.MANIFEST),
        "estimated_by": estimator.name,
        "batch_size": options.batch_size,
        "device": estimator.device.type,
        "versions": {name: importlib.metadata.version(name) for name in versions},
    }
    check_folder(out, content)
    if source := info.get("depth_source"):
        print(f"the depth of {folder} ({source}) is replaced in {out} by what {estimator.name} estimates")
    with work_folder(out, "depth") as partial:
        if not (out / shards.MANIFEST).exists():
            shards.write_json(out / PLAN, content)
            known = info["columns"]  # what has a depth must get the same kind: a dataset names one source
            views = [v for v in schema.views_of(known) if v != "right" or schema.depth_key(v) in known]
            _write(folder, out, partial, entries, views, estimator, options.batch_size)
            _finish(folder, out, info, entries, views, estimator.name)
    return out


def _write(
    folder: Path,
    out: Path,
    partial: Path,
    entries: Sequence[dict],
    views: Sequence[str],
    estimator: DepthEstimator,
    batch_size: int,
) -> None:
    total = sum(entry["rows"] for entry in entries) * len(views)
    with tqdm(total=total, desc="estimating", unit="picture") as bar:
        for entry in entries:
            target = out / entry["path"]
            if target.exists():
                bar.update(entry["rows"] * len(views))
                continue
            source = inside(folder, entry["path"])
            table = shards.read_table(source)
            depths = {}
            for view in views:
                pictures = table.column(schema.image_key(view)).to_pylist()
                depths[schema.depth_key(view)] = list(_depths(pictures, view, estimator, batch_size, bar))
            temporary = partial / f"{target.name}.{os.getpid()}"
            with_depth = _with_columns(table, depths)
            shards.write_table(target, with_depth, temporary=temporary, info=shards.shard_info(source))


def _depths(
    pictures: Sequence[dict | None], view: str, estimator: DepthEstimator, batch_size: int, bar: tqdm
) -> Iterator[bytes | None]:
    """Stored depth of the stored pictures of a view, None where it is absent. Which pictures share a batch follows from
    the shard alone.
    """
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        key = schema.image_key(view)
        decoded = [None if entry is None else shards.decode_image(key, entry["bytes"]) for entry in batch]
        groups = groupby(decoded, key=lambda picture: None if picture is None else picture.shape)
        for same in [list(group) for _, group in groups]:
            for depth in same if same[0] is None else estimator(same):
                yield None if depth is None else shards.encode_image(schema.depth_key(view), depth)
        bar.update(len(batch))


def _with_columns(table: pa.Table, images: dict[str, list[bytes | None]]) -> pa.Table:
    """`table` with these columns of encoded images, each in its place; those of the same names are replaced."""
    known = {**Features.from_arrow_schema(table.schema), **{key: Image() for key in images}}
    order = [column.key for column in schema.columns_of(known) if column.key in known]
    target = Features({key: known[key] for key in [*order, *(key for key in known if key not in order)]}).arrow_schema
    arrays = []
    for field in target:
        if field.name in images:
            values = [None if data is None else {"bytes": data, "path": None} for data in images[field.name]]
            arrays.append(pa.array(values, type=field.type))
        else:
            arrays.append(table.column(field.name).combine_chunks())
    return pa.Table.from_arrays(arrays, schema=target)


def _finish(folder: Path, out: Path, info: dict, entries: Sequence[dict], views: Sequence[str], name: str) -> None:
    """Statistics, which stay as they are, info, card, and at last the manifest: the dataset is whole."""
    shards.write_json(out / STATS, shards.read_json(folder / STATS))
    known = {*info["columns"], *map(schema.depth_key, views)}
    with shards.open_shard(out / entries[0]["path"]) as file:
        columns = [key for key in file.schema_arrow.names if key in known]
    info = {**info, "columns": columns, "views": list(schema.views_of(columns)), "depth_source": f"estimated by {name}"}
    describe_folder(out, info, [(entry["split"], Path(entry["path"]), entry["episodes"]) for entry in entries])
