"""The program ``attnd``: ``python -m attnd coordinator``, ``python -m attnd worker``, and all its other verbs."""

from __future__ import annotations

import sys

from ._attnd import run_program


def main() -> None:
    sys.exit(run_program(sys.executable, sys.argv[1:]))


if __name__ == "__main__":
    main()
