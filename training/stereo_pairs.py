"""Stereo pairs with true disparity as the stereo encoder is trained on them: cut out, scaled, in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from stereovla.dataset_builder.dataset.schema import CALIBRATION_KEYS
from stereovla.dataset_builder.streaming.augmentation import PhotometricAugmentation
from stereovla.dataset_builder.streaming.lanes import LaneStream
from stereovla.processing import StereoImageProcessorPil
from stereovla.processing.camera_geometry import Calibration, depth_to_disparity
from stereovla.processing.image_processing_stereovla import ViewGeometry


@dataclass(frozen=True)
class Framing:
    """What is cut out of pairs of any size, the same of both views, and scaled to (height, width) px.

    A cut alone changes no disparity; scaling by a factor multiplies them by it.

    Args:
        scale: "fit" = the smallest factor at which the pair still fills height and width, "native" = 1.
        zoom: training pairs are scaled further by a factor in [1, zoom].
    """

    height: int
    width: int
    scale: str = "fit"
    zoom: float = 1.0

    def geometry(self, source: tuple[int, int], rng: np.random.Generator | None = None) -> ViewGeometry:
        """Geometry for views of `source` = (height, width) px: drawn with `rng`, or without it from the middle."""
        factor = max(self.height / source[0], self.width / source[1])
        if self.scale == "native":
            if factor > 1:
                raise ValueError(
                    f"a pair of {source[0]} x {source[1]} px (height x width) is smaller than --height {self.height} "
                    f"--width {self.width}, which --scale native cuts out; make these smaller or use --scale fit"
                )
            factor = 1.0
        if rng is not None:
            factor *= self.zoom ** rng.random()
        cut = [
            min(size, round(target / factor)) for size, target in zip(source, (self.height, self.width), strict=True)
        ]
        room = [size - side for size, side in zip(source, cut, strict=True)]
        corner = [free // 2 if rng is None else int(rng.integers(free + 1)) for free in room]
        return ViewGeometry(
            source_height=source[0],
            source_width=source[1],
            crop_left=corner[1],
            crop_top=corner[0],
            crop_width=cut[1],
            crop_height=cut[0],
            scaled_width=self.width,
            scaled_height=self.height,
            pad_left=0,
            pad_top=0,
            height=self.height,
            width=self.width,
        )

    def apply(self, pair: dict[str, Any], random: bool) -> tuple[np.ndarray, np.ndarray]:
        """A pair of a stream -> views uint8 (2, height, width, 3) and disparity float32 (height, width) in px of these,
        0 = unknown. What is drawn follows from the pair's `seed`.
        """
        disparity = true_disparity(pair)
        geometry = self.geometry(disparity.shape, np.random.default_rng(pair["seed"]) if random else None)
        resample = int(StereoImageProcessorPil.resample)
        views = [geometry.image(pair[side], resample) for side in ("left", "right")]
        return np.stack(views), geometry.labels(disparity) * np.float32(geometry.scale[0])


def true_disparity(pair: dict[str, Any]) -> np.ndarray:
    """float32 (H, W) px of the left view as it came, 0 = unknown; of our own datasets' windows from depth and
    calibration.
    """
    if "disparity" in pair:
        return pair["disparity"]
    calibration = Calibration.from_mapping({key: pair[f"calibration.{key}"] for key in CALIBRATION_KEYS})
    return depth_to_disparity(pair["depth"], calibration)


class PairBatches(IterableDataset):
    """Batches of `size` pairs of a stream, and the stream's state after each, for `training.feed.Feed`: inputs
    {"pixel_values" float32 (size, 2, 3, H, W) in [0, 1], "disparity" float32 (size, H, W) px, 0 = unknown}.

    Args:
        augmentation: changes the colours of both views, by the pair's `seed`; None = as they are.
    """

    def __init__(
        self, stream: LaneStream, size: int, framing: Framing, augmentation: PhotometricAugmentation | None = None
    ):
        self.stream, self.size, self.framing, self.augmentation = stream, size, framing, augmentation

    def __iter__(self) -> Iterator[tuple[dict | None, list[str], dict]]:
        yield None, [], self.stream.state_dict()
        pairs = []
        for pair in self.stream:
            if self.augmentation is not None:
                views = {side: pair[side] for side in ("left", "right")}
                pair |= self.augmentation(views, (pair["seed"], 0, 0, 0))
            pairs.append(self.framing.apply(pair, random=True))
            if len(pairs) == self.size:
                yield collate(pairs), [], self.stream.state_dict()
                pairs = []


def collate(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Views uint8 (2, H, W, 3) and disparities (H, W) -> inputs as in `PairBatches`."""
    views, disparities = zip(*pairs, strict=True)
    pixel_values = torch.from_numpy(np.stack(views)).permute(0, 1, 4, 2, 3).float().div_(255)
    return {"pixel_values": pixel_values, "disparity": torch.from_numpy(np.stack(disparities))}
