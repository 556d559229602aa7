"""Datasets of strangers: nothing outside of the source is read, nothing outside of --out is written, and what declares
more than there can be is refused before it is made.
"""

import json
import re
import time

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_lines import data
from lerobot_folder import AS_THEY_ARE, write_lerobot, write_rig
from PIL import Image as PillowImage
from synthetic_dataset import write_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.formats.disparity_sets import open_pairs, pair_files
from stereovla.dataset_builder.formats.droid_source import _column
from stereovla.dataset_builder.formats.pixel_maps import decode_view
from stereovla.dataset_builder.formats.video import VideoError, read_all_frames
from stereovla.dataset_builder.streaming.window_stream import WindowStream


@pytest.fixture
def source(tmp_path):
    states = np.cumsum(np.random.default_rng(0).normal(0, 0.01, (6, 5)), 0)
    return write_lerobot(tmp_path / "a/source", states, np.zeros((6, 5)), rows=(0, 0))


def import_it(source, tmp_path) -> int:
    rig = write_rig(tmp_path, **AS_THEY_ARE)
    return data(["import", "lerobot", "--source", str(source), "--config", str(rig), "--out", str(tmp_path / "a/out")])


def change_info(source, **changes) -> None:
    path = source / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("split", ["../../../escaped", "{absolute}", "a/b", ""])
def test_a_split_does_not_lead_out_of_the_folder(source, tmp_path, capsys, split):
    split = split.format(absolute=tmp_path / "absolute")
    change_info(source, splits={split: "0:1", "train": "1:2"})
    assert import_it(source, tmp_path) == 2
    assert f"the split {split!r} cannot be; valid: letters, digits and _" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*.parquet") if source not in path.parents]


@pytest.mark.parametrize("key", ["video_path", "data_path"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("../../other/{name}", "is no name of a file inside of"),
        ("{absolute}/{name}", "is no name of a file inside of"),
        ("linked/{name}", "is a link to .*, outside of it"),
        ("{{chunk_index:0999999999d}}/{name}", "cannot be filled: it has {chunk_index:0999999999d}"),
        ("{{chunk_index.__class__}}", "cannot be filled: it has {chunk_index.__class__"),
    ],
)
def test_files_are_not_read_outside_of_the_source(source, tmp_path, capsys, key, template, message):
    name = {"video_path": "file-000.mp4", "data_path": "file-000.parquet"}[key]
    place = {"video_path": "videos/eyes/chunk-000", "data_path": "data/chunk-000"}[key]
    (tmp_path / "other").mkdir()
    (source / place / name).rename(tmp_path / "other" / name)  # a good file, at the wrong place
    (source / "linked").symlink_to(tmp_path / "other")
    change_info(source, **{key: template.format(absolute=tmp_path / "other", name=name)})
    assert import_it(source, tmp_path) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "a/out").glob("data/*"))


def test_a_shard_of_a_manifest_lies_in_the_dataset(source, tmp_path, capsys):
    assert import_it(source, tmp_path) == 0
    out = tmp_path / "a/out"
    manifest = json.loads((out / shards.MANIFEST).read_text())
    name = manifest["shards"][0]["path"]
    (out / name).rename(tmp_path / "elsewhere.parquet")
    manifest["shards"][0]["path"] = "../../elsewhere.parquet"
    (out / shards.MANIFEST).write_text(json.dumps(manifest))
    capsys.readouterr()
    assert data(["check", str(out)]) == 2
    assert "path of shard 0 is '../../elsewhere.parquet', expected data/NAME.parquet" in capsys.readouterr().err
    assert data(["export", "lerobot", "--dataset", str(out), "--out", str(tmp_path / "exported")]) == 2
    (out / name).symlink_to(tmp_path / "elsewhere.parquet")
    manifest["shards"][0]["path"] = name
    (out / shards.MANIFEST).write_text(json.dumps(manifest))
    assert data(["check", str(out)]) == 1
    assert "is a link to" in capsys.readouterr().out


# ---- HDF5


def written_h5(folder, write):
    with h5py.File(folder / "other.h5", "w") as file:
        file["secret"] = np.arange(3.0)
    (folder / "raw").write_bytes(np.arange(3.0).tobytes())
    with h5py.File(folder / "a.h5", "w") as file:
        write(file, folder)
    return h5py.File(folder / "a.h5")


def external_link(file, folder):
    file["a/b"] = h5py.ExternalLink(str(folder / "other.h5"), "secret")


def external_group(file, folder):
    file["a"] = h5py.ExternalLink("other.h5", "/")


def soft_link(file, folder):
    file["link"] = h5py.ExternalLink("other.h5", "secret")
    file["a/b"] = h5py.SoftLink("/link")


def external_data(file, folder):
    file.create_dataset("a/b", (3,), "f8", external=[(str(folder / "raw"), 0, 24)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "secret", (3,))
    file.create_virtual_dataset("a/b", layout)


def huge(file, folder):
    file.create_dataset("a/b", (10**9, 6), "f8", chunks=(1000, 6))  # 48 GB in 2 kB


def group(file, folder):
    file.create_group("a/b")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (external_link, "a/b is a link to something else"),
        (external_group, "a/b is a link to something else"),
        (soft_link, "a/b is a link to something else"),
        (external_data, "a/b holds no data of its own"),
        (virtual, "a/b holds no data of its own"),
        (group, "a/b holds no data of its own"),
        (huge, r"a/b declares \(1000000000, 6\) numbers; at most 10000000 are read"),
    ],
)
def test_columns_lie_in_their_file_and_have_a_size(tmp_path, write, message):
    with written_h5(tmp_path, write) as file, pytest.raises(ValueError, match=message):
        _column(file, "a/b")


def test_a_plain_column_is_read(tmp_path):
    with written_h5(tmp_path, lambda file, folder: file.create_dataset("a/b", data=np.arange(3))) as file:
        assert _column(file, "a/b").tolist() == [0, 1, 2]
        with pytest.raises(KeyError):
            _column(file, "a/c")


# ---- pictures and videos


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG of 8x8 px whose header says otherwise: 631 bytes can declare 12 GB."""
    content = bytearray(shards.encode_image("observation.images.left", np.zeros((8, 8, 3), np.uint8)))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(content)


@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_a_picture_that_declares_12_gb_is_refused(monkeypatch, decoder):
    if decoder == "pillow":
        monkeypatch.setattr(shards, "simplejpeg", None)
    start = time.process_time()
    with pytest.raises(shards.ShardError, match="cannot be decoded: the picture"):
        shards.decode_image("observation.images.left", jpeg_of(65500, 65500))
    with pytest.raises(ValueError, match="is no view: the picture"):
        decode_view(jpeg_of(65500, 65500), "a view")
    assert time.process_time() - start < 5
    assert shards.decode_image("observation.images.left", jpeg_of(8, 8)).shape == (8, 8, 3)


def test_a_video_is_an_mp4_of_a_size(tmp_path, monkeypatch):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    assert [frame.shape for frame in read_all_frames(tmp_path / "a.mp4")] == [(32, 64, 3)]
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n" + str(tmp_path / "a.mp4") + "\n#EXT-X-ENDLIST\n"
    for text in (playlist, f"ffconcat version 1.0\nfile {tmp_path / 'a.mp4'}\n"):
        (tmp_path / "b.mp4").write_text(text)
        with pytest.raises(VideoError, match="b.mp4 cannot be read"):
            list(read_all_frames(tmp_path / "b.mp4"))
    monkeypatch.setattr("stereovla.untrusted.MOST_PIXELS", 2000)
    with pytest.raises(VideoError, match="a.mp4 is 64x32 px; at most 2000 px are decoded"):
        list(read_all_frames(tmp_path / "a.mp4"))


# ---- parquet


TOO_LARGE = r"its [0-9]+ bytes declare [0-9]+ or more to be read, in 3 rows; at most 1000 are"


def test_shards_are_not_read_that_declare_too_much(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path, [3], 1)
    (path,) = folder.glob("data/*.parquet")
    monkeypatch.setattr("stereovla.untrusted.MOST_PARQUET_BYTES", 1000)
    monkeypatch.setattr("stereovla.untrusted.MOST_PARQUET_GROWTH", 0)
    with pytest.raises(shards.ShardError, match=f"shard {path}: {TOO_LARGE}"):
        shards.read_table(path)
    with pytest.raises(shards.ShardError, match=f"shard {path} of {folder}: {TOO_LARGE}"):
        WindowStream(folder)
    with pytest.raises(ValueError, match=f"{path.name} cannot be read: {TOO_LARGE}"):
        open_pairs([str(folder)], "columns", "train", 0.3, ("left", "right", "disparity"), 1.0)


@pytest.mark.parametrize("name", ["meta/tasks", "meta/episodes/chunk-000/file-000", "data/chunk-000/file-000"])
def test_no_file_of_a_source_is_read_that_declares_too_much(source, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("stereovla.untrusted.MOST_PARQUET_BYTES", 2**20)
    path = source / f"{name}.parquet"
    table = pq.read_table(path)
    zeros = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), pa.array([b"x" * 2**20]))
    pq.write_table(table.append_column("more", zeros), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2**17
    assert import_it(source, tmp_path) in (1, 2)
    said = "".join(capsys.readouterr())
    assert re.search(rf"{name}.parquet cannot be read: its \d+ bytes declare \d+ or more to be read", said)


# ---- stereo sets


def test_pictures_beside_a_dataset_lie_in_its_folder(tmp_path):
    from datasets import Dataset, Image

    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for name in ("set/left.png", "set/right.png", "outside.png"):
        PillowImage.fromarray(np.full((8, 9, 3), 7, np.uint8)).save(tmp_path / name)
    columns = ("left", "right", "disparity")
    for left, message in ((folder / "left.png", None), (tmp_path / "outside.png", "is no name of a file inside of")):
        rows = {"left": [str(left)] * 3, "right": [str(folder / "right.png")] * 3, "disparity": [[[1.0] * 9] * 8] * 3}
        dataset = Dataset.from_dict(rows).cast_column("left", Image()).cast_column("right", Image())
        table = dataset.data.table.combine_chunks()
        pq.write_table(table, folder / "data/train.parquet")
        pairs = open_pairs([str(folder)], "columns", "train", 0.3, columns, 1.0)
        if message is None:
            assert pairs[0]["left"].shape == (8, 9, 3)
        else:
            with pytest.raises(ValueError, match=message):
                pairs[0]


def test_views_of_a_set_lie_in_its_folder(tmp_path):
    folder = tmp_path / "set/scene"
    folder.mkdir(parents=True)
    for name in ("im0.png", "im1.png", "disp0.pfm"):
        (folder / name).touch()
    assert len(pair_files(tmp_path / "set", "middlebury")) == 1
    (folder / "im1.png").unlink()
    (folder / "im1.png").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="is a link to /etc/hostname, outside of it"):
        pair_files(tmp_path / "set", "middlebury")
