"""Keras 3's attention layers, computed by attnd: drop-ins with the same arguments, weights and outputs, of any backend that computes
at once (torch, numpy; others where nothing is traced).

>>> import os
>>> os.environ.setdefault("KERAS_BACKEND", "torch")
'torch'
>>> import numpy as np, attnd.keras
>>> layer = attnd.keras.MultiHeadAttention(num_heads=2, key_dim=4)
>>> x = np.ones((1, 3, 8), "float32")
>>> output, scores = layer(x, x, return_attention_scores=True)
>>> tuple(output.shape), tuple(scores.shape)
((1, 3, 8), (1, 2, 3, 3))

They are for inference: a layer that is called for training is refused, as no gradient would pass it.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

import keras
from keras import ops

from . import _attention

if TYPE_CHECKING:
    from ._cluster import Cluster

__all__ = ["AdditiveAttention", "Attention", "GroupQueryAttention", "MultiHeadAttention"]


def _call(layer: Any, q: Any, k: Any, v: Any, visible: Any, uniform: bool, scores: bool, **options: Any) -> tuple[Any, Any]:
    """Context and, where they are wanted, weights, of ``[batch, heads, tokens, dim]``."""
    q, k, v = (np.ascontiguousarray(ops.convert_to_numpy(rows)) for rows in (q, k, v))
    empty = "uniform" if uniform else "zero"
    told = _attention.attention(
        q,
        k,
        v,
        attn_mask=visible,
        cluster=layer.cluster,
        return_weights=scores,
        return_lse=True,
        empty_row=empty,
        **options,
    )
    weights = None
    if scores:
        weights = told[2]
        if uniform:
            weights[np.isneginf(told[1])] = 1 / k.shape[2]
        weights = ops.cast(ops.convert_to_tensor(weights), layer.compute_dtype)
    return ops.convert_to_tensor(told[0]), weights


def _refuse_training(layer: Any, training: Any) -> None:
    if training:
        raise RuntimeError(f"{layer.name} is called for training, and attnd computes no gradients: training=False")


class _Dots:
    """Of layers whose scores are made of rows ``[batch, tokens, dim]`` by one function."""

    cluster: Cluster | None = None

    def call(
        self,
        inputs: list[Any],
        mask: list[Any] | None = None,
        training: bool = False,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """As Keras' own."""
        self._validate_inputs(inputs=inputs, mask=mask)
        _refuse_training(self, training)
        q, v = inputs[0], inputs[1]
        k = inputs[2] if len(inputs) > 2 else v
        lead, queries, keys = tuple(q.shape[:-2]), q.shape[-2], k.shape[-2]
        q_rows, k_rows, v_rows = (ops.reshape(rows, (-1, 1, *rows.shape[-2:])) for rows in (q, k, v))
        visible = None
        if mask and mask[1] is not None:
            visible = np.asarray(ops.convert_to_numpy(mask[1]), bool).reshape(-1, 1, 1, keys)
        if use_causal_mask:
            causal = np.tri(queries, keys, dtype=bool)
            visible = causal if visible is None else visible & causal
        # A hidden key's score is less by a number beside which no other score counts: rows that see none are uniform.
        context, weights = _call(self, q_rows, k_rows, v_rows, visible, True, return_attention_scores, **self._function())
        context = ops.reshape(context, (*lead, queries, v.shape[-1]))
        if mask and mask[0] is not None:
            context = ops.where(ops.expand_dims(ops.cast(mask[0], "bool"), -1), context, ops.zeros_like(context))
        if return_attention_scores:
            return context, ops.reshape(weights, (*lead, queries, keys))
        return context

    def _number(self, weight: Any) -> np.ndarray:
        return np.asarray(ops.convert_to_numpy(weight), np.float32)


@keras.saving.register_keras_serializable(package="attnd")
class Attention(_Dots, keras.layers.Attention):
    """``keras.layers.Attention``, of either score mode.

    Attributes:
        cluster: Where attention is computed; here if it is ``None``.
    """

    def _function(self) -> dict[str, Any]:
        scale = 1.0 if self.scale is None else float(self._number(self.scale))
        if self.score_mode == "dot":
            return {"scale": scale}
        weight = self._number(self.concat_score_weight).reshape(1)
        return {"score": "keras_concat", "params": {"c": weight, "s": np.float32([scale])}}


@keras.saving.register_keras_serializable(package="attnd")
class AdditiveAttention(_Dots, keras.layers.AdditiveAttention):
    """``keras.layers.AdditiveAttention``.

    Attributes:
        cluster: Where attention is computed; here if it is ``None``.
    """

    def _function(self) -> dict[str, Any]:
        return {"score": "keras_additive", "params": {"v": self._number(self.scale)} if self.use_scale else {}}


@keras.saving.register_keras_serializable(package="attnd")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """``keras.layers.MultiHeadAttention``, over any axes.

    Attributes:
        cluster: Where attention is computed; here if it is ``None``.
    """

    cluster: Cluster | None = None

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Any, Any]:
        _refuse_training(self, training)
        axes = self._attention_axes
        # [batch, attended axes, heads, dim] of each: the axes that aren't attended over are batch.
        rank = len(query.shape)
        free = [axis for axis in range(rank - 2) if axis not in axes]
        order = [*free, *axes, rank - 2, rank - 1]
        turned = [ops.transpose(rows, order) for rows in (query, key, value)]
        lead = tuple(turned[0].shape[: len(free)])
        of_queries, of_keys = (tuple(rows.shape[len(free) : -2]) for rows in turned[:2])

        def heads(rows: Any) -> Any:
            tokens = prod(rows.shape[len(free) : -2])
            return ops.transpose(ops.reshape(rows, (-1, tokens, *rows.shape[-2:])), (0, 2, 1, 3))

        visible = None
        if attention_mask is not None:
            # As Keras has it: heads before the axes of queries and of keys, and whatever is missing in front.
            visible = np.asarray(ops.convert_to_numpy(attention_mask), bool)
            while visible.ndim < len(free) + 1 + 2 * len(axes):
                visible = np.expand_dims(visible, -2 * len(axes) - 1)
            visible = np.broadcast_to(visible, (*lead, visible.shape[len(free)], *of_queries, *of_keys))
            visible = visible.reshape(prod(lead), -1, prod(of_queries), prod(of_keys))
        context, weights = _call(
            self,
            *(heads(rows) for rows in turned),
            visible,
            # Keras' fused attention takes the mean where a row sees no key, and its softmax 0.
            not (return_attention_scores or self._dropout > 0 or rank != 4),
            return_attention_scores,
            scale=self._inverse_sqrt_key_dim,
            is_causal=use_causal_mask,
        )
        context = ops.reshape(ops.transpose(context, (0, 2, 1, 3)), (*lead, *of_queries, *turned[2].shape[-2:]))
        context = ops.transpose(context, [order.index(axis) for axis in range(rank)])
        if weights is not None:
            weights = ops.reshape(weights, (*lead, -1, *of_queries, *of_keys))
        return context, weights


@keras.saving.register_keras_serializable(package="attnd")
class GroupQueryAttention(keras.layers.GroupQueryAttention):
    """``keras.layers.GroupQueryAttention``.

    Attributes:
        cluster: Where attention is computed; here if it is ``None``.
    """

    cluster: Cluster | None = None

    def _compute_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> tuple[Any, Any]:
        _refuse_training(self, training)
        scores = bool(self._return_attention_scores)
        # Keras has repeated each head for the queries that share it.
        key, value = (rows[:, :, :: self.num_repeats] for rows in (key, value))
        visible = None
        if attention_mask is not None:
            visible = np.asarray(ops.convert_to_numpy(attention_mask), bool)
            visible = visible[:, None] if visible.ndim == 3 else visible
        context, weights = _call(
            self,
            *(ops.transpose(rows, (0, 2, 1, 3)) for rows in (query, key, value)),
            visible,
            not (scores or self.dropout > 0),
            scores,
            scale=self._inverse_sqrt_head_dim,
            is_causal=use_causal_mask,
        )
        return ops.transpose(context, (0, 2, 1, 3)), weights

