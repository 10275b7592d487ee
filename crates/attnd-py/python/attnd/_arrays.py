"""What users hand over, as the compiled half takes it: contiguous arrays of few types."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

_F32, _F16 = np.dtype(np.float32), np.dtype(np.float16)
_FLOATS = ("float32", "float16", "bfloat16")


def _ordered(array: np.ndarray) -> np.ndarray:
    """The elements in C order, each at a place where its type may be; a copy where they aren't."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.array(array, order="C")


def floats(name: str, array: Any) -> np.ndarray:
    """The elements as f32 or f16, or as the bits of bf16. Copies nothing that is contiguous."""
    array = np.asarray(array)
    dtype = array.dtype
    # Types of this machine's order of bytes are one object each, and to compare objects takes a tenth of the time.
    if dtype is _F32 or dtype is _F16:
        return _ordered(array)
    if dtype.name == "bfloat16":
        return _ordered(array).view(np.uint16)
    native = dtype.newbyteorder("=")
    if native == _F32 or native == _F16:
        return _ordered(array.astype(native))
    hint = f"; {name}.astype(numpy.float32) rounds it" if dtype.kind in "fiu" else ""
    raise ValueError(f"{name} is {dtype}, expected {', '.join(_FLOATS)}{hint}")


def dense(name: str, array: Any) -> np.ndarray:
    """A mask of bools, or a bias of floats. Doubles become floats: their users write numbers that both have."""
    array = np.asarray(array)
    if array.dtype == np.bool_:
        return _ordered(array)
    if array.dtype == np.float64:
        # -inf and the lowest double hide a key, and so does the lowest float.
        lowest = np.finfo(np.float32).min
        array = np.where(array < lowest, -np.inf, array).astype(np.float32)
    return floats(name, array)


def table(name: str, array: Any) -> np.ndarray:
    """Parameters and tables, as f32."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} is {array.dtype}, expected numbers")
    return _ordered(array.astype(np.float32, copy=False))


def integers(name: str, array: Any) -> np.ndarray:
    """Ids and indices, as 64 bits."""
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} is {array.dtype}, expected integers")
    return _ordered(array.astype(np.int64, copy=False))


def count(name: str, value: Any) -> int:
    """A number that counts something."""
    if not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{name} is {value!r}, expected a number that counts something")
    return int(value)


def of_batch(name: str, value: Any, signed: bool = False) -> int | list[int]:
    """A number for all of the batch, or one for each of its elements."""
    array = integers(name, value)
    if array.ndim > 1 or (not signed and (array < 0).any()):
        raise ValueError(f"{name} is {value!r}, expected a number{'' if signed else ' over -1'}, or one for each batch element")
    return array.tolist()


def shaped(name: str, array: np.ndarray, *shapes: tuple[int | None, ...]) -> np.ndarray:
    """The array, if it has one of these shapes, in which ``None`` is any number."""
    if not any(len(shape) == array.ndim and all(n in (None, m) for n, m in zip(shape, array.shape)) for shape in shapes):
        expected = " or ".join(str(tuple("any" if n is None else n for n in shape)).replace("'", "") for shape in shapes)
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    return array
