"""Clusters: those that are there, and local ones of real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import weakref
from typing import IO, Any, Sequence

import numpy as np

from ._attnd import Coordinator
from ._session import Session, Step, step_batch

# Time for processes to end after they were asked to.
_STOP_SECONDS = 15


class Cluster:
    """A coordinator and its workers. ``attnd.attention(..., cluster=cluster)`` computes on them.

    Made by :func:`attnd.connect` or :meth:`Cluster.local`. A context manager: :meth:`close` at its end.

    Attributes:
        url: Of the coordinator.
    """

    def __init__(self, url: str, *, _processes: _Processes | None = None) -> None:
        self.url = url
        self._coordinator = Coordinator(url)
        self._processes = _processes

    @classmethod
    def local(cls, workers: int = 2, *, threads_per_worker: int | None = None) -> Cluster:
        """Starts a coordinator and ``workers`` processes on this machine, which end with this one, however it ends.

        >>> import numpy as np, attnd
        >>> q = np.ones((1, 2, 3, 8), np.float32)
        >>> with attnd.Cluster.local(workers=2) as cluster:
        ...     far = attnd.attention(q, q, q, cluster=cluster)
        >>> bool((far == attnd.attention(q, q, q)).all())
        True

        Args:
            workers: Worker processes.
            threads_per_worker: Compute threads of each; the cores, divided evenly, unless it is said.

        Raises:
            RuntimeError: A process didn't start; with what it said.
        """
        processes = _Processes(workers, threads_per_worker)
        return cls(processes.url, _processes=processes)

    def workers(self) -> dict[str, str]:
        """The state of each worker that has joined, by its id: ``"ACTIVE"`` for one that computes."""
        return dict(self._coordinator.workers())

    def session(
        self,
        layers: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int,
        value_dim: int | None = None,
        dtype: str = "f32",
        storage: str | None = None,
        replicas: int = 1,
        acks: int = 1,
        ttl: float | None = None,
        max_tokens: int | None = None,
        allow_same_host: bool = False,
        value_is_key_prefix: bool = False,
        name: str | None = None,
    ) -> Session:
        """Opens a session, or goes on with the equal one of that name, as its writer.

        >>> import numpy as np, attnd
        >>> rows = np.ones((2, 5, 8), np.float32)
        >>> with attnd.Cluster.local(workers=1) as cluster, cluster.session(1, 4, 2, head_dim=8) as session:
        ...     session.append(0, rows, rows)
        ...     session.step(0, rows[:, :1], rows[:, :1], np.ones((4, 1, 8), np.float32)).shape
        5
        (4, 1, 8)

        Args:
            layers: Layers, each with keys and values of its own.
            heads: Query heads.
            kv_heads: Key/value heads; as many as heads unless it is said.
            head_dim: Elements of a query and of a key.
            value_dim: Elements of a value; ``head_dim`` unless it is said.
            dtype: Of rows and queries as they are sent: ``"f32"``, ``"f16"`` or ``"bf16"``.
            storage: How they are resident: as they are sent, or as ``"int8"`` or ``"int4"``, with a scale for each token and kv head.
            replicas: Workers that hold each part; with two, one may be lost at any time.
            acks: How many of them have an append before it is acknowledged.
            ttl: Seconds without a request after which the session is closed.
            max_tokens: Most tokens of a layer.
            allow_same_host: Replicas may be on one machine.
            value_is_key_prefix: Values are the first elements of keys, and aren't sent.
            name: 1 to 64 of ``[A-Za-z0-9._-]``; one that nobody has unless it is said.
        """
        spec = {
            "layers": layers,
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "value_dim": head_dim if value_dim is None else value_dim,
            "dtype": dtype,
            "storage": storage,
            "replicas": replicas,
            "acks": acks,
            "ttl": ttl,
            "max_tokens": max_tokens,
            "allow_same_host": allow_same_host,
            "value_is_key_prefix": value_is_key_prefix,
        }
        return Session(self._coordinator, self._coordinator.open(name, spec), ends=True)

    def attach(self, name: str, *, write: bool = True) -> Session:
        """Goes on with a session as its writer, whoever that was before, or looks at one that somebody else may write. It stays when the
        context ends, unlike one that was opened."""
        return Session(self._coordinator, self._coordinator.attach(name, write), ends=False)

    def sessions(self) -> list[str]:
        """The names of all sessions."""
        return self._coordinator.list_sessions()

    def step_batch(self, steps: Sequence[Step]) -> list[np.ndarray | Exception]:
        """Steps of several sessions, in one message where there is room for them, as in continuous batching.

        Returns:
            The context of each, or the exception that its :meth:`Session.step` would have raised: one costs the others nothing.
        """
        return step_batch(self._coordinator, steps)

    def close(self) -> None:
        """Ends the processes of a local cluster; sessions on it are gone. A cluster that was there before stays."""
        processes, self._processes = self._processes, None
        if processes is not None:
            processes.stop()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"attnd.Cluster({self.url!r})"


def connect(url: str) -> Cluster:
    """The cluster of the coordinator at ``url``, such as ``http://127.0.0.1:7400``. Nothing is sent yet.

    Raises:
        ValueError: It is no such URL.
    """
    return Cluster(url)


# Processes of local clusters of this process, whose pipes a forked child must not hold open.
_started: weakref.WeakSet[_Processes] = weakref.WeakSet()


class _Processes:
    """``attnd local``, which starts all others, says where its coordinator listens, and ends when its stdin does."""

    def __init__(self, workers: int, threads_per_worker: int | None) -> None:
        command = [sys.executable, "-m", "attnd", "local", "--exit-with-parent", "--workers", str(workers)]
        if threads_per_worker is not None:
            command += ["--threads-per-worker", str(threads_per_worker)]
        # Ctrl-C reaches a whole process group; these are ended by their parent.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # Whoever forgets the cluster ends it.
        self._ended = weakref.finalize(self, _stop, self.process, os.getpid())
        _started.add(self)
        try:
            said: list[str] = []
            reader = threading.Thread(target=_pass_on, args=(self.process.stderr, said), daemon=True)
            reader.start()
            assert self.process.stdout is not None
            self.url = self.process.stdout.readline().strip()
            if not self.url.startswith("http"):
                self.stop()
                # Until it has read the last line.
                reader.join(_STOP_SECONDS)
                raise RuntimeError("".join(said).strip() or f"attnd local says {self.url!r} instead of a URL")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._ended()


def _pass_on(lines: IO[str], said: list[str]) -> None:
    """Hands on what the processes log, and keeps the first lines for whoever has to know why they didn't start."""
    with lines:
        for line in lines:
            if len(said) < 20:
                said.append(line)
            sys.stderr.write(line)


def _stop(process: subprocess.Popen[str], parent: int) -> None:
    """Asks the processes to end, and sees to it that they do."""
    assert process.stdin is not None and process.stdout is not None
    # A forked child has no part in them.
    if os.getpid() == parent:
        process.terminate()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    process.stdout.close()


def _let_go() -> None:
    """In a forked child: the processes end with their parent, which is not this one."""
    for processes in list(_started):
        stdin = processes.process.stdin
        if stdin is not None:
            with contextlib.suppress(OSError):
                stdin.close()


os.register_at_fork(after_in_child=_let_go)
