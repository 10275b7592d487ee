"""Sessions: keys and values that stay on the workers, so that a step sends its own rows and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import numpy as np

from ._arrays import floats
from ._options import CallShape, options_of
from ._attnd import Coordinator, OpenSession


class Session:
    """Keys and values of some layers, on the workers of a cluster. Made by :meth:`attnd.Cluster.session`.

    A context manager: at its end a session that was opened or forked here is closed, and its memory is free. One that was attached to is
    somebody else's too, and stays.

    Rows are ``[kv_heads, tokens, dim]``, queries ``[heads, tokens, dim]``, of the session's type. Numbers of layers begin at 0.

    Attributes:
        name: Under which :meth:`attnd.Cluster.attach` finds it.
    """

    def __init__(self, coordinator: Coordinator, session: OpenSession, *, ends: bool) -> None:
        self._coordinator = coordinator
        self._session = session
        # With its context, which then isn't somebody else's.
        self._ends = ends
        self._call = CallShape(1, session.heads, None)
        self.name: str = session.name

    def append(self, layer: int, k: Any, v: Any, *, allow_non_finite: bool = False, timeout: float | None = None) -> int:
        """Appends the keys and values of some tokens to a layer, all of them or none.

        Args:
            layer: Which layer.
            k: ``[kv_heads, tokens, head_dim]``; any number of tokens.
            v: ``[kv_heads, tokens, value_dim]``; ``None`` where values are parts of keys.
            allow_non_finite: NaN and infinities may come.
            timeout: Seconds.

        Returns:
            Tokens of the layer since.
        """
        v = None if v is None else floats("v", v)
        return self._session.append(layer, floats("k", k), v, allow_non_finite, timeout)

    def attend(self, layer: int, q: Any, *, at_len: int | None = None, return_lse: bool = False, **options: Any) -> Any:
        """Attends over the tokens of a layer.

        Args:
            layer: Which layer.
            q: ``[heads, tokens, head_dim]``.
            at_len: Only the first so many tokens.
            return_lse: Return ``[heads, tokens]`` too.
            options: Those of :func:`attnd.attention` that are no matrices and no tables of keys: ``is_causal="bottom-right"`` where the
                queries are the last tokens, ``scale``, ``window``, ``softcap``, ``alibi_slopes``, ``sinks``, ``key_begin``...

        Returns:
            ``[heads, tokens, value_dim]``, of the type of ``q``.
        """
        given = np.asarray(q)
        told = self._session.attend(layer, floats("q", given), options_of(self._call, options), at_len)
        return _answer(told, given, return_lse)

    def step(self, layer: int, k: Any, v: Any, q: Any, *, return_lse: bool = False, is_causal: bool | str = "bottom-right", **options: Any) -> Any:
        """Appends the keys and values of a token, or of some, and attends over all tokens with them: one message each way.

        Args:
            layer: Which layer.
            k: ``[kv_heads, tokens, head_dim]``.
            v: ``[kv_heads, tokens, value_dim]``.
            q: ``[heads, tokens, head_dim]``.
            return_lse: Return ``[heads, tokens]`` too.
            is_causal: Each token sees those up to itself.
            options: As those of :meth:`attend`.

        Returns:
            As :meth:`attend`.
        """
        given = np.asarray(q)
        v = None if v is None else floats("v", v)
        options = options_of(self._call, {"is_causal": is_causal, **options})
        told = self._session.step(layer, floats("k", k), v, floats("q", given), options)
        return _answer(told, given, return_lse)

    def tokens(self, layer: int = 0) -> int:
        """How many tokens a layer has, as far as this side was told."""
        return self._session.tokens(layer)

    def fork(self, name: str | None = None) -> Session:
        """Another session with the same tokens, in the same memory until one of them changes."""
        return Session(self._coordinator, self._session.fork(name), ends=True)

    def truncate(self, tokens: int) -> None:
        """Cuts all layers down to so many tokens."""
        self._session.truncate(tokens)

    def seal(self) -> None:
        """Ends all appends and cuts."""
        self._session.seal()

    def describe(self) -> dict[str, Any]:
        """What the session is and has: dimensions, ``tokens`` of each layer, ``generation``, ``sealed``, ``ttl_left`` in seconds."""
        return self._session.describe()

    def close(self) -> bool:
        """Ends the session everywhere; whether it had ended before."""
        return self._coordinator.close_session(self.name)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._ends:
            self.close()

    def __repr__(self) -> str:
        return f"attnd.Session({self.name!r})"


@dataclass
class Step:
    """One step of :meth:`attnd.Cluster.step_batch`, as the arguments of :meth:`Session.step`.

    Attributes:
        session: Of which session; each of a batch has its own.
        layer: Of which layer.
        k: ``[kv_heads, tokens, head_dim]``.
        v: ``[kv_heads, tokens, value_dim]``.
        q: ``[heads, tokens, head_dim]``.
        options: Those of :meth:`Session.step`.
    """

    session: Session
    layer: int
    k: Any
    v: Any
    q: Any
    options: dict[str, Any] = field(default_factory=dict)


def step_batch(coordinator: Coordinator, steps: Sequence[Step]) -> list[np.ndarray | Exception]:
    """See :meth:`attnd.Cluster.step_batch`."""
    ready, given = [], []
    for step in steps:
        options = options_of(step.session._call, {"is_causal": "bottom-right", **step.options})
        given.append(np.asarray(step.q))
        v = None if step.v is None else floats("v", step.v)
        ready.append((step.session._session, step.layer, floats("k", step.k), v, floats("q", given[-1]), options))
    told = coordinator.step_batch(ready)
    return [one if isinstance(one, Exception) else _answer(one, q, False) for one, q in zip(told, given)]


def _answer(told: dict[str, Any], given: np.ndarray, return_lse: bool) -> Any:
    context = told["context"]
    if given.dtype != np.float32:
        context = context.astype(given.dtype)
    return (context, told["lse"]) if return_lse else context
