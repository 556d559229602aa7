"""Prompts and answers of the language side: boxes, depths, poses and camera parameters <-> text and tokens.

The action, box and value prompts, the value text and the bin tokens are those of the released StereoVLA (checked
against recorded examples). The camera question is ours, its format was never published: see `CameraParameters`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, ClassVar

import numpy as np

_NUMBER = r"-?\d+(?:\.\d+)?"
_LIST = rf"\[({_NUMBER}(?:,{_NUMBER})*)\]"
_CAMERA_FIELDS = {"f": 2, "c": 2, "b": 1, "t": 3, "q": 4}

# How a question is put: in the released StereoVLA's words, or as PaliGemma and pi0 do, with a newline at its end.
IN_OUT, NEWLINE = "In: {}\nOut: ", "{}\n"


def action_prompt(instruction: str, form: str = IN_OUT) -> str:
    """Question that an action chunk (and before it the keyframe pose) answers."""
    return form.format(f"What action should the robot take to {instruction}?")


def box_prompt(name: str, form: str = IN_OUT) -> str:
    """Question that the object's boxes in the left and the right view answer."""
    return form.format(f"What is the bounding box of {name} in the images?")


def value_prompt(caption: str, form: str = IN_OUT) -> str:
    """Question about one or more numbers, answered by `value_text`."""
    return form.format(f"What is {caption} in the image?")


def depth_prompt(points_px: Any, form: str = IN_OUT) -> str:
    """Question about the depth at pixels (n, 2) (u, v) of the processed left view; a point is named by the pixel it
    is in.
    """
    return value_prompt(f"the depth at {points_text(points_px)}", form)


def points_text(points_px: Any) -> str:
    """Pixels (n, 2) as `depth_prompt` writes them, for example "(16, 21), (3, 5)"."""
    cells = np.floor(np.asarray(points_px, dtype=np.float64).reshape(-1, 2)).astype(int).tolist()
    return ", ".join(f"({u}, {v})" for u, v in cells)


def camera_prompt(form: str = IN_OUT) -> str:
    """Question that `CameraParameters.text` answers."""
    return form.format("What are the camera parameters of the images?")


def value_text(values: Any, decimals: int) -> str:
    """Numbers (n,) -> "[0.53,1.21]". Halves round away from zero, decided on the exact binary value of the float."""
    step = Decimal(1).scaleb(-decimals)
    rounded = [Decimal(float(v)).quantize(step, rounding=ROUND_HALF_UP) for v in np.asarray(values).reshape(-1)]
    return "[" + ",".join(str(number + 0) for number in rounded) + "]"  # "+ 0" turns -0.00 into 0.00


def parse_values(text: str) -> list[float]:
    """Inverse of `value_text`; ValueError when `text` is no such list."""
    match = re.fullmatch(_LIST, text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no list of numbers such as '[0.53]' or '[0.53,1.21]'")
    return [float(number) for number in match.group(1).split(",")]


@dataclass(frozen=True)
class CameraParameters:
    """What the model says about the camera. Lengths in m; focal length and principal point in units of the image size.

    As text for example "f [1.207,1.207] c [0.500,0.500] b [0.063] t [0.550,-0.400,0.620] q
    [0.271,-0.653,0.653,-0.271]". Why so: each field is a list as in `value_text`, so that the model writes all its
    numbers in one way, digit by digit; the letters say which field comes next; intrinsics are relative to the image
    size, so that answers do not depend on the resolution; three decimals are 1 mm and about 0.1 degree; a quaternion
    (with its first component positive) has no jumps over a camera's usual poses, where Euler angles of a camera that
    looks down have.
    """

    decimals: ClassVar[int] = 3

    focal_length: tuple[float, float]  # fx / width, fy / height of the processed view
    principal_point: tuple[float, float]  # cx / width, cy / height
    baseline_m: float
    position_m: tuple[float, float, float]  # of the left camera in the robot base frame
    quaternion: tuple[float, float, float, float]  # wxyz, optical frame (x right, y down, z forward) -> base frame

    def text(self) -> str:
        """Answer to `camera_prompt`."""
        fields = (self.focal_length, self.principal_point, (self.baseline_m,), self.position_m, self.quaternion)
        return " ".join(f"{key} {value_text(v, self.decimals)}" for key, v in zip(_CAMERA_FIELDS, fields, strict=True))

    @classmethod
    def parse(cls, text: str) -> "CameraParameters":
        """Inverse of `text` up to its rounding; ValueError when `text` has another form."""
        match = re.fullmatch(r"\s+".join(rf"{key}\s*{_LIST}" for key in _CAMERA_FIELDS), text.strip())
        if match is None:
            raise ValueError(f"{text!r} does not have the form 'f [fx,fy] c [cx,cy] b [m] t [x,y,z] q [w,x,y,z]'")
        values = [tuple(float(number) for number in group.split(",")) for group in match.groups()]
        for (key, length), numbers in zip(_CAMERA_FIELDS.items(), values, strict=True):
            if len(numbers) != length:
                raise ValueError(f"{text!r}: field {key!r} has {len(numbers)} numbers, expected {length}")
        return cls(values[0], values[1], values[2][0], values[3], values[4])


class BinTokens:
    """Numbers in [-1, 1] <-> ids at the end of the vocabulary: id = vocab_size - bin, bin = 1 ... num_bins.

    `vocab_size` is the size that the rule counts from. In the released model it leaves out the pad token, which was
    appended after it: 92544 there, although the tokenizer has 92545 entries.
    """

    def __init__(self, num_bins: int, vocab_size: int):
        if num_bins < 2 or num_bins >= vocab_size:
            raise ValueError(f"num_bins={num_bins} must be at least 2 and below the vocabulary size {vocab_size}")
        self.num_bins = num_bins
        self.vocab_size = vocab_size
        self._edges = np.linspace(-1.0, 1.0, num_bins)  # float64: float32 would move values on an edge to the next bin

    @property
    def first_id(self) -> int:
        """Smallest id of a bin; the largest is vocab_size - 1."""
        return self.vocab_size - self.num_bins

    def encode(self, values: Any) -> np.ndarray:
        """Numbers (...) -> int64 ids (...). Numbers outside [-1, 1] take the outermost bin, as in the released
        model.
        """
        values = np.asarray(values, dtype=np.float64)
        if np.isnan(values).any():
            raise ValueError(f"cannot write NaN as a token (values {values.tolist()})")
        return self.vocab_size - np.clip(np.digitize(values, self._edges), 1, self.num_bins)

    def decode(self, ids: Any) -> np.ndarray:
        """Ids (...) -> float64 (...), the middle of each bin. Ids that are no bins give -1 or 1; ask `is_bin` first."""
        bins = self.vocab_size - np.asarray(ids, dtype=np.int64)
        lower = self._edges[np.clip(bins - 1, 0, self.num_bins - 1)]
        upper = self._edges[np.clip(bins, 0, self.num_bins - 1)]
        return (lower + upper) / 2

    def is_bin(self, ids: Any) -> np.ndarray:
        """Ids (...) -> bool (...)."""
        ids = np.asarray(ids)
        return (ids >= self.first_id) & (ids < self.vocab_size)

    def encode_boxes(self, boxes_px: Any, size: Sequence[int]) -> np.ndarray:
        """Boxes (..., 4) x_min, y_min, x_max, y_max in px of a view of `size` (height, width) -> ids (..., 4).

        0 ... width and 0 ... height map to -1 ... 1. The released code rounds boxes down to whole px before; we do not.
        """
        return self.encode(np.asarray(boxes_px, dtype=np.float64) / (size[1], size[0], size[1], size[0]) * 2 - 1)

    def decode_boxes(self, ids: Any, size: Sequence[int]) -> np.ndarray:
        """Inverse of `encode_boxes` up to half a bin."""
        return (self.decode(ids) + 1) / 2 * (size[1], size[0], size[1], size[0])
