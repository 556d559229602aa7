"""What the files of a folder say, however they store it: compressed columns, texts in pictures, escapes, encodings."""

import base64
import binascii
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pyarrow as pa
from PIL import ImageSequence

from stereovla.untrusted import PICTURE_FORMATS, check_pixels, open_image, open_parquet

PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")
SEARCHED = (".safetensors", ".mp4")  # beside texts, pictures and parquet: what they say stands in them as it is
# how files begin whose content is packed, or runs when it is loaded
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xff\x06\x00\x00sNaPpY": "snappy",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "SQLite",
    b"\x93NUMPY": "numpy",
    b"\x80\x02": "pickle",
    b"\x80\x03": "pickle",
    b"\x80\x04": "pickle",
    b"\x80\x05": "pickle",
    b"%PDF": "PDF",
}
_ENCODED = re.compile(rb"[A-Za-z0-9+/_-]{24,}")
_HEXADECIMAL = re.compile(rb"\b(?:[0-9a-fA-F]{2}){16,}\b")
_ESCAPE = re.compile(rb"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})|\\([\"'/\\])")
SLICE, OVERLAP = 2**26, 2**12  # bytes of weights that are searched at a time; a secret lies in one of them
_MOST_LAYERS = 3  # of encodings in encodings


def reason_not_searched(path: Path) -> str | None:
    """Why the content of a file cannot be searched; None where it can."""
    with open(path, "rb") as file:
        start = file.read(512)
    packed = next((what for magic, what in PACKED.items() if start.startswith(magic)), None)
    if packed is None and start[257:262] == b"ustar":
        packed = "tar"
    if packed is not None:
        return f"a {packed} file"
    if start.startswith((*PICTURES, b"PAR1")) or path.suffix.lower() in SEARCHED or is_text(path):
        return None
    return "neither text, nor picture, nor parquet, nor safetensors"


def is_text(path: Path) -> bool:
    """Whether a file is UTF-8, or UTF-16 or UTF-32 with their mark."""
    content = path.read_bytes()
    wide = "utf-32" if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) else "utf-16"
    encoding = wide if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return "\0" not in text


def hidden_texts(path: Path) -> Iterator[bytes]:
    """What a file says beside its bytes as they are; ValueError for one that is damaged."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"PAR1"):
        yield from parquet_texts(path)
    elif start.startswith(PICTURES):
        yield picture_texts(path.read_bytes())
    elif path.suffix.lower() == ".safetensors":
        yield from tensor_texts(path)
    elif path.suffix.lower() != ".mp4":
        yield from decoded(path.read_bytes())


def tensor_texts(path: Path) -> Iterator[bytes]:
    """The description at the start of a safetensors file, and its tensors of bytes, which may be a text."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:  # these are other bytes, which are searched as they are
            return
        head = file.read(length)
        yield head
        yield from decoded(head)
        try:
            entries = json.loads(head)
            places = [entry["data_offsets"] for entry in entries.values() if entry.get("dtype") in ("U8", "I8")]
        except (ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"it is no whole safetensors file: {error}") from error
        for start, stop in places:
            for place in range(start, stop, SLICE - OVERLAP):
                file.seek(8 + length + place)
                yield file.read(min(SLICE, stop - place)).replace(b"\0", b"")


def decoded(content: bytes, layer: int = 0) -> Iterator[bytes]:
    """Texts of other encodings, and what is escaped or encoded in a text."""
    if b"\0" in content:  # UTF-16 or UTF-32
        content = content.replace(b"\0", b"")
        yield content
    if _ESCAPE.search(content):
        yield _ESCAPE.sub(_unescaped, content)
    if b"%" in content:
        yield unquote_to_bytes(content)
    if layer == _MOST_LAYERS:
        return
    inner = [bytes.fromhex(found.decode()) for found in _HEXADECIMAL.findall(content)]
    for found in _ENCODED.findall(content):
        for alphabet in (b"+/", b"-_"):
            try:
                inner.append(base64.b64decode(found + b"=" * (-len(found) % 4), alphabet, validate=True))
            except binascii.Error:
                continue
    if texts := [text for text in inner if text.isascii() and b"\0" not in text]:
        whole = b"\n".join(texts)
        yield whole
        yield from decoded(whole, layer + 1)


def _unescaped(found: re.Match) -> bytes:
    return found[3] or chr(int(found[1] or found[2], 16)).encode("utf-8", "replace")


def picture_texts(content: bytes) -> bytes:
    """The texts that a picture carries, those of every frame of a film, unpacked; ValueError for no picture."""
    texts = []
    try:
        with open_image(content, (*PICTURE_FORMATS, "GIF")) as image:
            check_pixels(image.width, image.height * getattr(image, "n_frames", 1), "the film")
            for frame in ImageSequence.Iterator(image):
                frame.load()  # texts may follow the pixels
                texts += [f"{key} {value!r}" for key, value in frame.info.items()]
            texts += [f"{key} {value!r}" for key, value in image.getexif().items()]
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"it is no whole picture: {error}") from error
    return "\n".join(texts).encode("utf-8", "replace")


def parquet_texts(path: Path) -> Iterator[bytes]:
    """Metadata, strings and bytes of all columns, and the texts of pictures in them."""
    try:
        with open_parquet(path) as file:
            layout = file.schema_arrow
            metadata = [layout.metadata, *(field.metadata for field in layout)]
            yield b"\n".join(value for entry in metadata if entry for pair in entry.items() for value in pair)
            for batch in file.iter_batches(256):
                for column in batch.columns:
                    yield from column_texts(column)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"it is no whole parquet file: {error}") from error


def column_texts(array: pa.Array) -> Iterator[bytes]:
    """Strings and bytes of a column and of what is nested in it."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from column_texts(array.dictionary)
    elif pa.types.is_struct(kind):
        for part in array.flatten():
            yield from column_texts(part)
    elif pa.types.is_map(kind):
        yield from column_texts(array.keys)
        yield from column_texts(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from column_texts(array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        whole = "\n".join(array.drop_null().unique().to_pylist()).encode("utf-8", "replace")
        yield whole
        yield from decoded(whole)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        cells = array.drop_null().to_pylist()
        yield b"\n".join(cells)
        yield b"\n".join(picture_texts(cell) for cell in cells if cell.startswith(PICTURES) and _has_texts(cell))


def _has_texts(picture: bytes) -> bool:
    """Whether more than pixels is in a picture: what this project records has none, and decoding takes time."""
    return any(word in picture for word in (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"Exif", b"\xff\xfe", b"GIF8", b"RIFF"))
