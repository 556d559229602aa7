"""Published sets with depth: every layout and kind of file gives the depth that was written, errors name the file."""

import io
import struct
import zipfile

import h5py
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from depth_sets import ENCODED, hdf5, make_picture, npy, npz, write_folders, write_hypersim, write_nyu, write_scannet
from stereo_sets import pfm, png16, save

from stereovla.dataset_builder.formats.depth_sets import decode_depth, open_depths


def opened(folder, form, split="train", unit_m=None, columns=("image", "depth")):
    return open_depths([str(folder)], form, split, 0.25, columns, unit_m)


@pytest.mark.parametrize("suffix", ENCODED)
def test_every_kind_of_file_gives_the_depth_that_was_written(suffix, tmp_path):
    folder = write_folders(tmp_path, 8, suffix)
    unit = ENCODED[suffix][1]
    train, held_out = (opened(folder, "folders", split, unit) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (6, 2)
    for number in range(8):
        sample = train[number] if number < 6 else held_out[number - 6]
        picture, depth = make_picture(number)
        np.testing.assert_array_equal(sample["left"], picture)
        np.testing.assert_allclose(sample["depth"], depth, rtol=1e-3 if suffix == ".hdf5" else 1e-6)
        assert sample["depth"].dtype == np.float32


def test_layouts_know_their_unit_and_a_declared_one_goes_before(tmp_path):
    for form, write in (("nyu", write_nyu), ("scannet", write_scannet)):
        folder = write(tmp_path / form, 4)
        for number, sample in enumerate(opened(folder, form)):
            picture, depth = make_picture(number)
            np.testing.assert_allclose(sample["depth"], depth, rtol=1e-6)
            assert sample["left"].shape == picture.shape
            assert np.abs(sample["left"].astype(int) - picture).mean() < 8  # ScanNet's were halved, from a JPEG
    np.testing.assert_allclose(opened(tmp_path / "nyu", "nyu", unit_m=2e-3)[0]["depth"], 2 * make_picture(0)[1])
    with pytest.raises(ValueError, match="the form 'folders' needs m per step"):
        opened(tmp_path, "folders")


def test_hypersims_distances_become_planar_depth(tmp_path):
    sample = opened(write_hypersim(tmp_path, 4), "hypersim")[1]
    np.testing.assert_allclose(sample["depth"], make_picture(1)[1], rtol=1e-5)


def test_columns_of_a_dataset(tmp_path):
    features = Features({"rgb": Image(), "z": Value("binary")})
    rows = [{"rgb": picture, "z": npy(depth)} for picture, depth in map(make_picture, range(4))]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    train = opened(tmp_path, "columns", unit_m=1.0, columns=("rgb", "z"))
    assert len(train) == 3
    np.testing.assert_array_equal(train[2]["depth"], make_picture(2)[1])
    np.testing.assert_array_equal(train[2]["left"], make_picture(2)[0])


def test_what_is_unknown_is_0():
    depth = decode_depth(pfm(np.array([[0.0, -1.0, np.inf], [np.nan, 2.0, 0.5]])), 1.0, "x")
    assert depth.tolist() == [[0, 0, 0], [0, 2, 0.5]]
    assert not decode_depth(png16(np.zeros((2, 2), np.uint16)), 1e-3, "x").any()  # nothing measured: no error


def test_a_unit_that_cannot_be_right_is_refused():
    millimetres = png16(np.full((2, 2), 1500, np.uint16))
    with pytest.raises(ValueError, match="a.png has a median depth of 1500 m; valid: 0.001 to 1000. Is 1 m per step"):
        decode_depth(millimetres, 1.0, "a.png")
    with pytest.raises(ValueError, match="a.npy has a median depth of 0.0005 m"):
        decode_depth(npy(np.full((2, 2), 0.5)), 1e-3, "a.npy")


def header(shape: str, dtype: str = "<f4") -> bytes:
    """A .npy file that declares a shape, without numbers."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("depth.npy", data)
    return file.getvalue()


def linked() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened["dataset"] = h5py.ExternalLink("/etc/passwd", "x")
    return file.getvalue()


def huge() -> bytes:
    """Declares 2^40 numbers, and holds none of them."""
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened.create_dataset("dataset", (2**20, 2**20), np.float32, chunks=(64, 64))
    return file.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (header("(1048576, 1048576)"), r"its array is float32 \(1048576, 1048576\); valid: at most"),
        (zipped(header("(1048576, 1048576)")), "its array is float32"),
        (header("(4, 4)"), "it has 0 bytes of numbers; float32 .* needs 64"),
        (header("(1,)", "|O"), "its array is object"),
        (npy(np.ones((2, 2, 3), np.float32)), r"x is float32 \(2, 2, 3\); expected numbers \(height, width\)"),
        (npz(a=np.ones((2, 2)), b=np.ones((2, 2))), "it holds a, b; valid: one array, or one that is called depth"),
        (npz(), "it holds nothing"),
        (b"PK\x03\x04 no archive", "is no depth map"),
        (b"\x93NUMPY\x01\x00\x02\x00((", "is no depth map"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1), r"is a NumPy file of version \(2, 0\); valid: \(1, 0\)"),
        (b"\x89HDF\r\n\x1a\n nothing", "is no depth map"),
        (hdf5(a=np.ones((2, 2)), b=np.ones((2, 2))), "it holds a, b"),
        (linked(), "dataset is a link to something else"),
        (huge(), r"dataset declares \(1048576, 1048576\) numbers; at most"),
        (b"Pf\n1048576 1048576\n-1.0\n", "the map is 1048576x1048576 px"),
    ],
)
def test_what_is_no_map_is_refused_before_it_is_allocated(data, message):
    with pytest.raises(ValueError, match=message):
        decode_depth(data, 1.0, "x")


def test_broken_sets_are_named(tmp_path):
    folder = write_folders(tmp_path, 8)
    with pytest.raises(ValueError, match=r"has no file \*\*/color/\*.jpg: is it a folder of scannet"):
        opened(folder, "scannet")
    save(folder / "depth/room0/0001.npy", npy(make_picture(1)[1]))
    with pytest.raises(ValueError, match=r"has several files depth/room0/0001.\* \(.npy, .png\); leave one"):
        opened(folder, "folders", unit_m=1e-3)
    (folder / "depth/room0/0001.npy").unlink()
    (folder / "depth/room1/0005.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 files of folders, the first is .*depth/room1/0005.\*"):
        opened(folder, "folders", unit_m=1e-3)
    save(folder / "depth/room1/0005.png", png16(np.full((64, 48), 900, np.uint16)))
    with pytest.raises(ValueError, match=r"0005.png has 64 x 64 px .* its depth 64 x 48: they do not show the same"):
        opened(folder, "folders", unit_m=1e-3)[5]
