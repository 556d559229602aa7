"""One geometry for both views of a pair, one for every other view, and for all that is measured in their pixels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .camera_geometry import Calibration

# Of one source view. What is done with it grows with its pixels; no camera's picture is larger.
MAX_SIDE_PX = 16_384
MAX_VIEW_PX = 2**25  # an 8K view has 33.2 million
MAX_SAMPLE_PX = 2 * MAX_VIEW_PX  # of all views of a sample together: as many as a pair may have


@dataclass(frozen=True)
class ViewGeometry:
    """Centred crop of a source view, scaled to fit a target size, centred in it between black bars. All sizes in px."""

    source_height: int
    source_width: int
    crop_left: int
    crop_top: int
    crop_width: int
    crop_height: int
    scaled_width: int
    scaled_height: int
    pad_left: int
    pad_top: int
    height: int
    width: int

    @classmethod
    def fit(
        cls, source: tuple[int, int], target: tuple[int, int], crop: tuple[int, int] | None = None
    ) -> "ViewGeometry":
        """Geometry from `source` to `target`, all (height, width); `crop` is cut from the middle of the source
        first.
        """
        if crop is not None and (crop[0] > source[0] or crop[1] > source[1]):
            raise ValueError(f"crop_size {crop} (height, width) is larger than the image {source}")
        height, width = crop or source
        # Integers, so that the longer side is exact: int(49 * (1 / 49)) is 0. The other side is rounded down.
        if target[0] * width <= target[1] * height:
            scaled = (target[0], max(1, width * target[0] // height))
        else:
            scaled = (max(1, height * target[1] // width), target[1])
        return cls(
            source_height=source[0],
            source_width=source[1],
            crop_left=(source[1] - width) // 2,
            crop_top=(source[0] - height) // 2,
            crop_width=width,
            crop_height=height,
            scaled_width=scaled[1],
            scaled_height=scaled[0],
            pad_left=(target[1] - scaled[1]) // 2,
            pad_top=(target[0] - scaled[0]) // 2,
            height=target[0],
            width=target[1],
        )

    @property
    def is_identity(self) -> bool:
        """True if the view is used as it is."""
        return (
            (self.source_height, self.source_width) == (self.height, self.width) == (self.crop_height, self.crop_width)
        )

    @property
    def scale(self) -> np.ndarray:
        """(2,) processed px per source px along u and v; the two differ by the rounding of the shorter side."""
        return np.array([self.scaled_width / self.crop_width, self.scaled_height / self.crop_height])

    @property
    def offset(self) -> np.ndarray:
        """(2,) with processed = source * scale + offset."""
        return np.array([self.pad_left, self.pad_top]) - np.array([self.crop_left, self.crop_top]) * self.scale

    def points(self, points_px: Any) -> np.ndarray:
        """Pixels (..., 2) of the source view -> pixels (..., 2) of the processed view, which may lie outside of it."""
        return np.asarray(points_px, dtype=np.float64) * self.scale + self.offset

    def source_points(self, points_px: Any) -> np.ndarray:
        """Inverse of `points`."""
        return (np.asarray(points_px, dtype=np.float64) - self.offset) / self.scale

    def shows(self, points_px: Any) -> np.ndarray:
        """Processed pixels (..., 2) -> bool (...): is the point on the image, not on a bar or outside. NaN gives
        False.
        """
        relative = np.asarray(points_px, dtype=np.float64) - [self.pad_left, self.pad_top]
        return ((relative >= 0) & (relative < [self.scaled_width, self.scaled_height])).all(axis=-1)

    def boxes(self, boxes_px: Any) -> np.ndarray:
        """Boxes (..., 4) x_min, y_min, x_max, y_max: source px -> processed px, cut at the border of a centre crop.

        A box that a crop removes altogether comes back with zero width or height.
        """
        boxes = np.asarray(boxes_px, dtype=np.float64)
        corners = self.points(boxes.reshape(*boxes.shape[:-1], 2, 2))
        low = np.array([self.pad_left, self.pad_top])
        return np.clip(corners, low, low + [self.scaled_width, self.scaled_height]).reshape(boxes.shape)

    def source_boxes(self, boxes_px: Any) -> np.ndarray:
        """Processed px (..., 4) -> source px (..., 4)."""
        boxes = np.asarray(boxes_px, dtype=np.float64)
        return self.source_points(boxes.reshape(*boxes.shape[:-1], 2, 2)).reshape(boxes.shape)

    def calibration(self, calibration: Calibration) -> Calibration:
        """Calibration of the source view -> that of the processed view."""
        return calibration.moved(self.scale, self.offset)

    def image(self, image: np.ndarray, resample: int) -> np.ndarray:
        """uint8 (h, w, 3) of the source -> (height, width, 3); nothing is resampled where the scale is 1."""
        if self.is_identity:
            return image
        top, left = self.crop_top, self.crop_left
        image = image[top : top + self.crop_height, left : left + self.crop_width]
        if (self.scaled_height, self.scaled_width) != image.shape[:2]:
            resized = Image.fromarray(np.ascontiguousarray(image)).resize(
                (self.scaled_width, self.scaled_height), resample
            )
            image = np.asarray(resized)
        out = np.zeros((self.height, self.width, 3), dtype=np.uint8)
        out[self.pad_top : self.pad_top + self.scaled_height, self.pad_left : self.pad_left + self.scaled_width] = image
        return out

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Per-pixel labels (depth in m, masks) (h, w) of the source -> (height, width) by nearest pixel, 0 on the
        bars.
        """
        if labels.shape != (self.source_height, self.source_width):
            raise ValueError(
                f"labels have shape {labels.shape}, the image has {(self.source_height, self.source_width)}"
            )
        if self.is_identity:
            return labels
        rows = (np.arange(self.scaled_height) * 2 + 1) * self.crop_height // (2 * self.scaled_height) + self.crop_top
        columns = (np.arange(self.scaled_width) * 2 + 1) * self.crop_width // (2 * self.scaled_width) + self.crop_left
        out = np.zeros((self.height, self.width), dtype=labels.dtype)
        target = (
            slice(self.pad_top, self.pad_top + self.scaled_height),
            slice(self.pad_left, self.pad_left + self.scaled_width),
        )
        out[target] = labels[rows[:, None], columns]
        return out


def is_view(image: Any) -> bool:
    """True if `image` is a single view and no collection of views."""
    return isinstance(image, Image.Image) or getattr(image, "ndim", None) in (2, 3)


def _sides(image: Any) -> tuple[int, ...]:
    """(width, height) of a PIL image, the shape of an array or tensor, () of anything else."""
    return image.size if isinstance(image, Image.Image) else tuple(getattr(image, "shape", ()))


def _pixels(image: Any) -> int:
    """Pixels of an RGB view, before it is read."""
    sides = _sides(image)
    return math.prod(sides) if isinstance(image, Image.Image) else -(-math.prod(sides) // 3) if sides else 0


def view_array(image: Any, name: str) -> np.ndarray:
    """PIL RGB image, or uint8 array or tensor (h, w, 3) or (3, h, w) -> uint8 (h, w, 3); errors start with `name`.

    A view of more than MAX_SIDE_PX a side or MAX_VIEW_PX in all is refused before it is read.
    """
    sides = _sides(image)
    if max(sides, default=0) > MAX_SIDE_PX or _pixels(image) > MAX_VIEW_PX:
        raise ValueError(
            f"{name} has the shape {tuple(sides)}; a view has at most {MAX_SIDE_PX:,} px a side and {MAX_VIEW_PX:,} px "
            "in all"
        )
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(
                f"{name} has PIL mode {image.mode!r}; expected 'RGB' (use image.convert('RGB') if that is meant)"
            )
        return np.asarray(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} is a {type(image).__name__}; expected a PIL image, a numpy array or a torch tensor")
    if image.dtype != np.uint8:
        value_range = f" in [{image.min()}, {image.max()}]" if image.size and image.dtype.kind in "fiub" else ""
        raise ValueError(f"{name} has dtype {image.dtype}{value_range}; expected uint8 in [0, 255]")
    if image.ndim == 3 and image.shape[-1] != 3 and image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"{name} has shape {image.shape}; expected RGB as (height, width, 3) or (3, height, width)")
    return image


def view_arrays(images: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Views by name, all of them there -> uint8 (h, w, 3) each; errors start with `where` and the view's name.

    The left and the right view must have equal sizes, others are free. More than MAX_SAMPLE_PX in all are refused
    before any is read.
    """
    total = sum(map(_pixels, images.values()))
    if total > MAX_SAMPLE_PX:
        raise ValueError(
            f"{where}: the views {list(images)} have {total:,} px together; a sample has at most {MAX_SAMPLE_PX:,}"
        )
    arrays = {name: view_array(image, f"{where}: {name} view") for name, image in images.items()}
    if "right" in arrays and arrays["left"].shape != arrays["right"].shape:
        raise ValueError(
            f"{where}: the left view is {arrays['left'].shape[:2]} (height, width), the right view "
            f"{arrays['right'].shape[:2]}"
        )
    return arrays


def as_pairs(images: Any) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
    """One pair or a list of pairs -> ([(left, right) uint8 (h, w, 3)], was it a list); the two views have equal
    size.
    """
    if images is None or is_view(images):
        got = "nothing" if images is None else "a single view"
        raise ValueError(f"images is {got}; expected a pair [left, right] or a list of pairs")
    items = list(images)
    batched = not any(item is None or is_view(item) for item in items)
    pairs = []
    for number, pair in enumerate(items if batched else [items]):
        where = f"images[{number}]" if batched else "images"
        views = list(pair)
        if len(views) != 2 or any(view is None for view in views):
            count = sum(view is not None for view in views)
            raise ValueError(f"{where} has {count} of 2 views; expected [left, right]")
        pairs.append(tuple(view_arrays({"left": views[0], "right": views[1]}, where).values()))
    if not pairs:
        raise ValueError("images is empty; expected a pair [left, right] or a list of pairs")
    return pairs, batched


def as_views(
    images: Any, names: Sequence[str], needed: Sequence[str]
) -> tuple[list[tuple[np.ndarray | None, ...]], bool]:
    """One set of views or a list of sets -> ([views uint8 (h, w, 3) in the order of `names`, None where a view is
    absent], was it a list).

    A set is a dict {name: view or None}; one sample's may also be a list in the order of `names`, or a single view
    where `names` has one. The views `needed` must be there.
    """
    expected = f"a dict of the views {list(names)}, or a list of dicts"
    if images is None:
        raise ValueError(f"images is nothing; expected {expected}")
    single = isinstance(images, Mapping) or is_view(images)
    items = [images] if single else list(images)
    named = any(isinstance(item, Mapping) for item in items)
    batched = not single and (named or not any(item is None or is_view(item) for item in items))
    if not items:
        raise ValueError(f"images is empty; expected {expected}")
    samples = []
    for number, item in enumerate(items if batched or single else [items]):
        where = f"images[{number}]" if batched else "images"
        if not isinstance(item, Mapping):
            item = [item] if item is None or is_view(item) else list(item)
            if len(item) != len(names):
                raise ValueError(
                    f"{where} has {len(item)} views without names, this model has {len(names)}, {list(names)}; "
                    f"expected {expected}"
                )
            item = dict(zip(names, item, strict=True))
        if unknown := [name for name in item if name not in names]:
            raise ValueError(f"{where} has unknown views {unknown}; this model's views are {list(names)}")
        given = {name: item[name] for name in names if item.get(name) is not None}
        if missing := [name for name in needed if name not in given]:
            raise ValueError(
                f"{where} has the views {list(given)}, without {missing}; every sample needs {list(needed)}, others of "
                f"{list(names)} may be absent"
            )
        arrays = view_arrays(given, where)
        samples.append(tuple(arrays.get(name) for name in names))
    return samples, batched


class StereoImageProcessorPil(PilBackend):
    """Stereo pairs -> `pixel_values` float32 (batch, 2, 3, height, width) in [0, 1], left view first; and for the
    processors any sets of views.

    Every view goes through a `ViewGeometry`, both of a pair through the same: an optional centre crop of `crop_size`
    source px, then a letterbox to `size` (Lanczos, centred, black bars). Views that already have that size are not
    resampled. Mean and standard deviation are not applied here: each encoder of the model has its own, inside the
    model.
    """

    valid_kwargs = ImagesKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.LANCZOS
    size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = False

    def __init__(self, **kwargs: Unpack[ImagesKwargs]):
        """`size`, `do_center_crop` with `crop_size`, `resample`, `rescale_factor`; see the class."""
        super().__init__(**kwargs)
        if self.do_normalize or self.do_pad or not self.do_resize or not self.do_rescale:
            raise ValueError(
                "do_normalize and do_pad must be False, do_resize and do_rescale True: each encoder normalises inside "
                "the model, and every view is letterboxed to size and scaled by rescale_factor"
            )
        if not self.size.height or not self.size.width:
            raise ValueError(f"size must be {{'height': ..., 'width': ...}}, got {dict(self.size)}")
        if self.do_center_crop and not (self.crop_size and self.crop_size.height and self.crop_size.width):
            raise ValueError("do_center_crop needs crop_size={'height': ..., 'width': ...} in px of the source images")

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) of the processed views."""
        return self.size.height, self.size.width

    def geometry(self, source: Sequence[int]) -> ViewGeometry:
        """Geometry for views of `source` = (height, width) px."""
        crop = (self.crop_size.height, self.crop_size.width) if self.do_center_crop else None
        return ViewGeometry.fit((int(source[0]), int(source[1])), self.target_size, crop)

    def prepare(self, samples: Sequence[Sequence[np.ndarray | None]]) -> tuple[np.ndarray, list[ViewGeometry]]:
        """Checked views (see `as_pairs`, `as_views`) -> uint8 (batch, views, height, width, 3), zeros where a view is
        absent, and the geometry of each sample's first view.
        """
        sizes = [image.shape[:2] for views in samples for image in views if image is not None]
        geometries = {size: self.geometry(size) for size in dict.fromkeys(sizes)}
        out = np.empty((len(samples), len(samples[0]), *self.target_size, 3), dtype=np.uint8)
        for number, views in enumerate(samples):
            for place, image in enumerate(views):
                absent = image is None
                out[number, place] = 0 if absent else geometries[image.shape[:2]].image(image, int(self.resample))
        return out, [geometries[views[0].shape[:2]] for views in samples]

    def to_pixel_values(self, views: np.ndarray) -> torch.Tensor:
        """uint8 (batch, views, height, width, 3) -> float32 (batch, views, 3, height, width) in [0, 1]."""
        channels_first = torch.from_numpy(views).permute(0, 1, 4, 2, 3)
        return channels_first.to(torch.float32, memory_format=torch.contiguous_format).mul_(self.rescale_factor)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """One pair [left, right] or a list of pairs -> BatchFeature(pixel_values); a pair gives a batch of one.

        Views are PIL RGB images, or uint8 arrays or tensors (h, w, 3) or (3, h, w). Options belong to the
        constructor: the geometry of a checkpoint is part of it.
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}; set options when creating the image processor")
        pixel_values = self.to_pixel_values(self.prepare(self._samples(images))[0])
        return BatchFeature({"pixel_values": pixel_values.numpy() if return_tensors == "np" else pixel_values})

    def _samples(self, images: Any) -> list[tuple[np.ndarray, ...]]:
        return as_pairs(images)[0]


class ViewImageProcessorPil(StereoImageProcessorPil):
    """Single views -> `pixel_values` float32 (batch, 1, 3, height, width) in [0, 1]: one view or a list of views, each
    as one of a pair. What a depth expert alone is given.
    """

    def _samples(self, images: Any) -> list[tuple[np.ndarray, ...]]:
        items = [images] if is_view(images) else list(images)
        if not items:
            raise ValueError("images is empty; expected a view or a list of views")
        return [tuple(view_arrays({"view": image}, f"images[{n}]").values()) for n, image in enumerate(items)]
