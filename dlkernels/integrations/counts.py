"""Counts the calls of torch's operators that our kernels served, and those that were left to torch."""

from __future__ import annotations

import os
import threading
from collections import Counter
from typing import NamedTuple

__all__ = ["Counts", "count_left", "count_served", "counts", "report"]

Pairs = Counter[tuple[str, str]]


class Counts(NamedTuple):
    """served: (operator, kernel) -> calls. left: (operator, reason) -> calls."""

    served: Pairs
    left: Pairs

    def since(self, earlier: Counts) -> Counts:
        return Counts(self.served - earlier.served, self.left - earlier.left)


_served: Pairs = Counter()
_left: Pairs = Counter()
_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child the thread that held the lock may not exist."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def count_served(operator: str, kernel: str) -> None:
    with _lock:
        _served[operator, kernel] += 1


def count_left(operator: str, reason: str) -> None:
    """Counts nothing for an empty reason: the switch is off."""
    if reason:
        with _lock:
            _left[operator, reason] += 1


def counts() -> Counts:
    """The counts of the process so far."""
    with _lock:
        return Counts(Counter(_served), Counter(_left))


def report(of: Counts) -> str:
    """A table with a line for each operator and kernel or reason."""
    rows = [(operator, str(calls), kernel) for (operator, kernel), calls in sorted(of.served.items())]
    rows += [(operator, str(calls), f"left to torch: {why}") for (operator, why), calls in sorted(of.left.items())]
    if not rows:
        return "no call of an operator that dlkernels serves"
    rows.insert(0, ("operator", "calls", "kernel"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {calls:>{widths[1]}}  {what}" for name, calls, what in rows)
