"""Counts what a step of the recurrence consists of in the machine code of the sequence kernels.

`python tests/cuda/counts.py` compiles the kernels of float32 and bfloat16 for sm_90a, reads their instructions and
writes counts.json, from which predict.py makes the tables of docs/cuda.md. Run both after a change of the kernels:

    python tests/cuda/counts.py && python tests/cuda/predict.py --write
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ladder import BUILD, HERE, ROOT, Failure, Unit, run_units

sys.path.insert(0, str(ROOT / "csrc" / "setup"))
sys.dont_write_bytecode = True

import compiled  # noqa: E402
import machine_code as machine  # noqa: E402
from machine_code import Instruction, code_of  # noqa: E402

FILE = HERE / "counts.json"
ARCH = "90a"
SOURCES = tuple(f"sequence_{way}_{dtype}.cu" for way in ("forward", "backward") for dtype in ("bf16", "f32"))

SHUFFLES = {0x389, 0x589, 0x989, 0xF89}  # SHFL, with registers or numbers as operands
STORE_SHARED, STORE_GENERIC, REDUCE, EXIT = 0x388, 0x385, 0x98E, 0x94D  # STS, ST, RED, EXIT
CLUSTER_WAIT = 0xDC7  # UCGABAR_WAIT
MULTIPLY_ADD = 0x23  # the lowest 9 bits of FFMA
WIDTHS = {4: 32, 5: 64, 6: 128}  # the codes of accesses that are not narrower


def _is_product(one: Instruction) -> bool:
    return one.opcode == machine.TENSOR_PRODUCT or one.opcode & 0x1FF == MULTIPLY_ADD


def _is_vector_load(one: Instruction) -> bool:
    """A load of 128 bits from L2 that sees what other blocks have written."""
    return one.opcode == machine.LOAD_GLOBAL and one.strong and one.width == machine.QUAD


def _is_wait(one: Instruction) -> bool:
    return one.opcode in (CLUSTER_WAIT, machine.TRY_WAIT)


def _is_signal(one: Instruction) -> bool:
    return one.opcode in (machine.CLUSTER_ARRIVE, REDUCE)


def _is_exchange_store(one: Instruction) -> bool:
    """A store to other blocks: everything else that the kernels store outside of their shared memory is weak and has
    32 bits or less."""
    if one.opcode == machine.STORE_GLOBAL:
        return one.strong or one.width == machine.QUAD
    return one.opcode in (machine.SEND_ASYNC, STORE_GENERIC)


def _is_cell(one: Instruction) -> bool:
    """Cells end with the exchange of their results, between lanes too if a lane does not have 16 bytes."""
    return one.opcode in SHUFFLES or _is_exchange_store(one)


class Loop(NamedTuple):
    begin: int
    end: int  # the jump back


def loops_of(code: Sequence[Instruction]) -> list[Loop]:
    # Code for rare cases stands behind the end of the kernel and jumps back into it: those are no loops.
    exits = {at for at, one in enumerate(code) if one.opcode == EXIT}
    back = [Loop(one.target // 16, at) for at, one in enumerate(code) if one.opcode in machine.BRANCHES]
    return [loop for loop in back if loop.begin < loop.end and exits.isdisjoint(range(loop.begin, loop.end))]


class Counts(NamedTuple):
    """Of one chunk of sequences, as far as not said otherwise; where the code branches, of all branches together."""

    instructions: int  # in the loop over chunks, without inner loops
    critical: int  # of these from the wait for other blocks to the last thing that other blocks wait for
    loop: int  # instructions of the loop over the steps of the product whose weights are in shared memory
    loop_steps: int  # of these steps in one iteration
    products: int  # tensor-core products, in float32 multiply-adds, without that loop
    loop_products: int  # the same in that loop
    shared_loads: int
    shared_stores: int
    trips: int  # waits for vectors from L2 one after the other, without that loop
    loop_trips: int  # what an iteration of that loop adds
    vector_loads: str  # of vectors from L2: number and width in bits
    sends: str  # stores to other blocks: widths in bits, without their number, since the compiler unrolls their loop
    barriers: int  # of the block
    fences: int  # that wait for all earlier stores of the thread
    signals: int  # to other blocks, beside the stores


def _trips(code: Sequence[Instruction]) -> int:
    """How many waits for L2 follow each other. Loads that are under way together are waited for once: those that were
    issued after the same number of waits."""
    waited = 0
    requested: dict[int, int] = {}  # by register: the wait that follows from using it
    for one in code:
        if _is_vector_load(one):
            requested |= dict.fromkeys(one.destinations, waited + 1)
            continue
        waited = max([waited, *(requested.get(register, 0) for register in one.sources | _stored(one))])
        if one.opcode not in machine.NO_RESULT:
            for register in one.destinations:
                requested.pop(register, None)
    return waited


def _stored(one: Instruction) -> set[int]:
    """What a store to shared memory reads: its data."""
    return {one.low >> 32 & 0xFF} if one.opcode == STORE_SHARED else set()


def products_of_step(kernel: compiled.Sequence) -> int:
    """How many products a warp computes in a step of its part (slice_shape() in sequence.h)."""
    rows = kernel.units * ({"lstm": 4, "gru": 3, "rnn": 1}[kernel.cell] if kernel.way == "forward" else 1)
    if kernel.dtype == "f32":
        return 4 * -(-rows // 32) * kernel.columns
    tiles = -(-rows // 16)
    return 2 * (-(-tiles // 2) if tiles >= 6 else tiles) * kernel.columns // 8


def count(kernel: compiled.Sequence, code: Sequence[Instruction]) -> Counts:
    def inside(loop: Loop) -> Sequence[Instruction]:
        return code[loop.begin : loop.end + 1]

    def has(loop: Loop, *tests: Callable[[Instruction], bool]) -> bool:
        return all(any(map(test, inside(loop))) for test in tests)

    # The loop over chunks is the innermost one with both the product and the cells.
    around = [loop for loop in loops_of(code) if has(loop, _is_product, _is_cell)]
    if not around:
        raise Failure("no loop has both products and cells")
    chunk = min(around, key=lambda loop: loop.end - loop.begin)
    inner = [loop for loop in loops_of(code) if chunk.begin <= loop.begin and loop.end < chunk.end]
    products = [loop for loop in inner if has(loop, _is_product)]
    if len(products) > 1:
        raise Failure(f"{len(products)} loops in the loop over chunks have products")
    in_loops = {at for loop in inner for at in range(loop.begin, loop.end + 1)}
    straight = [at for at in range(chunk.begin, chunk.end + 1) if at not in in_loops]
    # Blocks wait at a barrier, for a receipt, in a short loop for a flag, or for the vectors themselves.
    flags = [
        loop
        for loop in inner
        if loop.end - loop.begin < 24 and not has(loop, _is_product) and not has(loop, _is_vector_load)
        and has(loop, lambda one: one.opcode == machine.LOAD_GLOBAL and one.strong)
    ]  # fmt: skip
    every = range(chunk.begin, chunk.end + 1)
    waits = [at for at in every if _is_wait(code[at])] + [loop.end for loop in flags]
    waits = waits or [at for at in every if _is_vector_load(code[at])]
    stores = [at for at in every if _is_exchange_store(code[at])]
    signals = [at for at in every if _is_signal(code[at])]
    if not waits or not (stores or signals) or min(waits) > max(stores + signals):
        raise Failure("cannot tell where a step waits for other blocks and where they wait for it")
    first = min(waits)
    # After the stores to others, the kernels of a grid erase older ones by as many stores.
    erased = not signals and code[stores[-1]].opcode == machine.STORE_GLOBAL
    last = max(signals) if signals else stores[len(stores) // 2 - 1] if erased else stores[-1]
    plain = [code[at] for at in straight]
    # Loops in that of the products only load again what was absent.
    nested = {at for loop in inner if loop not in products for at in range(loop.begin, loop.end + 1)}
    looped = [code[at] for loop in products for at in range(loop.begin, loop.end + 1) if at not in nested]
    matrix = any(one.opcode == machine.TENSOR_PRODUCT for one in inside(chunk))

    def number(some: Sequence[Instruction], *opcodes: int) -> int:
        return sum(one.opcode in opcodes for one in some)

    def multiplications(some: Sequence[Instruction]) -> int:
        if matrix:
            return number(some, machine.TENSOR_PRODUCT)
        return sum(map(_is_product, some))

    sent = [code[at] for at in stores if at <= last]
    sent = sent or [code[at] for at in every if first < at < last and code[at].opcode == machine.STORE_GLOBAL]
    # In float32 vectors are copied in a loop.
    copies = [one for loop in inner if loop not in products for one in inside(loop)] if not matrix else []
    requests = sum(map(_is_vector_load, [*plain, *looped, *copies]))
    loop_products = multiplications(looped)
    return Counts(
        instructions=len(straight),
        critical=sum(first <= at <= last for at in straight),
        loop=len(looped),
        products=multiplications(plain),
        loop_steps=loop_products // products_of_step(kernel),
        loop_products=loop_products,
        shared_loads=number(plain, machine.LOAD_SHARED),
        shared_stores=number(plain, STORE_SHARED),
        trips=max(_trips(plain), min(1, requests)),
        loop_trips=_trips([*looped, *looped]) - _trips(looped),
        vector_loads=f"{requests} x 128" if requests else "-",
        sends=" and ".join(str(width) for width in sorted({_width(one) for one in sent})),
        barriers=number(plain, machine.BLOCK_BARRIER),
        fences=number(plain, machine.MEMORY_BARRIER),
        signals=len(signals),
    )


def _width(one: Instruction) -> int:
    return 128 if one.opcode == machine.SEND_ASYNC else WIDTHS.get(one.width, 16)


def key(kernel: compiled.Sequence) -> str:
    kind = "cluster" if kernel.cluster else "grid"
    return f"{kernel.way} {kernel.cell} {kernel.dtype} {kind} {kernel.units} {kernel.columns}"


def main() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    units = [Unit("compile", source, 1, partial(compiled.compile_one, source, ARCH)) for source in SOURCES]
    for name, outcome in run_units(units).items():
        if outcome.failure:
            raise SystemExit(f"{name}: {outcome.failure}")
    table: dict[str, Counts] = {}
    for source in SOURCES:
        for name, code in code_of(BUILD / f"{source}.sm_{ARCH}.cubin").items():
            kernel = compiled.sequence_kernel(name)
            assert kernel is not None, name
            try:
                table[key(kernel)] = count(kernel, code)
            except Failure as failure:
                raise SystemExit(f"{key(kernel)}: {failure}") from None
    lines = [f"  {json.dumps(name)}: {json.dumps(table[name]._asdict())}" for name in sorted(table)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(table)} kernels counted")


if __name__ == "__main__":
    main()
