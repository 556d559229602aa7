"""What observations hold, and under which keys: this project's, openpi's for DROID, LeRobot's, or those of a file."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.serving.wire import shown

PAIR = ("left", "right")
# A gripper that DROID measures is 0 where it is open, ours 1: no key of its pose of the tool is among these.
KEYS: dict[str, list[str | list[str]]] = {
    "left": ["left", "observation/exterior_image_1_left", "observation.images.left"],
    "right": ["right", "observation/exterior_image_1_right", "observation.images.right"],
    "wrist": ["wrist", "observation/wrist_image_left", "observation.images.wrist"],
    "state": [
        "state",
        "observation/state",
        "observation.state",
        ["observation/joint_position", "observation/gripper_position"],
    ],
    "instruction": ["instruction", "prompt", "task"],
    "embodiment": ["embodiment"],
    "outputs": ["outputs"],
    "seed": ["seed"],
    "running_actions": ["running_actions"],
    "delay": ["delay"],
}
# what a server hears that sends no keys of its own
OPENPI = {name: [keys[1] if len(keys) > 1 else keys[0]] for name, keys in KEYS.items()}
# but for views and depths
# of the left view and the pair, for a model that sees points; a map of these counts as the way to each
CALIBRATION = ("focal_length_px", "principal_point_px", "baseline_m", "transform_camera_to_base")
OTHERS = ("state", "instruction", "embodiment", "outputs", "seed", "running_actions", "delay")
ENDPOINT, ENDPOINTS = "endpoint", ("infer", "reset")  # RoboArena's way to say that an episode begins
IGNORED = "ignored"


@dataclass
class Observation:
    """What was read of a message.

    images: {view: uint8 RGB (H, W, 3), or the bytes of a JPEG or PNG}; depths: {view: (H, W) m, 0 = unknown}.
    state: (S,) or (k, S), oldest first. outputs: what is asked for beside the actions. seed: of the noise.
    running_actions: (n, A), what is left of the chunk that is executed, which the next one continues; delay: how many
    of them will have been executed when it is there. calibration: as processors take it; None = not told.
    """

    images: dict[str, Any]
    instruction: Any
    state: Any
    embodiment: Any
    depths: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    seed: int | None = None
    running_actions: Any = None
    delay: int = 0
    calibration: Any = None


def read_keys(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file of keys; ValueError for what is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'{path} holds {shown(found)}; it must be an object such as {{"left": ["camera_0"]}}')
    return found


class ObservationKeys:
    """The keys of the observations of one model.

    Args:
        views: names of those that it sees. depths: those whose true depth it is shown; the first is needed.
        outputs: what it can be asked for beside actions. embodiments: the robots that it knows.
        keys: {name: key, or several of which an observation has one; a list among them is of keys whose numbers are
            joined}, in place of the defaults of those names. "ignored" are keys that are read and not used.
        embodiment: that of observations which name none; "" = the only one.
        calibration: whether an observation has none, may have one ("known") or must ("needed").
    """

    def __init__(
        self,
        views: Sequence[str],
        depths: Sequence[str] = (),
        outputs: Sequence[str] = (),
        embodiments: Sequence[str] = (),
        keys: Mapping[str, Any] | None = None,
        embodiment: str = "",
        calibration: str = "",
    ):
        self.views, self.depths, self.outputs = tuple(views), tuple(depths), tuple(outputs)
        if embodiment and embodiment not in embodiments:
            raise ValueError(f"unknown embodiment {embodiment!r}; the model knows {', '.join(embodiments)}")
        self.embodiment = embodiment or (embodiments[0] if len(embodiments) == 1 else "")
        self.calibration = calibration
        told = [f"calibration.{name}" for name in CALIBRATION] if calibration else []
        names = [*self.views, *(f"depth.{name}" for name in self.depths), *told]
        self.keys = {name: _default(name) for name in (*names, *OTHERS)}
        self.ignored: set[str] = set()
        self._replace(keys or {})

    def _replace(self, keys: Mapping[str, Any]) -> None:
        for name, given in keys.items():
            if name not in self.keys and name != IGNORED:
                near = difflib.get_close_matches(name, self.keys, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join((*self.keys, IGNORED))}"
                raise ValueError(f"the keys have an entry {name!r}; {hint}")
            several = given if isinstance(given, list) else [given]
            parts = [part for one in several for part in (one if isinstance(one, list) else [one])]
            if not parts or not all(isinstance(part, str) and part for part in parts) or [] in several:
                raise ValueError(f"the keys of {name!r} are {shown(given)}; expected a key or a list of keys")
            if name == IGNORED:
                self.ignored = set(parts)
            else:
                self.keys[name] = several
        owners: dict[str, str] = {ENDPOINT: ENDPOINT, **dict.fromkeys(self.ignored, IGNORED)}
        for name, key in self._parts():
            if owners.setdefault(key, name) != name:
                raise ValueError(f"the key {key!r} is of {owners[key]!r} and of {name!r}; it can be of one alone")
        self._owners = owners

    def _parts(self) -> Iterator[tuple[str, str]]:
        """(name, key) of all keys."""
        for name, several in self.keys.items():
            for one in several:
                for key in one if isinstance(one, list) else [one]:
                    yield name, key

    def read(self, message: Mapping[str, Any]) -> Observation:
        """The observation of a message; ValueError for one that lacks something or has too much. Maps within it count
        by the way to what they hold, "observation/state".
        """
        items = list(_flat(message))
        if len(found := dict(items)) < len(items):
            raise ValueError("the observation has a key both by itself and within a map; send it once")
        values = self._values(found)
        missing = [name for name in self._needed if values.get(name) is None]
        if missing:
            raise ValueError(f"the observation lacks {'; '.join(self._described(name) for name in missing)}; {self}")
        if (values.get("running_actions") is None) != (values.get("delay") is None):
            raise ValueError(f"running_actions and delay belong together; send both, or none of them; {self}")
        instruction = values["instruction"]
        return Observation(
            images={name: values[name] for name in self.views if name in values},
            instruction=instruction.decode() if isinstance(instruction, bytes) else instruction,
            state=values["state"],
            embodiment=values.get("embodiment", self.embodiment),
            depths={name: values[key] for name in self.depths if (key := f"depth.{name}") in values},
            outputs=_outputs(values.get("outputs"), self.outputs),
            seed=_whole(values.get("seed"), "seed"),
            running_actions=values.get("running_actions"),
            delay=_whole(values.get("delay"), "delay") or 0,
            calibration={key: values[name] for key in CALIBRATION if (name := f"calibration.{key}") in values} or None,
        )

    def reset_seed(self, message: Mapping[str, Any]) -> int | None:
        """The seed of a message whose endpoint is "reset"; ValueError where it has more than that."""
        values = self._values({key: value for key, value in message.items() if key != ENDPOINT})
        if set(values) - {"seed"}:
            raise ValueError(f"a reset has {', '.join(values)}; it may have a seed alone")
        return _whole(values.get("seed"), "seed")

    def message(self, **values: Any) -> dict[str, Any]:
        """The message of an observation, by names as those of `keys`: each under the first of its keys."""
        unknown = [name for name in values if name not in self.keys]
        if unknown:
            raise ValueError(f"there is no key for {', '.join(unknown)}; {self}")
        several = [name for name in values if isinstance(self.keys[name][0], list)]
        if several:
            raise ValueError(f"{', '.join(several)} has no key of its own; put one first among its keys")
        return {self.keys[name][0]: value for name, value in values.items()}

    @property
    def _needed(self) -> tuple[str, ...]:
        sides = [name for name in self.views if name in PAIR]
        depths = [f"depth.{name}" for name in self.depths[:1]]
        depths += [f"calibration.{name}" for name in CALIBRATION[:3]] if self.calibration == "needed" else []
        return (*sides, *depths, "instruction", "state", *([] if self.embodiment else ["embodiment"]))

    def _values(self, message: dict[str, Any]) -> dict[str, Any]:
        """{name: value} of what a message holds."""
        for key in message:
            if key not in self._owners:
                near = difflib.get_close_matches(key, self._owners, n=1) if isinstance(key, str) else []
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._owners)}"
                raise ValueError(f"unknown key {shown(key)}; {hint}; {self}; --keys can name it, or ignore it")
        values: dict[str, Any] = {}
        unused = {key for key in message if self._owners[key] not in (ENDPOINT, IGNORED)}
        for name, several in self.keys.items():
            found = [one for one in several if all(key in message for key in (one if isinstance(one, list) else [one]))]
            if len(found) > 1:
                raise ValueError(f"{name} is there as {' and as '.join(map(repr, found))}; send one of them")
            for one in found:
                values[name] = _joined([message[key] for key in one]) if isinstance(one, list) else message[one]
                unused -= set(one) if isinstance(one, list) else {one}
        if unused:
            key = min(unused)
            raise ValueError(f"{key!r} is a part of {self._described(self._owners[key])}, which is not there as that")
        return values

    def _described(self, name: str) -> str:
        keys = [" with ".join(map(repr, one)) if isinstance(one, list) else repr(one) for one in self.keys[name]]
        return f"{name} ({' or '.join(keys)})"

    def __str__(self) -> str:
        return f"this model's views are {', '.join(self.views)}"


def _default(name: str) -> list[Any]:
    if name in KEYS:
        return KEYS[name]
    if name.startswith("calibration."):
        return [name.replace(".", "/")]
    view = name.removeprefix("depth.")
    if view == name:
        return [name, f"observation/{name}", f"observation.images.{name}"]
    return [*(["depth"] if view == "left" else []), f"depth/{view}", f"observation.images.{view}_depth"]


def _flat(message: Mapping[Any, Any], above: str = "") -> Iterator[tuple[Any, Any]]:
    for key, value in message.items():
        key = f"{above}/{key}" if above and isinstance(key, str) else key
        if isinstance(value, dict) and value and isinstance(key, str):  # an empty one is a wrong value
            yield from _flat(value, key)
        else:
            yield key, value


def _joined(parts: Sequence[Any]) -> np.ndarray:
    try:
        arrays = [np.atleast_1d(np.asarray(part)) for part in parts]
        if any(array.dtype.kind not in "biuf" for array in arrays):
            raise ValueError("they are no numbers")
        return np.concatenate(arrays, axis=-1)
    except ValueError as error:
        raise ValueError(f"the parts of the state cannot be joined: {error}") from error


def _outputs(value: Any, known: Sequence[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name in known for name in value):
        raise ValueError(f"outputs are {shown(value)}; expected a list of {', '.join(known) or 'none: it has none'}")
    return tuple(name for name in known if name in value)


def _whole(value: Any, name: str) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{name} is {shown(value)}; it must be an integer of at least 0, or absent")
    return value
