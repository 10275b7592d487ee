"""Sessions on real workers: the same bits as one call, and what becomes of them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import traceback

import ml_dtypes
import numpy as np
import pytest

import attnd
import attnd.aio


def rows(rng, heads, tokens, dim=16, dtype=np.float32):
    return rng.standard_normal((heads, tokens, dim), dtype=np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_steps_have_the_bits_of_one_call(cluster, rng, dtype):
    k, v, q = rows(rng, 2, 700, dtype=dtype), rows(rng, 2, 700, 12, dtype=dtype), rows(rng, 4, 700, dtype=dtype)
    name = {np.float32: "f32", ml_dtypes.bfloat16: "bf16"}[dtype]
    wanted, wanted_lse = attnd.attention(q, k, v, is_causal=True, return_lse=True)
    with cluster.session(2, 4, 2, head_dim=16, value_dim=12, dtype=name) as session:
        assert session.append(1, k[:, :600], v[:, :600]) == 600
        chunk = slice(600, 690)
        got, lse = session.step(1, k[:, chunk], v[:, chunk], q[:, chunk], return_lse=True)
        assert got.dtype == dtype and np.array_equal(got, wanted[:, chunk]) and np.array_equal(lse, wanted_lse[:, chunk])
        for token in range(690, 700):
            one = slice(token, token + 1)
            assert np.array_equal(session.step(1, k[:, one], v[:, one], q[:, one]), wanted[:, one])
        assert np.array_equal(session.attend(1, q, is_causal="bottom-right"), wanted)
        before = session.attend(1, q[:, 99:100], at_len=100)
        assert np.array_equal(before, wanted[:, 99:100])
        assert (session.tokens(0), session.tokens(1)) == (0, 700)
        described = session.describe()
        assert described["tokens"] == [0, 700] and described["dtype"] == name and not described["sealed"]
    assert session.close() is True


def test_forks_cuts_and_names(cluster, rng):
    k, v, q = rows(rng, 2, 300), rows(rng, 2, 300), rows(rng, 2, 1)
    with cluster.session(1, 2, head_dim=16, name="py-parent") as parent:
        parent.append(0, k, v)
        with parent.fork("py-child") as child:
            child.truncate(100)
            child.append(0, k[:, 200:], v[:, 200:])
            assert {"py-parent", "py-child"} <= set(cluster.sessions())
            of_child = np.concatenate([k[:, :100], k[:, 200:]], 1), np.concatenate([v[:, :100], v[:, 200:]], 1)
            assert np.array_equal(child.attend(0, q), attnd.attention(q, *of_child))
            assert np.array_equal(parent.attend(0, q), attnd.attention(q, k, v))
        reader = cluster.attach("py-parent", write=False)
        assert reader.tokens() == 300 and np.array_equal(reader.attend(0, q), parent.attend(0, q))
        parent.seal()
        with pytest.raises(attnd.Error) as raised:
            parent.append(0, k, v)
        assert raised.value.reason == "SEALED"
    with pytest.raises(attnd.Error) as raised:
        parent.attend(0, q)
    assert raised.value.reason == "SESSION"


def test_who_attaches_ends_nothing(cluster, rng):
    k, v = rows(rng, 2, 30), rows(rng, 2, 30)
    with cluster.session(1, 2, head_dim=16, name="py-owned") as owner:
        owner.append(0, k, v)
        with cluster.attach("py-owned", write=False) as reader:
            assert reader.tokens() == 30
        assert owner.append(0, k, v) == 60
        with cluster.attach("py-owned") as writer:
            assert writer.append(0, k, v) == 90
        assert "py-owned" in cluster.sessions()
        with pytest.raises(ValueError, match="layer is 1, the session has 1"):
            owner.tokens(1)
    assert "py-owned" not in cluster.sessions()


def test_a_forked_child_connects_by_itself(cluster, rng):
    k, v, q = rows(rng, 2, 30), rows(rng, 2, 30), rows(rng, 2, 1)
    with cluster.session(1, 2, head_dim=16, name="py-forked") as session:
        session.append(0, k, v)
        wanted = attnd.attention(q, k, v)

        def in_child():
            assert np.array_equal(attnd.attention(q, k, v, cluster=cluster), wanted)
            assert "py-forked" in cluster.sessions()
            with pytest.raises(RuntimeError, match="was opened by process"):
                session.attend(0, q)
            assert np.array_equal(cluster.attach("py-forked", write=False).attend(0, q), wanted)
            assert np.array_equal(asyncio.run(attnd.aio.attention(q, k, v)), wanted)

        assert exit_of_child(in_child) == 0
        assert session.append(0, k, v) == 60


def exit_of_child(call, seconds=20):
    """The exit code of a forked child that calls something."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_sessions_of_cancelled_calls_are_closed(cluster):
    async def main():
        there = attnd.aio.connect(cluster.url)
        before = set(await there.sessions())
        for wait in [0, 0.0005, 0.002, 0.005] * 3:
            opening = asyncio.create_task(there.session(1, 2, head_dim=16))
            await asyncio.sleep(wait)
            opening.cancel()
            try:
                opened = await opening
            except asyncio.CancelledError:
                continue
            await opened.close()
        assert set(await there.sessions()) == before

    asyncio.run(main())


def test_a_batch_of_steps(cluster, rng):
    sessions = [cluster.session(1, 4, 2, head_dim=16) for _ in range(3)]
    data = [(rows(rng, 2, n), rows(rng, 2, n), rows(rng, 4, 1)) for n in (5, 300, 40)]
    for session, (k, v, _) in zip(sessions, data):
        session.append(0, k[:, :-1], v[:, :-1])
    steps = [attnd.Step(s, 0, k[:, -1:], v[:, -1:], q) for s, (k, v, q) in zip(sessions, data)]
    sessions[1].seal()
    got = cluster.step_batch(steps)
    for at in (0, 2):
        k, v, q = data[at]
        assert np.array_equal(got[at], attnd.attention(q, k, v))
    assert isinstance(got[1], attnd.Error) and got[1].reason == "SEALED"
    with pytest.raises(ValueError, match="steps 0 and 1 are of one session"):
        cluster.step_batch([steps[0], steps[0]])
    for session in sessions:
        session.close()


def test_what_makes_no_sense_is_a_value_error(cluster, rng):
    k, v, q = rows(rng, 2, 5), rows(rng, 2, 5), rows(rng, 4, 5)
    with cluster.session(1, 4, 2, head_dim=16) as session:
        for call, text in [
            (lambda: session.append(0, k[:1], v), r"k has shape \[1, 5, 16\], expected \[2, tokens, 16\]"),
            (lambda: session.append(0, k, v[:, :4]), "tokens of k is 5, of v 4"),
            (lambda: session.append(0, k.astype(np.float16), v), "k is f16, the session has f32"),
            (lambda: session.append(0, k, None), "v is missing"),
            (lambda: session.append(7, k, v), "layer"),
            (lambda: session.attend(0, q, attn_mask=np.ones((5, 5), bool)), "attn_mask: a session takes no matrices"),
            (lambda: session.attend(0, q, sinks=np.ones((2, 2))), "sinks has shape"),
            (lambda: session.attend(0, q, nonsense=1), "nonsense"),
        ]:
            with pytest.raises((ValueError, TypeError), match=text):
                call()
    with pytest.raises(ValueError, match="dtype is \"f64\", expected f32, f16, bf16"):
        cluster.session(1, 2, head_dim=4, dtype="f64")
    with pytest.raises(attnd.Error, match="PLACEMENT"):
        cluster.session(1, 2, head_dim=4, replicas=5)
    with pytest.raises(ValueError):
        cluster.session(1, 2, head_dim=4, name="not a name")
    with pytest.raises(ValueError, match="ttl is -1"):
        cluster.session(1, 2, head_dim=4, ttl=-1)


def test_coroutines_do_the_same_and_cancelled_ones_end(cluster, rng):
    k, v, q = rows(rng, 2, 300), rows(rng, 2, 300), rows(rng, 4, 300)

    async def main():
        there = attnd.aio.connect(cluster.url)
        assert (await there.workers()) == cluster.workers()
        async with await there.session(1, 4, 2, head_dim=16) as session:
            assert await session.append(0, k[:, :200], v[:, :200]) == 200
            got = await session.step(0, k[:, 200:], v[:, 200:], q[:, 200:])
            wanted = await attnd.aio.attention(q, k, v, is_causal=True, cluster=there)
            assert np.array_equal(got, wanted[:, 200:])
            fork = await session.fork()
            both = await there.step_batch([attnd.Step(s, 0, k[:, :1], v[:, :1], q[:, :1]) for s in (session, fork)])
            assert np.array_equal(both[0], both[1])
            await fork.close()
        big = rng.standard_normal((1, 8, 8000, 128), dtype=np.float32)
        keys = rng.standard_normal((1, 8, 30000, 128), dtype=np.float32)
        for where in (None, there):
            call = asyncio.create_task(attnd.aio.attention(big, keys, keys, cluster=where))
            await asyncio.sleep(0.3)
            begun = time.monotonic()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert time.monotonic() - begun < 5

    asyncio.run(main())
