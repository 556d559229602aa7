"""Pickles are read as data: as pickle reads them where they hold data, and refused, without harm, where they do not."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from pickle_fuzzer import (
    DTYPE,
    FALSE,
    FROM_BUFFER,
    NDARRAY,
    NONE,
    RECONSTRUCT,
    SCALAR,
    call,
    campaign,
    data,
    dtype,
    named,
    number,
    text,
    tuple_of,
)
from released_miniature import STATISTICS, write_preprocessor

from stereovla.modeling_stereovla import convert_pickle
from stereovla.modeling_stereovla.convert_pickle import Record, read_pickle
from stereovla.modeling_stereovla.convert_preprocessor import read_statistics

START = b"\x80\x05"
POINTER = data(struct.pack("<Q", 0x4141414141414141))
# a dtype of 8 bytes, one object, whose flags say that it has no objects
OBJECT_FIELD = dtype("V8") + tuple_of(
    number(3),
    text("|"),
    NONE,
    tuple_of(text("a")),
    b"}" + text("a") + tuple_of(dtype("O"), number(0)) + b"s",
    number(8),
    number(1),
    number(0),
)
FLAGS = dtype("f8") + tuple_of(number(3), text("<"), NONE, NONE, NONE, number(-1), number(-1), number(63)) + b"b"
EMPTY = call(RECONSTRUCT, NDARRAY, tuple_of(number(0)), data(b"b"))
ATTACKS = {
    "ndarray before its buffer": (
        call(NDARRAY, tuple_of(number(64)), dtype("u8"), data(bytes(512)), number(-512)),
        "numpy.ndarray is called",
    ),
    "ndarray far away": (
        call(NDARRAY, tuple_of(number(1)), dtype("u8"), b"\x96" + struct.pack("<Q", 8) + bytes(8), number(-(2**40))),
        "numpy.ndarray is called",
    ),
    "ndarray by class": (NDARRAY + tuple_of(tuple_of(number(9))) + b"\x81", "no class that pickle would make it of"),
    "objects in a reconstructed array": (
        EMPTY + tuple_of(number(1), tuple_of(number(1)), OBJECT_FIELD + b"b", FALSE, POINTER) + b"b",
        "dtype 'V8'; arrays of statistics have one of",
    ),
    "objects in a number": (call(SCALAR, OBJECT_FIELD + b"b", POINTER), "dtype 'V8'"),
    "objects in a buffer": (call(FROM_BUFFER, POINTER, dtype("O"), tuple_of(number(1)), text("C")), "dtype 'O'"),
    "flags of a dtype": (FLAGS, "has fields, names, a sub-array or flags"),
    "a state of a dtype that is none": (dtype("f8") + b"]b", "is not that of a number"),
    "more than the buffer": (
        call(FROM_BUFFER, data(bytes(8)), dtype("f8"), tuple_of(number(2)), text("C")),
        r"8 bytes for an array \(2,\) of f8",
    ),
    "a shape that overflows": (
        call(FROM_BUFFER, data(b""), dtype("f8"), tuple_of(number(0), number(2**62), number(2**62)), text("C")),
        "at most 32 of less than 2",
    ),
    "a negative shape": (
        call(FROM_BUFFER, data(bytes(8)), dtype("f8"), tuple_of(number(-1)), text("C")),
        "from 0 on",
    ),
    "a short number": (call(SCALAR, dtype("f8"), data(bytes(7))), r"7 bytes for an array \(\) of f8"),
    "a subclass": (call(RECONSTRUCT, DTYPE, tuple_of(number(0)), data(b"b")), "_reconstruct is called with other"),
    "a large start": (call(RECONSTRUCT, NDARRAY, tuple_of(number(2**40)), data(b"b")), "_reconstruct is called with"),
    "a state of an array twice": (
        EMPTY + tuple_of(number(1), tuple_of(number(1)), dtype("u1"), FALSE, data(b"a")) * 2 + b"bb",
        "a tuple is given a state",
    ),
    "truth values that are none": (
        call(FROM_BUFFER, data(b"\x02"), dtype("b1"), tuple_of(number(1)), text("C")),
        "other bytes than 0 and 1",
    ),
    "a persistent id": (NONE + b"Q", "opcode BINPERSID"),
    "an extension": (b"\x82\x01", "opcode EXT1"),
    "a buffer from outside": (b"\x97", "opcode NEXT_BUFFER"),
    "a call of a list": (b"])R", "something is called that is no name"),
    "keys that collide": (b"}" + number(2**61 - 1) + NONE + b"s", "integers of 32 bits"),
    "nested keys": (b"}" + b")\x85\x85" + NONE + b"s", "a key or a member of a set is a tuple"),
    "below the mark": (b"](" + b"a", "from below a mark"),
    "an unknown place": (b"h\x07", "KeyError: 7"),
}


def read(tmp_path: Path, content: bytes, inert: frozenset[str] = frozenset()):
    (tmp_path / "a.pkl").write_bytes(content)
    return read_pickle(tmp_path / "a.pkl", inert)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_pickle_never_writes_is_refused(tmp_path, name):
    program, message = ATTACKS[name]
    with pytest.raises(ValueError, match=message):
        read(tmp_path, START + program + b".")


def test_arrays_over_the_same_bytes_are_counted_each(tmp_path):
    shared = data(bytes(2**20)) + b"\x94" + dtype("f8") + b"\x94("
    again = call(FROM_BUFFER, b"h\x00", b"h\x01", tuple_of(number(2**17)), text("C"))
    with pytest.raises(ValueError, match="its arrays have more than 67108864 bytes"):
        read(tmp_path, START + shared + again * 65 + b"t.")


def test_sizes_are_limited_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_pickle, "MOST_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1000 opcodes"):
        read(tmp_path, START + b"\x8f" * 1000 + b".")
    monkeypatch.setattr(convert_pickle, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="has 12 bytes; a pickle of statistics is read up to 10"):
        read(tmp_path, bytes(12))


def test_numbers_of_either_byte_order_and_layout_have_their_values(tmp_path):
    assert read(tmp_path, START + call(SCALAR, dtype("f8"), data(struct.pack("<d", 2.5))) + b".") == 2.5
    assert read(tmp_path, pickle.dumps([{1, "a"}, frozenset({None, b"b"})], 4)) == [{1, "a"}, frozenset({None, b"b"})]
    for protocol in (3, 4, 5):
        for array in (np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.eye(3, 2)), np.ones((0, 4), "f4")):
            found = read(tmp_path, pickle.dumps({"first": array, "again": array}, protocol))
            assert np.array_equal(found["first"], array) and found["first"].shape == array.shape
            assert found["again"] is found["first"] and found["first"].dtype == array.dtype


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.booleans() | st.none()
leaves = numbers | st.text() | st.binary(max_size=300)
contents = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text() | st.integers(-(2**31), 2**31 - 1), inner, max_size=5)
        | st.tuples(inner, inner)
    ),
    max_leaves=30,
)
arrays = numpy_st.arrays(
    st.sampled_from(("?", "i1", "<i8", ">i4", "u2", "<f4", ">f8", "f2")),
    numpy_st.array_shapes(min_dims=0, min_side=0, max_side=4),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=contents, array=arrays, protocol=st.integers(3, 5))
def test_data_reads_as_pickle_reads_it(tmp_path_factory, content, array, protocol):
    path = tmp_path_factory.getbasetemp() / "data.pkl"
    path.write_bytes(pickle.dumps([content, array, [content]], protocol))
    ours, theirs = read_pickle(path), pickle.loads(path.read_bytes())
    assert ours[::2] == theirs[::2] == [content, [content]]
    native = array.dtype.newbyteorder("=")  # which pickle makes of some, and not of others
    assert ours[1].shape == array.shape and ours[1].dtype.newbyteorder("=") == native
    assert ours[1].astype(native).tobytes() == theirs[1].astype(native).tobytes() == array.astype(native).tobytes()


def test_objects_of_inert_classes_keep_their_state(tmp_path):
    program = named("a", "B") + b")\x81}" + text("x") + number(3) + b"sb."
    assert read(tmp_path, START + program, frozenset({"a.B"})) == Record("a.B", {"x": 3})
    with pytest.raises(ValueError, match="this file also names a.B. Nothing of it was imported or run"):
        read(tmp_path, START + program)


def test_statistics_are_arrays_of_a_robots_size(tmp_path):
    write_preprocessor(tmp_path / "good")
    assert read_statistics(tmp_path / "good")[0]["epiclab_franka"]["action"]["max"] == (
        STATISTICS["action"]["max"].tolist()
    )
    laughs: list = [1.0]
    for _ in range(30):
        laughs = [laughs] * 10  # 10^30 numbers, were they counted
    for name, value, message in (
        ("laughs", laughs, "proprio min is a list, not an array"),
        ("long", np.zeros(300), "proprio min has 300 dimensions; at most 256 are read"),
    ):
        write_preprocessor(tmp_path / name, {key: {"min": value, "max": value} for key in STATISTICS})
        with pytest.raises(ValueError, match=message):
            read_statistics(tmp_path / name)


def test_fuzzed_pickles_are_read_or_refused():
    outcomes = campaign(1000, seed=0)
    assert outcomes["read"] + outcomes["refused"] == 1000 and outcomes["read"] > 80


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_fuzzed_pickles_are_read_or_refused_many(seed):
    """100,000 in all, each process with a limit on its memory; a crash would end it."""
    fuzzer = Path(__file__).parents[1] / "pickle_fuzzer.py"
    run = subprocess.run([sys.executable, str(fuzzer), "25000", str(seed)], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.returncode}: {run.stderr[-2000:]}"
    outcomes = json.loads(run.stdout)
    assert outcomes["read"] + outcomes["refused"] == 25000 and outcomes["read"] > 2500
