"""The calibration of a stereo camera, from the file that OpenCV or a ZED's maker wrote.

OpenCV (YAML, XML or JSON of `FileStorage`): camera matrices, distortions, R and T under the names of its samples or
those of `stereoCalibrate`; they may be in two files. ZED (`SN12345678.conf`, https://calib.stereolabs.com): a section
for each camera and resolution, and [STEREO], whose lengths are mm.
"""

import configparser
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stereovla.extras import extra
from stereovla.processing.rotations import rotation_vector_to_matrix

with extra("robot"):
    import cv2

# names of each value in files of OpenCV: of its sample stereo_calib, of the arguments of stereoCalibrate, of others
NAMES = {
    "left_matrix": ("M1", "cameraMatrix1", "K1"),
    "left_distortion": ("D1", "distCoeffs1"),
    "right_matrix": ("M2", "cameraMatrix2", "K2"),
    "right_distortion": ("D2", "distCoeffs2"),
    "rotation": ("R",),
    "translation": ("T",),
}
# by width and height, as in the names of the sections of a ZED's file
RESOLUTIONS = {
    (2208, 1242): "2K",
    (1920, 1200): "FHD1200",
    (1920, 1080): "FHD",
    (1280, 720): "HD",
    (960, 600): "SVGA",
    (672, 376): "VGA",
}
BASELINE_M = (1e-3, 1.0)  # as datasets take it


@dataclass(frozen=True)
class StereoCalibration:
    """Of the views as the camera gives them, in OpenCV's convention: the middle of the first pixel is (0, 0), and
    x_right = rotation x_left + translation.

    size_px: width, height. matrices (3, 3); distortions k1, k2, p1, p2 and further ones; translation in m.
    """

    size_px: tuple[int, int]
    left_matrix: np.ndarray
    left_distortion: np.ndarray
    right_matrix: np.ndarray
    right_distortion: np.ndarray
    rotation: np.ndarray
    translation_m: np.ndarray

    def __post_init__(self):
        for name, shape in (("left_matrix", (3, 3)), ("right_matrix", (3, 3)), ("rotation", (3, 3))):
            _check(name, getattr(self, name), shape)
        _check("translation", self.translation_m, (3,))
        if not np.allclose(self.rotation @ self.rotation.T, np.eye(3), atol=1e-6):
            raise ValueError(f"the rotation between the cameras is none: {self.rotation.tolist()}")
        x, y, z = self.translation_m
        if abs(x) < max(abs(y), abs(z)):
            raise ValueError(f"the cameras stand {[x, y, z]} m apart; a pair stands side by side, along x")
        if x > 0:
            raise ValueError(f"the second camera lies {x:g} m to the left of the first: are left and right swapped?")
        low, high = BASELINE_M
        if not low <= (baseline := float(np.linalg.norm(self.translation_m))) <= high:
            raise ValueError(
                f"the cameras stand {baseline:g} m apart, expected {low:g} ... {high:g} m: unit_m says how long the "
                "unit of the translation is, 0.001 for mm"
            )
        for side in ("left", "right"):
            matrix = getattr(self, f"{side}_matrix")
            middle = matrix[:2, 2] / self.size_px
            if matrix[0, 0] <= 0 or matrix[1, 1] <= 0 or (np.abs(middle - 0.5) > 0.25).any():
                raise ValueError(
                    f"the {side} camera's matrix {matrix.tolist()} does not fit a view of {list(self.size_px)} px: is "
                    "it of another size?"
                )


def _check(name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.shape != shape or not np.isfinite(value).all():
        raise ValueError(f"the {name} is {value.tolist()}; expected {shape} finite numbers")


def read_stereo_calibration(
    *paths: str | Path, size_px: tuple[int, int], unit_m: float | None = None
) -> StereoCalibration:
    """Reads the file, or files, of one camera; ValueError for what cannot be used.

    Args:
        size_px: width and height of the views that are to be rectified, for which the calibration must be.
        unit_m: length of the unit of the translation in m; None = what the format says: mm of a ZED's, else m.
    """
    if not paths:
        raise ValueError("no file of a calibration is named")
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path} is no file")
    if Path(paths[0]).suffix.lower() in (".conf", ".ini"):
        return _of_zed(Path(paths[0]), size_px, 1e-3 if unit_m is None else unit_m)
    return _of_opencv([Path(path) for path in paths], size_px, 1.0 if unit_m is None else unit_m)


def _of_opencv(paths: list[Path], size_px: tuple[int, int], unit_m: float) -> StereoCalibration:
    found: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            storage = cv2.FileStorage(str(path), cv2.FILE_STORAGE_READ)
        except (cv2.error, SystemError) as error:  # the second where its constructor failed
            raise ValueError(f"{path} is no file of OpenCV's FileStorage: {error}") from error
        for name, keys in NAMES.items():
            for key in keys:
                node = storage.getNode(key)
                if node.empty():
                    continue
                if not node.isMap() or (value := node.mat()) is None:
                    raise ValueError(f"{path}: {key} is no matrix")
                found[name] = np.asarray(value, np.float64)
        size = [storage.getNode(key).real() for key in ("image_width", "image_height")]
        storage.release()
        if all(size) and tuple(map(int, size)) != tuple(size_px):
            raise ValueError(f"{path} is of views of {[int(side) for side in size]} px, these have {list(size_px)}")
    missing = [f"{name} ({' or '.join(keys)})" for name, keys in NAMES.items() if name not in found]
    if missing:
        raise ValueError(f"{', '.join(map(str, paths))}: there is no {', no '.join(missing)}")
    return StereoCalibration(
        tuple(size_px),
        found["left_matrix"],
        found["left_distortion"].ravel(),
        found["right_matrix"],
        found["right_distortion"].ravel(),
        found["rotation"] if found["rotation"].size == 9 else rotation_vector_to_matrix(found["rotation"].ravel()),
        unit_m * found["translation"].ravel(),
    )


def _of_zed(path: Path, size_px: tuple[int, int], unit_m: float) -> StereoCalibration:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(path.read_text(encoding="utf-8", errors="replace"))
    except configparser.Error as error:
        raise ValueError(f"{path} is no calibration of a ZED: {error}") from error
    name = RESOLUTIONS.get(tuple(size_px))
    if name is None:
        sizes = ", ".join(f"{width}x{height}" for width, height in RESOLUTIONS)
        raise ValueError(f"the views have {size_px[0]}x{size_px[1]} px; a ZED has {sizes}")

    def number(section: str, *keys: str, default: float | None = None) -> float:
        for key in keys:  # which configparser compares without regard to case
            if parser.has_option(section, key):
                try:
                    return float(parser.get(section, key))
                except ValueError as error:
                    raise ValueError(f"{path}: {key} of [{section}] is {parser.get(section, key)!r}") from error
        if default is not None:
            return default
        there = ", ".join(parser.sections()) or "no sections"
        raise ValueError(f"{path} has no {' or '.join(keys)} in a section [{section}]; it has {there}")

    matrices, distortions = [], []
    for section in (f"LEFT_CAM_{name}", f"RIGHT_CAM_{name}"):
        fx, fy, cx, cy = (number(section, key) for key in ("fx", "fy", "cx", "cy"))
        matrices.append(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))
        shared = section.replace(f"CAM_{name}", "DISTO")  # where newer files have the distortion of all resolutions
        section = shared if parser.has_section(shared) else section
        distortions.append(np.array([number(section, key, default=0.0) for key in ("k1", "k2", "p1", "p2", "k3")]))
    turns = [number("STEREO", f"{key}_{name}", default=0.0) for key in ("RX", "CV", "RZ")]
    # the file says where the right camera stands, OpenCV's translation is the way back
    baseline = number("STEREO", "Baseline")
    away = [number("STEREO", f"{key}_{name}", key, default=0.0) for key in ("TY", "TZ")]
    return StereoCalibration(
        tuple(size_px),
        matrices[0],
        distortions[0],
        matrices[1],
        distortions[1],
        rotation_vector_to_matrix(np.array(turns)),
        -unit_m * np.array([baseline, *away]),
    )
