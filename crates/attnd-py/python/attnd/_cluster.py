"""Clusters: those that are there, and local ones of real processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

from ._attnd import Coordinator

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
        try:
            return cls(processes.url, _processes=processes)
        except BaseException:
            processes.stop()
            raise

    def workers(self) -> dict[str, str]:
        """The state of each worker that has joined, by its id: ``"ACTIVE"`` for one that computes."""
        return dict(self._coordinator.workers())

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
        said: list[str] = []
        self._reader = threading.Thread(target=self._pass_on, args=(said,), daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url.startswith("http"):
            self.stop()
            raise RuntimeError("".join(said).strip() or f"attnd local says {self.url!r} instead of a URL")

    def _pass_on(self, said: list[str]) -> None:
        """Hands on what the processes log, and keeps the first lines for whoever has to know why they didn't start."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if len(said) < 20:
                said.append(line)
            sys.stderr.write(line)

    def stop(self) -> None:
        process = self.process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        # The end of its stdin is what it waits for.
        process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._reader.join()
        process.stderr.close()
