"""The options of a call, as the compiled half takes them, where they make sense by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from ._arrays import count, dense, integers, of_batch, shaped, table


@dataclass(frozen=True)
class Relative:
    """T5's bias by the distance between query and key.

    Attributes:
        table: ``[buckets, heads]``; in T5's files ``relative_attention_bias.weight``.
        max_distance: Distances from here on share the last bucket.
        bidirectional: Whether keys behind the query have half of the buckets, as in T5's encoder.
    """

    table: Any
    max_distance: int = 128
    bidirectional: bool = False


@dataclass(frozen=True)
class Swin:
    """Swin's bias inside windows of an image; each batch element is a window, row by row.

    Attributes:
        table: ``[(2 * rows - 1) * (2 * columns - 1), heads]``.
        window: Rows and columns of a window.
        regions: The region of each token of shifted windows, integers, ``[windows, rows * columns]``.
        between: What is added between tokens of different regions.
    """

    table: Any
    window: tuple[int, int]
    regions: Any = None
    between: float = -100.0


@dataclass(frozen=True)
class Csr:
    """Blocks of keys that blocks of queries see, as compressed sparse rows: ``scipy.sparse``'s ``indptr`` and ``indices``.

    Attributes:
        indptr: ``[rows + 1]``, or ``[layouts, rows + 1]`` for each head or each head of each batch element.
        indices: ``[blocks]``, ascending in each row.
        block: Queries and keys of a block; ``(1, 1)`` is the adjacency of a graph.
    """

    indptr: Any
    indices: Any
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Outputs:
    """What is told beside the context. It costs a second pass over the scores and no matrix is ever stored for it.

    Attributes:
        stages: Whole matrices of ``"weights"``, or of what becomes them: ``"raw"``, ``"capped"``, ``"masked"`` scores.
        rectangles: Parts of such matrices: ``(stage, heads, queries, keys)``, the last three ``(begin, end)``.
        top_k: The keys with the highest scores of each row, at most 1024 of them.
        mass_block: Sums of weights over blocks of so many keys.
        entropy: Of the weights of each row, in nats.
        distance: Mean distance to the keys that a row weighs, in tokens.
        max_score: The highest score of each row.
        heatmap: Rows and columns of a pooled map of weights, at most 4096 each.
        heads: ``(begin, end)`` of the query heads of each batch element that this is wanted of.
    """

    stages: Sequence[str] = ()
    rectangles: Sequence[tuple[str, tuple[int, int], tuple[int, int], tuple[int, int]]] = ()
    top_k: int = 0
    mass_block: int | None = None
    entropy: bool = False
    distance: bool = False
    max_score: bool = False
    heatmap: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None


class CallShape(NamedTuple):
    """What options must fit. A session has one batch element, and says nothing of its keys, beside which it takes no matrices."""

    batch: int
    heads: int
    keys: int | None


def options_of(call: CallShape, given: dict[str, Any], *, return_weights: bool = False, outputs: Outputs | None = None) -> dict[str, Any]:
    """The arguments of :func:`attnd.attention` by their names, as the compiled half takes them: those that are there differ from the
    default."""
    options: dict[str, Any] = {"allow_non_finite": False}
    for name, value in given.items():
        # Most are none of the two, and a small call is as long as this loop.
        if value is None or value is False or (isinstance(value, np.bool_) and not value):
            continue
        take = _TAKEN.get(name)
        if take is None:
            raise TypeError(f"unknown option: {name}")
        options[name] = take(call, name, value)
    _join(options)
    if return_weights or outputs is not None:
        options["outputs"] = _wanted(outputs or Outputs(), return_weights)
    return options


def _join(options: dict[str, Any]) -> None:
    """Makes one of those that are said apart, and refuses what says nothing without another."""
    for name, other in (("query_documents", "documents"), ("params", "score"), ("alibi_by_key", "alibi_slopes")):
        if name in options and other not in options:
            raise ValueError(f"{name} needs {other}")
    if options.get("is_causal") == "bottom-right" and "offset" in options:
        raise ValueError("is_causal is 'bottom-right', and offset says where queries stand: give one of them")
    if "is_causal" in options:
        options["causal"] = options.pop("is_causal")
    if "documents" in options:
        options["documents"] = (options["documents"], options.pop("query_documents", None))
    if "score" in options:
        options["score"] = (options["score"], options.pop("params", []))
    if "alibi_slopes" in options:
        slopes = options.pop("alibi_slopes")
        options["alibi"] = (None if isinstance(slopes, str) else slopes, options.pop("alibi_by_key", False))


def _as_it_is(_: CallShape, __: str, value: Any) -> Any:
    return value


def _count(_: CallShape, name: str, value: Any) -> int:
    return count(name, value)


def _lengths(_: CallShape, name: str, value: Any) -> int | list[int]:
    return of_batch(name, value)


def _offsets(_: CallShape, name: str, value: Any) -> int | list[int]:
    return of_batch(name, value, signed=True)


def _integers(_: CallShape, name: str, value: Any) -> np.ndarray:
    return integers(name, value)


def _causal(_: CallShape, __: str, value: Any) -> str:
    return value if isinstance(value, str) else "top-left"


def _window(_: CallShape, name: str, value: Any) -> tuple[int | None, int | None]:
    """Keys before and behind."""
    if isinstance(value, Integral):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 at least: the key of the query itself")
        return int(value) - 1, 0
    left, right = value
    return tuple(None if side is None else count(name, side) for side in (left, right))


def _matrix(call: CallShape, name: str, value: Any) -> np.ndarray:
    """A mask or bias, of one column for all keys or of one for each. The compiled half would take those that are missing as hidden."""
    if call.keys is None:
        raise ValueError(f"{name}: a session takes no matrices beside its keys")
    mask = dense(name, value)
    if mask.ndim > 0 and mask.shape[-1] == 1 and call.keys != 1:
        return np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:-1], call.keys)))
    if mask.ndim > 0 and mask.shape[-1] != call.keys:
        raise ValueError(f"{name} has shape {mask.shape}, the call needs 1 or {call.keys} keys")
    return mask


def _slopes(call: CallShape, name: str, value: Any) -> str | list[float]:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f"{name} is {value!r}, expected 'auto' or numbers")
        return value
    return shaped(name, table(name, value), (call.heads,), (call.batch, call.heads)).ravel().tolist()


def _sinks(call: CallShape, name: str, value: Any) -> list[float]:
    of_heads = table(name, value)
    if of_heads.ndim != 1:
        raise ValueError(f"{name} has shape {of_heads.shape}, expected ({call.heads},)")
    return of_heads.tolist()


def _relative(_: CallShape, name: str, value: Relative) -> tuple[np.ndarray, int, bool]:
    entries = shaped(f"{name}.table", table(f"{name}.table", value.table), (None, None))
    return entries, count(f"{name}.max_distance", value.max_distance), bool(value.bidirectional)


def _swin(call: CallShape, name: str, value: Swin) -> tuple[np.ndarray, tuple[int, int], tuple[np.ndarray, float] | None]:
    rows, columns = (count(f"{name}.window", side) for side in value.window)
    entries = (max(2 * rows - 1, 0) * max(2 * columns - 1, 0), call.heads)
    of_window = shaped(f"{name}.table", table(f"{name}.table", value.table), entries)
    shift = None
    if value.regions is not None:
        regions = shaped(f"{name}.regions", integers(f"{name}.regions", value.regions), (None, rows * columns))
        shift = (regions, float(value.between))
    return of_window, (rows, columns), shift


def _csr(_: CallShape, name: str, value: Csr) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    queries, keys = (count(f"{name}.block", side) for side in value.block)
    return integers(f"{name}.indptr", value.indptr), integers(f"{name}.indices", value.indices), (queries, keys)


def _params(_: CallShape, name: str, value: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    return [(key, table(f"{name}[{key!r}]", of_key)) for key, of_key in value.items()]


# By the names that `attnd.attention` has for them.
_TAKEN: dict[str, Callable[[CallShape, str, Any], Any]] = {
    "alibi_by_key": _as_it_is,
    "alibi_slopes": _slopes,
    "allow_non_finite": _as_it_is,
    "attn_mask": _matrix,
    "bias": _matrix,
    "chunk": _count,
    "csr": _csr,
    "documents": _integers,
    "empty_row": _as_it_is,
    "forbid_empty_rows": _as_it_is,
    "is_causal": _causal,
    "key_begin": _lengths,
    "key_end": _lengths,
    "offset": _offsets,
    "params": _params,
    "prefix": _lengths,
    "previous": _matrix,
    "query_documents": _integers,
    "query_end": _lengths,
    "relative": _relative,
    "scale": _as_it_is,
    "score": _as_it_is,
    "sigmoid_bias": _as_it_is,
    "sinks": _sinks,
    "softcap": _as_it_is,
    "swin": _swin,
    "timeout": _as_it_is,
    "window": _window,
    "workers": _count,
}


def _wanted(outputs: Outputs, weights: bool) -> dict[str, Any]:
    wanted: dict[str, Any] = {name: value for name, value in vars(outputs).items() if value is not None}
    wanted["stages"] = (["weights"] if weights else []) + list(outputs.stages)
    wanted["rectangles"] = list(outputs.rectangles)
    return wanted
