"""untrusted: names stay inside of their folder, and what is declared too large is refused before it is made."""

import io
import os
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stereovla.untrusted import fill_template, inside, open_image, open_parquet, read_yaml, split_name

WRONG_NAMES = (
    "",
    "..",
    "../a",
    "a/../../b",
    "/etc/passwd",
    "a/b\0c",
    "\\\\host\\share",
    "C:\\a",
    "C:a",
    "a\\..\\..\\b",
    "//a",
)


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no name of a file inside of"):
        inside(tmp_path, name)


def test_names_inside_are_joined(tmp_path):
    for name in (
        "a",
        "a/b.parquet",
        "a..b",
        "...",
        "videos/observation.images.left/chunk-000/file-000.mp4",
        "a b",
        "é",
    ):
        assert inside(tmp_path, name) == tmp_path / name


def test_links_are_followed_to_where_they_lead(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "data").mkdir(parents=True)
    outside.mkdir()
    (root / "data/real").touch()
    (root / "to_inside").symlink_to("data/real")
    (root / "to_file").symlink_to("/etc/hostname")
    (root / "to_folder").symlink_to(outside)
    (root / "round").symlink_to("round")
    (tmp_path / "alias").symlink_to(root)  # the folder that the user names may be a link
    assert inside(root, "to_inside").resolve() == root / "data/real"
    assert inside(tmp_path / "alias", "data/real").is_file()
    for name in ("to_file", "to_folder/x", "to_folder"):
        with pytest.raises(ValueError, match="is a link to .*, outside of it; put a copy in its place"):
            inside(root, name)
    with pytest.raises(ValueError, match="leads nowhere"):
        inside(root, "round")


def test_links_of_the_hubs_cache_are_inside(tmp_path):
    snapshot = tmp_path / "datasets--a--b/snapshots/0123"
    (snapshot / "data").mkdir(parents=True)
    (tmp_path / "datasets--a--b/blobs").mkdir()
    (tmp_path / "datasets--a--b/blobs/ff").touch()
    (snapshot / "data/a.parquet").symlink_to("../../../blobs/ff")
    assert inside(snapshot, "data/a.parquet").is_file()
    assert inside(snapshot / "data", "a.parquet").is_file()
    (snapshot / "b").symlink_to(os.path.relpath("/etc/hostname", snapshot))
    with pytest.raises(ValueError, match="outside of it"):
        inside(snapshot, "b")


@pytest.mark.parametrize("name", ["../../../escaped", "/abs", "a/b", "", "a-b", "train ", "a" * 101, None, 3, "x\n"])
def test_splits_have_names_of_letters(name):
    with pytest.raises(ValueError, match="the split .* cannot be"):
        split_name(name)
    assert split_name("train") == "train" and split_name("val_2.a") == "val_2.a"


def test_templates_have_their_fields_and_no_more():
    template = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    assert fill_template(template, video_key="left", chunk_index=1, file_index=12) == (
        "videos/left/chunk-001/file-012.mp4"
    )
    assert fill_template("{a}-{a:d}-{a:5}-{{}}", a=7) == "7-7-    7-{}"
    for wrong in (
        "{a:0999999999d}",
        "{a:>100}",
        "{a.__class__}",
        "{a[0]}",
        "{a!r}",
        "{b}",
        "{}",
        "{0}",
        "{a:{a}}",
        "{a:,}",
        "{",
        None,
        3,
    ):
        with pytest.raises(ValueError, match="cannot be filled"):
            fill_template(wrong, a=7)


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares its size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_pictures_are_refused_by_their_declared_size():
    for width, height in ((65500, 65500), (8193, 8192), (10**6, 10**3)):
        with pytest.raises(ValueError, match="the picture is (too large|.* at most 67108864 px are decoded)"):
            open_image(png_of(width, height))
    assert open_image(png_of(8192, 8192)).size == (8192, 8192)


def test_only_formats_of_pictures_are_opened():
    """For EPS, Pillow starts a program."""
    with pytest.raises(OSError, match="cannot identify"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")


def parquet_of(column: pa.Array, **options) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": column}), file, compression="zstd", store_schema=False, **options)
    return file


def large_parquets() -> dict[str, pa.Array]:
    """Columns of more than 2^20 bytes in files of less than 2^17."""
    text = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1] * 700, pa.int32()), pa.array([b"x" * 2**10, b""]))
    return {
        "equal numbers": pa.array(np.zeros(2**17 + 1)),
        "equal bytes": pa.array([b"x" * 2**11] * 513),
        "one text for many rows": text,
        "one text often in one row": pa.ListArray.from_arrays(pa.array([0, 2100]), text),
        "in a struct": pa.StructArray.from_arrays([text], ["bytes"]),
        "in a map": pa.MapArray.from_arrays(pa.array([0, 2100]), pa.array(range(2100)), text),
    }


@pytest.mark.parametrize("kind", large_parquets())
def test_parquet_is_refused_by_its_declared_size(kind, monkeypatch):
    monkeypatch.setattr("stereovla.untrusted.MOST_PARQUET_BYTES", 2**20)
    file = parquet_of(large_parquets()[kind], use_dictionary=kind != "equal bytes")
    size = len(file.getvalue())
    assert size < 2**17
    with pytest.raises(ValueError, match=f"its {size} bytes declare 1[0-9]{{6}} or more .* at most 1048576 are"):
        open_parquet(file)


def test_parquet_is_not_read_to_find_that_it_is_too_large():
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6), pa.int32()), pa.array([b"x" * 2**20]))
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match="declare [0-9]{11} or more to be read, in 1000000 rows"):
        open_parquet(parquet_of(text))
    assert pa.total_allocated_bytes() - before < 2**24


def test_parquet_that_is_as_large_as_its_texts_is_read():
    """That one of them could stand for all rows makes none of these too large."""
    noise = np.random.default_rng(0)
    pictures = [noise.bytes(1000 + n) for n in range(3000)]
    sentences = pa.array([f"sentence {n % 500}" for n in range(200_000)])
    for column, of_rows in (
        (pa.array(pictures), pictures),
        (pa.StructArray.from_arrays([pa.array(pictures)], ["bytes"]), [{"bytes": p} for p in pictures]),
        (sentences, sentences.to_pylist()),
        (pa.ListArray.from_arrays(pa.array(range(200_001)), sentences), [[text] for text in sentences.to_pylist()]),
        (pa.array([None, "a", None]), [None, "a", None]),
        (pa.array([], pa.string()), []),
        (pa.nulls(3), [None] * 3),
    ):
        for rows in (10**6, 999):  # as others write it: in one group, and in several
            with open_parquet(parquet_of(column, row_group_size=rows)) as file:
                assert file.read()["a"].to_pylist() == of_rows


def test_what_a_parquet_file_may_declare_grows_with_it(monkeypatch):
    monkeypatch.setattr("stereovla.untrusted.MOST_PARQUET_BYTES", 1000)
    open_parquet(parquet_of(pa.array([np.random.default_rng(0).bytes(10_000)]))).close()
    with pytest.raises(ValueError, match="at most 1000 are, or 8 times the bytes of the file"):
        open_parquet(parquet_of(pa.array([b"x" * 10_000])))


def test_yaml_is_refused_that_grows_by_its_aliases():
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
    )
    for text, message in (
        (laughs, "with its aliases written out it has [0-9]+ values; at most 10000 are read"),
        ("a: &a [*a]", "an alias refers to what it is part of"),
        ("[" * 5000 + "]" * 5000, "no valid YAML"),
        ("a: " + "1" * 5000, "no valid YAML"),
        ("a: 2001-99-99", "no valid YAML"),
        ("a: !!python/object/apply:os.system [id]", "no valid YAML"),
        ("a: [", "no valid YAML"),
        ("x" * (2**20 + 1), "at most 1048576 are read"),
    ):
        with pytest.raises(ValueError, match=f"rig.yaml.*{message}") as error:
            read_yaml(text, "rig.yaml")
        assert len(str(error.value)) < 2000
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: {d: *a}", "rig.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    assert read_yaml("", "rig.yaml") is None
