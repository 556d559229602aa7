"""Pictures with a true number for each pixel as a part alone is trained on them: cut out, scaled, in batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import IterableDataset

from stereovla.dataset_builder.dataset.schema import BASELINE, CALIBRATION_KEYS
from stereovla.dataset_builder.streaming.augmentation import PhotometricAugmentation
from stereovla.dataset_builder.streaming.lanes import LaneStream
from stereovla.processing import StereoImageProcessorPil
from stereovla.processing.camera_geometry import Calibration, depth_to_disparity
from stereovla.processing.image_processing_stereovla import ViewGeometry


@dataclass(frozen=True)
class Framing(ABC):
    """What is cut out of the views of samples of any size, the same of all views, and scaled to (height, width) px.

    Args:
        scale: "fit" = the smallest factor at which a view still fills height and width, "native" = 1.
        zoom: in training they are scaled further by a factor in [1, zoom].
        views: keys of the views in a sample.
    """

    truth: ClassVar[str]  # what the true numbers are called among the inputs

    height: int
    width: int
    scale: str = "fit"
    zoom: float = 1.0
    views: tuple[str, ...] = ("left", "right")

    @abstractmethod
    def true_values(self, sample: dict[str, Any]) -> np.ndarray:
        """float32 (H, W) of the left view as it came, 0 = unknown."""

    @abstractmethod
    def scaled(self, truth: np.ndarray, factor: np.float32) -> np.ndarray:
        """What true values are in a view that is scaled by `factor`."""

    def geometry(self, source: tuple[int, int], rng: np.random.Generator | None = None) -> ViewGeometry:
        """Geometry for views of `source` = (height, width) px: drawn with `rng`, or without it from the middle."""
        factor = max(self.height / source[0], self.width / source[1])
        if self.scale == "native":
            if factor > 1:
                raise ValueError(
                    f"a view of {source[0]} x {source[1]} px (height x width) is smaller than the {self.height} x "
                    f"{self.width} px that --scale native cuts out; make these smaller or use --scale fit"
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

    def more(self, sample: dict[str, Any], geometry: ViewGeometry) -> dict[str, np.ndarray]:
        """What else a sample has, by the names that it gets among the inputs."""
        return {}

    def apply(self, sample: dict[str, Any], random: bool) -> dict[str, np.ndarray]:
        """A sample of a stream -> "views" uint8 (V, height, width, 3), under the name that `truth` has their true
        values float32 (height, width), 0 = unknown, and what `more` adds. What is drawn follows from the sample's
        `seed`.
        """
        truth = self.true_values(sample)
        geometry = self.geometry(truth.shape, np.random.default_rng(sample["seed"]) if random else None)
        resample = int(StereoImageProcessorPil.resample)
        views = np.stack([geometry.image(sample[view], resample) for view in self.views])
        values = self.scaled(geometry.labels(truth), np.float32(geometry.scale[0]))
        return {"views": views, self.truth: values, **self.more(sample, geometry)}

    def collate(self, framed: Iterable[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """Results of `apply` -> inputs: "pixel_values" float32 (B, V, 3, H, W) in [0, 1], and the others stacked."""
        framed = list(framed)
        stacked = {name: torch.from_numpy(np.stack([one[name] for one in framed])) for name in framed[0]}
        pixel_values = stacked.pop("views").permute(0, 1, 4, 2, 3).float().div_(255)
        return {"pixel_values": pixel_values} | stacked


class DisparityFraming(Framing):
    """Of stereo pairs with disparity in px, which scaling by a factor multiplies by it and a cut alone leaves."""

    truth = "disparity"

    def more(self, sample: dict[str, Any], geometry: ViewGeometry) -> dict[str, np.ndarray]:
        """segmentation uint8 (height, width), 0 where nothing is known, and depth_times_disparity float32 (), px m, NaN
        where it is not known.
        """
        product, segmentation = np.float32(np.nan), np.zeros((self.height, self.width), np.uint8)
        if "segmentation" in sample:
            segmentation = geometry.labels(sample["segmentation"])
        if BASELINE in sample:
            camera = geometry.calibration(_calibration(sample))
            product = np.float32(camera.focal_length_px[0] * camera.baseline_m)
        return {"segmentation": segmentation, "depth_times_disparity": product}

    def true_values(self, sample: dict[str, Any]) -> np.ndarray:
        """As in `Framing`; of our own datasets' windows from depth and calibration."""
        if "disparity" in sample:
            return sample["disparity"]
        return depth_to_disparity(sample["depth"], _calibration(sample))

    def scaled(self, truth: np.ndarray, factor: np.float32) -> np.ndarray:
        return truth * factor


def _calibration(sample: dict[str, Any]) -> Calibration:
    return Calibration.from_mapping({key: sample[f"calibration.{key}"] for key in CALIBRATION_KEYS})


class DepthFraming(Framing):
    """Of pictures with depth in m, which neither a cut nor scaling changes."""

    truth = "depth"

    def true_values(self, sample: dict[str, Any]) -> np.ndarray:
        return sample["depth"]

    def scaled(self, truth: np.ndarray, factor: np.float32) -> np.ndarray:
        return truth


class PictureBatches(IterableDataset):
    """Batches of `size` samples of a stream, as `Framing.collate` makes them, and the stream's state after each, for
    `training.feed.Feed`.

    Args:
        augmentation: changes the colours of all views, by the sample's `seed`; None = as they are.
    """

    def __init__(
        self, stream: LaneStream, size: int, framing: Framing, augmentation: PhotometricAugmentation | None = None
    ):
        self.stream, self.size, self.framing, self.augmentation = stream, size, framing, augmentation

    def __iter__(self) -> Iterator[tuple[dict | None, list[str], dict]]:
        yield None, [], self.stream.state_dict()
        framed = []
        for sample in self.stream:
            if self.augmentation is not None:
                views = {view: sample[view] for view in self.framing.views}
                sample |= self.augmentation(views, (sample["seed"], 0, 0, 0))
            framed.append(self.framing.apply(sample, random=True))
            if len(framed) == self.size:
                yield self.framing.collate(framed), [], self.stream.state_dict()
                framed = []
