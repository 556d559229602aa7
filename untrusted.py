"""What files of strangers may make this project do: which names they may lead to, and how large what they declare may
be. Everything is decided before it is opened or allocated.
"""

import io
import itertools
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from PIL import Image

MOST_PIXELS = 2**26  # of a picture, twice those of 8K; as RGB it takes 200 MB
MOST_YAML_BYTES = 2**20
MOST_YAML_VALUES = 10_000  # with every alias written out; a description of a robot has some dozens
# of a parquet file as it is read, or 8 times its own size; pictures, which are nearly all of one, do not grow
MOST_PARQUET_BYTES, MOST_PARQUET_GROWTH = 2**30, 8
# Pillow knows 40 formats, and for one of them (EPS) it starts a program
PICTURE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM")


def inside(folder: str | Path, name: str | Path) -> Path:
    """folder / name, for a name that a stranger chose; ValueError where it, or a link on its way, leads out of it.

    The Hub's cache is made of links; those from a snapshot to the same repository's files count as inside.
    """
    folder, text = Path(folder), str(name)
    if not text or "\0" in text or PureWindowsPath(text).anchor or ".." in re.split(r"[/\\]", text):
        raise ValueError(f"{text!r} is no name of a file inside of {folder}; valid: relative paths without '..'")
    try:
        root, real = folder.resolve(), (folder / text).resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ValueError(f"{text!r} in {folder} leads nowhere: {error}") from error
    roots = [root, *(above.parent / "blobs" for above in root.parents if above.name == "snapshots")]
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{text!r} in {folder} is a link to {real}, outside of it; put a copy in its place")
    return folder / text


def split_name(name: Any) -> str:
    """The name of a split, which becomes a part of file names; ValueError for one that datasets does not take."""
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name) or len(name) > 100:
        raise ValueError(f"the split {str(name)[:100]!r} cannot be; valid: letters, digits and _, such as train")
    return name


def fill_template(template: Any, **values: str | int) -> str:
    """A template of a path, such as "chunk-{chunk_index:03d}/{video_key}.mp4", with its fields filled; ValueError for
    one with other fields, or with more than a width of two digits.
    """
    try:
        for _, name, width, conversion in string.Formatter().parse(template):
            if name is not None and (name not in values or conversion or not re.fullmatch(r"(\d{1,2}d?|d)?", width)):
                raise ValueError(f"it has {{{name}{'!' if conversion else ''}{conversion or ''}:{width[:20]}}}")
        return template.format(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the path {str(template)[:200]!r} cannot be filled: {error}; it may have the fields {', '.join(values)}, "
            "numbers with a width such as {:03d}"
        ) from error


def check_pixels(width: int, height: int, what: str) -> None:
    """ValueError for a picture that is too large to be decoded."""
    if width * height > MOST_PIXELS:
        raise ValueError(f"{what} is {width}x{height} px; at most {MOST_PIXELS} px are decoded")


def open_image(data: bytes, formats: Sequence[str] = PICTURE_FORMATS) -> Image.Image:
    """The picture of a file's bytes, not decoded yet; ValueError for one that is too large, OSError for no picture."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the picture is too large to be decoded: {error}") from error
    check_pixels(*image.size, "the picture")
    return image


def open_parquet(source: str | Path | IO[bytes], **options: Any) -> pq.ParquetFile:
    """A parquet file, its footer read; ValueError where what the footer declares is too much to be read. A page that
    holds more than the footer says is not found here.

    Args:
        options: of pyarrow's ParquetFile.
    """
    file = pq.ParquetFile(source, **options)
    try:
        size = source.seek(0, io.SEEK_END) if hasattr(source, "seek") else Path(source).stat().st_size
        most = max(MOST_PARQUET_BYTES, MOST_PARQUET_GROWTH * size)
        _check_declared(file, source, size, most)
    except BaseException:
        file.close()
        raise
    return file


def check_parquet_files(names: Iterable[str]) -> None:
    """`open_parquet` of those of these files, paths or URLs, that are of parquet, before another library reads them."""
    for name in names:
        if name.endswith(".parquet"):
            try:
                with fsspec.open(name, "rb") as source, open_parquet(source):
                    pass
            except ValueError as error:
                raise ValueError(f"{name} cannot be read: {error}") from error


def _check_declared(file: pq.ParquetFile, source: str | Path | IO[bytes], size: int, most: int) -> None:
    layout, groups = file.metadata.schema, [file.metadata.row_group(n) for n in range(file.num_row_groups)]
    widths = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
    # equal rows take next to no bytes in the file, and a list of fixed length its numbers also where it is null
    total = file.metadata.num_rows * sum(_fixed_width(field.type) for field in file.schema_arrow)
    repeated: dict[str, int] = {}  # texts and bytes that the file holds once for many rows: at most this much
    for number in range(len(layout)):
        column = layout.column(number)
        width = widths.get(column.physical_type, max(0, column.length))
        for chunk in (group.column(number) for group in groups):
            total += max(chunk.total_uncompressed_size, chunk.num_values * width)
            if column.physical_type == "BYTE_ARRAY" and "RLE_DICTIONARY" in chunk.encodings:
                largest = chunk.num_values * chunk.total_uncompressed_size
                repeated[column.path] = repeated.get(column.path, 0) + largest
    if total <= most and sum(repeated.values()) > most:
        # each of them is read once, with the numbers of the rows, which the footer's sizes bound
        with pq.ParquetFile(source, read_dictionary=list(repeated)) as once:
            names = [name for name in once.schema_arrow.names if any(f"{p}.".startswith(f"{name}.") for p in repeated)]
            # group by group: pyarrow cannot read a batch of nested columns that begins in one and ends in another
            batches = (once.iter_batches(row_groups=[number], columns=names) for number in range(len(groups)))
            for batch in itertools.chain.from_iterable(batches):
                total += sum(_repeated_bytes(column) for column in batch.columns)
                if total > most:
                    break
    if total > most:
        raise ValueError(
            f"its {size} bytes declare {total} or more to be read, in {file.metadata.num_rows} rows; at most "
            f"{MOST_PARQUET_BYTES} are, or {MOST_PARQUET_GROWTH} times the bytes of the file"
        )


def _fixed_width(kind: pa.DataType) -> int:
    """Bytes of the lists of fixed length in a value."""
    if pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        width = inner.bit_width // 8 if pa.types.is_primitive(inner) else _fixed_width(inner)
        return kind.list_size * max(1, width)
    return sum(_fixed_width(kind.field(number).type) for number in range(kind.num_fields))


def _repeated_bytes(array: pa.Array) -> int:
    """Bytes of texts and bytes in a column, and in what is nested in it, where each row has its own."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0
    if pa.types.is_map(kind):
        return _repeated_bytes(array.keys) + _repeated_bytes(array.items)
    if pa.types.is_struct(kind):
        return sum(_repeated_bytes(part) for part in array.flatten())
    return _repeated_bytes(array.flatten()) if pa.types.is_nested(kind) else 0


def read_yaml(text: str, where: str) -> Any:
    """Content of YAML; ValueError, which names `where`, for what is none, refers to itself or grows by its aliases."""
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"{where} has {len(text)} characters; at most {MOST_YAML_BYTES} are read")
    try:
        count = _count_values(yaml.compose(text, Loader=yaml.SafeLoader), {})
        if count > MOST_YAML_VALUES:
            raise ValueError(f"with its aliases written out it has {count} values; at most {MOST_YAML_VALUES} are read")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no valid YAML: {error}") from error


def _count_values(node: yaml.Node | None, counts: dict[yaml.Node, int | None]) -> int:
    """Values of a node, those of an alias counted wherever it stands."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if node not in counts:
        counts[node] = None  # being counted
        children = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        counts[node] = 1 + sum(_count_values(child, counts) for child in children)
    if counts[node] is None:
        raise ValueError("an alias refers to what it is part of")
    return counts[node]
