"""`python -m benchmarks`, which is `make bench`: suites.py says what it adds to `python -m dlkernels bench`."""

from __future__ import annotations

import sys

try:
    import dlkernels  # noqa: F401
except (ImportError, ValueError) as error:  # a bad setting is one line, as from `python -m dlkernels`
    print(f"dlkernels: {error}", file=sys.stderr)
    raise SystemExit(2) from None

from .suites import ProjectCommand

if __name__ == "__main__":
    raise SystemExit(ProjectCommand().run())
