"""Counts what a step of the recurrence consists of in the machine code of the sequence kernels.

`python tests/cuda/counts.py` compiles the kernels of float32 and bfloat16 for sm_90a, disassembles them and writes
counts.json, from which predict.py makes the tables of docs/cuda.md. Run both after a change of the kernels:

    python tests/cuda/counts.py && python tests/cuda/predict.py --write

It needs nvcc and nvdisasm (NVDISASM, else the one on PATH; the wheels nvidia-cuda-nvdisasm and triton have it too).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ladder import BUILD, HERE, ROOT, Failure, Unit, must, run_units, tool

sys.path.insert(0, str(ROOT / "csrc" / "setup"))
sys.dont_write_bytecode = True

import compiled  # noqa: E402

FILE = HERE / "counts.json"
ARCH = "90a"
SOURCES = tuple(f"sequence_{way}_{dtype}.cu" for way in ("forward", "backward") for dtype in ("bf16", "f32"))


class Instruction(NamedTuple):
    name: str  # with its modifiers: LDG.E.128.STRONG.GPU
    target: str  # the label that it jumps to


class Loop(NamedTuple):
    begin: int
    end: int  # the jump back


class Function(NamedTuple):
    instructions: list[Instruction]
    loops: list[Loop]


def parse(listing: str) -> dict[str, Function]:
    """The functions in the output of `nvdisasm -c`."""
    functions: dict[str, Function] = {}
    for text in re.split(r"^\.text\.(?=\w+:$)", listing, flags=re.MULTILINE)[1:]:
        name, _, body = text.partition(":\n")
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in body.splitlines():
            if label := re.match(r"(\.\w+):", line):
                labels[label[1]] = len(instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", line):
                target = re.search(r"`\((\.\w+)\)", found[2]) if found[1].startswith("BRA") else None
                instructions.append(Instruction(found[1], target[1] if target else ""))
        back = [
            (labels[one.target], at) for at, one in enumerate(instructions) if one.target and labels[one.target] < at
        ]
        # Code for rare cases stands behind the end of the kernel and jumps back into it: those are no loops.
        exits = {at for at, one in enumerate(instructions) if one.name == "EXIT"}
        loops = [Loop(begin, end) for begin, end in back if exits.isdisjoint(range(begin, end))]
        functions[name] = Function(instructions, loops)
    return functions


def _is_product(name: str) -> bool:
    return name.startswith(("HMMA", "FFMA"))


def _is_strong_load(name: str) -> bool:
    return re.match(r"LDG?\.E.*\.STRONG", name) is not None


def _is_exchange_store(name: str) -> bool:
    """Stores of 128 bits to other blocks. Everything else that the kernels store has 32 bits or less."""
    return re.match(r"STAS|STG?\.E.*\.128", name) is not None


class Counts(NamedTuple):
    """Of one chunk of sequences, as far as not said otherwise; where the code branches, of all branches together."""

    instructions: int  # in the loop over chunks, without inner loops
    critical: int  # of these from the wait for other blocks to the last thing that other blocks wait for
    loop: int  # instructions of the loop over the steps of the product whose weights are in shared memory
    products: int  # tensor-core products, in float32 multiply-adds, without that loop
    loop_products: int  # the same in that loop
    shared_loads: int
    shared_stores: int
    trips: int  # times that products wait for vectors that were requested from L2, without that loop
    loop_trips: int  # the same in that loop
    vector_loads: str  # of vectors from L2: number and width in bits
    sends: str  # stores to other blocks: widths in bits, without their number, since the compiler unrolls their loop
    barriers: int  # of the block
    fences: int  # that wait for all earlier stores of the thread


def _trips(names: Sequence[str]) -> int:
    """How often something waits for vectors from L2: a product or, in float32, a copy to shared memory. All loads since
    the last wait are under way together."""
    trips, requested = 0, False
    for name in names:
        if _is_strong_load(name) and ".128" in name:
            requested = True
        elif requested and (_is_product(name) or name.startswith("STS")):
            trips, requested = trips + 1, False
    return trips


def _widths(names: Sequence[str]) -> list[int]:
    return [int(found[1]) if (found := re.search(r"\.(64|128)\b", name)) else 32 for name in names]


def count(function: Function) -> Counts:
    code, loops = function.instructions, function.loops

    def names(loop: Loop) -> list[str]:
        return [code[at].name for at in range(loop.begin, loop.end + 1)]

    def has(loop: Loop, *tests: Callable[[str], bool]) -> bool:
        return all(any(map(test, names(loop))) for test in tests)

    def is_cell(name: str) -> bool:
        return name.startswith(("SHFL", "MUFU"))

    # The loop over chunks is the innermost one with both the product and the cells.
    around = [loop for loop in loops if has(loop, _is_product, is_cell, lambda name: name.startswith("STS"))]
    if not around:
        raise Failure("no loop has both products and cells")
    chunk = min(around, key=lambda loop: loop.end - loop.begin)
    inner = [loop for loop in loops if chunk.begin <= loop.begin and loop.end < chunk.end]
    products = [loop for loop in inner if has(loop, _is_product) and not has(loop, is_cell)]
    if len(products) > 1:
        raise Failure(f"{len(products)} inner loops have products")
    in_loops = {at for loop in inner for at in range(loop.begin, loop.end + 1)}
    straight = [at for at in range(chunk.begin, chunk.end + 1) if at not in in_loops]
    spins = [
        loop
        for loop in inner
        if loop.end - loop.begin < 24
        and not has(loop, _is_product)
        and has(loop, lambda name: _is_strong_load(name) or name.startswith("SYNCS"))
    ]
    waits = [at for at in range(chunk.begin, chunk.end) if code[at].name.startswith(("UCGABAR_WAIT", "SYNCS"))]
    waits += [loop.end for loop in spins]
    waits = waits or [at for at in straight if _is_strong_load(code[at].name)]
    arrivals = [at for at in range(chunk.begin, chunk.end) if code[at].name.startswith(("UCGABAR_ARV", "RED"))]
    arrivals = arrivals or [at for at in range(chunk.begin, chunk.end) if _is_exchange_store(code[at].name)]
    if not waits or not arrivals or waits[0] > arrivals[-1]:
        raise Failure("cannot tell where a step waits for other blocks and where they wait for it")
    first, last = waits[0], arrivals[-1]
    plain = [code[at].name for at in straight]
    looped = names(products[0]) if products else []
    every = names(chunk)
    product = "HMMA" if has(chunk, lambda name: name.startswith("HMMA")) else "FFMA"
    requests = [name for name in every if _is_strong_load(name) and ".128" in name]
    sent = [code[at].name for at in range(first, last) if re.match(r"STG?\.E|STAS", code[at].name)]
    return Counts(
        instructions=len(straight),
        critical=sum(first <= at <= last for at in straight),
        loop=len(looped),
        products=sum(name.startswith(product) for name in plain),
        loop_products=sum(name.startswith(product) for name in looped),
        shared_loads=sum(name.startswith("LDS") for name in plain),
        shared_stores=sum(name.startswith("STS") for name in plain),
        trips=_trips(plain) + sum(_trips(names(loop)) for loop in inner if loop not in products),
        loop_trips=_trips(looped),
        vector_loads=f"{len(requests)} x 128" if requests else "-",
        sends=" and ".join(map(str, sorted(set(_widths(sent))))),
        barriers=sum(name.startswith("BAR.") for name in plain),
        fences=sum(name.startswith("MEMBAR") for name in plain),
    )


def nvdisasm() -> str:
    if os.environ.get("NVDISASM"):
        return os.environ["NVDISASM"]
    found = sorted((ROOT / "build").glob("gpuless-*/lib/python*/site-packages/triton/backends/nvidia/bin/nvdisasm"))
    return tool("nvdisasm", *map(str, found))


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
        for name, function in parse(must([nvdisasm(), "-c", BUILD / f"{source}.sm_{ARCH}.cubin"])).items():
            kernel = compiled.sequence_kernel(name)
            assert kernel is not None, name
            try:
                table[key(kernel)] = count(function)
            except Failure as failure:
                raise SystemExit(f"{key(kernel)}: {failure}") from None
    lines = [f"  {json.dumps(name)}: {json.dumps(table[name]._asdict())}" for name in sorted(table)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(table)} kernels counted")


if __name__ == "__main__":
    main()
