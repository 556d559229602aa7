"""Photometric augmentation of the views of a frame: what exposure and light change, never where things are.

Geometry stays as recorded. A disparity is a horizontal distance between the two views, so a crop, shift or rotation of
one view alone makes it wrong. A horizontal flip is wrong even when both views are flipped: the mirrored left view is
what a camera to the *right* would see, so all disparities turn negative unless the views are swapped too, and then
actions, camera pose, boxes and words such as "left" would have to be mirrored with them, for a robot whose mirror image
does not exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_MIDDLE = 127.5
_STREAM = 1  # keeps these draws apart from those of questions.window_generator


@dataclass(frozen=True)
class PhotometricAugmentation:
    """Largest changes; each window draws its own, uniformly. All views get the same, but for `between_views`.

    Args:
        brightness, saturation: factors lie in 1 -+ this.
        contrast: the same, about middle grey.
        balance: the same for each colour channel on its own (colour of the light).
        between_views: exposure of every other view relative to the left (a factor in 1 -+ this) and its black level
            (-+ this share of the range), as cameras differ; 0 = the views stay photometrically equal.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    balance: float = 0.05
    between_views: float = 0.02

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 <= value < 1:
                raise ValueError(f"{item.name}={value} must be in [0, 1)")

    def __call__(
        self, views: Mapping[str, np.ndarray | None], place: tuple[int, int, int, int]
    ) -> dict[str, np.ndarray | None]:
        """The augmented views, {name: uint8 (H, W, 3) RGB}; what is None stays so.

        Args:
            views: "left", "right" and others. How those two look does not depend on which others there are.
            place: (seed, epoch, episode, frame): nothing else decides, so a resumed stream augments as before.
        """
        rng = np.random.default_rng((*place, _STREAM))
        brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * (self.brightness, self.contrast, self.saturation)
        gain = brightness * (1 + self.balance * rng.uniform(-1, 1, 3))
        of_right = self.between_views * rng.uniform(-1, 1, 2)
        colors = saturation * np.eye(3) + (1 - saturation) * _LUMA  # (3, 3), rows sum to 1: grey stays grey
        matrix = np.empty((3, 4))
        matrix[:, :3] = contrast * gain[:, None] * colors
        matrix[:, 3] = (1 - contrast) * _MIDDLE
        result = {}
        for name, view in views.items():
            own = matrix
            if name != "left":
                exposure, black = of_right if name == "right" else self.between_views * rng.uniform(-1, 1, 2)
                own = matrix * (1 + exposure)
                own[:, 3] += 255 * black
            result[name] = None if view is None else _apply(view, own)
        return result


def _apply(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Affine map of the colours, rounded and clipped to 0..255: one pass in C, 0.2 ms for 128x128."""
    return np.array(Image.fromarray(image).convert("RGB", tuple(matrix.ravel().tolist())))
