"""openpi's wire: msgpack maps, in which arrays are maps too. Nothing in it can run code.

As openpi-client 0.1.2 writes it (`msgpack_numpy.py`, https://github.com/Physical-Intelligence/openpi at 15a9616): an
array is {b"__ndarray__": True, b"data": bytes in C order, b"dtype": "<f4", b"shape": [...]}, a numpy scalar
{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}.

On connect the server sends packed metadata. Then, in order, a client sends an observation and is answered by a map with
`actions`; a text frame is an error, after which the connection is closed.
"""

import math
import reprlib
from typing import Any

import msgpack
import numpy as np

NAMES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
DTYPES = {dtype.str: dtype for name in NAMES for dtype in (np.dtype(name), np.dtype(name).newbyteorder(">"))}
MAX_DIMENSIONS = 4
DEFAULT_LIMIT = 32 * 2**20  # bytes; a 1080p pair has 12.4 MB
MAX_KEYS = 128  # of all maps of a message; an array has 4
MAX_KEY_BYTES = 128
MAX_PLAIN_BYTES = 2**16  # of all texts, numbers and lists of a message; byte strings, as of arrays, may fill it
MAX_DEPTH = 4  # maps within maps
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_MAPS = (*range(0x80, 0x90), 0xDE, 0xDF)  # first bytes, of https://github.com/msgpack/msgpack/blob/master/spec.md
_BYTES = range(0xC4, 0xC7)


class WireError(ValueError):
    """Bytes that are no message."""


def pack(message: dict[Any, Any]) -> bytes:
    """Message with numpy arrays and scalars -> bytes; TypeError for what cannot be sent."""
    return msgpack.packb(message, default=_packed)


def _packed(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.str not in DTYPES:
        kind = f"numpy value of {value.dtype}" if isinstance(value, (np.ndarray, np.generic)) else type(value).__name__
        raise TypeError(f"cannot send a {kind}; arrays may hold {', '.join(NAMES)}")
    if isinstance(value, np.generic):
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def unpack(data: bytes | str) -> dict[Any, Any]:
    """Inverse of `pack`, arrays read-only and in this machine's byte order, scalars as Python's; WireError for anything
    else.
    """
    if isinstance(data, str):
        raise WireError("a text message; messages are binary msgpack maps")
    try:
        message = msgpack.unpackb(data, ext_hook=_no_extension, object_pairs_hook=_unpacked)
    except WireError:
        raise
    except Exception as error:  # msgpack raises ValueError, TypeError, RecursionError and its own kinds
        raise WireError(f"no msgpack message: {type(error).__name__}: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"a message is a map, this is {shown(message)}")
    return message


def unpack_bounded(data: bytes | str) -> dict[Any, Any]:
    """`unpack` of a stranger's message: WireError unless it is a map of few keys, in which nothing is large but byte
    strings. It is measured before anything is built of it: a list of 30 million numbers would be a gigabyte.
    """
    if isinstance(data, bytes):
        try:
            _measure(data)
        except (msgpack.UnpackException, msgpack.StackError, ValueError) as error:
            if isinstance(error, WireError):
                raise
            raise WireError(f"no msgpack message: {type(error).__name__}: {error}") from error
    return unpack(data)


def shown(value: Any) -> str:
    """The value as errors name it, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _measure(data: bytes) -> None:
    if not data or data[0] not in _MAPS:
        raise WireError("a message is a map, this is something else")
    reader = msgpack.Unpacker(max_buffer_size=len(data))
    reader.feed(data)
    left = [reader.read_map_header()]  # keys to come of each open map
    keys, plain = left[0], 0
    while left:
        if keys > MAX_KEYS:
            raise WireError(f"maps of {keys:,} keys; at most {MAX_KEYS} are read")
        if not left[-1]:
            left.pop()
            continue
        left[-1] -= 1
        begin = reader.tell()
        reader.skip()
        value = reader.tell()
        if value - begin > MAX_KEY_BYTES:
            raise WireError(f"a key of {value - begin:,} bytes; at most {MAX_KEY_BYTES} are read")
        if value < len(data) and data[value] in _MAPS:
            if len(left) == MAX_DEPTH:
                raise WireError(f"maps within maps; at most {MAX_DEPTH} are read")
            left.append(reader.read_map_header())
            keys += left[-1]
            continue
        reader.skip()
        if data[value] not in _BYTES:
            plain += reader.tell() - value
            if plain > MAX_PLAIN_BYTES:
                raise WireError(
                    f"texts, numbers and lists of {plain:,} bytes, arrays apart; at most {MAX_PLAIN_BYTES:,} are read"
                )


def _no_extension(code: int, data: bytes) -> Any:
    raise WireError(f"a msgpack extension of type {code}; arrays are maps with the key {_ARRAY!r}")


def _unpacked(pairs: list[tuple[Any, Any]]) -> Any:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise WireError(f"a map names a key twice; its keys are {', '.join(shown(key) for key, _ in pairs)}")
    if _ARRAY in found:
        return _array(found)
    if _SCALAR in found:
        return _scalar(found)
    return found


def _dtype(found: dict[Any, Any], names: tuple[bytes, ...]) -> np.dtype:
    """That of an array or a scalar, whose map must have the keys `names`."""
    if found.keys() != set(names):
        raise WireError(f"an array or scalar with the keys {shown(list(found))}; it has {', '.join(map(repr, names))}")
    dtype = found[b"dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WireError(f"an array or scalar of {shown(dtype)}; allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _array(found: dict[Any, Any]) -> np.ndarray:
    dtype = _dtype(found, (_ARRAY, b"data", b"dtype", b"shape"))
    shape, content = found[b"shape"], found[b"data"]
    sizes_fit = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes_fit or len(shape) > MAX_DIMENSIONS:
        raise WireError(f"an array of shape {shown(shape)}; allowed are up to {MAX_DIMENSIONS} sizes of at least 0")
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * dtype.itemsize:
        raise WireError(f"the bytes of an array do not fit its shape {shape} of {dtype.str}")
    array = np.frombuffer(content, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _scalar(found: dict[Any, Any]) -> bool | int | float:
    dtype, value = _dtype(found, (_SCALAR, b"data", b"dtype")), found[b"data"]
    try:
        if type(value) not in (bool, int, float):
            raise ValueError
        with np.errstate(over="ignore"):
            return dtype.type(value).item()
    except (ValueError, OverflowError):
        raise WireError(f"a scalar of {dtype.str} cannot be {shown(value)}") from None
