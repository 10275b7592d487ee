"""A cache of ``generate()`` whose keys and values are on the workers of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers.cache_utils import CacheLayerMixin

from ._options import options_of
from ._session import Session
from ._tensors import array, check

if TYPE_CHECKING:
    from ._cluster import Cluster

# Heads, kv heads, head and value dimension, type.
_Shape = tuple[int, int, int, int, torch.dtype]

_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class SessionLayer(CacheLayerMixin):
    """One layer of a :class:`Cache`. Its ``update`` keeps nothing: it marks the new rows, which attention then sends, with its queries."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: Cache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer
        self.tokens = 0
        # Of its keys and values, since there are some.
        self.shape: _Shape | None = None
        # Rows were handed out, whose attention hasn't come.
        self.waits = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.cache.check(self, key_states.shape[2])
        self.is_initialized, self.waits = True, True
        rows = key_states.view_as(key_states)
        rows._attnd_layer = self  # type: ignore[attr-defined]
        return rows, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1


class Cache(transformers.Cache):
    """The ``past_key_values`` of ``generate()``, for a model with ``attn_implementation="attnd"``: keys and values of its layers are in
    sessions of a cluster, one for each element of the batch. A decoding step sends the keys, values and queries of its token, and
    nothing of those before.

    A context manager, at whose end the sessions are closed. Without that they end when nobody asks for them any more.

    >>> import attnd.hf, torch, transformers
    >>> attnd.hf.register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ... )
    >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="attnd").eval()
    >>> prompt = torch.ones(1, 3, dtype=torch.long)
    >>> with attnd.Cluster.local(workers=2) as cluster, attnd.hf.Cache(cluster, config) as cache:
    ...     text = model.generate(prompt, past_key_values=cache, max_new_tokens=4, do_sample=False)
    >>> bool((text == model.generate(prompt, max_new_tokens=4, do_sample=False)).all())
    True
    """

    def __init__(
        self,
        cluster: Cluster,
        config: transformers.PretrainedConfig,
        *,
        storage: str | None = None,
        replicas: int = 1,
        acks: int = 1,
        allow_same_host: bool = False,
        ttl: float | None = None,
    ) -> None:
        """
        Args:
            cluster: Where keys and values are.
            config: Of the model.
            storage: How they are resident: as the model computes them, or as ``"int8"`` or ``"int4"``.
            replicas: Workers that hold each part; with two, one may be lost at any time.
            acks: How many of them have a token before its step is answered.
            allow_same_host: Replicas may be on one machine.
            ttl: Seconds without a step after which a session is closed.
        """
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[SessionLayer(self, layer) for layer in range(layers)])
        self._cluster = cluster
        self._options = {
            "storage": storage,
            "replicas": replicas,
            "acks": acks,
            "allow_same_host": allow_same_host,
            "ttl": ttl,
        }
        # Of each shape that layers have, the sessions of the batch.
        self._sessions: dict[_Shape, list[Session]] = {}
        # What came between a step and its answer: nobody knows what the sessions have.
        self._broken: str | None = None

    def step(
        self,
        layer: SessionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: list[dict[str, Any]],
    ) -> torch.Tensor:
        """Appends a layer's rows and attends over all of it, each element of the batch with its options; ``[batch, heads, tokens, dim]``."""
        for name, rows in (("query", query), ("key", key), ("value", value)):
            check(name, rows)
        sessions = self._of(layer, query, key, value)
        q, k, v = (array(rows) for rows in (query, key, value))
        steps = [
            (session._session, layer.layer, k[b], v[b], q[b], options_of(session._call, options[b]))
            for b, session in enumerate(sessions)
        ]
        self._broken = f"a step of layer {layer.layer} was interrupted"
        told = self._cluster._coordinator.step_batch(steps)
        for one in told:
            if isinstance(one, Exception):
                self._broken = f"a step of layer {layer.layer} failed: {one}"
                raise one
        layer.waits = False
        layer.tokens += key.shape[2]
        if any(one["at_len"] != layer.tokens for one in told):
            has = [one["at_len"] for one in told]
            self._broken = f"layer {layer.layer} has {has} tokens, and {layer.tokens} came through this cache"
            raise RuntimeError(f"attnd.hf.Cache: {self._broken}: somebody else wrote to its sessions")
        self._broken = None
        context = np.stack([one["context"] for one in told]) if len(told) > 1 else told[0]["context"][None]
        return torch.from_numpy(context).to(query.dtype)

    def _of(self, layer: SessionLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[Session]:
        """The sessions that have the layer's keys and values."""
        shape = (query.shape[1], key.shape[1], key.shape[3], value.shape[3], query.dtype)
        if layer.shape not in (None, shape):
            raise ValueError(f"layer {layer.layer} has tokens of (heads, kv heads, dimensions, type) {layer.shape}, this is {shape}")
        sessions = self._sessions.get(shape)
        if sessions is None:
            heads, kv_heads, head_dim, value_dim, dtype = shape
            sessions = []
            try:
                for _ in range(query.shape[0]):
                    opened = self._cluster.session(
                        len(self.layers),
                        heads,
                        kv_heads,
                        head_dim=head_dim,
                        value_dim=value_dim,
                        dtype=_NAMES[dtype],
                        **self._options,
                    )
                    sessions.append(opened)
            except BaseException:
                # All of a batch or none.
                for session in sessions:
                    session.close()
                raise
            self._sessions[shape] = sessions
        if len(sessions) != query.shape[0]:
            raise ValueError(f"the batch has {query.shape[0]} elements, the cache {len(sessions)}: a cache is for one batch")
        layer.shape = shape
        return sessions

    def check(self, layer: SessionLayer, new: int) -> None:
        """Refuses rows of a layer that don't follow what the sessions have: after a step that failed, or a model's run that ended between
        two layers, or where the attention of a layer was another's, which saw nothing of the tokens before.

        Raises:
            RuntimeError: With what happened, and how to go on.
        """
        go_on = "cache.crop(...) or cache.reset() makes the layers equal again"
        if self._broken is not None:
            raise RuntimeError(f"attnd.hf.Cache: {self._broken}; {go_on}")
        for other in self.layers:
            if other.waits:
                text = f"layer {other.layer} took keys from attnd.hf.Cache and didn't attend by attnd"
                raise RuntimeError(f'{text}: load the model with "attnd", or, if its run was interrupted, {go_on}')
            # Layers before this one have the new tokens, those behind it don't yet; some models have layers without keys.
            expected = layer.tokens + (new if other.layer < layer.layer else 0)
            if other.shape is not None and other is not layer and other.tokens != expected:
                text = f"layer {other.layer} has {other.tokens} tokens where layer {layer.layer} needs {expected}"
                raise RuntimeError(f"attnd.hf.Cache: {text}: a run of the model ended between layers; {go_on}")

    # === what generate() does with a cache beside steps ===

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = len(next(iter(self._sessions.values()), []))
        self.batch_select_indices(torch.arange(count).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Element ``i`` of the batch is element ``indices[i]`` of before: its session, or a fork of it, which copies no token."""
        for shape, sessions in self._sessions.items():
            left = dict(enumerate(sessions))
            chosen: list[Session] = []
            forks: list[Session] = []
            try:
                for at in indices.tolist():
                    # The session itself goes to the first that asks for it.
                    if at in left:
                        chosen.append(left.pop(at))
                    else:
                        forks.append(sessions[at].fork())
                        chosen.append(forks[-1])
            except BaseException:
                for fork in forks:
                    fork.close()
                raise
            self._sessions[shape] = chosen
            for session in left.values():
                session.close()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end of all layers, which have equally many then: ``-n`` removes ``n`` of those that all layers have,
        and, as before transformers 5, ``n`` leaves ``n``."""
        if tokens_to_remove == 0 and self._broken is None:
            return
        self._look()
        least = min((layer.tokens for layer in self.layers if layer.shape is not None), default=0)
        self._cut(min(tokens_to_remove, least) if tokens_to_remove > 0 else max(least + tokens_to_remove, 0))

    def reset(self) -> None:
        self._cut(0)

    def _look(self) -> None:
        """What the layers have, asked of those who know."""
        for shape, sessions in self._sessions.items():
            of_each = [session.describe()["tokens"] for session in sessions]
            for layer in self.layers:
                if layer.shape == shape:
                    layer.tokens = min(tokens[layer.layer] for tokens in of_each)

    def _cut(self, length: int) -> None:
        for sessions in self._sessions.values():
            for session in sessions:
                session.truncate(length)
        self._look()
        for layer in self.layers:
            layer.waits = False
        self._broken = None

    def sessions(self) -> list[str]:
        """The names of the sessions, of all elements of the batch."""
        return [session.name for sessions in self._sessions.values() for session in sessions]

    def close(self) -> None:
        """Ends the sessions, whose memory is free then."""
        of_all, self._sessions = self._sessions, {}
        for sessions in of_all.values():
            for session in sessions:
                session.close()
        for layer in self.layers:
            layer.tokens, layer.shape, layer.waits = 0, None, False
        self._broken = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
