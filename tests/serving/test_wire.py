"""openpi's wire, against openpi-client's own form of messages, written down byte by byte."""

import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest

from stereovla.serving import wire

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", wire.NAMES)
def test_arrays_come_back_as_they_were(dtype):
    value = np.arange(0 if dtype.startswith("u") else -3, 9 if dtype.startswith("u") else 6)[:9].astype(dtype)
    value = np.concatenate([value, value[:3]]).reshape(2, 3, 2)
    for array in (
        value,
        value.transpose(2, 0, 1),
        value[:0],
        value.astype(value.dtype.newbyteorder(">")),
        value[0, 0, 0],
    ):
        back = wire.unpack_bounded(wire.pack({"a": np.asarray(array)}))["a"]
        assert back.dtype == np.dtype(dtype) and back.dtype.isnative and back.shape == array.shape
        np.testing.assert_array_equal(back, array)
    scalar = wire.unpack_bounded(wire.pack({"a": value.reshape(-1)[0]}))["a"]
    assert scalar == value.reshape(-1)[0] and type(scalar) in (bool, int, float)


def test_messages_have_openpis_form():
    """As openpi_client/msgpack_numpy.py packs them: byte keys, dtype as numpy's short text."""
    plain = msgpack.unpackb(wire.pack({"a": np.arange(3, dtype=np.float32), "b": np.float32(1.5)}))
    data = np.arange(3, dtype="<f4").tobytes()
    assert plain["a"] == {b"__ndarray__": True, b"data": data, b"dtype": "<f4", b"shape": [3]}
    assert plain["b"] == {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}


def test_objects_are_not_sent():
    for value in (np.array([object()]), object(), np.array(["text"]), np.array([1j])):
        with pytest.raises(TypeError, match="cannot send"):
            wire.pack({"a": value})


def array(**changes) -> bytes:
    parts = {b"__ndarray__": True, b"data": b"1234", b"dtype": "|u1", b"shape": [2, 2]}
    return msgpack.packb({"a": {**parts, **{name.encode(): value for name, value in changes.items()}}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array(dtype="|O"), r"of '\|O'; allowed are \|b1, "),
        (array(dtype="uint8"), "of 'uint8'"),
        (array(dtype=1), "of 1"),
        (array(data=b"123"), r"do not fit its shape \[2, 2\]"),
        (array(data="1234"), "do not fit its shape"),
        (array(shape=[-1]), r"of shape \[-1\]"),
        (array(shape=[1] * 9), "of shape"),
        (array(shape=[True]), "of shape"),
        (array(shape=4), "of shape 4"),
        (array(shape=[2**62, 4]), "do not fit its shape"),
        (array(more=1), "it has b'__ndarray__', b'data', b'dtype', b'shape'"),
        (msgpack.packb({"a": {b"__ndarray__": True}}), "it has b'__ndarray__'"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}), "of |u1 cannot be 300"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}), "of <f4 cannot be 'x'"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"")}), "extension of type 5"),
        (msgpack.packb({1: 2}), "no msgpack message"),
        (b"\xc1", "this is something else|no msgpack message"),
    ],
)
def test_what_is_no_message(data, message):
    for unpack in (wire.unpack, wire.unpack_bounded):
        with pytest.raises(wire.WireError, match=message):
            unpack(data)


def test_the_client_needs_neither_torch_nor_what_reads_data():
    code = (
        "import sys, stereovla.serving.client\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'PIL', 'prometheus_client'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_robot_s_computer_needs_no_torch():
    """All that docs/robots.md runs there, where torch and what reads data cannot be imported."""
    rooms = ["client", "robot_loop", "executor", "motion", "limits", "gripper", "recording", "rectification"]
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pyarrow', 'datasets', 'mujoco'): sys.modules[name] = None\n"
        f"import {', '.join(f'stereovla.serving.{name}' for name in (*rooms, 'stereo_calibration'))}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
