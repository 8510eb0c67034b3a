"""`python -m dlkernels run`: a Python program on our kernels, without a change of its code."""

from __future__ import annotations

import os
import runpy
import sys

from dlkernels.integrations.enable import enable

__all__ = ["main"]

_USAGE = """usage: python -m dlkernels run FILE [arguments]
       python -m dlkernels run -m MODULE [arguments]
"""


def main(argv: list[str]) -> int:
    """Runs the program as Python would, with `dlkernels.enable()` on, and prints the handle's report to stderr when it
    ends. Returns 0, or 2 if no program is given; an exception or SystemExit of the program passes through."""
    is_module = argv[:1] == ["-m"]
    program = argv[is_module:]
    if not program or program[0].startswith("-"):
        print(_USAGE, end="", file=sys.stderr)
        return 2
    name = program[0]
    if not is_module and not os.path.isfile(name):
        print(f"python -m dlkernels run: there is no file {name!r}", file=sys.stderr)
        return 2
    sys.argv = program
    if not is_module and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(name))  # of the program, in place of the present directory
    with enable() as handle:
        try:
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
        finally:
            sys.stdout.flush()
            print(handle.report(), file=sys.stderr)
    return 0
