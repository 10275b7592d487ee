"""``attnd.attention`` in this process: what it computes, what it takes, what it refuses."""

from __future__ import annotations

import signal
import threading
import time

import ml_dtypes
import numpy as np
import pytest

import attnd
import reference


def drawn(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def operands(rng, batch=2, heads=4, kv_heads=2, queries=5, keys=9, dim=8, value_dim=6):
    return (
        drawn(rng, batch, heads, queries, dim),
        drawn(rng, batch, kv_heads, keys, dim),
        drawn(rng, batch, kv_heads, keys, value_dim),
    )


def causal(queries, keys, align="top-left"):
    position = np.arange(queries)[:, None] + (keys - queries if align == "bottom-right" else 0)
    return np.arange(keys)[None] <= position


def assert_exact(q, k, v, got, **options):
    wanted, weights, _ = reference.attention(q, k, v, **options)
    limit = reference.bound(q, k, v, scale=options.get("scale"), weights=weights, visible=options.get("visible"))
    worst = np.max(np.abs(got - wanted) / limit)
    assert worst <= 1, worst


@pytest.mark.parametrize("align", ["top-left", "bottom-right"])
def test_causal_alignments(rng, align):
    for queries, keys in [(5, 9), (9, 5), (300, 300), (1, 700)]:
        q, k, v = operands(rng, queries=queries, keys=keys)
        got = attnd.attention(q, k, v, is_causal=align)
        assert_exact(q, k, v, got, visible=causal(queries, keys, align))
        if align == "top-left":
            assert np.array_equal(got, attnd.attention(q, k, v, is_causal=True))


def test_lse_and_weights_come_in_this_order(rng):
    q, k, v = operands(rng)
    context, lse, weights = attnd.attention(q, k, v, return_lse=True, return_weights=True)
    _, wanted, wanted_lse = reference.attention(q, k, v)
    np.testing.assert_allclose(weights, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)
    assert np.array_equal(context, attnd.attention(q, k, v))
    assert weights.dtype == lse.dtype == np.float32


def test_three_dimensions_are_one_batch_element(rng):
    q, k, v = operands(rng, batch=1)
    context, lse = attnd.attention(q[0], k[0], v[0], return_lse=True)
    assert np.array_equal(context, attnd.attention(q, k, v)[0])
    assert lse.shape == (4, 5)


def test_masks_broadcast_and_hide(rng):
    q, k, v = operands(rng)
    for shape in [(2, 4, 5, 9), (1, 1, 5, 9), (5, 9), (9,), (2, 1, 1, 9), (4, 5, 1)]:
        visible = rng.random(shape) < 0.6
        got = attnd.attention(q, k, v, attn_mask=visible)
        assert_exact(q, k, v, got, visible=np.broadcast_to(visible, (2, 4, 5, 9)))
        numbers = np.where(visible, drawn(rng, *shape), -np.inf).astype(np.float32)
        got = attnd.attention(q, k, v, attn_mask=numbers)
        wanted, _, _ = reference.attention(q, k, v, bias=numbers)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
        # The lowest number hides a key, whatever its type.
        for dtype in (np.float32, np.float64, np.float16):
            lowest = np.where(visible, 0, np.finfo(dtype).min).astype(dtype)
            assert np.array_equal(attnd.attention(q, k, v, attn_mask=lowest), attnd.attention(q, k, v, attn_mask=visible))


def test_rows_that_see_nothing(rng):
    q, k, v = operands(rng)
    visible = np.ones((5, 9), bool)
    visible[2] = False
    assert not attnd.attention(q, k, v, attn_mask=visible)[:, :, 2].any()
    assert np.isnan(attnd.attention(q, k, v, attn_mask=visible, empty_row="nan")[:, :, 2]).all()
    uniform = attnd.attention(q, k, v, attn_mask=visible, empty_row="uniform")[:, :, 2]
    np.testing.assert_allclose(uniform, np.repeat(v, 2, axis=1).mean(2), rtol=1e-5, atol=1e-6)
    with pytest.raises(attnd.InvalidArgument, match="EMPTY_ROW"):
        attnd.attention(q, k, v, attn_mask=visible, forbid_empty_rows=True)


def test_a_window_counts_the_key_of_the_query_itself(rng):
    q, k, v = operands(rng, queries=9)
    distance = np.arange(9)[:, None] - np.arange(9)[None]
    for window, visible in [(3, (distance >= 0) & (distance < 3)), ((2, None), distance <= 2), ((1, 0), (distance >= 0) & (distance <= 1))]:
        visible = visible & (distance >= 0)
        got = attnd.attention(q, k, v, is_causal=True, window=window)
        assert_exact(q, k, v, got, visible=visible)
    assert np.array_equal(attnd.attention(q, k, v, is_causal=np.True_, window=np.int64(3)), attnd.attention(q, k, v, is_causal=True, window=3))
    both = attnd.attention(q, k, v, offset=0, window=(2, 1))
    assert_exact(q, k, v, both, visible=(distance <= 2) & (distance >= -1))


def test_padding_prefix_chunks_and_offsets(rng):
    q, k, v = operands(rng)
    keys = np.arange(9)
    begin, end = np.array([0, 2]), np.array([7, 9])
    visible = (keys >= begin[:, None]) & (keys < end[:, None])
    got = attnd.attention(q, k, v, key_begin=begin.tolist(), key_end=end.tolist())
    assert_exact(q, k, v, got, visible=visible[:, None, None])
    got = attnd.attention(q, k, v, is_causal=True, prefix=4)
    assert_exact(q, k, v, got, visible=causal(5, 9) | (keys < 4))
    got = attnd.attention(q, k, v, is_causal=True, offset=3)
    assert_exact(q, k, v, got, visible=keys[None] <= np.arange(5)[:, None] + 3)
    got = attnd.attention(q, k, v, offset=[0, 3], chunk=4)
    position = np.arange(5)[None, :, None] + np.array([0, 3])[:, None, None]
    assert_exact(q, k, v, got, visible=(position // 4 == keys // 4)[:, None])


def test_documents_blocks_and_graphs(rng):
    q, k, v = operands(rng, queries=9)
    ids = np.array([[5, 5, 7, 7, 7, 5, 1, 1, 1], [2] * 9])
    got = attnd.attention(q, k, v, documents=ids)
    assert_exact(q, k, v, got, visible=(ids[:, :, None] == ids[:, None])[:, None])
    few = np.array([7, 1, 5, 5, 7])
    got = attnd.attention(q[:, :, :5], k, v, documents=ids[0], query_documents=few)
    assert_exact(q[:, :, :5], k, v, got, visible=few[:, None] == ids[0][None])
    neighbours = rng.random((9, 9)) < 0.4
    indptr = np.concatenate([[0], neighbours.sum(1).cumsum()])
    graph = attnd.Csr(indptr, np.nonzero(neighbours)[1])
    assert_exact(q, k, v, attnd.attention(q, k, v, csr=graph), visible=neighbours)
    blocks = attnd.Csr([0, 1, 3, 4], [0, 0, 2, 1], block=(3, 3))
    visible = np.kron(np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]], bool), np.ones((3, 3), bool))
    assert_exact(q, k, v, attnd.attention(q, k, v, csr=blocks), visible=visible)


def test_caps_sinks_and_slopes(rng):
    q, k, v = operands(rng, queries=9)
    for options in [{"softcap": 2.0}, {"sinks": np.array([0.5, -1, 3, -np.inf])}, {"scale": -0.7}]:
        got = attnd.attention(q, k, v, **options)
        np.testing.assert_allclose(got, reference.attention(q, k, v, **options)[0], rtol=1e-4, atol=1e-6)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    distance = np.abs(np.arange(9)[:, None] - np.arange(9)[None])
    got = attnd.attention(q, k, v, is_causal=True, alibi_slopes=slopes)
    bias = -slopes[:, None, None] * distance
    np.testing.assert_allclose(got, reference.attention(q, k, v, bias=bias, visible=causal(9, 9))[0], rtol=1e-4, atol=1e-6)
    published = attnd.attention(q, k, v, is_causal=True, alibi_slopes="auto")
    of_four = 2.0 ** -np.array([2.0, 4.0, 6.0, 8.0])
    assert np.array_equal(published, attnd.attention(q, k, v, is_causal=True, alibi_slopes=of_four))


def test_tables(rng):
    q, k, v = operands(rng, queries=9)
    table = drawn(rng, 8, 4)
    got = attnd.attention(q, k, v, relative=attnd.Relative(table, max_distance=20), is_causal=True)
    # Of eight buckets four have a distance each; those below 20 share the others by their logarithm.
    distance = np.maximum(np.arange(9)[:, None] - np.arange(9)[None], 0)
    far = 4 + (np.log(np.maximum(distance, 1) / 4) / np.log(20 / 4) * 4).astype(int)
    bucket = np.where(distance < 4, distance, np.minimum(far, 7))
    bias = table[bucket].transpose(2, 0, 1)
    np.testing.assert_allclose(got, reference.attention(q, k, v, bias=bias, visible=causal(9, 9))[0], rtol=1e-4, atol=1e-6)
    table = drawn(rng, 25, 4)
    got = attnd.attention(q, k, v, swin=attnd.Swin(table, (3, 3)))
    place = np.stack(np.divmod(np.arange(9), 3), 1)
    apart = place[:, None] - place[None] + 2
    bias = table[apart[..., 0] * 5 + apart[..., 1]].transpose(2, 0, 1)
    np.testing.assert_allclose(got, reference.attention(q, k, v, bias=bias)[0], rtol=1e-4, atol=1e-6)


def test_other_scores_and_normalisers(rng):
    q, k, v = operands(rng)
    got = attnd.attention(q, k, v, score="cosine", params={"beta": 3.0})
    unit = [x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True) for x in (q, k)]
    np.testing.assert_allclose(got, reference.attention(*unit, v, scale=3.0)[0], rtol=1e-4, atol=1e-6)
    got = attnd.attention(q, k, v, sigmoid_bias=-1.0)
    scores = np.einsum("bhqd,bhkd->bhqk", q, np.repeat(k, 2, 1)).astype(np.float64) / np.sqrt(8)
    weights = 1 / (1 + np.exp(1 - scores))
    np.testing.assert_allclose(got, np.einsum("bhqk,bhkd->bhqd", weights, np.repeat(v, 2, 1)), rtol=1e-4, atol=1e-6)
    from_keys = attnd.attention(q, k, None, value_dim=3)
    assert np.array_equal(from_keys, attnd.attention(q, k, k[..., :3]))


def test_outputs(rng):
    q, k, v = operands(rng, keys=700)
    wanted = attnd.Outputs(
        stages=["raw"], rectangles=[("weights", (1, 3), (0, 2), (10, 20))], top_k=3, mass_block=256, entropy=True,
        distance=True, max_score=True, heatmap=(5, 7),
    )
    _, weights, told = attnd.attention(q, k, v, return_weights=True, outputs=wanted, is_causal="bottom-right")
    assert told.elements[0].shape == (2, 4, 5, 700)
    assert np.array_equal(told.elements[1], weights[:, 1:3, :2, 10:20])
    assert np.array_equal(told.top_keys[..., 0], weights.argmax(-1))
    np.testing.assert_allclose(told.mass.sum(-1), 1, rtol=1e-5)
    safe = np.where(weights > 0, weights, 1).astype(np.float64)
    np.testing.assert_allclose(told.entropy, -(weights * np.log(safe)).sum(-1), rtol=1e-4)
    assert told.heatmap.shape == (2, 4, 5, 7) and told.distance.shape == (2, 4, 5)
    raw_visible = np.where(causal(5, 700, "bottom-right"), told.elements[0], -np.inf)
    np.testing.assert_allclose(told.max_score, raw_visible.max(-1), rtol=1e-6)
    _, some = attnd.attention(q[0], k[0], v[0], outputs=attnd.Outputs(top_k=2, heads=(1, 2)))
    assert some.top_keys.shape == (1, 5, 2) and some.entropy is None


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly_and_the_result_rounded_once(rng, dtype):
    q, k, v = (x.astype(dtype) for x in operands(rng))
    got, lse = attnd.attention(q, k, v, return_lse=True)
    exact, exact_lse = attnd.attention(*(x.astype(np.float32) for x in (q, k, v)), return_lse=True)
    assert got.dtype == dtype and lse.dtype == np.float32
    assert np.array_equal(got, exact.astype(dtype)) and np.array_equal(lse, exact_lse)


def test_arrays_may_lie_in_any_order(rng):
    q, k, v = operands(rng)
    turned = [np.asfortranarray(x) for x in (q, k, v)]
    strided = [np.repeat(x, 2, axis=2)[:, :, ::2] for x in (q, k, v)]
    wanted = attnd.attention(q, k, v)
    assert np.array_equal(attnd.attention(*turned), wanted)
    assert np.array_equal(attnd.attention(*strided), wanted)
    unaligned = [np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape) for x in (q, k, v)]
    assert not unaligned[0].flags.aligned
    assert np.array_equal(attnd.attention(*unaligned), wanted)
    swapped = [x.astype(">f4") for x in (q, k, v)]
    assert np.array_equal(attnd.attention(*swapped), wanted) and attnd.attention(*swapped).dtype == np.float32
    q.setflags(write=False)
    assert np.array_equal(attnd.attention(q, k, v), wanted)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": np.zeros((2, 4, 5, 8))}, "q is float64, expected float32, float16, bfloat16; q.astype"),
        ({"q": np.zeros((2, 4, 5, 8), complex)}, "q is complex128, expected float32"),
        ({"q": np.zeros((2, 3, 5, 8), np.float32)}, "GQA_RATIO"),
        ({"q": np.zeros((2, 4, 5, 7), np.float32)}, "last dimension of q is 7, of k 8"),
        ({"k": np.zeros((1, 2, 9, 8), np.float32)}, "batch of q is 2, of k 1"),
        ({"v": np.zeros((2, 2, 8, 6), np.float32)}, "tokens of k is 9, of v 8"),
        ({"q": np.zeros((4, 5, 8), np.float32)}, "both have a batch, or none"),
        ({"q": np.zeros((5, 8), np.float32)}, "expected .batch, heads, tokens, dim."),
        ({"k": np.zeros((2, 2, 9, 8), np.float16)}, "q is f32, k is f16"),
        ({"enable_gqa": False}, "q has 4 heads, k 2, and enable_gqa is False"),
        ({"is_causal": "middle"}, "is_causal is \"middle\", expected \"top-left\""),
        ({"empty_row": "ones"}, "empty_row is \"ones\""),
        ({"scale": float("nan")}, "SCALE"),
        ({"softcap": -1.0}, "softcap"),
        ({"attn_mask": np.ones((5, 10), bool)}, "the call needs"),
        ({"attn_mask": np.ones((5, 8), bool)}, r"attn_mask has shape \(5, 8\), the call needs 1 or 9 keys"),
        ({"bias": np.zeros((5, 4), np.float32)}, "bias has shape"),
        ({"attn_mask": np.ones((5, 9), np.int32)}, "attn_mask is int32, expected"),
        ({"sinks": [1.0]}, "sinks has 1 logits, num_heads is 4"),
        ({"key_end": [1, 2, 3]}, "key_end has 3 entries, batch is 2"),
        ({"window": (1, 0)}, "window"),
        ({"window": 0, "is_causal": True}, "window is 0, expected 1 at least"),
        ({"score": "nonsense"}, "nonsense"),
        ({"sinks": np.zeros((4, 1))}, r"sinks has shape \(4, 1\), expected \(4,\)"),
        ({"alibi_slopes": np.zeros((4, 2)), "is_causal": True}, r"alibi_slopes has shape \(4, 2\), expected \(4,\) or \(2, 4\)"),
        ({"alibi_slopes": "some"}, "alibi_slopes is 'some'"),
        ({"swin": attnd.Swin(np.zeros((4, 25)), (3, 3))}, r"swin.table has shape \(4, 25\), expected \(25, 4\)"),
        ({"swin": attnd.Swin(np.zeros((25, 4)), (3, 3), np.zeros(9, int))}, "swin.regions has shape"),
        ({"relative": attnd.Relative(np.zeros(8)), "is_causal": True}, "relative.table has shape"),
        ({"key_end": 2.5}, "key_end is float64, expected integers"),
        ({"key_end": -1}, "key_end is -1, expected a number over -1"),
        ({"chunk": 0, "is_causal": True}, "chunk"),
        ({"query_documents": np.zeros(5, int)}, "query_documents needs documents"),
        ({"params": {"beta": 1.0}}, "params needs score"),
        ({"alibi_by_key": True}, "alibi_by_key needs alibi_slopes"),
        ({"value_dim": 3}, "value_dim is for a call without v"),
        ({"workers": 2}, "workers and timeout are for a call on a cluster"),
        ({"is_causal": "bottom-right", "offset": 2}, "give one of them"),
        ({"value_dim": None, "v": None}, "v is missing, and so is value_dim"),
        ({"outputs": attnd.Outputs(top_k=5000)}, "OUTPUTS"),
        ({"outputs": attnd.Outputs(stages=["soft"])}, "stage is \"soft\""),
    ],
)
def test_what_makes_no_sense_is_a_value_error_that_says_why(rng, change, text):
    q, k, v = operands(rng)
    call = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(ValueError, match=text):
        attnd.attention(**call)


def test_what_is_not_finite_is_named(rng):
    q, k, v = operands(rng)
    k[1, 0, 3, 2] = np.nan
    with pytest.raises(attnd.InvalidArgument, match=r"NON_FINITE: k\[h=2,pos=3,i=2\]") as raised:
        attnd.attention(q, k, v)
    assert raised.value.reason == "NON_FINITE" and raised.value.outcome == "not_executed"
    assert isinstance(raised.value, ValueError) and isinstance(raised.value, attnd.Error)
    assert np.isnan(attnd.attention(q, k, v, allow_non_finite=True)[1, :2]).all()


def test_threads_can_be_chosen_and_show_in_no_bit(rng):
    q, k, v = operands(rng, queries=130, keys=1000)
    before, wanted = attnd.num_threads(), attnd.attention(q, k, v, is_causal=True)
    try:
        for threads in (1, 3):
            attnd.set_num_threads(threads)
            assert attnd.num_threads() == threads
            assert np.array_equal(attnd.attention(q, k, v, is_causal=True), wanted)
        for threads in (0, 10**9):
            with pytest.raises(ValueError, match=f"num_threads is {threads}, expected 1 to"):
                attnd.set_num_threads(threads)
    finally:
        attnd.set_num_threads(before)


def test_other_threads_of_python_run_meanwhile(rng):
    q, k, v = operands(rng, queries=2000, keys=8000, dim=64)
    counted = []
    running = threading.Event()

    def count():
        running.set()
        while running.is_set():
            counted.append(time.monotonic())
            time.sleep(0.001)

    counting = threading.Thread(target=count)
    counting.start()
    begun = time.monotonic()
    attnd.attention(q, k, v)
    ended = time.monotonic()
    running.clear()
    counting.join()
    assert sum(begun < at < ended for at in counted) >= 3, (ended - begun, len(counted))


def test_ctrl_c_ends_a_call(rng):
    q, k, v = operands(rng, batch=1, heads=8, queries=8000, keys=30000, dim=128)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    begun = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        attnd.attention(q, k, v)
    assert time.monotonic() - begun < 10
    # And the next one is as if there had been none.
    small = operands(rng)
    assert attnd.attention(*small).shape == (2, 4, 5, 6)


def test_a_forked_child_has_threads_of_its_own(rng):
    import os

    q, k, v = operands(rng)
    wanted = attnd.attention(q, k, v)
    child = os.fork()
    if child == 0:
        same = np.array_equal(attnd.attention(q, k, v), wanted)
        os._exit(0 if same else 1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
