"""Exact attention on CPU: over arrays in this process, or sharded over a cluster, with the same bits.

>>> import numpy as np, attnd
>>> rng = np.random.default_rng(0)
>>> q, k, v = (rng.standard_normal((1, 8, 64, 32), dtype=np.float32) for _ in range(3))
>>> context = attnd.attention(q, k, v, is_causal=True)
>>> context.shape, context.dtype
((1, 8, 64, 32), dtype('float32'))
"""

from ._attention import Inspected, attention
from ._attnd import num_threads, set_num_threads
from ._cluster import Cluster, connect
from ._errors import Error, InvalidArgument
from ._options import Csr, Outputs, Relative, Swin
from ._session import Session, Step

__all__ = [
    "Cluster",
    "Csr",
    "Error",
    "Inspected",
    "InvalidArgument",
    "Outputs",
    "Relative",
    "Session",
    "Step",
    "Swin",
    "attention",
    "connect",
    "num_threads",
    "set_num_threads",
]
