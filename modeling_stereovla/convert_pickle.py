"""Reads a pickle of plain data without unpickling it.

A pickle is a program for a stack machine that may call any function, and numpy's own functions, called as a stranger
likes, read and write memory outside of their arrays. So nothing that a pickle names is ever looked up or called here.
The opcodes that pickle's protocols 2 to 5 write for dicts, lists, strings and numbers are carried out on values of
Python; what numpy's arrays and numbers are pickled as is recognised by its names and built from a dtype of a list, a
shape and bytes whose lengths agree; objects of classes in `inert` become records that do nothing.
"""

import math
import pickletools
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

# Statistics and a config are some kB. An opcode of one byte makes an object of up to 216 bytes (an empty set), so that
# these limits hold a reading to 300 MB and some seconds.
MOST_BYTES = 64 * 2**20
MOST_OPCODES = 1_000_000
MOST_DIMENSIONS = 32  # of an array; numpy 1's own limit
DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


@dataclass(frozen=True)
class Name:
    """What a pickle would have looked up: module.name."""

    full: str


@dataclass
class Record:
    """Stands for an object of a class that is not imported: keeps the state that the pickle gives it, does nothing."""

    class_name: str
    state: Any = field(default_factory=dict)


@dataclass
class Dtype:
    """numpy.dtype before and after its state, which gives the byte order."""

    code: str
    order: str = "|"


@dataclass
class Unbuilt:
    """numpy's empty array, which its state fills; `places` in the memo that hold it."""

    places: list[int] = field(default_factory=list)


NDARRAY = Name("numpy.ndarray")
CORES = ("numpy.core", "numpy._core")  # of numpy 1 and 2


def read_pickle(path: str | Path, inert: frozenset[str] = frozenset()) -> Any:
    """Content of a pickle of dicts, lists, strings, numbers and numpy arrays, and of records for `inert` classes.

    Arrays are numeric; keys of dicts and members of sets are strings, bytes, None, truth values, integers of 32 bits.

    Raises:
        ValueError: it names anything else (each name is listed), it is no such pickle, or is larger than the limits.
    """
    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes; a pickle of statistics is read up to {MOST_BYTES}")
    machine = PickleMachine(inert)
    failure = content = None
    try:
        content = machine.run(Path(path).read_bytes())
    except (ValueError, IndexError, KeyError, TypeError) as error:  # of a damaged or hostile file
        failure = error
    if machine.refused:
        names = ", ".join(sorted(machine.refused))
        raise ValueError(
            f"{path} was not read: a preprocessor holds numpy arrays, dicts and floats and the release's own classes, "
            f"and this file also names {names}. Nothing of it was imported or run. If these are classes whose content "
            "does not matter, name them with --inert, and they are read as records that do nothing"
        )
    if failure is not None:
        raise ValueError(f"{path} cannot be read as a pickle: {type(failure).__name__}: {failure}") from failure
    return content


class PickleMachine:
    """The stack, the marks in it and the memo; one method or entry of a table for each opcode that is carried out."""

    def __init__(self, inert: frozenset[str]):
        self.inert, self.refused = inert, set()
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.array_bytes = 0

    def run(self, data: bytes) -> Any:
        """The value that the program leaves; ValueError, IndexError, KeyError or TypeError of one that is not well."""
        for count, (opcode, argument, place) in enumerate(pickletools.genops(BytesIO(data))):
            if count == MOST_OPCODES:
                raise ValueError(f"it has more than {MOST_OPCODES} opcodes")
            if opcode.name == "STOP":
                return self.pop()
            if opcode.name in PUSHED:
                self.stack.append(argument)
            elif opcode.name in CONSTANTS:
                self.stack.append(CONSTANTS[opcode.name]())
            elif opcode.name in OPERATIONS:
                OPERATIONS[opcode.name](self, argument)
            else:
                raise ValueError(
                    f"opcode {opcode.name} at byte {place}; pickles of protocol 2 to 5 need none for plain data"
                )
        raise ValueError("it ends without the opcode STOP")

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("a value is taken from below a mark")
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        """The values above the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def target(self, kind: type) -> Any:
        """The value on top, which must be of this kind."""
        if (self.marks and len(self.stack) <= self.marks[-1]) or not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {kind.__name__} is filled that is none")
        return self.stack[-1]

    # ---- names, and what they would have been called for

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is not a string")
        full = f"{module}.{name}"
        if full not in self.inert and full not in NUMPY_NAMES:
            self.refused.add(full)  # read on as a record, to find the other names
        self.stack.append(Name(full))

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("something is called that is no name, or with no tuple")
        if function == NDARRAY:
            raise ValueError("numpy.ndarray is called; where numpy pickles an array, it is only named")
        maker = CALLS.get(function.full)
        self.stack.append(Record(function.full) if maker is None else self.counted(maker(*arguments)))

    def make(self, class_: Any) -> None:
        """An object of a class, whose arguments are not kept."""
        if not isinstance(class_, Name) or class_.full in NUMPY_NAMES:
            raise ValueError("an object is made of what is no class that pickle would make it of")
        self.stack.append(Record(class_.full))

    def build(self, state: Any) -> None:
        """Gives the value on top its state."""
        found = self.target(object)
        if isinstance(found, Record):
            found.state = state
        elif isinstance(found, Dtype):
            found.order = byte_order(found, state)
        elif isinstance(found, Unbuilt):
            self.stack[-1] = self.counted(array_of_state(state))
            self.memo |= {place: self.stack[-1] for place in found.places if self.memo[place] is found}
        else:
            raise ValueError(f"a {type(found).__name__} is given a state")

    def counted(self, made: Any) -> Any:
        """What was made; ValueError where the arrays are larger together than any file, which gives each its bytes."""
        self.array_bytes += getattr(made, "nbytes", 0)
        if self.array_bytes > MOST_BYTES:
            raise ValueError(f"its arrays have more than {MOST_BYTES} bytes")
        return made

    # ---- containers and the memo

    def memoize(self, place: int) -> None:
        found = self.memo[place] = self.target(object)
        if isinstance(found, Unbuilt):
            found.places.append(place)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a key has no value")
        for key in values[::2]:
            check_hashable(key)
        self.target(dict).update(zip(values[::2], values[1::2], strict=True))

    def add_items(self, values: list[Any]) -> None:
        for value in values:
            check_hashable(value)
        self.target(set).update(values)

    def frozen_set(self, values: list[Any]) -> None:
        for value in values:
            check_hashable(value)
        self.stack.append(frozenset(values))

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple(reversed([self.pop() for _ in range(count)])))


def check_hashable(value: Any) -> None:
    """ValueError for what a stranger can choose so that hashing takes for ever: nested tuples, numbers that collide."""
    if type(value) is int and -(2**31) <= value < 2**31:
        return
    if value is not None and type(value) not in (str, bytes, bool):
        found = type(value).__name__
        raise ValueError(f"a key or a member of a set is a {found}; read are strings, bytes, None, integers of 32 bits")


def make_dtype(code: Any, align: Any = False, copy: Any = True) -> Dtype:
    """What numpy.dtype(code, align, copy) stands for; numpy writes False and True."""
    if not isinstance(code, str) or code not in DTYPES or align not in (False, 0):
        shown = repr(code) if isinstance(code, str) else type(code).__name__
        raise ValueError(f"dtype {shown[:40]}; arrays of statistics have one of {', '.join(DTYPES)}")
    return Dtype(code)


def byte_order(dtype: Dtype, state: Any) -> str:
    """Byte order in the state of a numeric dtype: version 3, order, no fields, no names, no sub-array, no flags."""
    if not isinstance(state, tuple) or len(state) != 8 or state[1] not in ("<", ">", "|", "="):
        raise ValueError(f"the state of dtype {dtype.code} is not that of a number")
    version, order, *rest = state
    if version != 3 or [type(value) for value in rest] != [type(None)] * 3 + [int] * 3 or rest[3:] != [-1, -1, 0]:
        raise ValueError(f"the state of dtype {dtype.code} has fields, names, a sub-array or flags; a number has none")
    return order


def array_of(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    """Array (shape) over the bytes `data`, which have exactly its length."""
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, Dtype) or order not in ("C", "F"):
        raise ValueError("an array is made of other things than bytes, a dtype, a shape and an order")
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("the shape of an array is no tuple of numbers from 0 on")
    if len(shape) > MOST_DIMENSIONS or max(shape, default=0) >= 2**31:
        raise ValueError(f"an array of {len(shape)} dimensions; at most {MOST_DIMENSIONS} of less than 2^31 are read")
    kind = np.dtype(dtype.code).newbyteorder(dtype.order)
    if len(data) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{len(data)} bytes for an array {shape} of {dtype.code}")
    if dtype.code == "b1" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise ValueError("an array of truth values holds other bytes than 0 and 1")
    flat = np.frombuffer(data, kind) if data else np.empty(0, kind)
    return flat.reshape(shape, order=order)


def array_of_state(state: Any) -> np.ndarray:
    """Array of the state that numpy gives one: version 1, shape, dtype, whether Fortran's order, bytes."""
    if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1 or not isinstance(state[3], bool):
        raise ValueError("the state of an array is not numpy's: 1, shape, dtype, order, bytes")
    _, shape, dtype, fortran, data = state
    return array_of(data, dtype, shape, "F" if fortran else "C")


def number_of(dtype: Any, data: Any) -> np.generic:
    """Number of numpy of its bytes."""
    return array_of(data, dtype, ())[()]


def unbuilt_array(kind: Any, shape: Any, code: Any) -> Unbuilt:
    """What numpy begins an array with: its class, (0,) and b"b"."""
    if kind != NDARRAY or shape != (0,) or code not in (b"b", "b"):
        raise ValueError("numpy's _reconstruct is called with other things than its class, (0,) and b'b'")
    return Unbuilt()


CALLS = {
    "numpy.dtype": make_dtype,
    **{f"{core}.multiarray._reconstruct": unbuilt_array for core in CORES},
    **{f"{core}.multiarray.scalar": number_of for core in CORES},
    **{f"{core}.numeric._frombuffer": array_of for core in CORES},
}
NUMPY_NAMES = {NDARRAY.full, *CALLS}
PUSHED = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}


def _reduce(machine: PickleMachine, _: None) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, arguments)


def _new_object(machine: PickleMachine, _: None) -> None:
    machine.pop()  # arguments
    machine.make(machine.pop())


def _new_object_with_keywords(machine: PickleMachine, _: None) -> None:
    machine.pop()
    _new_object(machine, None)


def _stack_name(machine: PickleMachine, _: None) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _set_item(machine: PickleMachine, _: None) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _append(machine: PickleMachine, _: None) -> None:
    value = machine.pop()
    machine.target(list).append(value)


def _appends(machine: PickleMachine, _: None) -> None:
    values = machine.pop_marked()
    machine.target(list).extend(values)


OPERATIONS = {
    "PROTO": lambda machine, protocol: None,
    "FRAME": lambda machine, size: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_marked(),
    "BINPUT": PickleMachine.memoize,
    "LONG_BINPUT": PickleMachine.memoize,
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine.memo)),
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_marked())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": lambda machine, _: machine.add_items(machine.pop_marked()),
    "FROZENSET": lambda machine, _: machine.frozen_set(machine.pop_marked()),
    "GLOBAL": lambda machine, name: machine.name(*name.split(" ", 1)),
    "STACK_GLOBAL": _stack_name,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_with_keywords,
    "BUILD": lambda machine, _: machine.build(machine.pop()),
}
