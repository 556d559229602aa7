"""Records what a policy was shown and what the arm did, an episode at a time, on the robot's computer.

FOLDER/episode_000007/ has episode.json (robot, cameras, instruction, whether it succeeded), steps.jsonl (one line for
each step of a chunk: timestamp, state, action) and a folder of JPEG files for each view. An episode that is not
finished has a name that begins with a dot; it is never taken for a whole one. `stereovla data import rollouts` makes a
dataset of them.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stereovla.serving.motion import Motion

FORMAT = "stereovla rollout 1"
HEADER, STEPS = "episode.json", "steps.jsonl"
NAME = re.compile(r"episode_(\d{6,})")
QUALITY = 95  # of JPEG, without subsampling of colours: its error is below that of the dataset's own
OUTCOMES: dict[str, bool | None] = {"s": True, "f": False, "d": None}  # by the key that says so; None = thrown away


def ask_outcome(read: Callable[[str], str] = input) -> bool | None:
    """Whether the episode succeeded, by a key of whoever watches; None = it is to be thrown away. Asks until it is one
    of `OUTCOMES`.
    """
    while True:
        key = read("success (s), failure (f), or discard (d)? ").strip().lower()
        if key in OUTCOMES:
            return OUTCOMES[key]


class EpisodeRecorder:
    """Writes episodes into `folder`; several may be there already.

    Args:
        embodiment, state_names: as in the server's metadata; no names for a robot whose state is no pose.
        motion: how its actions move it. rate_hz: steps per second.
        calibration: of the views as they are recorded, with "size_px", such as `Rectification.calibration`, and where
            it is known "transform_camera_to_base"; None = unknown, then a dataset of StereoVLA cannot be made of it.
        about: what else is to be remembered, such as the model and its revision.
    """

    def __init__(
        self,
        folder: str | Path,
        embodiment: str,
        state_names: Sequence[str],
        motion: Motion,
        rate_hz: float,
        calibration: Mapping[str, Any] | None = None,
        about: Mapping[str, str] | None = None,
    ):
        self.folder, self.motion = Path(folder), motion
        self._header = {
            "format": FORMAT,
            "embodiment": embodiment,
            "state_names": list(state_names),
            "rate_hz": float(rate_hz),
            "calibration": None if calibration is None else _plain(calibration),
            "about": dict(about or {}),
        }
        json.dumps(self._header)  # TypeError for what cannot be written, before an episode is lost by it
        self.folder.mkdir(parents=True, exist_ok=True)
        self._partial: Path | None = None

    def begin(self, instruction: str) -> None:
        """An episode begins; ValueError while another one is recorded, or without an instruction."""
        if self._partial is not None:
            raise ValueError(f"{self._partial} is not finished; end or discard it first")
        if not instruction.strip():
            raise ValueError("the instruction is empty; a policy cannot learn from such an episode")
        numbers = [int(match[1]) for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name.lstrip(".")))]
        self._number = max(numbers, default=-1) + 1
        self._partial = self.folder / f".episode_{self._number:06d}"
        self._partial.mkdir()
        self._header |= {"instruction": instruction, "views": {}}
        self._steps = 0
        self._last: tuple[float, np.ndarray] | None = None
        self._file = open(self._partial / STEPS, "w", encoding="utf-8")

    def add(self, time_s: float, state: np.ndarray, views: Mapping[str, np.ndarray], target: np.ndarray | None) -> None:
        """What is seen and where the arm is when a step begins, and the `target` (A,) that it was told in the end of
        the step before; None at the first.

        Args:
            views: RGB uint8 (H, W, 3) by name, the same in every step, of the same sizes.
        """
        if self._partial is None:
            raise ValueError("no episode has begun; call begin first")
        sizes = {name: [int(view.shape[1]), int(view.shape[0])] for name, view in views.items()}
        self._header["views"] = self._header["views"] or sizes
        if sizes != self._header["views"]:
            raise ValueError(
                f"step {self._steps} has the views {sizes}, the first {self._header['views']} (width, height)"
            )
        self._write(target)
        for name, view in views.items():
            folder = self._partial / name
            folder.mkdir(exist_ok=True)
            Image.fromarray(view).save(folder / f"{self._steps:06d}.jpg", quality=QUALITY, subsampling=0)
        self._last = (time_s, np.asarray(state, np.float64))
        self._steps += 1

    def _write(self, target: np.ndarray | None) -> None:
        """The line of the step that has ended."""
        if self._last is None:
            return
        if target is None:
            raise ValueError("a step has ended; say what the arm was told in it")
        time_s, state = self._last
        action = self.motion.actions(state, np.asarray(target, np.float64)[None])[0]
        line = {"timestamp": time_s, "state": state.tolist(), "action": action.tolist()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def end(self, success: bool, target: np.ndarray) -> Path:
        """The episode's folder, whole; `target` as in `add`. ValueError for one without a step."""
        if self._partial is None or not self._steps:
            raise ValueError("there is no episode with a step to end")
        self._write(target)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        header = {**self._header, "success": bool(success), "steps": self._steps}
        (self._partial / HEADER).write_text(json.dumps(header, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        done = self.folder / self._partial.name.lstrip(".")
        os.replace(self._partial, done)
        self._partial = None
        return done

    def discard(self) -> None:
        """Throws the episode that is recorded away; nothing where there is none."""
        if self._partial is not None:
            self._file.close()
            shutil.rmtree(self._partial)
            self._partial = None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in values.items()}
