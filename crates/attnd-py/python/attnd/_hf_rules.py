"""Rules in dense masks: what a mask of bools says in a few numbers, kernels compute without reading it."""

from __future__ import annotations

from typing import Any

import torch


def rule_of(mask: torch.Tensor) -> dict[str, Any] | None:
    """The options of :func:`attnd.attention` that hide the same keys as ``mask``, ``[batch, 1, queries, keys]``; ``None`` if there are
    none. A rule is proposed by a few rows and believed only where it gives every element of the mask."""
    if mask.dim() != 4 or mask.shape[1] != 1 or not mask.any():
        return None
    rows = mask[:, 0]
    batch, queries, keys = rows.shape
    column = torch.arange(keys)
    last = rows[:, -1]
    begin = last.int().argmax(-1)
    end = keys - last.flip(-1).int().argmax(-1)
    in_last = (column >= begin[:, None]) & (column < end[:, None])
    if not bool(last.any(-1).all()) or not torch.equal(last, in_last):
        return None
    bounds = _bounds(begin, end, keys)
    if torch.equal(rows, in_last[:, None].expand_as(rows)):
        return bounds
    # Queries are the last tokens of the keys, as in a cache that was just appended to, or stand where the last one sees to.
    for offset in (keys - queries, int(end.max()) - queries):
        position = torch.arange(queries)[:, None] + offset
        causal = column <= position
        rule: dict[str, Any] = {"is_causal": "top-left", "offset": offset}
        whole = causal & (column < end[:, None, None])
        if torch.equal(rows, whole & (column >= begin[:, None, None])):
            return {**rule, **bounds}
        # In a window the last row begins where the window does, and rows before it tell where the padding ends.
        width = int(end.max() - begin.max())
        windowed = whole & (column > position - width)
        first = rows.any(1).int().argmax(-1)
        if torch.equal(rows, windowed & (column >= first[:, None, None])):
            return {**rule, "window": (width - 1, 0), **_bounds(first, end, keys)}
    return None


def _bounds(begin: torch.Tensor, end: torch.Tensor, keys: int) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    if bool((begin > 0).any()):
        bounds["key_begin"] = _of_batch(begin)
    if bool((end < keys).any()):
        bounds["key_end"] = _of_batch(end)
    return bounds


def _of_batch(lengths: torch.Tensor) -> int | list[int]:
    """A number where it is one: a mask of one element may be for all of a batch."""
    of_each = lengths.tolist()
    return of_each[0] if len(set(of_each)) == 1 else of_each
