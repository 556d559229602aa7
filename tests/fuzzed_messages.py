"""Messages to the policy server that are nearly right: mutations of observations, a function of their seeds."""

import io
from typing import Any

import msgpack
import numpy as np
from PIL import Image
from tiny_checkpoint import EMBODIMENT, stereo_pair

KEYS = ("left", "right", "instruction", "state", "embodiment", "seed", "outputs")
OPENPI = {
    "left": "observation/exterior_image_1_left",
    "right": "observation/exterior_image_1_right",
    "state": "observation/state",
    "instruction": "prompt",
}
DTYPES = ("|b1", "|u1", "<i4", "<i8", "<f4", ">f8", "<f2", "|O", "<U4", "", "uint8", "|V8", "<c8")
TEXTS = (
    "pick up the red cube",
    "pick up the green ball",
    "",
    " ",
    "\0",
    "<bin_3>",
    "</s>",
    "red " * 300,
    "x" * 9000,
    "é😀" * 50,
)


def valid_request(rng: np.random.Generator) -> dict[str, Any]:
    """One that is answered with actions, unless its pair happens to look wrong."""
    left, right = stereo_pair(int(rng.integers(5)), size=int(rng.choice([48, 64, 64, 96])))
    history = int(rng.integers(1, 5))
    state = np.array([0.45, 0.0, 0.2, 0.0, 0.0, 0.1, 1.0]) + rng.uniform(-0.1, 0.1, (history, 7))
    return {
        "left": left,
        "right": right,
        "instruction": TEXTS[int(rng.integers(2))],
        "state": state[0].astype(np.float32) if history == 1 else state,
        "embodiment": EMBODIMENT,
        "seed": int(rng.integers(1000)),
        "outputs": [],
    }


def packed(message: Any) -> bytes:
    """As `wire.pack`, but for anything, with arrays of any dtype; written as openpi-client writes them."""

    def array(value: Any) -> Any:
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}

    return msgpack.packb(message, default=array)


def picture(view: np.ndarray, form: str) -> bytes:
    """A view as a file."""
    file = io.BytesIO()
    Image.fromarray(view).save(file, form)
    return file.getvalue()


def fuzzed(seed: int) -> bytes | str:
    """The message of a seed."""
    rng = np.random.default_rng((13, seed))
    message = valid_request(rng)
    if rng.random() < 0.2:
        form = str(rng.choice(["PNG", "JPEG"]))
        message |= {side: picture(message[side], form) for side in ("left", "right")}
    kind = rng.choice(["values", "values", "values", "structure", "bytes", "bytes", "array", "none", "keys", "noise"])
    if kind == "values":
        for key in rng.choice(KEYS, int(rng.integers(1, 3)), replace=False).tolist():
            message[key] = _other_value(key, message[key], rng)
    elif kind == "structure":
        message = _other_structure(message, rng)
    elif kind == "keys":
        message = {
            OPENPI.get(key, key) if rng.random() < 0.9 else f"observation.{key}": v for key, v in message.items()
        }
    elif kind == "array":
        message[str(rng.choice(["left", "right", "state"]))] = _other_array(rng)
    elif kind == "noise":
        return "text" if rng.random() < 0.2 else rng.bytes(int(rng.integers(200)))
    data = packed(message)
    return _other_bytes(data, rng) if kind == "bytes" else data


def _junk(rng: np.random.Generator) -> Any:
    return [
        None, True, -1, 2**63, 1.5, float("nan"), float("inf"), "predict", b"bytes", [], {}, [[1, [2]]], {"a": [1]},
        "long" * 5000, [0.0] * 7, [0] * 9000, np.zeros(3, np.uint8), np.zeros((2, 2, 3)), np.zeros(0, np.float32),
        msgpack.ExtType(7, b"x"), msgpack.Timestamp(1), np.float32(2.5), np.int64(3), np.bool_(True),
        {b"__ndarray__": 1}, {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"},
        {b"__npgeneric__": True, b"data": 2**63, b"dtype": "|i1"},
    ][int(rng.integers(26))]  # fmt: skip


def _other_value(key: str, value: Any, rng: np.random.Generator) -> Any:
    if rng.random() < 0.3:
        return _junk(rng)
    if key in ("left", "right"):
        return _other_view(value, rng)
    if key == "state":
        return _other_state(np.array(value), rng)
    if key == "instruction":
        return TEXTS[int(rng.integers(len(TEXTS)))]
    if key == "seed":
        return [0, 1, 2**32, 2**64 - 1, -3, 1.0, "1", None][int(rng.integers(8))]
    if key == "outputs":
        return [["keyframe"], ["disparity", "keyframe"], ["depth"], "keyframe", [1], None, ["disparity"]][
            int(rng.integers(7))
        ]
    return ["reset", "hello", EMBODIMENT, EMBODIMENT.upper(), "aloha", ""][int(rng.integers(6))]


def _other_view(value: np.ndarray | bytes, rng: np.random.Generator) -> Any:
    if isinstance(value, bytes):
        return _other_bytes(value, rng)
    side = value.shape[0]
    return [
        lambda: value[::-1],
        lambda: value[:, ::-1],
        lambda: np.ascontiguousarray(value.transpose(2, 0, 1)),
        lambda: value[: side - 1],
        lambda: value[..., :2],
        lambda: value[None],
        lambda: value.astype(np.float32) / 255,
        lambda: value.astype(np.int32),
        lambda: value * 0,
        lambda: np.zeros((1, 20_000, 3), np.uint8),
        lambda: np.zeros((20_000, 1, 3), np.uint8),
        lambda: np.zeros((0, side, 3), np.uint8),
        lambda: rng.integers(0, 256, value.shape, np.uint8),
        lambda: np.clip(value.astype(int) + rng.integers(-4, 5, value.shape), 0, 255).astype(np.uint8),
    ][int(rng.integers(14))]()


def _other_state(state: np.ndarray, rng: np.random.Generator) -> Any:
    extreme = [np.nan, np.inf, -np.inf, 3e38, -1e30, 1e5, 1e-40, 0.0, -0.0][int(rng.integers(9))]
    changed = state.astype(np.float64).copy()
    changed.reshape(-1)[int(rng.integers(changed.size))] = extreme
    return [
        lambda: changed,
        lambda: changed.astype(np.float32),
        lambda: changed.tolist(),
        lambda: state.astype(np.int64),
        lambda: state.astype(bool),
        lambda: state.tolist(),
        lambda: np.repeat(np.atleast_2d(state), 5, axis=0),
        lambda: state[..., :6],
        lambda: state[None, None],
        lambda: [str(number) for number in state.reshape(-1)],
        lambda: [None, *state.reshape(-1)[1:].tolist()],
    ][int(rng.integers(11))]()


def _other_structure(message: dict[str, Any], rng: np.random.Generator) -> Any:
    key = str(rng.choice(KEYS))
    return [
        lambda: {name: value for name, value in message.items() if name != key},
        lambda: {**message, key + "s": 1},
        lambda: {**message, "k" * int(rng.integers(1, 3000)): 1},
        lambda: {**message, **{f"key {i}": i for i in range(int(rng.integers(1, 40)))}},
        lambda: [message],
        lambda: {"request": message},
        lambda: list(message.items()),
        lambda: {name: [value] for name, value in message.items()},
        lambda: {**message, "endpoint": ["infer", "reset", "metadata", 1, np.zeros(2)][int(rng.integers(5))]},
        lambda: {"endpoint": "reset", "seed": [0, -1, "x", 2**63][int(rng.integers(4))]},
        lambda: {
            "observation": {OPENPI.get(name, name).removeprefix("observation/"): v for name, v in message.items()}
        },
        lambda: {OPENPI.get(key, key): message[key], **message},
        lambda: {**message, key: {key: message[key]}},
    ][int(rng.integers(13))]()


def _other_array(rng: np.random.Generator) -> dict[Any, Any]:
    shape = [int(size) for size in rng.integers(-1, 70, int(rng.integers(0, 6)))]
    if rng.random() < 0.2:
        shape = [2**62, 4]
    content = rng.bytes(int(rng.choice([0, 1, 28, 12_288])))
    array = {b"__ndarray__": True, b"data": content, b"dtype": str(rng.choice(DTYPES)), b"shape": shape}
    if rng.random() < 0.3:
        del array[[b"data", b"dtype", b"shape"][int(rng.integers(3))]]
    return array


def _other_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    kind = int(rng.integers(5))
    if kind == 0:  # bits, anywhere
        for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
            changed[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # bytes, where the structure is
        for place in rng.integers(0, 80, int(rng.integers(1, 4))):
            changed[place] = int(rng.integers(256))
    elif kind == 2:
        del changed[int(rng.integers(len(data))) :]
    elif kind == 3:
        changed += rng.bytes(int(rng.integers(1, 50)))
    else:
        place = int(rng.integers(len(data)))
        del changed[place : place + int(rng.integers(1, 30))]
    return bytes(changed)
