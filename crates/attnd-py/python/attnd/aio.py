"""The same for asyncio: ``await attnd.aio.attention(...)``, clusters and sessions whose methods are coroutines.

>>> import asyncio, numpy as np, attnd.aio
>>> q = np.ones((1, 2, 3, 8), np.float32)
>>> asyncio.run(attnd.aio.attention(q, q, q)).shape
(1, 2, 3, 8)

A task that is cancelled ends its call, here and on the cluster, and is cancelled when that has ended: of a mutation of a session nobody
knows then whether it was done, and the session finds out before its next one.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable, Sequence, TypeVar

import numpy as np

from . import _attention, _cluster, _session
from ._attnd import Interrupt

__all__ = ["Cluster", "Session", "attention", "connect"]

T = TypeVar("T")

_threads: ThreadPoolExecutor


def _start_threads() -> None:
    """Calls wait for threads of their own, which wait for kernels and the network."""
    global _threads
    _threads = ThreadPoolExecutor(max_workers=64, thread_name_prefix="attnd-aio")


_start_threads()
# A forked child has none of its parent's.
os.register_at_fork(after_in_child=_start_threads)


async def _run(function: Callable[..., T], *args: Any, undo: Callable[[T], Any] | None = None, **kwargs: Any) -> T:
    """Calls a function in a thread. Where the task is cancelled, so is the call, and what it made all the same goes through ``undo``."""
    interrupt = Interrupt()
    loop = asyncio.get_running_loop()
    call = loop.run_in_executor(_threads, interrupt.run, partial(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        interrupt.set()
        await asyncio.wait([call])
        # What it says of its end is told by the cancellation.
        if call.exception() is None and undo is not None:
            await loop.run_in_executor(_threads, undo, call.result())
        raise


async def attention(*args: Any, **kwargs: Any) -> Any:
    """:func:`attnd.attention`; ``cluster`` may be one of either kind."""
    cluster = kwargs.get("cluster")
    if isinstance(cluster, Cluster):
        kwargs["cluster"] = cluster.cluster
    return await _run(_attention.attention, *args, **kwargs)


def connect(url: str) -> Cluster:
    """:func:`attnd.connect`; nothing is sent yet."""
    return Cluster(_cluster.connect(url))


class Cluster:
    """:class:`attnd.Cluster` with coroutines.

    Attributes:
        cluster: The other one.
    """

    def __init__(self, cluster: _cluster.Cluster) -> None:
        self.cluster = cluster

    @classmethod
    async def local(cls, workers: int = 2, *, threads_per_worker: int | None = None) -> Cluster:
        """:meth:`attnd.Cluster.local`."""
        local = partial(_cluster.Cluster.local, workers, threads_per_worker=threads_per_worker)
        return cls(await _run(local, undo=_cluster.Cluster.close))

    async def session(self, *args: Any, **kwargs: Any) -> Session:
        """:meth:`attnd.Cluster.session`."""
        undo = None if kwargs.get("name") else _session.Session.close
        return Session(await _run(self.cluster.session, *args, undo=undo, **kwargs))

    async def attach(self, name: str, *, write: bool = True) -> Session:
        """:meth:`attnd.Cluster.attach`."""
        return Session(await _run(self.cluster.attach, name, write=write))

    async def sessions(self) -> list[str]:
        """:meth:`attnd.Cluster.sessions`."""
        return await _run(self.cluster.sessions)

    async def step_batch(self, steps: Sequence[_session.Step]) -> list[np.ndarray | Exception]:
        """:meth:`attnd.Cluster.step_batch`; of sessions of either kind."""
        of = [step.session.session if isinstance(step.session, Session) else step.session for step in steps]
        plain = [_session.Step(session, s.layer, s.k, s.v, s.q, s.options) for session, s in zip(of, steps)]
        return await _run(self.cluster.step_batch, plain)

    async def workers(self) -> dict[str, str]:
        """:meth:`attnd.Cluster.workers`."""
        return await _run(self.cluster.workers)

    async def close(self) -> None:
        """:meth:`attnd.Cluster.close`."""
        await _run(self.cluster.close)

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(self, *details: Any) -> None:
        await _run(self.cluster.__exit__, *details)


class Session:
    """:class:`attnd.Session` with coroutines.

    Attributes:
        session: The other one.
        name: Its name.
    """

    def __init__(self, session: _session.Session) -> None:
        self.session = session
        self.name = session.name

    async def append(self, layer: int, k: Any, v: Any, **options: Any) -> int:
        """:meth:`attnd.Session.append`."""
        return await _run(self.session.append, layer, k, v, **options)

    async def attend(self, layer: int, q: Any, **options: Any) -> Any:
        """:meth:`attnd.Session.attend`."""
        return await _run(self.session.attend, layer, q, **options)

    async def step(self, layer: int, k: Any, v: Any, q: Any, **options: Any) -> Any:
        """:meth:`attnd.Session.step`."""
        return await _run(self.session.step, layer, k, v, q, **options)

    async def tokens(self, layer: int = 0) -> int:
        """:meth:`attnd.Session.tokens`."""
        return await _run(self.session.tokens, layer)

    async def fork(self, name: str | None = None) -> Session:
        """:meth:`attnd.Session.fork`."""
        return Session(await _run(self.session.fork, name, undo=None if name else _session.Session.close))

    async def truncate(self, tokens: int) -> None:
        """:meth:`attnd.Session.truncate`."""
        await _run(self.session.truncate, tokens)

    async def seal(self) -> None:
        """:meth:`attnd.Session.seal`."""
        await _run(self.session.seal)

    async def describe(self) -> dict[str, Any]:
        """:meth:`attnd.Session.describe`."""
        return await _run(self.session.describe)

    async def close(self) -> bool:
        """:meth:`attnd.Session.close`."""
        return await _run(self.session.close)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *details: Any) -> None:
        await _run(self.session.__exit__, *details)
