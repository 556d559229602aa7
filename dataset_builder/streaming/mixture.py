"""Several datasets with weights, and what datasets say of themselves."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download

from stereovla.dataset_builder.dataset.manifest import count_problems, parse_manifest
from stereovla.dataset_builder.dataset.schema import POSES
from stereovla.dataset_builder.dataset.shards import read_json
from stereovla.dataset_builder.dataset.statistics import mix_statistics
from stereovla.dataset_builder.streaming.episodes import split_revision
from stereovla.sources import source_of

Mixture = Sequence[tuple[str | Path, float]]  # (dataset, weight)


def check_mixture(path: str | Path | Mixture) -> Mixture:
    """[(path, weight)] of one or several datasets; ValueError for weights that are not above 0 and repeated paths."""
    if isinstance(path, str | Path):
        return [(path, 1.0)]
    mixture = [(name, float(weight)) for name, weight in path]
    names = [str(name) for name, _ in mixture]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not mixture:
        raise ValueError(f"datasets are named twice: {twice}" if twice else "no datasets are named")
    for name, weight in mixture:
        if not (np.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of {name} is {weight}; it must be above 0")
    return mixture


def load_meta(path: str | Path | Mixture) -> dict[str, Any]:
    """What a dataset (folder, Hub id or `id@revision`) says of itself: meta/info.json (`tasks`, `fps`, `splits`, ...)
    and `stats`, and `state_names`, {embodiment: the names of a state's numbers}: of a pose, or [] where it is none.
    ValueError where its counts are not those of its manifest.

    Of several datasets with weights: the `tasks` and the sums of the `splits` of all, and `stats` of the mixture (see
    `mix_statistics`); `state_names`, of which an embodiment has one list; and `fps`, `state_dim` and `action_dim`,
    which must be the same everywhere.
    """
    if isinstance(path, str | Path):
        return _load_meta(path)
    mixture = check_mixture(path)
    metas = {str(name): _load_meta(name) for name, _ in mixture}
    common = {}
    for key, why in (
        ("fps", "frame rates, Hz: {}; actions are per frame"),
        ("state_dim", "state sizes: {}; a model has one"),
        ("action_dim", "action sizes: {}; a model has one"),
    ):
        values = {name: meta[key] for name, meta in metas.items()}
        if len(set(values.values())) > 1:
            raise ValueError(f"the datasets have different {why.format(values)}")
        common[key] = next(iter(values.values()))
    splits: dict[str, Counter[str]] = {}
    state_names: dict[str, list[str]] = {}
    for name, meta in metas.items():
        for embodiment, names in meta["state_names"].items():
            if state_names.setdefault(embodiment, names) != names:
                raise ValueError(
                    f"the states of {embodiment!r} are {names or 'no poses'} in {name}, elsewhere "
                    f"{state_names[embodiment] or 'no poses'}; an embodiment has one kind of state"
                )
        for split, counts in meta["splits"].items():
            splits.setdefault(split, Counter()).update(counts)
    return {
        **common,
        "splits": {split: dict(counts) for split, counts in splits.items()},
        "tasks": sorted({task for meta in metas.values() for task in meta["tasks"]}),
        "state_names": state_names,
        "stats": mix_statistics([(metas[str(name)]["stats"], weight) for name, weight in mixture], state_names),
    }


def _load_meta(path: str | Path) -> dict[str, Any]:
    name, revision = split_revision(path)

    def read(file: str) -> Any:
        with source_of(path, "dataset") as folder:
            if folder is not None:
                return read_json(folder / "meta" / file)
            return read_json(Path(hf_hub_download(name, f"meta/{file}", repo_type="dataset", revision=revision)))

    info, manifest, stats = read("info.json"), read("manifest.json"), read("stats.json")
    if problems := count_problems(info, parse_manifest(manifest, f"manifest.json of {path}")):
        raise ValueError(f"dataset {path}: {'; '.join(problems)}")
    names = POSES.get(info.get("state_dim"), ()) if info.get("state_is_pose", True) else ()
    return {**info, "stats": stats, "state_names": {embodiment: list(names) for embodiment in stats}}
