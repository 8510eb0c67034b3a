"""`python -m dlkernels bench`: our layers against torch.nn on this machine, checked before they are timed."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 = done, 1 = some result is wrong, 2 = a speed target is missed, or bad arguments."""
    from .cli import run

    return run(argv)
