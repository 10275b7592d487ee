"""Attention in f64, written as its formula reads: what results are compared with."""

from __future__ import annotations

import numpy as np

# Unit roundoff of f32.
U = 2.0**-24


def attention(q, k, v, *, scale=None, visible=None, bias=None, softcap=None, sinks=None):
    """Context, weights and lse. ``visible`` and ``bias`` broadcast to ``[batch, heads, queries, keys]``; rows without keys are 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + np.asarray(bias, np.float64)
    if visible is not None:
        scores = np.where(np.broadcast_to(visible, scores.shape), scores, -np.inf)
    sink = np.full((1, q.shape[1], 1, 1), -np.inf) if sinks is None else np.asarray(sinks, np.float64)[None, :, None, None]
    most = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), sink)
    finite = np.where(np.isfinite(most), most, 0.0)
    powers = np.exp(scores - finite)
    total = powers.sum(-1, keepdims=True) + np.exp(sink - finite)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(total > 0, powers / total, 0.0)
        lse = (np.log(total) + finite)[..., 0]
    return np.einsum("bhqk,bhkd->bhqd", weights, v), weights, lse


def bound(q, k, v, *, scale=None, weights, visible=None):
    """``8 u (8 + S) A`` for each element of the context: ``S`` is the largest sum of absolute products of a row's scores, ``A`` the
    weighted mean of absolute values."""
    q, k, v = (np.abs(np.asarray(x, np.float64)) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    products = np.einsum("bhqd,bhkd->bhqk", q, k) * abs(q.shape[-1] ** -0.5 if scale is None else scale)
    if visible is not None:
        products = np.where(np.broadcast_to(visible, products.shape), products, 0.0)
    most = products.max(-1, keepdims=True, initial=0.0)
    means = np.einsum("bhqk,bhkd->bhqd", weights, v)
    return 8 * U * (8 + most) * means + 1e-37
