"""Shards: rows to parquet bytes and back, atomically written, with a manifest of their SHA-256.

Equal rows give equal bytes (with equal versions of pyarrow and Pillow): nothing in a shard depends on when or where it
was written.
"""

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from PIL import Image

from stereovla.dataset_builder.dataset import schema
from stereovla.untrusted import check_pixels, open_image, open_parquet, split_name

try:
    import simplejpeg  # part of the extra `data`; Pillow does without
except ImportError:
    simplejpeg = None

JPEG_MAGIC = b"\xff\xd8\xff"
JPEG_QUALITY = 95
PNG_LEVEL = 1  # of zlib; level 6 takes twice the time for 10 % fewer bytes
ROWS_PER_GROUP = 256  # one read of a streaming reader: 256 frames of 128x128 with depth are 6 MB
INFO_KEY = b"stereovla"  # parquet metadata: what the recorder counted for this shard (JSON)
MANIFEST = Path("meta/manifest.json")
_DICTIONARY_COLUMNS = ["task", "target.name", "embodiment"]
_COUNTED_COLUMNS = ["episode_index", "frame_index"]  # with minimum and maximum, for readers that filter by them


class ShardError(RuntimeError):
    """A shard that cannot be read; the message names it and says what is wrong."""


def encode_image(key: str, array: np.ndarray) -> bytes:
    """Decoded image of column `key` -> file bytes (JPEG for colour, PNG for depth in m and segmentation)."""
    buffer = io.BytesIO()
    if key.startswith(schema.IMAGES):
        Image.fromarray(array).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    elif schema.is_depth(key):
        steps = np.round(array / schema.DEPTH_UNIT_M)
        steps[steps > 65535] = 0  # too far to store: no depth rather than a wrong one
        return _png16(steps.astype(np.uint16))
    else:
        Image.fromarray(array).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _png16(pixels: np.ndarray) -> bytes:
    """uint16 (H, W) -> PNG whose rows are all stored as differences to the row above (PNG's filter 2).

    Pillow tries five filters per row; one fixed filter is written 2.5 times and read 1.6 times as fast, for 18 % more
    bytes (depth maps of 128x128).
    """
    height, width = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, 2 * width)
    filtered = np.full((height, 2 * width + 1), 2, np.uint8)
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)  # 16 bits of grey, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), PNG_LEVEL)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def decode_image(key: str, data: bytes) -> np.ndarray:
    """Inverse of `encode_image`: uint8 (H, W, 3), float32 m (H, W) for depth, uint8 (H, W) for segmentation.

    ShardError for bytes that are no whole image.
    """
    try:
        if data[:3] == JPEG_MAGIC:
            return decode_jpeg(data)
        with open_image(data, ("JPEG", "PNG")) as image:
            array = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow and simplejpeg raise for broken files
        raise ShardError(f"the {len(data)} bytes of {key} cannot be decoded: {error}") from error
    if schema.is_depth(key):
        return array.astype(np.float32) * np.float32(schema.DEPTH_UNIT_M)
    return array


def decode_jpeg(data: bytes) -> np.ndarray:
    """JPEG -> uint8 (H, W, 3) RGB. simplejpeg gives Pillow's pixels in half its time (120 us of 240 at 128x128)."""
    if simplejpeg is not None:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        check_pixels(width, height, "the picture")
        return simplejpeg.decode_jpeg(data)
    with open_image(data, ("JPEG",)) as image:
        return np.array(image.convert("RGB"))


def shard_path(split: str, index: int, count: int) -> Path:
    """Path of a shard inside the dataset folder, the Hub's naming."""
    return Path("data") / f"{split_name(split)}-{index:05d}-of-{count:05d}.parquet"


def encode_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Decoded row -> values that `write_shard` takes (images become bytes). Call it early: it frees the pixels."""
    images = {column.key for column in schema.columns_of(row) if column.image}
    return {
        key: encode_image(key, value) if key in images and value is not None else value for key, value in row.items()
    }


def rows_to_table(rows: Sequence[Mapping[str, Any]], layout: Features | None = None) -> pa.Table:
    """Encoded rows -> arrow table with the schema of `layout`, by default that of all columns of `schema.features`."""
    target = (schema.features() if layout is None else layout).arrow_schema
    arrays = []
    for column in schema.columns_of(target.names):
        if column.key not in target.names:
            continue
        values = [row.get(column.key) for row in rows]
        kind = target.field(column.key).type
        if column.image:
            values = [None if value is None else {"bytes": value, "path": None} for value in values]
        elif column.shape:
            values = [None if value is None else np.asarray(value).tolist() for value in values]
        arrays.append(pa.array(values, type=kind))
    return pa.Table.from_arrays(arrays, schema=target)


def write_shard(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    temporary: Path,
    info: Mapping[str, Any] | None = None,
    layout: Features | None = None,
) -> None:
    """Write encoded rows to `path`: first to `temporary` on the same file system, then renamed, so `path` is whole or
    absent.

    `info` (JSON-able) goes into the file's metadata; `shard_info` reads it.
    """
    write_table(path, rows_to_table(rows, layout), temporary=temporary, info=info)


def write_table(path: Path, table: pa.Table, *, temporary: Path, info: Mapping[str, Any] | None = None) -> None:
    """`write_shard` of rows that are a table already, with the metadata of `Features.arrow_schema`."""
    metadata = {**table.schema.metadata, INFO_KEY: json.dumps(dict(info or {}), sort_keys=True).encode()}
    temporary.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata(metadata),
        temporary,
        row_group_size=ROWS_PER_GROUP,
        use_dictionary=_DICTIONARY_COLUMNS,
        write_statistics=_COUNTED_COLUMNS,  # of an image column they are two whole images per page, twice
        compression="snappy",
        write_page_checksum=True,  # so that a reader sees a flipped bit
    )
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())  # a renamed but unwritten file would survive a power cut as garbage
    os.replace(temporary, path)


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard; ShardError names a missing, truncated or foreign file, or one that is too large to be read."""
    if not path.is_file():
        raise ShardError(f"shard {path} is missing")
    try:
        return open_parquet(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            f"shard {path} ({path.stat().st_size} bytes) is truncated or no parquet file: {error}"
        ) from error
    except ValueError as error:
        raise ShardError(f"shard {path}: {error}") from error


def shard_info(path: Path) -> dict[str, Any]:
    """What `write_shard` was given as `info`."""
    with open_shard(path) as file:
        return json.loads((file.schema_arrow.metadata or {}).get(INFO_KEY, b"{}"))


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole shard, or some columns of it; ShardError names a shard that is damaged inside."""
    with open_shard(path) as file:
        try:
            return file.read(columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"shard {path} is damaged: {error}") from error


def read_rows(path: Path, start: int = 0, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Decoded rows of a shard, as `schema.validate_row` takes them."""
    table = read_table(path)
    for row in table.slice(start, count).to_pylist():
        yield decode_row(row)


def decode_row(row: Mapping[str, Any], images: bool = True) -> dict[str, Any]:
    """A row of python values -> numpy arrays with the dtypes of the schema; columns that are null are left out.

    Args:
        images: decode them; else they are the bytes of their files.
    """
    decoded = {}
    for column in schema.columns_of(row):
        value = row.get(column.key)
        if value is None:
            continue
        if column.image:
            decoded[column.key] = decode_image(column.key, value["bytes"]) if images else value["bytes"]
        else:
            vector = column.shape and column.dtype != "string"
            decoded[column.key] = np.asarray(value, dtype=column.dtype) if vector else value
    return decoded


def numbers(table: pa.Table, key: str) -> np.ndarray:
    """Column of numbers or fixed-size lists of them -> own, writable array (rows, ...); null rows become NaN."""
    array = table.column(key).combine_chunks()
    shape = [len(array)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        if array.null_count:
            array = array.fill_null(_nan(array.type))
        array = array.flatten()
    return np.array(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _nan(kind: pa.DataType) -> Any:
    return [_nan(kind.value_type)] * kind.list_size if pa.types.is_fixed_size_list(kind) else float("nan")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any, *, temporary: Path | None = None) -> None:
    """Write JSON under a temporary name, then rename. Name one where several processes may write `path` at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # one name: what a kill leaves is overwritten by the next run
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read JSON; ValueError names a file that is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: is this folder a finished dataset?") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers of 5000 digits, 1000 nested lists
        raise ValueError(f"{path} is no valid JSON: {error}") from error


def write_manifest(folder: Path, splits: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Hash the shards (paths inside `folder`, per split), on all cores, and write the manifest; returns it."""

    def entry(item: tuple[str, Path]) -> dict[str, Any]:
        split, path = item
        table = read_table(folder / path, ["episode_index"])
        return {
            "path": path.as_posix(),
            "split": split,
            "sha256": sha256(folder / path),
            "bytes": (folder / path).stat().st_size,
            "rows": table.num_rows,
            "episodes": len(set(table.column("episode_index").to_pylist())),
        }

    items = [(split, path) for split, paths in splits.items() for path in paths]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock to the others
        manifest = {"shards": list(pool.map(entry, items))}
    write_json(folder / MANIFEST, manifest)
    return manifest
