"""Stereo sets with exact disparity, written in the published layouts without the project's own code."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from stereo_scene import textured_pair


def make_pair(seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(left, right uint8 (size, size, 3), disparity float32 (size, size) px): a rectangle before a wall, both textured,
    the wall 2 to 11 px and the rectangle 3 to 8 px more.
    """
    rng = np.random.default_rng(seed)
    far = int(rng.integers(2, 12))
    near = far + int(rng.integers(3, 9))
    left, right = textured_pair(2 * seed, size, size, far)
    cut_left, cut_right = textured_pair(2 * seed + 1, size, size, near)
    top, first = rng.integers(4, size // 4), rng.integers(near, size // 2)
    rows, columns = slice(top, top + size // 2), slice(first, first + size // 3)
    moved = slice(columns.start - near, columns.stop - near)
    disparity = np.full((size, size), far, np.float32)
    left[rows, columns], right[rows, moved], disparity[rows, columns] = (
        cut_left[rows, columns],
        cut_right[rows, moved],
        near,
    )
    return left, right, disparity


def png16(values: np.ndarray) -> bytes:
    """uint16 (H, W) -> PNG, byte by byte: unfiltered rows of big-endian 16-bit grey."""
    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def pfm(values: np.ndarray, little: bool = True, scale: float = 1.0) -> bytes:
    """float (H, W) -> PFM: three lines of text, then the rows from the bottom to the top."""
    height, width = values.shape
    head = f"Pf\n{width} {height}\n{-scale if little else scale}\n".encode()
    return head + values[::-1].astype("<f4" if little else ">f4").tobytes()


def save(path: Path, content: np.ndarray | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path)


def write_kitti(folder: Path, count: int, first_seed: int = 0, size: int = 64) -> Path:
    """The layout of KITTI 2015, with `make_pair`'s pairs."""
    for number in range(count):
        left, right, disparity = make_pair(first_seed + number, size)
        name = f"{number:06d}_10.png"
        save(folder / "training" / "image_2" / name, left)
        save(folder / "training" / "image_2" / name.replace("_10", "_11"), right)  # the next frame, not of the pair
        save(folder / "training" / "image_3" / name, right)
        save(folder / "training" / "disp_occ_0" / name, png16((256 * disparity).astype(np.uint16)))
    return folder


def write_middlebury(folder: Path, count: int) -> Path:
    for number in range(count):
        left, right, disparity = make_pair(number)
        disparity[:2] = np.inf  # unknown there
        scene = folder / f"scene-{number}"
        for name, content in (("im0.png", left), ("im1.png", right), ("disp0.pfm", pfm(disparity, scale=1 / 300))):
            save(scene / name, content)
    return folder


def write_sceneflow(folder: Path, count: int) -> Path:
    for number in range(count):
        left, right, disparity = make_pair(number)
        place = Path("TRAIN") / "A" / "0000"
        for side, view in (("left", left), ("right", right)):
            for rendering in ("clean", "final"):
                save(folder / f"frames_{rendering}pass" / place / side / f"{number:04d}.png", view)
        save(folder / "disparity" / place / "left" / f"{number:04d}.pfm", pfm(disparity, little=number % 2 == 0))
    return folder
