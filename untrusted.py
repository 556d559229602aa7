"""What files of strangers may make this project do: which names they may lead to, and how large what they declare may
be. Everything is decided before it is opened or allocated.
"""

import io
import re
import string
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from PIL import Image

MOST_PIXELS = 2**26  # of a picture, twice those of 8K; as RGB it takes 200 MB
MOST_YAML_BYTES = 2**20
MOST_YAML_VALUES = 10_000  # with every alias written out; a description of a robot has some dozens
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
