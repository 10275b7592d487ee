from typing import Any, Sequence

import numpy as np

def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray | None,
    options: dict[str, Any],
    value_dim: int | None = None,
) -> dict[str, Any]: ...
def num_threads() -> int:
    """How many threads compute calls of this process: ``ATTND_NUM_THREADS``, or the cores."""

def set_num_threads(threads: int) -> None:
    """Has calls of this process computed on so many threads from now on."""

def run_program(interpreter: str, arguments: Sequence[str]) -> int: ...

class Coordinator:
    def __init__(self, url: str) -> None: ...
    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray | None,
        options: dict[str, Any],
        value_dim: int | None = None,
    ) -> dict[str, Any]: ...
    def workers(self) -> list[tuple[str, str]]: ...
