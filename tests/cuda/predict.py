"""Counts the memory traffic and the barriers of one step of the recurrence on an H200 and predicts its time.

`python tests/cuda/predict.py` prints the table of docs/cuda.md. The counts follow from the plan. The constants are
data-sheet rates and guesses about latencies; none of them is measured.
"""

from __future__ import annotations

from typing import Any

CLOCK = 1.755e9  # cycles a second
MMA_RATE = 1270  # multiply-adds per cycle of one multiprocessor through mma.sync, about 0.6 of its peak
SHARED_RATE = 128  # bytes a cycle
L2_RATE = 64  # bytes a cycle into one multiprocessor
L2_TOTAL_RATE = 5.5e12  # bytes a second into all of them
MEMORY_RATE = 4.3e12  # bytes a second
CELL_CYCLES = 250  # gates, two barriers of the block, addresses
CLUSTER_SECONDS = 0.45e-6  # a cluster barrier and the stores to the other blocks
GRID_SECONDS = 1.1e-6  # a barrier of the grid: arrival, flag and acquire, through L2
LAUNCH_SECONDS = 2.0e-6  # the launch of a matrix product or of a cell kernel in a stream

SIZES = (128, 256, 512, 1024, 2048)
BATCHES = (1, 16, 64, 128)
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
_SAVED = {"lstm": 5, "gru": 5, "rnn_tanh": 1}


def predict(plan: dict[str, Any], mode: str, batch: int, hidden: int, training: bool = True) -> dict[str, float]:
    """The cost of a forward step of one direction in 16 bits: bytes of device memory, of exchange between blocks and of
    weights, the number of barriers, and seconds."""
    gates = _GATES[mode]
    # The input products and y, and in training the saved record.
    memory = batch * hidden * (4 * gates + 2 + (4 * _SAVED[mode] if training else 0))
    if plan["kind"] == "steps":
        weights = gates * hidden * hidden * 2
        traffic = memory + 2 * 4 * batch * gates * hidden
        seconds = 2 * LAUNCH_SECONDS + (weights + traffic) / MEMORY_RATE
        return {"memory": memory, "exchange": 0, "weights": weights, "barriers": 0, "seconds": seconds}
    cluster = plan["kind"] == "cluster"
    columns = 8 * plan["column_tiles"]
    chunks = plan["tile"] // columns
    rows, terms, splits = plan["rows"], plan["terms"], plan["splits"]
    product = rows * terms * columns / MMA_RATE
    vectors = columns * terms * 2 * (8 // splits) / SHARED_RATE if cluster else columns * terms * 2 / L2_RATE
    weights = plan["shared_weights"] / SHARED_RATE
    partials = 2 * splits * columns * rows * 4 / SHARED_RATE
    cycles = chunks * (max(product, vectors + weights) + partials + CELL_CYCLES)
    waves = -(-plan["groups"] // plan["groups_at_once"])
    exchange = plan["slices"] * plan["tile"] * terms * 2  # h of one group, sent to all its blocks
    seconds = cycles / CLOCK
    if not cluster:
        seconds = max(seconds, plan["groups"] * exchange / L2_TOTAL_RATE)
    step = waves * (seconds + (CLUSTER_SECONDS if cluster else GRID_SECONDS))
    return {
        "memory": memory,
        "exchange": exchange,
        "weights": plan["slices"] * plan["shared_weights"],  # read from shared memory in each chunk
        "barriers": 1,
        "seconds": max(step, memory / MEMORY_RATE),
    }


def table(plan_of: Any, mode: str) -> list[str]:
    lines = [
        "| H | B | plan | blocks | barriers | device memory | exchange | predicted |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for hidden in SIZES:
        for batch in BATCHES:
            plan = plan_of(mode, batch, hidden)
            cost = predict(plan, mode, batch, hidden)
            lines.append(
                f"| {hidden} | {batch} | {plan['kind']} | {plan['blocks'] or '-'} | {cost['barriers']:.0f} | "
                f"{cost['memory'] / 1024:.0f} KiB | {cost['exchange'] / 1024:.0f} KiB | "
                f"{cost['seconds'] * 1e6:.1f} µs |"
            )
    return lines


def main() -> None:
    from dlkernels._core import extension

    native = extension.native
    assert native is not None

    def plan_of(mode: str, batch: int, hidden: int) -> dict[str, Any]:
        return dict(native.cuda_plan(mode, "bfloat16", 100, batch, hidden))

    for mode in ("lstm", "gru"):
        print(f"\n{mode}\n")
        print("\n".join(table(plan_of, mode)))


if __name__ == "__main__":
    main()
