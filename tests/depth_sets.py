"""Pictures with exact depth, written in the layouts of others without the project's own code."""

import io
from pathlib import Path

import h5py
import numpy as np
from stereo_sets import pfm, png16, save


def make_picture(seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (size, size, 3), depth float32 (size, size) m): a rectangle 0.5 to 1 m away before a wall at 1.2 to 3 m.
    What is nearer is brighter, so that there is something to learn in seconds. Depths are whole mm.
    """
    rng = np.random.default_rng(seed)
    depth = np.full((size, size), rng.integers(1200, 3000), np.int64)
    top, left = rng.integers(0, size // 2, 2)
    depth[top : top + size // 2, left : left + size // 2] = rng.integers(500, 1000)
    grey = 120_000 / depth + rng.normal(0, 4, depth.shape)
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), (depth / 1000).astype(np.float32)


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def hdf5(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        for name, array in arrays.items():
            opened.create_dataset(name, data=array, compression="gzip")
    return file.getvalue()


# suffix -> depth in m as such a file, and m per step
ENCODED = {
    ".png": (lambda d: png16(np.round(1000 * d).astype(np.uint16)), 1e-3),
    ".pfm": (pfm, 1.0),
    ".npy": (npy, 1.0),
    ".npz": (lambda d: npz(depth=d, confidence=np.ones(3)), 1.0),
    ".hdf5": (lambda d: hdf5(dataset=d.astype(np.float16)), 1.0),
}


def write_folders(folder: Path, count: int, suffix: str = ".png", size: int = 64) -> Path:
    """images/NAME.png beside depth/NAME`suffix`, some deeper than others."""
    encode, _ = ENCODED[suffix]
    for number in range(count):
        picture, depth = make_picture(number, size)
        name = f"room{number // 4}/{number:04d}"
        save(folder / "images" / f"{name}.png", picture)
        save(folder / "depth" / f"{name}{suffix}", encode(depth))
    return folder


def write_nyu(folder: Path, count: int) -> Path:
    for number in range(count):
        picture, depth = make_picture(number)
        scene = folder / "sync" / f"kitchen_{number // 2:04d}"
        save(scene / f"rgb_{number:05d}.png", picture)
        save(scene / f"sync_depth_{number:05d}.png", png16(np.round(1000 * depth).astype(np.uint16)))
    return folder


def write_scannet(folder: Path, count: int) -> Path:
    """Pictures of twice the size of the maps."""
    for number in range(count):
        picture, depth = make_picture(number)
        scene = folder / f"scene{number // 2:04d}_00"
        save(scene / "color" / f"{number}.jpg", np.kron(picture, np.ones((2, 2, 1), np.uint8)))
        save(scene / "depth" / f"{number}.png", png16(np.round(1000 * depth).astype(np.uint16)))
    return folder


def write_hypersim(folder: Path, count: int, size: int = 64) -> Path:
    """Distances from the camera in place of planar depth, of a camera that sees 60 degrees from left to right."""
    focal = size / 2 / np.tan(np.deg2rad(30))
    for number in range(count):
        picture, depth = make_picture(number, size)
        distance = np.empty_like(depth)
        for y in range(size):
            for x in range(size):
                ray = np.array([(x + 0.5 - size / 2) / focal, (y + 0.5 - size / 2) / focal, 1.0])
                distance[y, x] = depth[y, x] * np.linalg.norm(ray)
        images = folder / f"ai_{number:03d}_001" / "images"
        save(images / "scene_cam_00_final_preview" / f"frame.{number:04d}.tonemap.jpg", picture)
        file = images / "scene_cam_00_geometry_hdf5" / f"frame.{number:04d}.depth_meters.hdf5"
        save(file, hdf5(dataset=distance))
    return folder
