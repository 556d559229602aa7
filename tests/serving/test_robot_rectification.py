"""Rectification against a projection of points written out here: rows, disparities, files of both kinds."""

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from stereovla.processing.rotations import rotation_vector_to_matrix, rpy_to_matrix  # noqa: E402
from stereovla.serving.rectification import Rectification  # noqa: E402
from stereovla.serving.stereo_calibration import StereoCalibration, read_stereo_calibration  # noqa: E402

SIZE = (320, 240)
LEFT = (np.array([[250.0, 0, 163.0], [0, 252.0, 118.0], [0, 0, 1]]), np.array([-0.17, 0.03, 3e-4, -5e-4, 0.002]))
RIGHT = (np.array([[247.0, 0, 158.0], [0, 248.0, 124.0], [0, 0, 1]]), np.array([-0.16, 0.02, -2e-4, 4e-4, 0.001]))
ROTATION = rpy_to_matrix(np.array([0.01, -0.02, 0.015]))
TRANSLATION = np.array([-0.12, 0.001, -0.002])
CAMERAS = StereoCalibration(SIZE, *LEFT, *RIGHT, ROTATION, TRANSLATION)
ZED = """
[LEFT_CAM_HD]
fx=700.0
fy=701.0
cx=638.4
cy=376.8
k1=-0.17
k2=0.029
p1=0.00036
p2=-0.00054
[RIGHT_CAM_HD]
fx=700.8
fy=700.9
cx=641.8
cy=342.7
k1=-0.174
k2=0.028
[STEREO]
Baseline=119.9
TY=0.3
TZ=-0.2
CV_HD=0.0106
RX_HD=0.0021
RZ_HD=-0.0004
"""


def raw_pixels(points: np.ndarray, matrix: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """Brown's model: points (n, 3) of the camera's frame -> pixels (n, 2), the middle of the first being (0, 0)."""
    x, y = points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]
    k1, k2, p1, p2, k3 = distortion
    r2 = x**2 + y**2
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
    v = y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
    return np.stack([matrix[0, 0] * u + matrix[0, 2], matrix[1, 1] * v + matrix[1, 2]], axis=1)


def at(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Bilinear, (n,)."""
    x, y = pixels.T
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    a, b = x - column, y - row
    top = (1 - a) * values[row, column] + a * values[row, column + 1]
    return (1 - b) * top + b * ((1 - a) * values[row + 1, column] + a * values[row + 1, column + 1])


def test_points_have_one_row_and_the_disparity_of_their_depth():
    """Where a point lies in the rectified views, the maps lead to where the cameras see it."""
    rectify = Rectification(CAMERAS)
    told = rectify.calibration
    focal, middle, baseline = told["focal_length_px"], told["principal_point_px"], told["baseline_m"]
    assert focal[0] == focal[1] and baseline == pytest.approx(np.linalg.norm(TRANSLATION), abs=1e-9)
    points = np.random.default_rng(0).uniform([-0.25, -0.2, 0.5], [0.3, 0.2, 1.5], (300, 3))  # of the left camera
    moved = points @ rectify.rotation.T
    # as datasets project: the middle of the first pixel is (0.5, 0.5); the maps count from 0
    left = moved[:, :2] / moved[:, 2:] * focal + middle - 0.5
    right = left - np.stack([focal[0] * baseline / moved[:, 2], np.zeros(300)], axis=1)
    inside = ((left > 1) & (left < np.array(SIZE) - 2) & (right > 1) & (right < np.array(SIZE) - 2)).all(axis=1)
    assert inside.sum() > 150
    raw_left, raw_right = raw_pixels(points, *LEFT), raw_pixels(points @ ROTATION.T + TRANSLATION, *RIGHT)
    for maps, pixels, raw in zip(rectify._maps, (left, right), (raw_left, raw_right), strict=True):
        found = np.stack([at(values, pixels[inside]) for values in maps], axis=1)
        np.testing.assert_allclose(found, raw[inside], atol=0.02)


def test_pictures_of_a_plane_match_after_it_and_not_before():
    """A smooth texture on a plane 0.8 m before the camera, seen by both as they are."""
    rectify = Rectification(CAMERAS)

    def picture(camera, rotation, translation) -> np.ndarray:
        matrix, distortion = camera
        rows, columns = np.mgrid[: SIZE[1], : SIZE[0]].astype(np.float64)
        seen = np.stack([(columns - matrix[0, 2]) / matrix[0, 0], (rows - matrix[1, 2]) / matrix[1, 1]], -1)
        rays = seen.copy()  # without distortion, by iteration
        for _ in range(30):
            flat = np.concatenate([rays.reshape(-1, 2), np.ones((rays[..., 0].size, 1))], 1)
            rays += seen - (raw_pixels(flat, np.eye(3), distortion)).reshape(rays.shape)
        directions = np.concatenate([rays, np.ones((*rays.shape[:2], 1))], -1) @ rotation  # in the left camera's frame
        origin = -rotation.T @ translation
        place = origin + directions * ((0.8 - origin[2]) / directions[..., 2])[..., None]
        waves = np.sin(40 * place[..., 0] + 9 * place[..., 1]) * np.sin(35 * place[..., 1])
        return np.repeat((127 + 100 * waves)[..., None], 3, -1).round().astype(np.uint8)

    raw = picture(LEFT, np.eye(3), np.zeros(3)), picture(RIGHT, ROTATION, TRANSLATION)
    left, right = rectify(*raw)
    assert left.shape == raw[0].shape and left.dtype == np.uint8
    told = rectify.calibration
    rows, columns = np.mgrid[20:220:7, 90:300:7]
    pixels = np.stack([columns.ravel(), rows.ravel()], 1).astype(np.float64)
    rays = np.concatenate(
        [(pixels + 0.5 - told["principal_point_px"]) / told["focal_length_px"], np.ones((len(pixels), 1))], 1
    )
    depth = 0.8 / (rays @ rectify.rotation)[:, 2]  # along the rectified camera's axis
    disparity = told["focal_length_px"][0] * told["baseline_m"] / depth
    matched = pixels - np.stack([disparity, np.zeros(len(disparity))], 1)
    inside = matched[:, 0] > 1
    assert inside.sum() > 300
    apart = [
        np.abs(at(one[..., 0].astype(float), pixels[inside]) - at(other[..., 0].astype(float), matched[inside]))
        for one, other in ((left, right), raw)
    ]
    assert np.mean(apart[0]) < 2.5 and np.mean(apart[1]) > 20


def write_opencv(path, names: dict, **more) -> None:
    storage = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    for name, value in {**names, **more}.items():
        storage.write(name, value)
    storage.release()


@pytest.mark.parametrize("suffix", ["yml", "xml", "json"])
@pytest.mark.parametrize(
    "names", [("M1", "D1", "M2", "D2"), ("cameraMatrix1", "distCoeffs1", "cameraMatrix2", "distCoeffs2")]
)
def test_files_of_opencv(tmp_path, suffix, names):
    lenses = dict(zip(names, (*LEFT, *RIGHT), strict=True))
    write_opencv(tmp_path / f"intrinsics.{suffix}", lenses, image_width=320, image_height=240)
    write_opencv(tmp_path / f"extrinsics.{suffix}", {"R": ROTATION, "T": 1000 * TRANSLATION[:, None]})
    paths = [tmp_path / f"{name}.{suffix}" for name in ("intrinsics", "extrinsics")]
    found = read_stereo_calibration(*paths, size_px=SIZE, unit_m=0.001)
    for name in StereoCalibration.__dataclass_fields__:
        np.testing.assert_allclose(getattr(found, name), getattr(CAMERAS, name), atol=1e-12)
    for change, words in (
        ({"unit_m": None}, "stand 120.0.* m apart, expected 0.001 ... 1 m: unit_m"),
        ({"size_px": (640, 480)}, r"is of views of \[320, 240\] px, these have \[640, 480\]"),
    ):
        with pytest.raises(ValueError, match=words):
            read_stereo_calibration(*paths, **{"size_px": SIZE, "unit_m": 0.001, **change})
    with pytest.raises(ValueError, match=r"there is no rotation \(R\), no translation \(T\)"):
        read_stereo_calibration(paths[0], size_px=SIZE)


def test_a_file_of_a_zed(tmp_path):
    path = tmp_path / "SN00012345.conf"
    path.write_text(ZED)
    found = read_stereo_calibration(path, size_px=(1280, 720))
    np.testing.assert_allclose(found.left_matrix, [[700.0, 0, 638.4], [0, 701.0, 376.8], [0, 0, 1]])
    np.testing.assert_allclose(found.left_distortion, [-0.17, 0.029, 0.00036, -0.00054, 0])
    np.testing.assert_allclose(found.right_distortion, [-0.174, 0.028, 0, 0, 0])
    np.testing.assert_allclose(found.translation_m, [-0.1199, -0.0003, 0.0002])
    np.testing.assert_allclose(found.rotation, rotation_vector_to_matrix(np.array([0.0021, 0.0106, -0.0004])))
    assert Rectification(found).calibration["baseline_m"] == pytest.approx(0.1199, abs=1e-5)
    newer = ZED.replace("[LEFT_CAM_HD]", "[LEFT_DISTO]\nk1=0.5\n[LEFT_CAM_HD]")
    path.write_text(newer)
    np.testing.assert_allclose(read_stereo_calibration(path, size_px=(1280, 720)).left_distortion, [0.5, 0, 0, 0, 0])
    for text, size, words in (
        (ZED, (1000, 720), "the views have 1000x720 px; a ZED has 2208x1242, 1920x1200"),
        (ZED, (1920, 1080), r"no fx in a section \[LEFT_CAM_FHD\]; it has LEFT_CAM_HD, RIGHT_CAM_HD, STEREO"),
        (ZED.replace("fx=700.0", "fx=seven"), (1280, 720), r"fx of \[LEFT_CAM_HD\] is 'seven'"),
        (ZED.replace("cx=638.4", "cx=1100"), (1280, 720), "does not fit a view of .* is it of another size"),
        ("nothing", (1280, 720), "is no calibration of a ZED"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_stereo_calibration(path, size_px=size)


def test_cameras_that_are_no_pair_are_refused(tmp_path):
    for change, words in (
        ({"translation_m": -TRANSLATION}, "to the left of the first: are left and right swapped"),
        ({"translation_m": np.array([0.01, -0.12, 0.0])}, "side by side, along x"),
        ({"rotation": 2 * ROTATION}, "the rotation between the cameras is none"),
        ({"left_matrix": np.eye(2)}, r"left_matrix is .*expected \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            StereoCalibration(**{**CAMERAS.__dict__, **change})
    with pytest.raises(ValueError, match="no-such-file.yml is no file"):
        read_stereo_calibration(tmp_path / "no-such-file.yml", size_px=SIZE)
    (tmp_path / "broken.yml").write_text("{")
    with pytest.raises(ValueError, match="broken.yml"):
        read_stereo_calibration(tmp_path / "broken.yml", size_px=SIZE)
    view = np.zeros((240, 321, 3), np.uint8)
    with pytest.raises(ValueError, match="the right view has 321x240 px, the calibration is of 320x240 px"):
        Rectification(CAMERAS)(view[:, :320], view)
