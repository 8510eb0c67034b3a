"""Two trees of dlkernels against each other, in alternating blocks of one run:

    python benchmarks/compare_trees.py OLD NEW [--only PART ...] [--attention] [--seconds 0.2] [--rounds 5] [--out FILE]

OLD and NEW are checkouts with a compiled module each. Every tree has a process of its own, which waits while the other
measures. Prints new time over old for each training case of the grid (median of the rounds), then their geometric mean
and the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = ((1, 8, 1024, 64), (4, 8, 512, 64), (8, 12, 197, 64))


def cases(attention: bool) -> list[dict[str, Any]]:
    from dlkernels.bench.cases import grid

    found = [
        {"name": case.name, "case": case}
        for case in grid([1, 2], ["float32", "bfloat16"])
        if case.training and case.against == "torch"
    ]
    if attention:
        found = [
            {"name": f"attention-train-{dtype}-{'x'.join(map(str, shape))}-1t", "shape": shape, "dtype": dtype}
            for dtype in ("float32", "bfloat16")
            for shape in SHAPES
        ]
    return found


def runnable(entry: dict[str, Any]) -> Any:
    import torch

    from dlkernels import functional
    from dlkernels.bench.workload import Inputs, Workload, ours

    if "case" in entry:
        case = entry["case"]
        torch.set_num_threads(case.threads)
        return Workload(case, Inputs.make(case), ours)
    torch.set_num_threads(1)
    q, k, v = (torch.randn(entry["shape"]).to(getattr(torch, entry["dtype"])).requires_grad_() for _ in range(3))
    gradient = torch.randn(entry["shape"]).to(q.dtype)

    def train() -> None:
        functional.attention(q, k, v).backward(gradient)
        q.grad = k.grad = v.grad = None

    return train


def worker(attention: bool) -> None:
    """Reads lines "case seconds", answers with the seconds that a call takes."""
    entries = cases(attention)
    current, run = -1, None
    for line in sys.stdin:
        index, seconds = line.split()
        if int(index) != current:
            current, run = int(index), runnable(entries[int(index)])
            run()
        times: list[float] = []
        end = time.perf_counter() + float(seconds)
        while time.perf_counter() < end or len(times) < 3:
            begin = time.perf_counter()
            run()  # type: ignore[misc]
            times.append(time.perf_counter() - begin)
        print(statistics.median(times), flush=True)


def start(tree: Path, attention: bool) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", *(["--attention"] if attention else [])]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tree)


def ask(process: subprocess.Popen[str], index: int, seconds: float) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{index} {seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", help="the old one and the new one")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name has one of these in it")
    parser.add_argument("--attention", action="store_true", help="attention instead of the recurrent layers")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a block")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each tree for a case")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.attention)
    if len(arguments.trees) != 2:
        parser.error("give two trees, the old one and the new one")
    old, new = (start(tree.resolve(), arguments.attention) for tree in arguments.trees)
    ratios: dict[str, dict[str, float]] = {}
    for index, entry in enumerate(cases(arguments.attention)):
        if not any(part in entry["name"] for part in arguments.only):
            continue
        rounds = [
            (ask(old, index, arguments.seconds), ask(new, index, arguments.seconds)) for _ in range(arguments.rounds)
        ]
        before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        ratios[entry["name"]] = {"old": before, "new": after, "ratio": ratio}
        print(f"{entry['name']:55} {before * 1e3:9.3f} ms {after * 1e3:9.3f} ms  {ratio:.3f}", flush=True)
    for process in (old, new):
        process.kill()
    values = [row["ratio"] for row in ratios.values()]
    mean = math.exp(statistics.fmean(map(math.log, values)))
    print(f"{len(values)} cases, new over old: geometric mean {mean:.3f}, largest {max(values):.3f}")
    if arguments.out:
        from dlkernels.bench.machine import describe

        arguments.out.write_text(json.dumps({"machine": describe(), "mean": mean, "cases": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
