"""torch's attention, computed by attnd: the same signatures, the same semantics.

>>> import torch, attnd.torch
>>> q = torch.ones(1, 2, 3, 4)
>>> attnd.torch.scaled_dot_product_attention(q, q, q, is_causal=True).shape
torch.Size([1, 2, 3, 4])

No gradients are computed: what requires one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ._tensors import attend, check

if TYPE_CHECKING:
    from ._cluster import Cluster

__all__ = ["MultiheadAttention", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    cluster: Cluster | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, of any number of leading dimensions.

    Args:
        query: ``[..., heads, queries, dim]``; f32, f16 or bf16, on CPU.
        key: ``[..., kv_heads, keys, dim]``.
        value: ``[..., kv_heads, keys, value_dim]``.
        attn_mask: What broadcasts to ``[..., heads, queries, keys]``: bools, true where a query sees a key, or numbers to add.
        dropout_p: 0; attnd is for inference.
        is_causal: Query ``i`` sees keys up to ``i``; not together with a mask.
        scale: ``1 / sqrt(dim)`` unless it is said.
        enable_gqa: Whether there may be fewer kv heads than heads.
        cluster: Where to compute; here unless it is said.

    Returns:
        ``[..., heads, queries, value_dim]``, of the query's type. Rows that see no key are 0.

    Raises:
        ValueError: What makes no sense, or attnd doesn't compute.
        RuntimeError: A gradient is required.
    """
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p}: attnd computes no dropout")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask: give one of them")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [..., heads, tokens, dim]")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise ValueError(f"attn_mask is {attn_mask.dtype}, expected torch.bool or {query.dtype}")

    # Leading dimensions become one batch; two dimensions are one head.
    dims = max(query.dim(), key.dim(), value.dim(), 4)
    q, k, v = (tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape) for tensor in (query, key, value))
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    if k.shape[-3] != v.shape[-3] or q.shape[-3] != k.shape[-3]:
        if not enable_gqa:
            heads = torch.broadcast_shapes(q.shape[-3:-2], k.shape[-3:-2], v.shape[-3:-2])
            q, k, v = (tensor.expand(*tensor.shape[:-3], *heads, *tensor.shape[-2:]) for tensor in (q, k, v))
        elif k.shape[-3] != v.shape[-3]:
            raise ValueError(f"key has {k.shape[-3]} heads, value {v.shape[-3]}: they must be equal")
    shape = (*batch, *q.shape[-3:-1], v.shape[-1])
    asked = shape[-max(query.dim(), key.dim(), value.dim()) :]
    if 0 in shape or k.shape[-2] == 0:
        # Nothing is looked at, or nobody looks.
        return query.new_zeros(asked)
    count = batch.numel()
    q, k, v = (tensor.expand(*batch, *tensor.shape[-3:]).reshape(count, *tensor.shape[-3:]) for tensor in (q, k, v))
    mask = None
    if attn_mask is not None:
        mask = attn_mask.reshape((1,) * (dims - attn_mask.dim()) + attn_mask.shape)
        if mask.shape[:-3].numel() != 1:
            mask = mask.expand(*batch, *mask.shape[-3:])
        mask = mask.reshape(mask.shape[:-3].numel(), *mask.shape[-3:])
        if mask.shape[-1] == 1:
            mask = mask.expand(*mask.shape[:-1], k.shape[-2])
        if mask.dtype == torch.float16:
            # torch adds in f32, where the lowest number of f16 is one among many.
            mask = mask.float()
    told = attend(q, k, v, cluster=cluster, attn_mask=mask, is_causal=is_causal, scale=scale)
    context = told["context"]
    for b, h, rows, weights in _blind_rows(mask, context.shape):
        heads = v[b].float().repeat_interleave(context.shape[1] // v.shape[1], dim=0)[h]
        context[b, h, rows] = (weights @ heads).to(context.dtype)
    return context.reshape(asked)


def _blind_rows(mask: torch.Tensor | None, shape: tuple[int, ...]) -> Iterator[tuple[int, Any, torch.Tensor, torch.Tensor]]:
    """Rows whose keys are all hidden by the lowest number, and not all by -inf: in their sums no score counts, so torch weighs alike those
    that have it.

    Yields the batch element, the heads that the mask's row is for, the queries, and the weights of their rows, ``[rows, keys]``.
    """
    if mask is None or not mask.dtype.is_floating_point:
        return
    lowest = torch.finfo(mask.dtype).min
    blind = (mask.amax(-1) == lowest).expand(mask.shape[0], mask.shape[1], shape[2])
    if not bool(blind.any()):
        return
    for b in range(shape[0]):
        of = b if mask.shape[0] > 1 else 0
        for h in range(mask.shape[1]):
            rows = blind[of, h].nonzero()[:, 0]
            if len(rows) > 0:
                hidden = (mask[of, h].expand(shape[2], -1)[rows] == lowest).float()
                yield b, h if mask.shape[1] > 1 else slice(None), rows, hidden / hidden.sum(-1, keepdim=True)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, whose state it loads and whose outputs and weights it gives. Attributes, arguments and shapes are
    torch's. There is no dropout: a module that has some is in evaluation mode.

    >>> import torch, attnd.torch
    >>> theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> ours = attnd.torch.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> _ = ours.load_state_dict(theirs.state_dict())
    >>> x = torch.randn(3, 5, 8)
    >>> with torch.no_grad():
    ...     bool(torch.allclose(ours(x, x, x)[0], theirs(x, x, x)[0], atol=1e-6))
    True

    Attributes:
        cluster: Where attention is computed; here if it is ``None``.
    """

    cluster: Cluster | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As torch's. Where ``need_weights`` is true, rows that see no key are NaN, else 0 before the output projection: as there."""
        if self.training and self.dropout > 0:
            raise RuntimeError(f"dropout is {self.dropout}, and attnd computes none: module.eval()")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal needs attn_mask, as in torch, where it is a hint about it")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))

        q, k, v = self._projected(query, key, value)
        visible, bias = self._masks(key_padding_mask, attn_mask, q.shape[1], q.dtype)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(1, k.shape[1], -1)])
            v = torch.cat([v, self.bias_v.expand(1, v.shape[1], -1)])
            visible, bias = _wider(visible, True), _wider(bias, 0.0)
        if self.add_zero_attn:
            k, v = (torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]) for tensor in (k, v))
            visible, bias = _wider(visible, True), _wider(bias, 0.0)

        def heads(tensor: torch.Tensor) -> torch.Tensor:
            tokens, batch, _ = tensor.shape
            return tensor.reshape(tokens, batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3)

        empty = "nan" if need_weights else "zero"
        told = attend(
            *(heads(tensor) for tensor in (q, k, v)),
            cluster=self.cluster,
            attn_mask=visible,
            bias=bias,
            return_weights=need_weights,
            empty_row=empty,
        )
        context, weights = told["context"], None
        if need_weights:
            weights = torch.from_numpy(told["elements"][0])
            # Of a softmax over nothing.
            weights[torch.from_numpy(told["lse"]) == float("-inf")] = float("nan")
        of_heads = heads(v)
        for b, h, rows, alike in _blind_rows(_only_these(bias, visible), context.shape):
            context[b, h, rows] = (alike @ of_heads[b, h].float()).to(context.dtype)
            if weights is not None:
                weights[b, h, rows] = alike
        context = context.permute(2, 0, 1, 3).reshape(q.shape)
        output = functional.linear(context, self.out_proj.weight, self.out_proj.bias)
        if weights is not None:
            weights = weights.to(query.dtype)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _projected(self, query, key, value):
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(functional.linear(*of) for of in zip(inputs, weights, biases))

    def _masks(self, key_padding_mask, attn_mask, batch, dtype):
        """What a query sees, and what is added to its scores: of torch's masks, which say what is hidden."""
        visible, bias = None, None
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype not in (torch.bool, dtype):
                raise ValueError(f"{name} is {mask.dtype}, expected torch.bool or {dtype}")
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None]
            if key_padding_mask.dtype == torch.bool:
                visible = ~key_padding_mask
            else:
                bias = key_padding_mask
        if attn_mask is not None:
            # [queries, keys], or [batch * heads, queries, keys].
            attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, self.num_heads))
            if attn_mask.dtype == torch.bool:
                visible = ~attn_mask if visible is None else visible & ~attn_mask
            else:
                bias = attn_mask if bias is None else bias + attn_mask
        return visible, bias


def _only_these(bias: torch.Tensor | None, visible: torch.Tensor | None) -> torch.Tensor | None:
    """The bias where it shows a key, and -inf where a mask of bools hides it, as torch joins them."""
    if bias is None or visible is None:
        return bias
    return bias.expand(torch.broadcast_shapes(bias.shape, visible.shape)).masked_fill(~visible, float("-inf"))


def _wider(mask: torch.Tensor | None, with_: bool | float) -> torch.Tensor | None:
    """With another key, at the end."""
    return None if mask is None else functional.pad(mask, (0, 1), value=with_)
