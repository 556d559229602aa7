"""The statistics of the released StereoVLA's pickled preprocessor, read without running anything that it names.

A pickle is a program that may call any function. The reader here gives it next to nothing to call: numpy's own
constructors of arrays and numbers are the only names that it looks up; the release's classes, which are not imported,
become inert records; every other name is refused, and the error lists them all. Dicts, lists, strings and numbers need
no names.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class _ArrayOfBytes:
    """numpy's maker of arrays from bytes. A pickle could set attributes of a Python function; here are none to set."""

    __slots__ = ()

    def __call__(self, *arguments):
        return _FROM_BUFFER(*arguments)


_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
# What numpy writes into pickles, taken from numpy itself: (module, name) in numpy 1 and 2 -> object.
NUMPY = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", np.zeros(1).__reduce__()[0]),
            ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
            ("numeric", "_frombuffer", _ArrayOfBytes()),
        )
    },
}
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
QUANTITIES = {"proprio": "state", "action": "action", "goal": "keyframe_pose"}  # the release's name -> the processor's


class Record:
    """Stands for an object of a class that is not imported: keeps what the pickle says about it and does nothing."""

    class_name = ""

    def __new__(cls, *arguments, **keywords):
        record = super().__new__(cls)
        record.state = {}
        return record

    def __init__(self, *arguments, **keywords):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class RestrictedUnpickler(pickle.Unpickler):
    """Looks up numpy's constructors, makes records of the classes in `inert`, and notes every other name in `refused`.

    A refused name becomes a record as well, so that reading goes on and finds the others; `read_pickle` then raises.
    """

    def __init__(self, file, inert: frozenset[str]):
        super().__init__(file)
        self.inert, self.refused = inert, []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NUMPY:
            return NUMPY[module, name]
        full = f"{module}.{name}"
        if full not in self.inert:
            self.refused.append(full)
        return type("Record", (Record,), {"class_name": full})


def read_pickle(path: str | Path, inert: frozenset[str] = INERT) -> Any:
    """Content of a pickle of dicts, lists, strings, numbers and numpy arrays, and of records for `inert` classes.

    Raises:
        ValueError: it names anything else (each name is listed), or it is no pickle.
    """
    failure = content = None
    with open(path, "rb") as file:
        unpickler = RestrictedUnpickler(file, inert)
        try:
            content = unpickler.load()
        except Exception as error:  # whatever a damaged or hostile file leads to; no code of its own has run
            failure = error
    if unpickler.refused:
        names = ", ".join(sorted(set(unpickler.refused)))
        raise ValueError(
            f"{path} was not read: a preprocessor holds numpy arrays, dicts and floats and the release's own classes, "
            f"and this file also names {names}. Nothing of it was imported or run. If these are classes whose content "
            "does not matter, name them with --inert, and they are read as records that do nothing"
        )
    if failure is not None:
        raise ValueError(f"{path} cannot be read as a pickle: {type(failure).__name__}: {failure}") from failure
    return content


def _attribute(record: Any, name: str, path: str | Path) -> Any:
    """Attribute of a record; ValueError naming what it has instead."""
    state = record.state if isinstance(record, Record) else record
    if not isinstance(state, Mapping) or name not in state:
        has = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
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
        raise ValueError(f"{path}: ratio is {ratio!r}; it must be a float in [0, 0.5)")
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path}: the normaliser has no statistics")
    statistics: dict[str, dict] = {}
    for embodiment, quantities in found.items():
        statistics[str(embodiment)] = {}
        for theirs, ours in QUANTITIES.items():
            ends = _attribute(quantities, theirs, path)
            values = {name: np.asarray(_attribute(ends, name, path)) for name in ("min", "max")}
            for name, value in values.items():
                if value.dtype.kind != "f" or value.ndim != 1 or not np.isfinite(value).all():
                    raise ValueError(
                        f"{path}: {embodiment} {theirs} {name} is {value.dtype} of shape {value.shape}; it must be one "
                        "finite float for each dimension"
                    )
            if values["min"].shape != values["max"].shape or (values["min"] > values["max"]).any():
                raise ValueError(f"{path}: {embodiment} {theirs} has min {values['min']} and max {values['max']}")
            statistics[str(embodiment)][ours] = {name: value.tolist() for name, value in values.items()}
    return statistics, ratio
