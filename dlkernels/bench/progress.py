"""A progress bar on stderr: one line that moves on a terminal, one line per tenth elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO


class Progress:
    def __init__(self, total: int, what: str, stream: TextIO | None = None):
        self.total, self.what = max(1, total), what
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.done = 0
        self.tenth = -1
        self.start = time.monotonic()

    def show(self, label: str) -> None:
        """Says what runs now."""
        if self.live:
            bar = "#" * (20 * self.done // self.total)
            line = f"{self.what} [{bar:<20}] {self.done}/{self.total} {self._left()} {label}"
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + line[:width].ljust(width))
        elif 10 * self.done // self.total > self.tenth:
            self.tenth = 10 * self.done // self.total
            self.stream.write(f"{self.what} {self.done}/{self.total} {self._left()} {label}\n")
        self.stream.flush()

    def advance(self, count: int = 1) -> None:
        self.done += count

    def finish(self) -> None:
        if self.live:
            self.stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        self.stream.write(f"{self.what}: {self.done} of {self.total} in {_clock(time.monotonic() - self.start)}\n")
        self.stream.flush()

    def _left(self) -> str:
        if not self.done:
            return ""
        return _clock((time.monotonic() - self.start) / self.done * (self.total - self.done)) + " left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
