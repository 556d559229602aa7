"""What server and client say to each other: msgpack maps, arrays as (dtype, shape, bytes). Nothing in it can run code.

The server greets with {"type": "hello", protocol, model, views, reads_depth, embodiments, chunk_size, state_history,
max_message_bytes}; `views` are the names of those that the model sees, reads_depth says whether it is shown the true
depth. Then, in order:

- request {"type": "predict", left, right, instruction, state, embodiment, seed (optional)}: left, right uint8
  (H, W, 3); state (7,) or (k, 7), oldest first, robot units; the same seed gives the same noise. "right" only where it
  is one of `views`; another view "wrist" is "view.wrist", and may be absent. A model that is shown the depth also needs
  "depth", float32 (H, W) m of the left view, 0 = unknown, and takes "depth.wrist".
- answer {"type": "prediction", actions float32 (chunk, 7) in robot units, latency_s, model},
- or {"type": "error", kind, message}: kind "malformed" (no such message), "invalid_input" (values that cannot be used)
  or "internal" (the server's fault), "closing" (the server shuts down). The connection stays open, but for: a message
  over the size limit (1009); too many connections, or more bytes waiting in all of them than the server holds (1013); a
  server that shuts down (1001).

All but arrays is small (MAX_KEYS, MAX_KEY_BYTES, MAX_VALUE_BYTES): a message is measured before anything is built of
it.
"""

import math
import reprlib
from typing import Any

import msgpack
import numpy as np

VERSION = 1
ARRAY = 1  # msgpack extension type
DTYPES = ("bool", "uint8", "int32", "int64", "float32", "float64")
MAX_DIMENSIONS = 4
DEFAULT_LIMIT = 32 * 2**20  # bytes; a 1080p pair has 12.4 MB
MAX_KEYS = 16
MAX_KEY_BYTES = 64
MAX_VALUE_BYTES = 2**16  # of a text, a number, a list; an array may fill the message
_MAPS = (*range(0x80, 0x90), 0xDE, 0xDF)  # first bytes, of https://github.com/msgpack/msgpack/blob/master/spec.md
_EXTENSIONS = (*range(0xC7, 0xCA), *range(0xD4, 0xD9))
_BYTES = range(0xC4, 0xC7)


class ProtocolError(ValueError):
    """Bytes that are no message of this protocol."""


def pack(message: dict[str, Any]) -> bytes:
    """Message with numpy arrays -> bytes."""
    return msgpack.packb(message, default=_pack_array)


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray) or value.dtype.name not in DTYPES:
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"cannot send a {kind}; arrays may hold {', '.join(DTYPES)}")
    little = value.astype(value.dtype.newbyteorder("<"), copy=False)
    return msgpack.ExtType(ARRAY, msgpack.packb((value.dtype.name, value.shape, little.tobytes())))


def unpack(data: bytes | str) -> dict[str, Any]:
    """Inverse of `pack`; ProtocolError for anything else."""
    if isinstance(data, str):
        raise ProtocolError("a text message; messages are binary msgpack maps")
    try:
        _measure(data)
        return msgpack.unpackb(data, ext_hook=_unpack_array, object_pairs_hook=_without_repeats)
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises ValueError, TypeError, RecursionError and its own kinds
        raise ProtocolError(f"no msgpack message: {type(error).__name__}: {error}") from error


def shown(value: Any) -> str:
    """The value as errors name it, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _measure(data: bytes) -> None:
    """ProtocolError unless the message is a map of few keys, in which nothing is large but arrays. Builds nothing of
    it: a list of 30 million numbers would be a gigabyte.
    """
    reader = _reader(data)
    if data and data[0] not in _MAPS and data[0] != 0xC1:  # 0xC1 begins nothing
        raise ProtocolError("a message is a map, this is something else")
    count = reader.read_map_header()
    if count > MAX_KEYS:
        raise ProtocolError(f"a map of {count:,} keys; at most {MAX_KEYS} are read")
    for _ in range(count):
        for name, limit in (("key", MAX_KEY_BYTES), ("value", MAX_VALUE_BYTES)):
            begin = reader.tell()
            reader.skip()
            size = reader.tell() - begin
            if size > limit and not (name == "value" and data[begin] in _EXTENSIONS):
                raise ProtocolError(f"a {name} of {size:,} bytes that is no array; at most {limit:,} are read")


def _reader(data: bytes) -> msgpack.Unpacker:
    reader = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
    reader.feed(data)
    return reader


def _without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ProtocolError(f"a map names a key twice; its keys are {', '.join(shown(key) for key, _ in pairs)}")
    return found


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise ProtocolError(f"unknown extension type {code}; arrays have {ARRAY}")
    reader = _reader(data)
    if reader.read_array_header() != 3:
        raise ProtocolError("an array is (dtype, shape, bytes)")
    for name in ("dtype", "shape"):
        begin = reader.tell()
        reader.skip()
        if reader.tell() - begin > MAX_KEY_BYTES:
            raise ProtocolError(f"an array whose {name} has {reader.tell() - begin:,} bytes; {MAX_KEY_BYTES} are read")
    if reader.tell() < len(data) and data[reader.tell()] not in _BYTES:
        raise ProtocolError("an array is (dtype, shape, bytes)")
    parts = msgpack.unpackb(data)
    dtype, shape, content = parts
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError(f"an array of {shown(dtype)}; allowed are {', '.join(DTYPES)}")
    sizes_fit = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes_fit or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"an array of shape {shown(shape)}; allowed are up to {MAX_DIMENSIONS} sizes of at least 0")
    itemsize = np.dtype(dtype).itemsize
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * itemsize:
        raise ProtocolError(f"the bytes of an array do not fit its shape {shape} of {dtype}")
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape)
