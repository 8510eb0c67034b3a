"""Predicts the time of one step of the recurrence on an H200.

`python tests/cuda/predict.py` prints the tables of docs/cuda.md, and with `--write` puts them there. What a step
consists of is counted in the machine code (counts.py writes counts.json) and follows from the plan. How long each part
takes are rates of the data sheet and guesses, which are listed below; none of them is measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "cuda.md"

CLOCK = 1.755e9  # cycles a second
# Rates of the data sheet, or guesses after them.
MMA_RATE = 1270  # multiply-adds per cycle of one multiprocessor through mma.sync, about 0.6 of its peak
SHARED_RATE = 128  # bytes a cycle
L2_RATE = 64  # bytes a cycle into one multiprocessor
L2_TOTAL_RATE = 5.5e12  # bytes a second into all of them
MEMORY_RATE = 4.3e12  # bytes a second
WARPS = 2  # of a block on each of the four schedulers, which issue one instruction a cycle
# Guesses of latencies.
MMA_CYCLES = 33  # of a product on which the next one depends
CELL_CYCLES = 250  # gates, the block's barriers, shuffles: what is waited for beside issuing instructions
TRIP_SECONDS = 0.25e-6  # from the request of vectors in L2 to the product that waits for them
FENCE_SECONDS = 0.25e-6  # of a thread's earlier stores, to L2 too
CLUSTER_SECONDS = 0.25e-6  # from a store to another block of the cluster until that block sees it
GRID_SECONDS = 0.3e-6  # until a store is in L2 and the other blocks, which ask for it, see it
SIGNAL_SECONDS = 0.45e-6  # of a signal in L2 after the store, and of seeing it
LAUNCH_SECONDS = 2.0e-6  # the launch of a matrix product or of a cell kernel in a stream
PRODUCT_RATE = {2: 300e12, 4: 25e12}  # multiply-adds a second of torch's products, by bytes of a number

SIZES = (128, 256, 512, 640, 768, 1024, 2048)
BATCHES = (1, 16, 64, 128)
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_SAVED = {"lstm": 5, "gru": 5, "rnn_tanh": 1, "rnn_relu": 1}

COUNTS: dict[str, dict[str, Any]] = json.loads((HERE / "counts.json").read_text())


def counted(plan: dict[str, Any], mode: str, dtype: str, way: str = "forward") -> dict[str, Any]:
    """What was counted in the kernel that the plan selects. The kernels of float16 are those of bfloat16."""
    name = "f32" if dtype == "float32" else "bf16"
    return COUNTS[f"{way} {mode.split('_')[0]} {name} {plan['kind']} {plan['units']} {plan['columns']}"]


def predict(
    plan: dict[str, Any], mode: str, batch: int, hidden: int, training: bool = True, dtype: str = "bfloat16"
) -> dict[str, float]:
    """The cost of a forward step of one direction: bytes of device memory and of exchange between blocks, instructions
    of a warp and waits for L2 from one exchange to the next, and seconds."""
    gates, item = _GATES[mode], 4 if dtype == "float32" else 2
    # The input products and y, and in training the saved record.
    memory = batch * hidden * (4 * gates + item + (4 * _SAVED[mode] if training else 0))
    if plan["kind"] == "steps":
        traffic = memory + gates * hidden * hidden * item + 2 * 4 * batch * gates * hidden
        work = batch * gates * hidden * hidden / PRODUCT_RATE[item]
        seconds = 2 * LAUNCH_SECONDS + max(traffic / MEMORY_RATE, work)
        return {"memory": memory, "exchange": 0, "instructions": 0, "trips": 0, "seconds": seconds}
    code = counted(plan, mode, dtype)
    cluster = plan["kind"] == "cluster"
    rows, terms, columns = plan["rows"], plan["terms"], plan["columns"]
    chunks, steps = plan["tile"] // columns, plan["shared_steps"]
    all_steps = math.ceil(terms / (4 if dtype == "float32" else 32) / plan["splits"])
    looped = math.ceil(steps * code["loop"] / code["loop_steps"]) if code["loop_steps"] else 0
    # An iteration of the loop over weights in shared memory may use vectors that were requested an iteration before.
    first = max(plan["register_steps"], code["loop_steps"])
    iterations = math.ceil(max(0, all_steps - first) / max(1, code["loop_steps"]))
    # Other blocks wait for the last chunk only until it has sent its part. All others are computed from end to end.
    instructions = (chunks - 1) * code["instructions"] + code["critical"] + chunks * looped
    # If there are no more of them than an iteration takes, all vectors are requested together.
    together = code["trips"] and all_steps <= code["loop_steps"]
    trips = chunks * (1 if together else code["trips"] + iterations * code["loop_trips"])
    latency = CELL_CYCLES
    if dtype != "float32":
        latency += 2 * MMA_CYCLES * all_steps
    cycles = WARPS * instructions + chunks * latency
    # Where a rate of the multiprocessor is the limit: the products, reading shared memory, reading from L2.
    product = rows * terms * columns / (128 if dtype == "float32" else MMA_RATE)
    vectors = columns * terms * item
    shared = plan["shared_weights"] + (vectors * (8 // plan["splits"]) if cluster and item == 2 else 0)
    cycles = max(cycles, chunks * max(product, shared / SHARED_RATE, 0 if cluster else vectors / L2_RATE))
    seconds = cycles / CLOCK + trips * TRIP_SECONDS
    exchange = plan["slices"] * plan["tile"] * terms * item  # h of one group, sent to all its blocks
    if not cluster:
        seconds = max(seconds, plan["groups"] * exchange / L2_TOTAL_RATE)
    seconds += code["fences"] * FENCE_SECONDS
    seconds += CLUSTER_SECONDS if cluster else GRID_SECONDS + min(1, code["signals"]) * SIGNAL_SECONDS
    waves = -(-plan["groups"] // plan["groups_at_once"])
    return {
        "memory": memory,
        "exchange": exchange,
        "instructions": waves * instructions,
        "trips": waves * trips,
        "seconds": max(waves * seconds, memory / MEMORY_RATE),
    }


def _each(number: int, one: dict[str, Any]) -> str:
    return f"{number / one['loop_steps']:.0f}" if one["loop_steps"] else "0"


def _waits(one: dict[str, Any]) -> str:
    if not one["trips"]:
        return "-"
    looped = f" + {one['loop_trips']} n / {one['loop_steps']}" if one["loop_trips"] else ""
    return f"{one['trips']}{looped}"


def compiled_table() -> list[str]:
    lines = [
        "| kernel | units | columns | instructions | until sent | each step in shared memory | products "
        "| loads, stores of shared memory | waits for L2 | loads from L2 | width of stores to blocks | barriers "
        "| fences |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    kinds = {"cluster": 0, "grid": 1}
    order = {"lstm": 0, "gru": 1, "rnn": 2}

    def place(name: str) -> tuple[Any, ...]:
        way, cell, dtype, kind, units, columns = name.split()
        return dtype, way != "forward", order[cell], kinds[kind], int(units), int(columns)

    for name in sorted(COUNTS, key=place):
        way, cell, dtype, kind, units, columns = name.split()
        if cell == "rnn" or (dtype == "f32" and (way, cell) != ("forward", "lstm")):
            continue
        one = COUNTS[name]
        lines.append(
            f"| {cell} {way}, {dtype}, {kind} | {units} | {columns} | {one['instructions']} | {one['critical']} | "
            f"{_each(one['loop'], one)} | {one['products']} + {_each(one['loop_products'], one)} n | "
            f"{one['shared_loads']}, {one['shared_stores']} | {_waits(one)} | "
            f"{one['vector_loads']} | {one['sends']} | {one['barriers']} | {one['fences']} |"
        )
    return lines


def predicted_table(plan_of: Callable[..., dict[str, Any]], mode: str, dtype: str) -> list[str]:
    lines = [
        "| H | B | plan | blocks | columns | instructions | waits for L2 | device memory | exchange | predicted |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for hidden in SIZES:
        for batch in BATCHES:
            plan = plan_of(mode, dtype, 100, batch, hidden)
            cost = predict(plan, mode, batch, hidden, dtype=dtype)
            lines.append(
                f"| {hidden} | {batch} | {plan['kind']} | {plan['blocks'] or '-'} | {plan['columns'] or '-'} | "
                f"{cost['instructions'] or '-'} | {cost['trips'] or '-'} | {cost['memory'] / 1024:.0f} KiB | "
                f"{cost['exchange'] / 1024:.0f} KiB | {cost['seconds'] * 1e6:.1f} µs |"
            )
    return lines


def tables() -> dict[str, list[str]]:
    """The tables of docs/cuda.md by the names of the marks between which they stand."""
    from dlkernels._core import extension

    assert extension.native is not None
    plan_of = extension.native.cuda_plan
    found = {"compiled": compiled_table()}
    for mode, dtype in (("lstm", "bfloat16"), ("gru", "bfloat16"), ("lstm", "float32")):
        found[f"{mode}, {dtype}"] = predicted_table(plan_of, mode, dtype)
    return found


def with_tables(text: str) -> str:
    """The text of docs/cuda.md with its tables replaced."""
    for name, lines in tables().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = before + begin + "\n".join(["", *lines, "", ""]) + end + after
    return text


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        DOCS.write_text(with_tables(DOCS.read_text()))
        return
    for name, lines in tables().items():
        print("\n".join([f"\n{name}\n", *lines]))


if __name__ == "__main__":
    main()
