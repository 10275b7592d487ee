"""Calls on real processes: the same bits, the same refusals, and what becomes of the processes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import attnd
import attnd.aio


def operands(rng, queries=40, keys=3000):
    return (
        rng.standard_normal((2, 4, queries, 16), dtype=np.float32),
        rng.standard_normal((2, 2, keys, 16), dtype=np.float32),
        rng.standard_normal((2, 2, keys, 12), dtype=np.float32),
    )


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as children:
            found += map(int, children.read().split())
    return found


def is_there(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(what, seconds=15.0):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, what
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cluster_has_the_bits_of_this_process(cluster, rng, workers):
    q, k, v = operands(rng)
    mask = rng.random((2, 1, 40, 3000)) < 0.7
    options = [
        {},
        {"is_causal": "bottom-right", "window": 500},
        {"attn_mask": mask, "softcap": 3.0, "sinks": [0.1, 0.2, 0.3, 0.4]},
        {"score": "cosine", "params": {"beta": 4.0}},
        {"outputs": attnd.Outputs(top_k=3, entropy=True, heatmap=(8, 8)), "return_weights": True, "return_lse": True},
    ]
    for option in options:
        here = attnd.attention(q, k, v, **option)
        there = attnd.attention(q, k, v, cluster=cluster, workers=workers, **option)
        if not isinstance(here, tuple):
            here, there = (here,), (there,)
        for one, other in zip(here, there):
            if isinstance(one, attnd.Inspected):
                for name, value in vars(one).items():
                    assert np.array_equal(value, getattr(other, name)), name
            else:
                assert np.array_equal(one, other)


def test_what_is_refused_here_is_refused_there(cluster, rng):
    q, k, v = operands(rng)
    q[1, 2, 3, 4] = np.inf
    said = []
    for where in (None, cluster):
        with pytest.raises(attnd.InvalidArgument) as raised:
            attnd.attention(q, k, v, cluster=where)
        said.append((str(raised.value), raised.value.reason, raised.value.outcome))
    assert said[0] == said[1] and said[0][1] == "NON_FINITE"


def test_workers_and_urls(cluster):
    assert cluster.workers() == {"w0": "ACTIVE", "w1": "ACTIVE"}
    assert attnd.connect(cluster.url).workers() == cluster.workers()
    assert cluster.url in repr(cluster)
    with pytest.raises(ValueError, match="nowhere"):
        attnd.connect("nowhere at all")
    with pytest.raises(attnd.Error) as raised:
        attnd.connect("http://127.0.0.1:1").workers()
    assert raised.value.reason == "TRANSPORT" and not isinstance(raised.value, ValueError)


def test_a_local_cluster_ends_with_its_context_and_goes_on_without_one_worker(rng):
    q, k, v = operands(rng)
    wanted = attnd.attention(q, k, v)
    with attnd.Cluster.local(workers=2, threads_per_worker=1) as cluster:
        assert np.array_equal(attnd.attention(q, k, v, cluster=cluster), wanted)
        nodes = children_of(cluster._processes.process.pid)
        assert len(nodes) == 3
        for pid in nodes:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8") as line:
                if "w1" in line.read().split("\0"):
                    os.kill(pid, signal.SIGKILL)
        assert np.array_equal(attnd.attention(q, k, v, cluster=cluster), wanted)
    assert not any(is_there(pid) for pid in nodes)
    # Once more does nothing.
    cluster.close()


def test_processes_end_with_whoever_started_them():
    program = "import attnd, sys, time; c = attnd.Cluster.local(workers=1); print(c._processes.process.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    local = int(parent.stdout.readline())
    nodes = [local, *children_of(local)]
    assert len(nodes) == 3 and all(map(is_there, nodes))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not any(is_there(pid) for pid in nodes))


def test_a_cluster_with_a_session_and_a_forked_child_ends_at_once(rng):
    cluster = attnd.Cluster.local(workers=2, threads_per_worker=1)
    nodes = [cluster._processes.process.pid, *children_of(cluster._processes.process.pid)]
    session = cluster.session(1, 2, head_dim=8)
    rows = rng.standard_normal((2, 300, 8), dtype=np.float32)
    session.append(0, rows, rows)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    begun = time.monotonic()
    cluster.close()
    took = time.monotonic() - begun
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert took < 4, took
    assert cluster._processes is None and not any(is_there(pid) for pid in nodes)


def test_a_cluster_that_nobody_holds_ends():
    pids = []
    for forget in (attnd.Cluster.close, lambda _: None):
        cluster = attnd.Cluster.local(workers=1)
        pids += [cluster._processes.process.pid, *children_of(cluster._processes.process.pid)]
        forget(cluster)
        del cluster
        gc.collect()
        eventually(lambda: not any(is_there(pid) for pid in pids))


def test_a_start_that_is_given_up_leaves_nothing():
    async def main():
        starting = asyncio.create_task(attnd.aio.Cluster.local(workers=1))
        await asyncio.sleep(0.02)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    before = set(children_of(os.getpid()))
    asyncio.run(main())
    eventually(lambda: set(filter(is_there, children_of(os.getpid()))) <= before)
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        attnd.Cluster.local(workers=1)
        time.sleep(5)
    gc.collect()
    eventually(lambda: set(filter(is_there, children_of(os.getpid()))) <= before)


def test_what_keeps_a_cluster_from_starting_is_said():
    with pytest.raises(RuntimeError, match="workers"):
        attnd.Cluster.local(workers=0)


def test_the_package_is_the_program():
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "attnd", *arguments], capture_output=True, text=True, timeout=60)

    listed = run("scores")
    assert listed.returncode == 0 and "cosine" in listed.stdout
    refused = run("attend", "--q", "missing.npy", "--k", "missing.npy", "--v", "missing.npy", "--workers", "1")
    assert refused.returncode == 2 and "missing.npy" in refused.stderr


def test_ctrl_c_ends_a_call_that_waits(cluster, rng):
    q = rng.standard_normal((1, 8, 6000, 128), dtype=np.float32)
    k, v = (rng.standard_normal((1, 8, 20000, 128), dtype=np.float32) for _ in range(2))
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        attnd.attention(q, k, v, cluster=cluster)
    assert time.monotonic() - begun < 10
    small = operands(rng)
    assert np.array_equal(attnd.attention(*small, cluster=cluster), attnd.attention(*small))
