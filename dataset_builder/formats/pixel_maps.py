"""Pictures, and maps with a number for each of their pixels, out of the files that others published.

A map is a PFM, a NumPy file (.npy, .npz), an HDF5 file, or a PNG or TIFF of one channel. How large it is, is decided
before it is decoded or allocated.
"""

import io
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from stereovla.untrusted import MOST_PIXELS, check_pixels, open_image

# what readers raise for files that are not what they begin like
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    EOFError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
# names of files with maps; what is in them is told by their first bytes
MAP_SUFFIXES = (".png", ".tif", ".tiff", ".pfm", ".npy", ".npz", ".hdf5", ".h5")


def decode_view(data: bytes, name: str) -> np.ndarray:
    """Image file -> uint8 (H, W, 3) RGB; grey is repeated, transparency dropped. ValueError names what cannot be."""
    try:
        with open_image(data) as image:
            if image.mode not in ("RGB", "RGBA", "L", "P"):
                raise ValueError(f"Pillow's mode is {image.mode}; valid: RGB, RGBA, L, P")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}, {len(data)} bytes, is no view: {error}") from error


def decode_map(data: bytes | Sequence[Any], name: str, kind: str) -> np.ndarray:
    """File or numbers (H, W) -> float32 (H, W) as they are.

    Args:
        data: bytes of a file, or numbers. The scale in a PFM's header is not applied: Middlebury's values are px
            whatever theirs says.
        name, kind: for errors, "NAME is no KIND".
    """
    if isinstance(data, bytes):
        try:
            values = _read(data)
        except UNREADABLE as error:
            raise ValueError(f"{name}, {len(data)} bytes, is no {kind}: {error}") from error
    else:
        values = np.asarray(data)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {values.dtype} {values.shape}; expected numbers (height, width), or a file")
    return values.astype(np.float32)


def known_values(values: np.ndarray, unit: float, name: str, kind: str) -> np.ndarray:
    """`values` times `unit`, and 0 where these are 0, negative, infinite or NaN, which is unknown."""
    values = values * np.float32(unit)
    known = np.isfinite(values) & (values > 0)
    if not known.any() and (values < 0).any():
        raise ValueError(f"{name} has no positive {kind}, but negative ones: is the sign of the unit {unit} right?")
    return np.where(known, values, np.float32(0))


def _read(data: bytes) -> np.ndarray:
    if data.startswith(b"Pf"):
        return read_pfm(data)
    if data.startswith(b"\x93NUMPY"):
        return read_npy(io.BytesIO(data))
    if data.startswith(b"PK"):
        return read_npz(data)
    if data.startswith(b"\x89HDF"):
        return read_hdf5(data)
    with open_image(data, ("PNG", "TIFF")) as image:
        if image.mode not in ("F", "I", "I;16", "L"):
            raise ValueError(f"Pillow's mode is {image.mode}; valid: one channel, F, I, I;16 or L")
        return np.array(image)


def read_pfm(data: bytes) -> np.ndarray:
    """A PFM of one channel -> float (H, W): three tokens of text, each with one white space after it, then rows from
    the bottom to the top, little-endian where the scale is below 0. (Pillow's reader takes no token above 10 letters,
    and Middlebury's scales can be longer.)
    """
    head = re.match(rb"Pf\s(\d+)\s+(\d+)\s([-+.\deE]+)\s", data)
    if head is None:
        raise ValueError("its header is not that of a PFM of one channel: Pf, width, height, scale")
    width, height, scale = int(head[1]), int(head[2]), float(head[3])
    check_pixels(width, height, "the map")
    if len(data) != head.end() + 4 * width * height:
        raise ValueError(f"it has {len(data) - head.end()} bytes of numbers; {width} x {height} need 4 each")
    return np.frombuffer(data, "<f4" if scale < 0 else ">f4", offset=head.end()).reshape(height, width)[::-1]


def read_npy(file: BinaryIO) -> np.ndarray:
    """The array of a .npy file; ValueError for objects, which would be unpickled, and for one that is too large."""
    # what numbers need; headers of the later ones may have gigabytes
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"it is a NumPy file of version {version}; valid: (1, 0)")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    count = math.prod(shape)
    if dtype.kind not in "fiu" or count > MOST_PIXELS:
        raise ValueError(f"its array is {dtype} {shape}; valid: at most {MOST_PIXELS} numbers, one for each pixel")
    data = file.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"it has {len(data)} bytes of numbers; {dtype} {shape} needs {count * dtype.itemsize}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")


def read_npz(data: bytes) -> np.ndarray:
    """The array of a .npz file that is called depth or disparity, or the only one that it has."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        with archive.open(f"{_the_map(names)}.npy") as file:
            return read_npy(file)


def read_hdf5(data: bytes) -> np.ndarray:
    """The data of an HDF5 file that are called depth or disparity, or the only ones that lie at its root (Hypersim's
    are called dataset).
    """
    from stereovla.dataset_builder.dataset.hdf5 import h5py, own_data  # its extra is needed for this format alone

    with h5py.File(io.BytesIO(data), "r") as file:
        found = own_data(file, _the_map(list(file)), MOST_PIXELS)
        if found.dtype.kind not in "fiu":
            raise ValueError(f"its data are {found.dtype} {found.shape}; valid: one number for each pixel")
        return found[()]


def _the_map(names: Sequence[str]) -> str:
    chosen = [name for name in names if name in ("depth", "disparity")] or list(names)
    if len(chosen) != 1:
        raise ValueError(f"it holds {', '.join(names) or 'nothing'}; valid: one array, or one that is called depth")
    return chosen[0]
