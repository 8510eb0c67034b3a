"""`python -m dlkernels info | doctor | bench | run`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m dlkernels <command> [options]

commands:
  info [--json]   what this machine has, and which kernel serves which operator
  doctor          what is wrong with the installation, and what to do about it
  bench           our layers against torch.nn on this machine (--help lists its options)
  run FILE ...    runs a Python program with dlkernels.enable() on (-m MODULE: runs a module)
  --version       the version of dlkernels
"""


def main(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "info":
        from dlkernels.info import main as print_info

        return print_info(rest)
    if command == "doctor":
        from dlkernels.doctor import main as examine

        return examine(rest)
    if command == "bench":
        from dlkernels.bench.cli import Command

        return Command().run(rest)
    if command == "run":
        from dlkernels.integrations.program import main as run_program

        return run_program(rest)
    if command in ("-V", "--version"):
        from dlkernels import __version__

        print(f"dlkernels {__version__}")
        return 0
    asked = command in ("-h", "--help", "help")
    if command and not asked:
        print(f"there is no command {command!r}", file=sys.stderr)
    print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
