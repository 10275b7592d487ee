"""torch's attention and attnd's, on random calls, against the same in f64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import attnd.torch
import reference

CASES = 800


def sdpa(q, k, v, **options):
    """torch's, in f64. The causal rule is a mask there: with a negative scale torch's own is NaN."""
    mask = options.pop("attn_mask", None)
    if options.pop("is_causal", False):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, **options)


def drawn(generator, *shape):
    return torch.randn(*shape, generator=generator)


def limit(q, k, v, scale, mask):
    """The f32 bound of each element, from absolute values; weights are bounded by 1, so ``A`` by the largest value that is seen."""
    group = q.shape[-3] // k.shape[-3]
    k, v = (tensor.double().abs().repeat_interleave(group, dim=-3) for tensor in (k, v))
    products = q.double().abs() @ k.transpose(-1, -2) * abs(q.shape[-1] ** -0.5 if scale is None else scale)
    most = products.amax(-1, keepdim=True)
    if mask is not None and mask.dtype != torch.bool:
        most = most + torch.where(mask.double().abs() < 1e30, mask.double().abs(), 0).amax(-1, keepdim=True)
    return 8 * reference.U * (8 + most) * v.amax(-2, keepdim=True) + 1e-30


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    kv_heads = pick(1, 2, 3)
    heads = kv_heads * pick(1, 1, 2, 4)
    lead = pick((), (1,), (2,), (2, 3))
    queries, keys = pick(1, 2, 7, 33, 130), pick(1, 3, 8, 65, 300)
    dim, value_dim = pick(1, 4, 8, 33, 64), pick(1, 8, 20, 64)
    q = drawn(generator, *lead, heads, queries, dim) * pick(0.1, 1, 3)
    k = drawn(generator, *lead, kv_heads, keys, dim)
    v = drawn(generator, *lead, kv_heads, keys, value_dim)
    options = {"enable_gqa": heads != kv_heads, "scale": pick(None, None, 0.3, -1.0)}
    kind = pick("none", "causal", "bool", "float", "float", "low")
    shapes = [(queries, keys), (1, keys), (heads, queries, keys), (1, queries, keys)]
    shape = pick(*shapes, (*lead, 1, queries, keys), (*lead, heads, queries, keys))
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "bool":
        options["attn_mask"] = torch.rand(shape, generator=generator) < pick(0.0, 0.1, 0.7, 1.0)
    elif kind == "float":
        hidden = torch.rand(shape, generator=generator) < pick(0.0, 0.3, 0.95)
        options["attn_mask"] = drawn(generator, *shape).masked_fill(hidden, float("-inf"))
    elif kind == "low":
        hidden = torch.rand(shape, generator=generator) < pick(0.3, 0.95)
        options["attn_mask"] = torch.zeros(shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    return (q, k, v), options


def test_random_calls_are_torchs():
    blind = 0
    for seed in range(CASES):
        (q, k, v), options = random_case(seed)
        got = attnd.torch.scaled_dot_product_attention(q, k, v, **options)
        wanted = sdpa(q, k, v, **options)
        assert got.shape == wanted.shape and got.dtype == torch.float32, seed
        worst = ((got.double() - wanted).abs() / limit(q, k, v, options["scale"], options.get("attn_mask"))).max()
        assert worst <= 1, (seed, worst, options.keys())
        blind += bool((wanted == 0).all(-1).any())
    assert blind >= 30, blind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_exactly_and_rounded_once(dtype):
    for seed in range(20):
        (q, k, v), options = random_case(seed)
        q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
        mask = options.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            options["attn_mask"] = mask.clamp(min=torch.finfo(dtype).min).to(dtype)
        got = attnd.torch.scaled_dot_product_attention(q, k, v, **options)
        wide = {**options, "attn_mask": None if mask is None else options["attn_mask"]}
        if mask is not None and mask.dtype != torch.bool and dtype == torch.float16:
            # torch adds in f32, where this is a number like others.
            wide["attn_mask"] = options["attn_mask"].float()
        elif mask is not None and mask.dtype != torch.bool:
            lowest = options["attn_mask"] == torch.finfo(dtype).min
            wide["attn_mask"] = options["attn_mask"].float().masked_fill(lowest, torch.finfo(torch.float32).min)
        exact = attnd.torch.scaled_dot_product_attention(q.float(), k.float(), v.float(), **wide)
        assert got.dtype == dtype and torch.equal(got, exact.to(dtype)), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_the_lowest_number_are_torchs(dtype):
    generator = torch.Generator().manual_seed(4)
    q, k, v = (drawn(generator, 2, 4, 6, 8).to(dtype) for _ in range(3))
    lowest = torch.finfo(dtype).min
    for shape in [(6, 6), (2, 1, 6, 6), (2, 4, 6, 6), (1, 6)]:
        mask = torch.zeros(shape, dtype=dtype).masked_fill(torch.rand(shape, generator=generator) < 0.4, lowest)
        mask[..., 0, :] = lowest
        if shape[-2] > 1:
            mask[..., 1, :] = lowest
            mask[..., 1, 2] = float("-inf")
        got = attnd.torch.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        wanted = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask.float())
        assert torch.allclose(got.float(), wanted, atol=2e-2 if dtype != torch.float32 else 1e-5), (shape, (got - wanted).abs().max())


def test_tensors_without_elements_are_torchs():
    for q, k in [((2, 3, 0, 4), (2, 3, 5, 4)), ((2, 3, 5, 4), (2, 3, 0, 4)), ((0, 3, 5, 4), (0, 3, 5, 4))]:
        q, k = torch.ones(q), torch.ones(k)
        got, wanted = attnd.torch.scaled_dot_product_attention(q, k, k), functional.scaled_dot_product_attention(q, k, k)
        assert got.shape == wanted.shape and torch.equal(got, wanted)


def test_tensors_of_any_layout_and_few_dimensions():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (drawn(generator, 2, 9, 4, 8).transpose(1, 2) for _ in range(3))
    got = attnd.torch.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(got.double(), sdpa(q, k, v), atol=1e-6)
    three = attnd.torch.scaled_dot_product_attention(q[0], k[0], v[0])
    assert three.shape == (4, 9, 8) and torch.equal(three, got[0])
    two = attnd.torch.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0])
    assert two.shape == (9, 8) and torch.equal(two, got[0, 0])
    shared = attnd.torch.scaled_dot_product_attention(q, k[:1], v[:1])
    assert torch.allclose(shared.double(), sdpa(q, k[:1], v[:1]), atol=1e-6)


def test_what_is_not_computed_is_refused():
    q = torch.ones(1, 2, 3, 4)
    call = attnd.torch.scaled_dot_product_attention
    for change, error, text in [
        ({"dropout_p": 0.1}, ValueError, "dropout_p is 0.1"),
        ({"is_causal": True, "attn_mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "give one"),
        ({"query": q.double()}, ValueError, "query is torch.float64"),
        ({"query": q.clone().requires_grad_()}, RuntimeError, "torch.no_grad"),
        ({"query": q.to("meta")}, ValueError, "query is on meta"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.int64)}, ValueError, "attn_mask is torch.int64"),
        ({"attn_mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, "the call needs"),
        ({"attn_mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, "the call needs 1 or 3 keys"),
        ({"attn_mask": torch.zeros(3, 3, requires_grad=True)}, RuntimeError, "attn_mask requires a gradient"),
        ({"key": torch.ones(1, 1, 3, 4), "value": torch.ones(1, 2, 3, 4), "enable_gqa": True}, ValueError, "heads"),
    ]:
        with pytest.raises(error, match=text):
            call(**{"query": q, "key": q, "value": q, **change})


def module_case(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    heads, head_dim = pick(1, 2, 4), pick(2, 5, 16)
    width = heads * head_dim
    widths = pick({}, {}, {"kdim": 7, "vdim": 5}, {"vdim": 3})
    made = {"bias": pick(True, False), "add_bias_kv": pick(True, False), "add_zero_attn": pick(True, False)}
    made["batch_first"] = pick(True, False)
    torch.manual_seed(seed)
    theirs = torch.nn.MultiheadAttention(width, heads, **made, **widths).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(drawn(generator, *parameter.shape) * 0.5)
    ours = attnd.torch.MultiheadAttention(width, heads, **made, **widths).eval()
    ours.load_state_dict(theirs.state_dict())
    batch, queries, keys = pick(1, 3), pick(1, 4, 40), pick(1, 5, 70)
    is_batched = pick(True, True, False)

    def rows(tokens, of):
        x = drawn(generator, tokens, batch, of)
        return x[:, 0] if not is_batched else (x.transpose(0, 1) if theirs.batch_first else x)

    inputs = [rows(queries, width), rows(keys, widths.get("kdim", width)), rows(keys, widths.get("vdim", width))]
    call = {"need_weights": pick(True, True, False), "average_attn_weights": pick(True, False)}
    if pick(True, False):
        padding = torch.rand(batch, keys, generator=generator) < 0.3
        padding = padding if is_batched else padding[0]
        hides = pick(float("-inf"), torch.finfo(torch.float32).min)
        call["key_padding_mask"] = pick(padding, torch.zeros(padding.shape).masked_fill(padding, hides))
    if pick(True, False):
        of_heads = (batch if is_batched else 1) * heads
        shape = pick((queries, keys), (of_heads, queries, keys))
        hidden = torch.rand(shape, generator=generator) < 0.3
        if pick(True, False):
            hidden[..., 0, :] = True
        numbers = drawn(generator, *shape)
        call["attn_mask"] = pick(
            hidden, numbers, numbers.masked_fill(hidden, float("-inf")), torch.zeros(shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        )
    padding, mask = call.get("key_padding_mask"), call.get("attn_mask")
    lowest = torch.finfo(torch.float32).min
    if padding is not None and mask is not None and padding.dtype == mask.dtype == torch.float32 and bool((mask == lowest).any()):
        # Twice the lowest number is -inf in f32, and none in f64.
        call["key_padding_mask"] = padding.masked_fill(padding == lowest, float("-inf"))
    return theirs, ours, inputs, call


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_random_modules_are_torchs():
    weighed = 0
    for seed in range(CASES):
        theirs, ours, inputs, call = module_case(seed)
        output, weights = ours(*inputs, **call)
        wide = {name: value.double() if torch.is_tensor(value) and value.dtype != torch.bool else value for name, value in call.items()}
        wanted, wanted_weights = theirs.double()(*(x.double() for x in inputs), **wide)
        assert output.shape == wanted.shape, seed
        # Of three linear layers: their sums are as large as the largest output, wherever they cancel.
        largest = max(1.0, float(wanted.nan_to_num().abs().max()))
        assert torch.allclose(output.double(), wanted, rtol=0, atol=1e-5 * largest, equal_nan=True), seed
        assert (weights is None) == (wanted_weights is None), seed
        if weights is not None:
            assert weights.shape == wanted_weights.shape, seed
            assert torch.allclose(weights.double(), wanted_weights, rtol=3e-5, atol=3e-6, equal_nan=True), seed
            weighed += 1
    assert weighed > CASES // 2


@torch.no_grad()
def test_a_module_computes_on_a_cluster_too(cluster):
    theirs, ours, inputs, call = module_case(3)
    here = ours(*inputs, **call)
    ours.cluster = cluster
    there = ours(*inputs, **call)
    for one, other in zip(here, there):
        assert one is None or torch.equal(one, other)
    with pytest.raises(RuntimeError, match="dropout is 0.5"):
        attnd.torch.MultiheadAttention(4, 2, dropout=0.5)(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4))


def test_rows_beside_numpy(rng):
    q = rng.standard_normal((1, 2, 5, 8), dtype=np.float32)
    tensor = torch.from_numpy(q)
    got = attnd.torch.scaled_dot_product_attention(tensor, tensor, tensor)
    assert np.array_equal(got.numpy(), attnd.attention(q, q, q))
