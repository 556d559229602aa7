"""Hostile pickles by the thousand: `python pickle_fuzzer.py COUNT SEED` reads them all and prints what came of them.

Three kinds in turn: bytes of a good pickle changed, its opcodes cut, repeated and exchanged, and programs that are put
together from opcodes, numpy's names and their arguments. Reading must end in a value of plain data or in a ValueError,
within the memory allowed; anything else, a crash too, ends the process with another status than 0.
"""

import io
import json
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from stereovla.modeling_stereovla.convert_pickle import Dtype, Name, Record, Unbuilt, read_pickle

MEMORY = 2**30  # bytes that a reading may take beside what the process has at its start
INERT = frozenset({"a.Inert", "b.Other"})
PLAIN = (type(None), bool, int, float, str, bytes, bytearray, np.generic, Record, Name, Dtype, Unbuilt)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


DTYPE, NDARRAY = named("numpy", "dtype"), named("numpy", "ndarray")
RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")
SCALAR = named("numpy._core.multiarray", "scalar")
FROM_BUFFER = named("numpy._core.numeric", "_frombuffer")
FALSE, TRUE, NONE = b"\x89", b"\x88", b"N"


def dtype(code: str, state: bytes = b"") -> bytes:
    return call(DTYPE, text(code), FALSE, TRUE) + state


def good_pickles() -> list[bytes]:
    """Of every protocol that is read."""
    scalars = {"a": 1, "b": [1.5, None, True, "text", b"bytes", 2**70], "c": (1, (2,), frozenset({3}), {4})}
    arrays = {"d": np.arange(6.0).reshape(2, 3), "e": np.float64(2), "f": np.asfortranarray(np.ones((2, 2), "f4"))}
    return [
        *(pickle.dumps(scalars, protocol) for protocol in (2, 4, 5)),
        *(pickle.dumps(scalars | arrays, protocol) for protocol in (3, 4, 5)),
        b"\x80\x04" + named("a", "Inert") + b")\x81}" + text("x") + dtype("f8") + b"sb.",
    ]


def pieces(content: bytes) -> list[bytes]:
    """A pickle's opcodes, each with its argument."""
    places = [place for _, _, place in pickletools.genops(io.BytesIO(content))]
    return [content[start:stop] for start, stop in zip(places, [*places[1:], len(content)], strict=True)]


def changed_bytes(random_: random.Random, good: list[bytes]) -> bytes:
    content = bytearray(random_.choice(good))
    for _ in range(random_.choice((1, 1, 2, 5, 20))):
        place = random_.randrange(len(content))
        match random_.randrange(4):
            case 0:
                content[place] = random_.randrange(256)
            case 1:
                del content[place : place + random_.randrange(1, 9)]
            case 2:
                content[place:place] = random_.randbytes(random_.randrange(1, 9))
            case 3:
                content[place] ^= 1 << random_.randrange(8)
        if not content:
            break
    return bytes(content)


def changed_opcodes(random_: random.Random, good: list[bytes]) -> bytes:
    parts, others = pieces(random_.choice(good)), pieces(random_.choice(good))
    for _ in range(random_.randrange(1, 6)):
        place = random_.randrange(len(parts))
        match random_.randrange(4):
            case 0:
                parts[place : place + random_.randrange(1, 4)] = []
            case 1:
                parts[place:place] = random_.choices(others, k=random_.randrange(1, 4))
            case 2:
                parts[place] = random_.choice(others)
            case 3:
                start = random_.randrange(len(others))
                parts[place:place] = others[start : start + random_.randrange(1, 30)]
        if not parts:
            break
    return b"".join(parts)


def program(random_: random.Random) -> bytes:
    """Calls of numpy's names with wrong, huge and negative arguments, among them the right ones."""

    def value(depth: int = 0) -> bytes:
        kinds = [
            lambda: number(random_.choice((0, 1, -1, 3, 8, 64, -512, 2**31, 2**62, -(2**40), 2**70))),
            lambda: text(random_.choice(("f8", "f4", "O", "V8", "u8", "b1", "U4", "|", "<", "C", "b", "a", "S'x'"))),
            lambda: data(random_.randbytes(random_.choice((0, 1, 4, 8, 16, 64)))),
            lambda: random_.choice((NONE, TRUE, FALSE, b"}", b"]", b")", b"\x8f", NDARRAY, DTYPE)),
            lambda: b"\x96" + struct.pack("<Q", 8) + bytes(8),
            lambda: b"h" + bytes([random_.randrange(4)]),
        ]
        if depth < 3:
            kinds += [
                lambda: tuple_of(*(value(depth + 1) for _ in range(random_.choice((0, 1, 1, 2, 3, 5, 8))))),
                lambda: call(
                    random_.choice((DTYPE, NDARRAY, RECONSTRUCT, SCALAR, FROM_BUFFER, named("a", "Inert"))),
                    *(value(depth + 1) for _ in range(random_.randrange(5))),
                ),
                lambda: dtype(random_.choice(("f8", "V8", "O", "i4"))) + value(depth + 1) + random_.choice((b"b", b"")),
                lambda: call(RECONSTRUCT, NDARRAY, tuple_of(number(0)), data(b"b")) + b"\x94" + value(depth + 1) + b"b",
                lambda: call(SCALAR, dtype("f8"), data(random_.randbytes(random_.choice((7, 8, 9))))),
                lambda: call(FROM_BUFFER, value(depth + 1), dtype("f8"), value(depth + 1), text("C")),
                lambda: b"]" + value(depth + 1) + b"a",
                lambda: b"}" + value(depth + 1) + value(depth + 1) + b"s",
                lambda: b"](" + value(depth + 1) * random_.choice((1, 50)) + b"e",
                lambda: value(depth + 1) + b"2",
                lambda: value(depth + 1) + random_.choice((b"q\x00", b"q\x01", b"\x94", b"0", b"(1", b"\x85", b"\x87")),
            ]
        return random_.choice(kinds)()

    return b"\x80\x05" + value() + random_.choice((b"", b"0", value())) + b"."


def hostile(seed: int, count: int):
    """`count` inputs that follow from the seed."""
    random_, good = random.Random(seed), good_pickles()
    for number_ in range(count):
        if number_ % 3 == 2:
            yield program(random_)
        else:
            yield (changed_bytes, changed_opcodes)[number_ % 3](random_, good)


def walk(content) -> int:
    """The number of values in what was read; every byte of every array is touched. AssertionError for a strange one."""
    todo, seen = [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            assert value.dtype.kind in "biuf" and type(value) is np.ndarray
            value.tobytes()
        elif isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        else:
            assert isinstance(value, PLAIN), type(value)
            todo += [value.state] if isinstance(value, Record) else []
    return len(seen)


def campaign(count: int, seed: int) -> dict:
    """What came of reading them: how many values, how many refusals, and the longest time."""
    outcomes, longest = Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hostile.pkl")
        for content in hostile(seed, count):
            path.write_bytes(content)
            start = time.perf_counter()
            try:
                found = read_pickle(path, INERT)
            except ValueError:
                outcomes["refused"] += 1
            else:
                walk(found)
                outcomes["read"] += 1
            longest = max(longest, time.perf_counter() - start)
    return {**outcomes, "longest_s": round(longest, 4)}


if __name__ == "__main__":
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(campaign(int(sys.argv[1]), int(sys.argv[2]))))
