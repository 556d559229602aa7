"""What server and client say to each other: msgpack maps, arrays as (dtype, shape, bytes). Nothing in it can run code.

The server greets with {"type": "hello", protocol, model, embodiments, chunk_size, state_history,
max_message_bytes}. Then, in order:

- request {"type": "predict", left, right, instruction, state, embodiment, seed (optional)}: left, right uint8
  (H, W, 3); state (7,) or (k, 7), oldest first, robot units; the same seed gives the same noise.
- answer {"type": "prediction", actions float32 (chunk, 7) in robot units, latency_s, model},
- or {"type": "error", kind, message}: kind "malformed" (no such message), "invalid_input" (values that cannot be used)
  or "internal" (the server's fault). The connection stays open; only a message over the size limit closes it.
"""

import math
from typing import Any

import msgpack
import numpy as np

VERSION = 1
ARRAY = 1  # msgpack extension type
DTYPES = ("bool", "uint8", "int32", "int64", "float32", "float64")
MAX_DIMENSIONS = 4
DEFAULT_LIMIT = 32 * 2**20  # bytes; a 1080p pair has 12.4 MB


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
        message = msgpack.unpackb(data, ext_hook=_unpack_array)
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises ValueError, TypeError, RecursionError and its own kinds
        raise ProtocolError(f"no msgpack message: {type(error).__name__}: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a message is a map, not {type(message).__name__}")
    return message


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise ProtocolError(f"unknown extension type {code}; arrays have {ARRAY}")
    parts = msgpack.unpackb(data)
    if not isinstance(parts, list) or len(parts) != 3:
        raise ProtocolError("an array is (dtype, shape, bytes)")
    dtype, shape, content = parts
    if dtype not in DTYPES:
        raise ProtocolError(f"an array of {dtype!r}; allowed are {', '.join(DTYPES)}")
    sizes_fit = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
    if not sizes_fit or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"an array of shape {shape!r}; allowed are up to {MAX_DIMENSIONS} sizes of at least 0")
    itemsize = np.dtype(dtype).itemsize
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * itemsize:
        raise ProtocolError(f"the bytes of an array do not fit its shape {shape} of {dtype}")
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).reshape(shape)
