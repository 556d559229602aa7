"""What the page shows to a model: a frame, from files and text fields or out of a dataset."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.shards import decode_image
from stereovla.dataset_builder.streaming.episodes import read_episode
from stereovla.processing.camera_geometry import Calibration
from stereovla.serving.observation_keys import Observation
from stereovla.untrusted import open_image

PICTURES = ("JPEG", "PNG", "WEBP")
EPISODES_KEPT = 4  # the last ones that were looked at, so that the next frame of one costs nothing


@dataclass(frozen=True)
class Carried:
    """What came with the views of a dataset or of the simulator and has no field on the page.

    depths: {view: (H, W) float32 m, 0 = unknown}. drawn: by a renderer, so that nobody need look for swapped views.
    """

    depths: Mapping[str, np.ndarray] = field(default_factory=dict)
    drawn: bool = False


@dataclass(frozen=True)
class Frame:
    """One moment.

    views: {name: (H, W, 3) uint8 RGB}. states: (k, S) float32, oldest first. calibration: of the left view and the
    pair, as far as it is known.
    """

    views: Mapping[str, np.ndarray]
    instruction: str
    embodiment: str
    states: np.ndarray
    calibration: Calibration | None = None
    carried: Carried = Carried()

    def observation(self, outputs: Sequence[str], seed: int) -> Observation:
        """What a served model is asked."""
        return Observation(
            images=dict(self.views),
            instruction=self.instruction,
            state=self.states,
            embodiment=self.embodiment,
            depths=dict(self.carried.depths),
            calibration=None if self.calibration is None else known_values(self.calibration),
            outputs=tuple(outputs),
            seed=seed,
        )


@lru_cache(EPISODES_KEPT)
def episode_of(dataset: str, split: str, episode: int) -> tuple[Mapping[str, Any], ...]:
    """Rows of `read_episode`."""
    return tuple(read_episode(dataset, split, episode))


def dataset_frame(dataset: str, split: str, episode: int, number: int, views: Sequence[str], history: int) -> Frame:
    """Frame `number` of an episode, with those of `views` that it has and its last `history` states; ValueError where
    it is not there.
    """
    rows = episode_of(dataset, split, episode)
    if not 0 <= number < len(rows):
        raise ValueError(f"episode {episode} has no frame {number}; it has {len(rows)}, from 0 to {len(rows) - 1}")
    row = rows[number]
    keys = {view: schema.image_key(view) for view in views}
    if missing := [view for view in ("left", "right") if view in keys and keys[view] not in row]:
        raise ValueError(
            f"the model sees {', '.join(views)}; frame {number} of episode {episode} of {dataset} has no view "
            f"{', '.join(missing)}; it has {', '.join(schema.views_of(row))}"
        )
    maps = {view: schema.depth_key(view) for view in views}
    known = {key: row[f"calibration.{key}"] for key in schema.CALIBRATION_KEYS if f"calibration.{key}" in row}
    return Frame(
        views={view: decode_image(key, row[key]) for view, key in keys.items() if key in row},
        instruction=row["task"],
        embodiment=row["embodiment"],
        states=np.stack([row["observation.state"] for row in rows[max(0, number + 1 - history) : number + 1]]),
        calibration=Calibration.from_mapping(known)
        if {"focal_length_px", "principal_point_px"} <= set(known)
        else None,
        carried=Carried({view: decode_image(key, row[key]) for view, key in maps.items() if key in row}),
    )


def read_view(path: str, name: str) -> np.ndarray:
    """The picture of a file, (H, W, 3) uint8; ValueError for what is none."""
    try:
        with open_image(Path(path).read_bytes(), PICTURES) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds, struct.error and zlib.error among them
        words = str(error) if type(error) is ValueError else "it cannot be decoded"
        raise ValueError(f"the {name} view is no picture of {', '.join(PICTURES)}: {words}") from error


def read_states(text: str | None, size: int) -> np.ndarray:
    """(k, size) float32 of lines of numbers; ValueError names the line that is none."""
    lines = [line for line in (text or "").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"the state is missing: a line of {size} numbers, earlier ones above it")
    states = []
    for number, line in enumerate(lines, 1):
        try:
            states.append([float(word) for word in re.split(r"[,;\s]+", line.strip(" \t[](),;"))])
        except ValueError as error:
            raise ValueError(f"line {number} of the state is {line[:80]!r}; expected {size} numbers") from error
        if len(states[-1]) != size:
            raise ValueError(f"line {number} of the state has {len(states[-1])} numbers; this model's have {size}")
    return np.array(states, np.float32)


def states_text(states: np.ndarray) -> str:
    """Inverse of `read_states`, to the last bit."""
    return "\n".join(", ".join(str(value) for value in row) for row in np.asarray(states, np.float32))


def read_calibration(text: str | None) -> Calibration | None:
    """That of a JSON object, None for no text; ValueError says what is wrong."""
    if not (text or "").strip():  # a field that nobody has touched is None
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the calibration is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"the calibration is {text[:80]!r}; expected an object with {', '.join(schema.CALIBRATION_KEYS)}"
        )
    try:
        return Calibration.from_mapping(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the calibration cannot be used: {error}") from error


def known_values(calibration: Calibration) -> dict[str, Any]:
    """A calibration as a mapping, which the processor in a checkpoint's own code takes too."""
    values = {key: getattr(calibration, key) for key in schema.CALIBRATION_KEYS}
    return {key: value for key, value in values.items() if value is not None}


def calibration_text(calibration: Calibration | None) -> str:
    """Inverse of `read_calibration`, as float32."""
    if calibration is None:
        return ""

    def plain(value: Any) -> Any:
        return [plain(one) for one in value] if isinstance(value, np.ndarray) else float(str(np.float32(value)))

    return json.dumps({key: plain(value) for key, value in known_values(calibration).items()})
