"""A bug to plant: a text in a file, its replacement, what is wrong with it, and the tests that should notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """`old` must occur in `file` exactly once. `why` is what the code does wrong with `new` in its place. `tests` are
    arguments of pytest, those most likely to fail first, "native tsan" and "native asan" for tests/native/run.sh, or
    "gpuless FILE ..." for a file of tests/gpuless in the environment of the oldest Triton that `make gpuless` made."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    def problem(self, root: Path = ROOT) -> str:
        """The reason why it cannot be planted; empty if it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        count = path.read_text().count(self.old)
        if count != 1:
            return f"its text stands {count} times in {self.file}"
        return "" if self.old != self.new else "it changes nothing"

    def plant(self, root: Path) -> None:
        path = root / self.file
        path.write_text(path.read_text().replace(self.old, self.new))
