"""The process of compare_trees that measures one tree. It imports that tree by PYTHONPATH, so it is run by its path and
not as a module.

Reads lines "case seconds" from the standard input and answers each with the median seconds of a call.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ((1, 8, 1024, 64), (4, 8, 512, 64), (8, 12, 197, 64))


def use_the_cases_of_this_checkout() -> None:
    """Replaces the tree's `dlkernels.bench` by that of this checkout, so that both trees run the same cases."""
    folder = Path(__file__).resolve().parents[1] / "dlkernels" / "bench"
    places = [str(folder)]
    spec = importlib.util.spec_from_file_location(
        "dlkernels.bench", folder / "__init__.py", submodule_search_locations=places
    )
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def cases(attention: bool) -> list[dict[str, Any]]:
    if attention:
        return [
            {"name": f"attention-train-{dtype}-{'x'.join(map(str, shape))}-1t", "shape": shape, "dtype": dtype}
            for dtype in ("float32", "bfloat16")
            for shape in SHAPES
        ]
    from dlkernels.bench.layers import grid

    return [
        {"name": case.name, "case": case}
        for case in grid([1, 2], ["float32", "bfloat16"])
        if case.training and case.against == "torch"
    ]


def runnable(entry: dict[str, Any]) -> Callable[[], object]:
    import torch

    from dlkernels import functional
    from dlkernels.bench.layers import Inputs, Workload, ours

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


def main(attention: bool) -> None:
    use_the_cases_of_this_checkout()
    entries = cases(attention)
    current, run = -1, None
    for line in sys.stdin:
        index, seconds = line.split()
        if run is None or int(index) != current:
            current, run = int(index), runnable(entries[int(index)])
            run()
        times: list[float] = []
        end = time.perf_counter() + float(seconds)
        while time.perf_counter() < end or len(times) < 3:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        print(statistics.median(times), flush=True)


if __name__ == "__main__":
    main("--attention" in sys.argv[1:])
