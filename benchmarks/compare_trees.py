"""Compares the speed of two trees of dlkernels, in alternating blocks of one run:

    python -m benchmarks.compare_trees OLD NEW [--only PART ...] [--attention] [--seconds 0.2] [--rounds 5] [--out FILE]

OLD and NEW are checkouts, each with a compiled module. Every tree has a process of its own, which waits while the other
measures. Both run the cases of this checkout. Prints new time over old for each training case of the grid (median of
the rounds), then their geometric mean and the largest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from . import ratios, tree_worker

# glibc's allocator then never gives memory back between two calls. By its defaults a process does so in every call or
# in none, by chance: the same build trained an LSTMCell (B 16, H 256) with 458 page faults a step in 1.7 ms, or with
# none in 0.93 ms.
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TOP_PAD_": str(64 << 20),
}  # fmt: skip


def start(tree: Path, attention: bool) -> subprocess.Popen[str]:
    command = [sys.executable, tree_worker.__file__, *(["--attention"] if attention else [])]
    env = {**ALLOCATOR, **os.environ, "PYTHONPATH": str(tree)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tree)


def ask(process: subprocess.Popen[str], index: int, seconds: float) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{index} {seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = ratios.parser(__doc__)
    parser.add_argument("trees", nargs=2, type=Path, metavar="TREE", help="the old one and the new one")
    parser.add_argument("--attention", action="store_true", help="attention instead of the recurrent layers")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a block")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each tree for a case")
    options = parser.parse_args()
    old, new = (start(tree.resolve(), options.attention) for tree in options.trees)
    found: dict[str, dict[str, float]] = {}
    for index, entry in enumerate(tree_worker.cases(options.attention)):
        if not ratios.is_chosen(entry["name"], options):
            continue
        rounds = [(ask(old, index, options.seconds), ask(new, index, options.seconds)) for _ in range(options.rounds)]
        before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        found[entry["name"]] = {"old": before, "new": after, "ratio": ratio}
        print(f"{entry['name']:55} {before * 1e3:9.3f} ms {after * 1e3:9.3f} ms  {ratio:.3f}", flush=True)
    for process in (old, new):
        process.kill()
    ratios.finish("cases, new over old", [row["ratio"] for row in found.values()], found, options.out)


if __name__ == "__main__":
    main()
