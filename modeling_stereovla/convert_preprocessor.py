"""The statistics of the released StereoVLA's pickled preprocessor, read without running anything that it names.

The release's classes, which are not imported, become inert records; see `convert_pickle`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .convert_pickle import Record, read_pickle

# Classes that the release's preprocessor is made of (shengliangd/StereoVLA, vla_network): itself, its normaliser, and
# its config with the training arguments in it. Of these only the dict of their attributes is read.
CONFIG = "vla_network.config.define"
PREPROCESSOR = "vla_network.preprocessor.preprocess"
INERT = frozenset(
    [
        f"{PREPROCESSOR}.DataPreprocessor",
        f"{PREPROCESSOR}.RatioMinMaxUniformRobotNormalizer",
        *(
            f"{CONFIG}.{name}"
            for name in (
                "VLAConfig VLAModelConfig VLATrainConfig AssembledVLAModelConfig Backbone2DConfig LLMConfig "
                "ActionExpertConfig FlowMatchingConfig MixDatasetConfig STATE_REP ACTION_REP"
            ).split()
        ),
        "transformers.training_args.TrainingArguments",
        "transformers.training_args.OptimizerNames",
        *(
            f"transformers.trainer_utils.{name}"
            for name in "SchedulerType IntervalStrategy SaveStrategy HubStrategy".split()
        ),
        "transformers.trainer_pt_utils.AcceleratorConfig",
    ]
)
_MOST_NAMES = 20  # that a message lists
MOST_EMBODIMENTS, MOST_DIMENSIONS = 1000, 256  # the release has 1 of 7; one array could be named for all of a million
QUANTITIES = {"proprio": "state", "action": "action", "goal": "keyframe_pose"}  # the release's name -> the processor's


def _attribute(record: Any, name: str, path: str | Path) -> Any:
    """Attribute of a record; ValueError naming what it has instead."""
    state = record.state if isinstance(record, Record) else record
    if not isinstance(state, Mapping) or name not in state:
        has = sorted(map(str, state))[:_MOST_NAMES] if isinstance(state, Mapping) else type(state).__name__
        what = record.class_name if isinstance(record, Record) else type(record).__name__
        raise ValueError(f"{path}: {what} has no {name!r}; it has {has}")
    return state[name]


def read_statistics(path: str | Path, inert: frozenset[str] = INERT) -> tuple[dict, float]:
    """Statistics of the release's preprocessor, and the share of the data that lies beyond each end of the range.

    Returns:
        {embodiment: {"state" | "action" | "keyframe_pose": {"min": [...], "max": [...]}}}, floats in robot units, one
        for each dimension; and the share, 0.01 for the 1st and the 99th percentile.

    Raises:
        ValueError: the file is refused (see `read_pickle`), or holds no such statistics.
    """
    normalizer = _attribute(read_pickle(path, inert), "robot_normalizer", path)
    ratio, found = _attribute(normalizer, "ratio", path), _attribute(normalizer, "stats", path)
    if not isinstance(ratio, float) or not 0 <= ratio < 0.5:
        shown = ratio if isinstance(ratio, int | float) else type(ratio).__name__  # not what may be nested for ever
        raise ValueError(f"{path}: ratio is {shown}; it must be a float in [0, 0.5)")
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path}: the normaliser has no statistics")
    if len(found) > MOST_EMBODIMENTS:
        raise ValueError(f"{path}: statistics of {len(found)} embodiments; at most {MOST_EMBODIMENTS} are read")
    statistics: dict[str, dict] = {}
    for embodiment, quantities in found.items():
        statistics[str(embodiment)] = {}
        for theirs, ours in QUANTITIES.items():
            ends = _attribute(quantities, theirs, path)
            values = {name: _attribute(ends, name, path) for name in ("min", "max")}
            for name, value in values.items():
                if not isinstance(value, np.ndarray):
                    raise ValueError(f"{path}: {embodiment} {theirs} {name} is a {type(value).__name__}, not an array")
                if value.dtype.kind != "f" or value.ndim != 1 or not np.isfinite(value).all():
                    raise ValueError(
                        f"{path}: {embodiment} {theirs} {name} is {value.dtype} of shape {value.shape}; it must be one "
                        "finite float for each dimension"
                    )
                if len(value) > MOST_DIMENSIONS:
                    raise ValueError(
                        f"{path}: {embodiment} {theirs} {name} has {len(value)} dimensions; at most {MOST_DIMENSIONS} "
                        "are read"
                    )
            if values["min"].shape != values["max"].shape or (values["min"] > values["max"]).any():
                raise ValueError(f"{path}: {embodiment} {theirs} has min {values['min']} and max {values['max']}")
            statistics[str(embodiment)][ours] = {name: value.tolist() for name, value in values.items()}
    return statistics, ratio
