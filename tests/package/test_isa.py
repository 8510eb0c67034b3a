"""Tests how an instruction set is chosen and that the kernel in the plan is the one that ran."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import torch

import dlkernels.nn
from dlkernels._core import extension
from tests.support.fresh_python import run_python
from tests.support.instruction_sets import BEST_ISA_LAST, available_isas, kernels_of
from tests.support.layer_cases import MODES, OP_MODES, Case, make_data, run_layer
from tests.support.settings import num_threads

pytestmark = pytest.mark.usefixtures("native")


def test_available_isas(native) -> None:
    names = native.available_isas()
    assert names and set(names) <= set(BEST_ISA_LAST)
    assert "scalar" in names
    assert native.isa() == available_isas()[-1], "the best one is in force unless capped"


NEEDED = {"avx512_bf16": ("avx512f", "avx512dq", "avx512bw", "avx512vl", "os_zmm", "avx512_bf16", "avx512_vnni")}
NEEDED["amx"] = (*NEEDED["avx512_bf16"], "amx_tile", "amx_bf16", "amx_int8", "os_amx", "amx_granted")


@pytest.mark.parametrize("name", NEEDED)
def test_units_need_everything(name: str, native) -> None:
    """An instruction set is available only if the processor has it, the system saves its registers and the process may
    use it; otherwise its instructions fault."""
    features = native.cpu_features()
    cap = os.environ.get("DLKERNELS_CPU_ISA") or "amx"
    can = (all(features[need] for need in NEEDED[name]) or emulated(native)) and name in native.build_info()["isas"]
    assert (name in native.available_isas()) == (can and BEST_ISA_LAST.index(cap) >= BEST_ISA_LAST.index(name))
    if name not in native.available_isas():
        with pytest.raises((ValueError, RuntimeError), match=f"{name} is more than this machine"):
            extension.choose_isa(name)


def emulated(native) -> bool:
    """Returns whether this build emulates the bfloat16 instructions in plain C++."""
    return "DLK_EMULATE_BF16" in native.build_info()["flags"]


FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
UNITS = {
    "amx": (
        re.compile(r"\t(tdp\w+|tile\w+|ldtilecfg|sttilecfg)\b"),
        {"tdpbf16ps", "tdpbusd", "tileloadd", "tilestored", "tilezero", "ldtilecfg", "sttilecfg", "tilerelease"},
    ),
    "avx512_bf16": (
        re.compile(r"\t(v\w*bf16\w*|vpdpbusd)\b"),
        {"vdpbf16ps", "vcvtne2ps2bf16", "vcvtneps2bf16", "vpdpbusd"},
    ),
}


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump reads the instructions")
@pytest.mark.parametrize("name", UNITS)
def test_instructions_of_units_are_only_in_their_kernels(name: str, native) -> None:
    """In other functions they would be illegal instructions on every machine without them."""
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.__file__], capture_output=True, text=True, check=True
    ).stdout
    pattern, expected = UNITS[name]
    found: dict[str, set[str]] = {}
    function = ""
    for line in code.splitlines():
        if head := FUNCTION.match(line):
            function = head[1]
        elif instruction := pattern.search(line):
            found.setdefault(instruction[1], set()).add(function)
    assert set(found) == (expected if name in native.build_info()["isas"] and not emulated(native) else set())
    # The processors with tiles have the other instructions too.
    inside = re.compile(rf"_Z+N+K?3dlk\d+({name}|amx)")
    outside = {symbol for symbols in found.values() for symbol in symbols if not inside.match(symbol)}
    assert not outside, outside


def test_set_isa(native) -> None:
    automatic = native.isa()
    try:
        for name in available_isas():
            extension.choose_isa(name)
            assert native.isa() == name
    finally:
        extension.choose_isa(None)
    assert native.isa() == automatic


@pytest.mark.parametrize("name", ["", "sse9", "AVX-512", "neon"])
def test_set_isa_refuses_nonsense(native, name: str) -> None:
    before = native.isa()
    with pytest.raises((ValueError, RuntimeError), match="scalar"):
        extension.choose_isa(name)
    assert native.isa() == before


CAPPED = """
import torch
from dlkernels._core import extension
from tests.support.layer_cases import *
from tests.support.instruction_sets import kernels_of
native = extension.native
print("isa", native.isa())
print("available", *native.available_isas())
for mode in MODES:
    check_case(Case(mode, T=4, B=3, I=5, H=17, P=3 if mode == "lstm_proj" else 0, lengths=(2, 4, 1)))
    assert native.last_run()["isa"] == kernels_of(native.isa())
"""


@pytest.mark.parametrize("cap", BEST_ISA_LAST)
def test_environment_caps(cap: str) -> None:
    """A cap above the machine's best instruction set is not an error; the best available one is used."""
    allowed = [name for name in available_isas() if BEST_ISA_LAST.index(name) <= BEST_ISA_LAST.index(cap)]
    output = run_python(CAPPED, DLKERNELS_CPU_ISA=cap)
    assert f"isa {allowed[-1]}" in output.splitlines()
    assert sorted(output.split("available", 1)[1].split()) == sorted(allowed)


def test_environment_of_nonsense() -> None:
    output = run_python(
        """
        try:
            import torch, dlkernels.nn
            from dlkernels._core import extension
            extension.native.isa()
            dlkernels.nn.GRU(3, 4)(torch.randn(2, 1, 3))
        except Exception as error:
            print(type(error).__name__, error)
        else:
            print("NO ERROR")
        """,
        DLKERNELS_CPU_ISA="sse9",
    )
    assert "NO ERROR" not in output
    assert "DLKERNELS_CPU_ISA" in output and "sse9" in output
    assert all(name in output for name in BEST_ISA_LAST), "the message says what is allowed"


PLAN_KEYS = ("kernel", "isa", "threads", "split", "recurrence", "chunk_steps", "directions_side_by_side")
SHAPES = [(1, 1, 8, 16), (20, 1, 16, 64), (10, 4, 8, 33), (6, 32, 16, 64), (3, 64, 8, 128), (4, 2, 16, 400)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_planned_kernel_ran(mode: str, dtype: torch.dtype, count: int, isa: str, native) -> None:
    op_mode = OP_MODES[mode]
    for t, b, i, h in SHAPES:
        for bidirectional in (False, True):
            proj = h // 2 if mode == "lstm_proj" else 0
            case = Case(mode, t, b, i, h, proj, bidirectional=bidirectional, dtype=dtype)
            data = make_data(case)
            name = str(dtype).removeprefix("torch.")
            with num_threads(count):
                for backward in (False, True):
                    run_layer(case, data, dtype, dlkernels.nn, grad=backward)
                    run = native.last_run()
                    plan = native.plan(op_mode, name, t, b, i, h, proj, case.D, count, backward, False, False)
                    assert run["backward"] == backward
                    assert {key: run[key] for key in PLAN_KEYS} == {key: plan[key] for key in PLAN_KEYS}
                    served = kernels_of(isa, layer=dtype, dot=plan["recurrence"] == "dot")
                    assert plan["isa"] == served and plan["reason"]
                    assert plan["kernel"] == f"cpu/{served}/{op_mode}"
                    assert run["members"] <= run["threads"] <= count


def test_the_plan_is_no_constant(native) -> None:
    """One or two rows use dot products with unpacked weights, many rows use tiles, and one thread never splits."""

    def plan(
        b: int, h: int, threads: int, steps: int = 50, backward: bool = False, deterministic: bool = False,
        mode: str = "gru",
    ) -> dict:  # fmt: skip
        return native.plan(mode, "float32", steps, b, h, h, 0, 1, threads, backward, deterministic, False)

    assert plan(1, 128, 1, steps=1)["recurrence"] == "dot"
    assert plan(1, 128, 1, steps=1, deterministic=True)["recurrence"] == "tiles", "one order of summation for all"
    assert plan(64, 256, 1)["recurrence"] == "tiles"
    assert plan(64, 256, 1)["split"] == plan(1, 8, 2)["split"] == "serial"
    assert plan(128, 256, 2)["split"] in ("rows", "units")
    fused = plan(16, 256, 1, mode="lstm")
    assert fused["chunk_steps"] == 0 and "in one go" in fused["reason"]
    others = (
        plan(16, 256, 1), plan(16, 256, 1, mode="lstm", backward=True), plan(7, 256, 1, mode="lstm"),
        plan(16, 2048, 1, mode="lstm"), plan(16, 256, 1, mode="lstm", deterministic=True),
    )  # fmt: skip
    assert all(other["chunk_steps"] > 0 and "in one go" not in other["reason"] for other in others)


def test_last_run_belongs_to_its_thread(native) -> None:
    import threading

    dlkernels.nn.GRU(3, 4)(torch.randn(2, 1, 3))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(native.last_run()))
    thread.start()
    thread.join()
    assert seen == [None] and native.last_run() is not None


def test_build_info(native) -> None:
    info = native.build_info()
    assert set(available_isas()) <= set(info["isas"])
    assert {"torch_target", "compiler", "flags"} <= set(info)
    assert isinstance(native.cpu_features(), dict)
