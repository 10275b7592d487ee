"""Times torch's scaled_dot_product_attention for `attnd bench peers`.

Reads one JSON object a line from stdin, each a case, and answers each with one line on stdout: {"seconds": [...]}, the
times of its runs in order, or {"error": "..."}. The first line out, before any case, is {"torch": VERSION}. Ends when
stdin does. Operands are kept between cases that differ in nothing else than what is done with them.
"""

import json
import os
import sys
import time

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SHAPE = ("heads", "kv_heads", "queries", "keys", "head_dim", "value_dim", "dtype")


def operands(case):
    """q, k and v of a case: random, the same in every run."""
    torch.manual_seed(7)
    dtype = DTYPES[case["dtype"]]

    def tensor(heads, tokens, dim):
        return torch.empty(1, heads, tokens, dim).uniform_(-1.7, 1.7).to(dtype)

    q = tensor(case["heads"], case["queries"], case["head_dim"])
    k = tensor(case["kv_heads"], case["keys"], case["head_dim"])
    v = tensor(case["kv_heads"], case["keys"], case["value_dim"])
    return q, k, v


def attention(case, q, k, v):
    """A function of no arguments that computes the case once."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    heads, kv_heads = case["heads"], case["kv_heads"]
    if case["fold"]:
        # The heads of a group become query tokens, so that keys and values are read once for all of them. Without a mask
        # that is the same attention.
        rows = heads // kv_heads * case["queries"]
        folded = q.view(1, kv_heads, rows, case["head_dim"])
        return lambda: sdpa(folded, k, v)
    return lambda: sdpa(q, k, v, is_causal=case["causal"], enable_gqa=heads != kv_heads)


def settle(case):
    """Keeps the process on the cores of the case and gives torch as many threads."""
    if case["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, case["cores"])
    torch.set_num_threads(case["threads"])


def timed(case, call):
    """Seconds of each run, after one that isn't counted."""
    call()
    seconds = []
    began = time.perf_counter()
    while len(seconds) < case["min_runs"] or time.perf_counter() - began < case["seconds"]:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    torch.set_grad_enabled(False)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    held_shape, held = None, None
    for line in sys.stdin:
        try:
            case = json.loads(line)
            settle(case)
            shape = [case[key] for key in SHAPE]
            if shape != held_shape:
                held = None
                held = operands(case)
                held_shape = shape
            answer = {"seconds": timed(case, attention(case, *held))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


main()
