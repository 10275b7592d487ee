"""What users hand over, as the compiled half takes it: contiguous arrays of few types."""

from __future__ import annotations

from typing import Any

import numpy as np

_F32, _F16 = np.dtype(np.float32), np.dtype(np.float16)
_FLOATS = ("float32", "float16", "bfloat16")


def floats(name: str, array: Any) -> np.ndarray:
    """The elements as f32 or f16, or as the bits of bf16. Copies nothing that is contiguous."""
    array = np.asarray(array)
    dtype = array.dtype
    # Types of this machine's order of bytes are one object each, and to compare objects takes a tenth of the time.
    if dtype is _F32 or dtype is _F16:
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)
    if dtype.name == "bfloat16":
        return np.ascontiguousarray(array).view(np.uint16)
    native = dtype.newbyteorder("=")
    if native == _F32 or native == _F16:
        return np.ascontiguousarray(array, native)
    hint = f"; {name}.astype(numpy.float32) rounds it" if dtype.kind in "fiu" else ""
    raise ValueError(f"{name} is {dtype}, expected {', '.join(_FLOATS)}{hint}")


def dense(name: str, array: Any) -> np.ndarray:
    """A mask of bools, or a bias of floats. Doubles become floats: their users write numbers that both have."""
    array = np.asarray(array)
    if array.dtype == np.bool_:
        return np.ascontiguousarray(array)
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
    return np.ascontiguousarray(array, dtype=np.float32)


def integers(name: str, array: Any) -> np.ndarray:
    """Ids and indices, as 64 bits."""
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} is {array.dtype}, expected integers")
    return np.ascontiguousarray(array, dtype=np.int64)
