"""Calls over torch's tensors: the arrays in them, where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import _attnd
from ._options import CallShape, options_of

if TYPE_CHECKING:
    from ._cluster import Cluster

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(name: str, tensor: torch.Tensor) -> None:
    """Refuses what attnd doesn't compute, before something else is computed instead."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: attnd computes on CPU, {name}.cpu()")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, expected torch.float32, torch.float16 or torch.bfloat16")
    _check_gradient(name, tensor)


def check_mask(name: str, tensor: torch.Tensor) -> None:
    """The same of a mask, which may be of doubles."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: attnd computes on CPU, {name}.cpu()")
    if tensor.dtype not in (torch.bool, torch.float64, *_DTYPES):
        raise ValueError(f"{name} is {tensor.dtype}, expected torch.bool or a floating type")
    _check_gradient(name, tensor)


def _check_gradient(name: str, tensor: torch.Tensor) -> None:
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise RuntimeError(f"{name} requires a gradient, and attnd computes none: call it under torch.no_grad()")


def array(tensor: torch.Tensor) -> np.ndarray:
    """The elements, contiguous; of bf16 their bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def mask_array(tensor: torch.Tensor) -> np.ndarray:
    """A mask of bools or floats, of which doubles become f32."""
    return array(tensor.float() if tensor.dtype == torch.float64 else tensor)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cluster: Cluster | None = None,
    attn_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_weights: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """One call over ``[batch, heads, tokens, dim]``. Of what comes back ``context`` is a tensor of the query's type, all else arrays."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check(name, tensor)
    keys = key.shape[2]
    taken = options_of(CallShape(query.shape[0], query.shape[1], keys), options, return_weights=return_weights)
    # Bits of bf16 can't be told from integers there.
    for name, tensor in (("attn_mask", attn_mask), ("bias", bias)):
        if tensor is None:
            continue
        check_mask(name, tensor)
        if tensor.shape[-1] not in (1, keys):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the call needs 1 or {keys} keys")
        taken[name] = mask_array(tensor.expand(*tensor.shape[:-1], keys))
    where = _attnd if cluster is None else cluster._coordinator
    told = where.attend((array(query), array(key), array(value), None), taken)
    told["context"] = torch.from_numpy(told["context"]).to(query.dtype)
    return told
