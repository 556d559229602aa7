"""Notices a calibration that is not the camera's: the tool, whose place the robot knows, is seen elsewhere."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

FRAMES = 30  # whose median is judged
LIMIT = 0.05  # of the side of the processed view: with 40 degrees of view a camera that is turned by 3 degrees


class CalibrationWatch:
    """Compares where a policy's pointers see the gripper with where the calibration says that the tool is.

    It listens to the model from then on: `compare` is to be called after each batch that the model has predicted.

    Attributes:
        offsets_px: the distances in the last `FRAMES` views that show the tool, px of the processed left view.
    """

    def __init__(self, model: Any):
        self.size = model.config.image_size
        self.offsets_px: deque[float] = deque(maxlen=FRAMES)
        self._seen: np.ndarray | None = None
        self._told = False
        cells = (np.arange(model.pointers.grid) + 0.5) * (self.size / model.pointers.grid)
        self._centres = torch.from_numpy(np.stack(np.meshgrid(cells, cells), axis=-1).reshape(-1, 2)).float()
        model.pointers.register_forward_hook(self._note)

    def _note(self, module: Any, inputs: Any, pointed: Any) -> None:
        attention = pointed.logits[:, 1].detach().float().cpu().softmax(-1)
        self._seen = (attention @ self._centres).numpy()

    def compare(self, tools_px: Sequence[np.ndarray]) -> None:
        """The last batch, of whose samples the processor says by `tool_px` where the tool is."""
        for seen, tool in zip(self._seen, tools_px, strict=True):
            if np.isfinite(tool).all():
                self.offsets_px.append(float(np.linalg.norm(seen - tool)))

    def news(self) -> str | None:
        """The `problem` where there is one, once."""
        if self._told or (problem := self.problem) is None:
            return None
        self._told = True
        return problem

    @property
    def problem(self) -> str | None:
        """What is wrong, in words, once `FRAMES` views say so; None = nothing, or too few views."""
        if len(self.offsets_px) < FRAMES or (offset := float(np.median(self.offsets_px))) <= LIMIT * self.size:
            return None
        return (
            f"the gripper is seen {offset:.0f} px beside where the calibration puts the tool (median of {FRAMES} "
            f"views of {self.size} px; up to {LIMIT * self.size:.0f} px are usual): is transform_camera_to_base still "
            "that of this camera?"
        )


def watch_of(model: Any, processor: Any) -> CalibrationWatch | None:
    """That of a model that sees points in the robot's base frame; None of another."""
    sees = getattr(processor, "points_frame", None) == "base" and model.pointers is not None
    # the processors of folders that were saved before cannot say where the tool is
    return CalibrationWatch(model) if sees and hasattr(processor, "tool_px") else None
