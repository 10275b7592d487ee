"""What all tests share."""

from __future__ import annotations

import numpy as np
import pytest

import attnd


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261201)


@pytest.fixture(scope="session")
def cluster():
    """Two real workers, for all tests that change nothing on them."""
    with attnd.Cluster.local(workers=2, threads_per_worker=1) as cluster:
        yield cluster
