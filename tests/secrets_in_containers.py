"""Secrets of every kind, made up from a seed, and files of every kind that hold one."""

import base64
import bz2
import gzip
import io
import json
import lzma
import random
import string
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

LETTERS = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
UPPER = string.ascii_uppercase + string.digits
# what a token of each kind looks like: text, and in parentheses how many of which letters
FORMS = (
    *("hf_(34a)", "gh" + "p_(36)", "gh" + "o_(36)", "gh" + "s_(36)", "github_" + "pat_(22)_(59)", "glpat-(20)"),
    *("AKI" + "A(16U)", "aws_secret" + "_access_key = (40)", "s" + "k-(48)", "s" + "k-proj-(74)T3BlbkFJ(74)"),
    *("s" + "k-ant-api03-(93)AA", "AI" + "za(35)", "xox" + "b-(12d)-(12d)-(24)", "sk_" + "live_(24)", "npm" + "_(36)"),
    *("pypi" + "-AgEIcHlwaS5vcmc(80)", "WANDB_API_KEY=(40h)", "SG" + ".(22).(43)", "r8" + "_(37)", "dapi" + "(32h)"),
    *("eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0.(43)", "postgres://bob:(16)9x7@db.host/x"),
    *(
        "https://bob:(16)9x7@host.org/x",
        "dop_" + "v1_(64h)",
        "dckr_" + "pat_(27)",
        "hvs" + ".(95)",
        "lin_" + "api_(40)",
    ),
    *("https://hooks.slack" + ".com/services/T(8U)/B(8U)/(24)", "glsa" + "_(32)_(8h)", "Authorization: Bearer (40)7a9"),
    *("-----BEGIN " + "RSA PRIVATE KEY-----", "-----BEGIN " + "OPENSSH PRIVATE KEY-----", "gsk" + "_(52)"),
    *(
        "AccountKey=" + "(86)==",
        '{"username":"bob","key":"' + '(32h)"}',
        "login bob password (24)7a9",
        "shpat" + "_(32h)",
    ),
    *("(10d):" + "AA(33)", "secret" + "_(40)7a9", "/home" + "/someone/data"),
)
ALPHABETS = {"a": string.ascii_letters, "U": UPPER, "d": string.digits, "h": HEX, "": LETTERS}


def secrets(count: int, seed: int) -> list[str]:
    """As many, of all forms in turn."""
    random_ = random.Random(seed)
    return [_filled(FORMS[number % len(FORMS)], random_) for number in range(count)]


def _filled(form: str, random_: random.Random) -> str:
    head, *parts = form.split("(")
    for part in parts:
        rule, _, tail = part.partition(")")
        count = int("".join(filter(str.isdigit, rule)))
        alphabet = ALPHABETS["".join(filter(str.isalpha, rule))]
        head += "".join(random_.choices(alphabet, k=count)) + tail
    return head


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, secret: str, compressed: bool, kind: str = "text") -> None:
    texts = PngImagePlugin.PngInfo()
    if kind == "text":
        texts.add_text("note", f"it is {secret}", zip=compressed)
    else:
        texts.add_itxt("note", f"it is {secret}", zip=compressed)
    Image.new("RGB", (8, 8)).save(path, pnginfo=texts)


def jpeg(path: Path, secret: str, exif: bool) -> None:
    image = Image.new("RGB", (8, 8))
    if exif:
        entries = Image.Exif()
        entries[0x010E] = secret  # ImageDescription
        image.save(path, format="JPEG", exif=entries)
    else:
        image.save(path, format="JPEG", comment=secret)


def picture_bytes(secret: str) -> bytes:
    buffer = io.BytesIO()
    texts = PngImagePlugin.PngInfo()
    texts.add_text("note", secret, zip=True)
    Image.new("RGB", (8, 8)).save(buffer, format="PNG", pnginfo=texts)
    return buffer.getvalue()


def table(path: Path, column: pa.Array, codec: str, metadata: dict | None = None) -> None:
    pq.write_table(pa.table({"a": column}).replace_schema_metadata(metadata), path, compression=codec)


def archive(path: Path, secret: str) -> None:
    with tarfile.open(path, "w") as file:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(secret)
        file.addfile(entry, io.BytesIO(secret.encode()))


def zipped(path: Path, secret: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.txt", secret)


def hdf5(path: Path, secret: str) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.frombuffer(secret.encode().ljust(4096, b"\0"), "u1"), compression="gzip")


def escaped(secret: str) -> str:
    return "".join(f"\\u{ord(letter):04x}" for letter in secret)


# name of the file -> what writes it with a secret
CONTAINERS: dict[str, Callable[[Path, str], object]] = {
    "notes.md": lambda path, secret: path.write_text(f"# Notes\n\nit is {secret}\n"),
    "config.json": lambda path, secret: path.write_text(json.dumps({"layers": 2, "note": secret}, indent=1)),
    "escaped.json": lambda path, secret: path.write_text('{"note": "it is ' + escaped(secret) + '"}'),
    "a.yaml": lambda path, secret: path.write_text(f"a: 1\nnote: '{secret}'\n"),
    "code.py": lambda path, secret: path.write_text(f"# {secret}\nx = 1\n"),
    "utf16.txt": lambda path, secret: path.write_text(f"it is {secret}\n", encoding="utf-16"),
    "utf32.txt": lambda path, secret: path.write_text(f"it is {secret}\n", encoding="utf-32"),
    "mark.txt": lambda path, secret: path.write_text(f"it is {secret}\n", encoding="utf-8-sig"),
    "base64.txt": lambda path, secret: path.write_text(base64.b64encode(f"it is {secret} ".encode()).decode()),
    "twice.txt": lambda path, secret: path.write_bytes(base64.b64encode(base64.b64encode(f" {secret} ".encode()))),
    "hex.txt": lambda path, secret: path.write_text(f"it is {secret}".encode().hex()),
    "percent.txt": lambda path, secret: path.write_text("a=" + quote(f"it is {secret}", safe="")),
    "a.safetensors": lambda path, secret: save_file({"a": torch.zeros(9)}, path, metadata={"note": secret}),
    "bytes.safetensors": lambda path, secret: save_file(
        {"a": torch.frombuffer(bytearray(f"\0\0 {secret} \0".encode()), dtype=torch.uint8)}, path
    ),
    "text.png": lambda path, secret: png(path, secret, False),
    "packed.png": lambda path, secret: png(path, secret, True),
    "itext.png": lambda path, secret: png(path, secret, True, "itext"),
    "comment.jpg": lambda path, secret: jpeg(path, secret, False),
    "exif.jpg": lambda path, secret: jpeg(path, secret, True),
    "snappy.parquet": lambda path, secret: table(path, pa.array(["a", f"it is {secret}"] * 40), "snappy"),
    "zstd.parquet": lambda path, secret: table(path, pa.array([f"it is {secret}".encode()] * 40), "zstd"),
    "nested.parquet": lambda path, secret: table(path, pa.array([[{"b": f" {secret} "}]] * 40), "gzip"),
    "picture.parquet": lambda path, secret: table(path, pa.array([picture_bytes(secret)] * 3), "snappy"),
    "metadata.parquet": lambda path, secret: table(path, pa.array([1]), "snappy", {"note": f"it is {secret}"}),
    "a.txt.gz": lambda path, secret: path.write_bytes(gzip.compress(secret.encode())),
    "a.bz2": lambda path, secret: path.write_bytes(bz2.compress(secret.encode())),
    "a.xz": lambda path, secret: path.write_bytes(lzma.compress(secret.encode())),
    "a.zip": zipped,
    "renamed.json": zipped,
    "a.tar": archive,
    "a.h5": hdf5,
    "events.out.tfevents.1": lambda path, secret: path.write_bytes(
        struct.pack("<QI", 99, 7) + b"\x1a\x20" + secret.encode() + bytes(4)
    ),
}
