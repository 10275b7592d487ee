"""``attnd.attention``: one call, over arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Sequence

import numpy as np

from . import _attnd
from ._arrays import floats
from ._options import CallShape, Csr, Outputs, Relative, Swin, options_of

if TYPE_CHECKING:
    from ._cluster import Cluster


@dataclass(frozen=True)
class Inspected:
    """What :class:`Outputs` asked for, ``None`` or empty where it didn't. With arrays of three dimensions there is no batch.

    Attributes:
        elements: ``[batch, heads, queries, keys]`` of each stage, then of each rectangle.
        top_keys: ``[batch, heads, queries, top_k]``, by falling score; ``2**32 - 1`` behind the last.
        top_weights: Their weights.
        top_scores: Their scores, biases included.
        mass: ``[batch, heads, queries, blocks]``.
        entropy: ``[batch, heads, queries]``.
        distance: ``[batch, heads, queries]``.
        max_score: ``[batch, heads, queries]``.
        heatmap: ``[batch, heads, rows, columns]``.
    """

    elements: list[np.ndarray] = field(default_factory=list)
    top_keys: np.ndarray | None = None
    top_weights: np.ndarray | None = None
    top_scores: np.ndarray | None = None
    mass: np.ndarray | None = None
    entropy: np.ndarray | None = None
    distance: np.ndarray | None = None
    max_score: np.ndarray | None = None
    heatmap: np.ndarray | None = None


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    attn_mask: Any = None,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    return_weights: bool = False,
    cluster: Cluster | None = None,
    bias: Any = None,
    alibi_by_key: bool = False,
    relative: Relative | None = None,
    swin: Swin | None = None,
    chunk: int | None = None,
    prefix: int | Sequence[int] | None = None,
    key_begin: int | Sequence[int] | None = None,
    key_end: int | Sequence[int] | None = None,
    query_end: int | Sequence[int] | None = None,
    offset: int | Sequence[int] | None = None,
    documents: Any = None,
    query_documents: Any = None,
    csr: Csr | None = None,
    score: str | None = None,
    params: dict[str, Any] | None = None,
    previous: Any = None,
    sigmoid_bias: float | None = None,
    empty_row: str | None = None,
    allow_non_finite: bool = False,
    forbid_empty_rows: bool = False,
    value_dim: int | None = None,
    outputs: Outputs | None = None,
    workers: int | None = None,
    timeout: float | None = None,
) -> Any:
    """Attention, exact, with the same bits in this process and on any number of workers.

    ``context = softmax(scale * q @ k.T + biases) @ v``, row by row, over the keys that a row sees.

    >>> import numpy as np, attnd
    >>> q, k, v = (np.full((1, 2, 3, 4), x, np.float32) for x in (1.0, 0.5, 7.0))
    >>> attnd.attention(q, k, v).shape
    (1, 2, 3, 4)
    >>> context, lse = attnd.attention(q, k, v, is_causal=True, return_lse=True)
    >>> np.exp(lse[0, 0] - 1).round(3).tolist()
    [1.0, 2.0, 3.0]

    Args:
        q: ``[batch, heads, queries, dim]`` or ``[heads, queries, dim]``; f32, f16 or bf16 (``ml_dtypes``).
        k: ``[batch, kv_heads, keys, dim]``, of the same type; ``heads`` is a multiple of ``kv_heads``.
        v: ``[batch, kv_heads, keys, value_dim]``; ``None``: the first ``value_dim`` elements of ``k``.
        attn_mask: Of ``[batch, heads, queries, keys]`` or what broadcasts to it. Bools: true where a query sees a key. Numbers are
            added to the scores, and -inf or the lowest number of the type hides a key.
        is_causal: ``True`` or ``"top-left"``: query ``i`` sees keys up to ``i``, as in torch, JAX and Keras.
            ``"bottom-right"``: the last query sees all keys, as for a cache that was just appended to.
        scale: What scores are multiplied by; ``1 / sqrt(dim)`` unless it is said.
        enable_gqa: Whether there may be fewer kv heads than heads.
        window: Keys that a query sees before and behind its position, ``(left, right)``, ``None`` for any number; a number alone
            is ``left``, itself included, and 0 on the right, as the ``sliding_window`` of transformers. Needs ``is_causal`` or
            ``offset``, which say where queries stand.
        softcap: Scores become ``softcap * tanh(score / softcap)``, before biases and masks.
        alibi_slopes: ``[heads]`` or ``[batch, heads]``, or ``"auto"`` for the published ones: a bias that falls with the distance.
        sinks: ``[heads]``, logits that join the denominator of each row and have no value.
        return_lse: Return ``lse`` too, the natural logarithm of the sum of exponentials, f32, ``[batch, heads, queries]``.
        return_weights: Return the weights too, f32, ``[batch, heads, queries, keys]``.
        cluster: Where to compute; here unless it is said.
        bias: Numbers to add to the scores, beside a mask of bools.
        alibi_by_key: The bias counts from the first key instead (BLOOM, MPT).
        relative: T5's bias.
        swin: Swin's bias.
        chunk: A query sees the keys of its own chunk of so many.
        prefix: Leading keys that the causal rule doesn't hide.
        key_begin: First key that is no padding, one number or one for each batch element.
        key_end: Keys before the padding behind them.
        query_end: Queries before the padding behind them, which see nothing.
        offset: Query ``i`` stands at key ``i + offset``.
        documents: The document of each key, integers, ``[keys]`` or ``[batch, keys]``: a query sees those of its own.
        query_documents: The document of each query; those of keys unless they are said.
        csr: Blocks of keys that blocks of queries see.
        score: Another function of query and key than their product; ``attnd scores`` lists them.
        params: Its parameters, by name.
        previous: The weights that rows had before, for functions that look at them.
        sigmoid_bias: Weights are ``sigmoid(score + sigmoid_bias)``, without a softmax.
        empty_row: What rows are that see no key: ``"zero"`` unless it is said, ``"nan"``, or ``"uniform"``, the mean of the values.
        allow_non_finite: NaN and infinities may come, and follow IEEE 754 into the rows that see them.
        forbid_empty_rows: A row that sees no key is an error.
        value_dim: Where ``v`` is ``None``.
        outputs: What is told beside the context.
        workers: How many workers of the cluster compute; as many as pay off unless it is said.
        timeout: Seconds for the call on a cluster.

    Returns:
        The context, of the type of ``q``, or a tuple of it and of what else was asked for, in this order: ``lse``, weights,
        :class:`Inspected`.

    Raises:
        ValueError: What makes no sense. Where a call was made of it, it is :class:`attnd.InvalidArgument`.
        attnd.Error: What else went wrong.
    """
    asked = np.asarray(q)
    q, k = floats("q", asked), floats("k", k)
    v = None if v is None else floats("v", v)
    unbatched = q.ndim == 3
    if unbatched:
        if k.ndim != 3 or (v is not None and v.ndim != 3):
            raise ValueError(f"q has shape {q.shape} and k {k.shape}: both have a batch, or none")
        q, k = q[None], k[None]
        v = None if v is None else v[None]
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}: expected [batch, heads, tokens, dim] or [heads, tokens, dim]")
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k {k.shape[1]}, and enable_gqa is False")

    if v is not None and value_dim is not None:
        raise ValueError("value_dim is for a call without v, which has its own")
    if cluster is None and (workers is not None or timeout is not None):
        raise ValueError("workers and timeout are for a call on a cluster")
    given = {
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "bias": bias,
        "alibi_by_key": alibi_by_key,
        "relative": relative,
        "swin": swin,
        "chunk": chunk,
        "prefix": prefix,
        "key_begin": key_begin,
        "key_end": key_end,
        "query_end": query_end,
        "offset": offset,
        "documents": documents,
        "query_documents": query_documents,
        "csr": csr,
        "score": score,
        "params": params,
        "previous": previous,
        "sigmoid_bias": sigmoid_bias,
        "empty_row": empty_row,
        "allow_non_finite": allow_non_finite,
        "forbid_empty_rows": forbid_empty_rows,
        "workers": workers,
        "timeout": timeout,
    }
    call = CallShape(q.shape[0], q.shape[1], k.shape[2])
    options = options_of(call, given, return_weights=return_weights, outputs=outputs)
    where = _attnd if cluster is None else cluster._coordinator
    told = where.attend((q, k, v, value_dim), options)
    return _answer(told, asked.dtype, unbatched, return_lse, return_weights, outputs)


def _answer(told, dtype, unbatched, return_lse, return_weights, outputs):
    def of_call(array: np.ndarray) -> np.ndarray:
        return array[0] if unbatched else array

    context = told["context"]
    if dtype is not context.dtype:
        context = context.astype(dtype.newbyteorder("="), copy=False)
    answer = [of_call(context)]
    if return_lse:
        answer.append(of_call(told["lse"]))
    elements = [of_call(matrix) for matrix in told["elements"]]
    if return_weights:
        answer.append(elements.pop(0))
    if outputs is not None:
        rest = {name: of_call(told[name]) for name in _TOLD if name in told}
        answer.append(Inspected(elements=elements, **rest))
    return answer[0] if len(answer) == 1 else tuple(answer)


_TOLD = ("top_keys", "top_weights", "top_scores", "mass", "entropy", "distance", "max_score", "heatmap")
