"""Tests combinations that are common in training jobs: several threads, several chunks of time steps, frozen tensors,
16-bit types and lengths. The rows cover all pairs of these. Each is compared with torch.nn, with one thread and with a
call that requires every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dlkernels.nn
from tests.support.covering_arrays import Row, pairwise, row_id
from tests.support.layer_cases import (
    DTYPES,
    MODES,
    Case,
    Data,
    Results,
    assert_bit_equal,
    assert_same_results,
    check_case,
    gradients,
    leaf,
    make_data,
    new_layer,
    run_layer,
)  # fmt: skip

# (T, B). Threads split the rows of the first shape and the hidden units of the second. A chunk has up to 384 rows; the
# last chunk of these two is shorter than the others and has an odd number of rows. A step of the third has more rows
# than that, so each of its chunks is one step.
SHAPES = {"rows": (23, 37), "units": (71, 13), "one_step_chunks": (4, 385)}
LAYOUTS = ("padded", "batch_first", "lengths", "packed")
# The tensors whose gradients are required; the others are frozen.
WANTED: dict[str, tuple[str, ...]] = {
    "all": ("x", "h0", "c0", "weight", "bias"),
    "x": ("x",),
    "state": ("h0", "c0"),
    "x_state": ("x", "h0", "c0"),
    "weights": ("weight", "bias"),
    "bias": ("bias_hh",),
    "x_and_one": ("x", "weight_hh"),
}


def case_of(row: Row) -> Case:
    T, B = SHAPES[row["shape"]]
    mode, layout = row["mode"], row["layout"]
    lengths = tuple(1 + (7 * b + T - 1) % T for b in range(B)) if layout in ("lengths", "packed") else None
    return Case(
        mode, T, B, 19, 50, 21 if mode == "lstm_proj" else 0, bias=row.get("bias", True),
        bidirectional=row["both_ways"], batch_first=layout == "batch_first", lengths=lengths,
        packed=layout == "packed", hx=row.get("hx", True), dtype=row["dtype"],
    )  # fmt: skip


def run(case: Case, data: Data, wanted: tuple[str, ...]) -> Results:
    """Returns outputs and the gradients of the tensors in `wanted`; no other tensor requires a gradient."""
    layer = new_layer(case, data, case.dtype)
    leaves: dict[str, Any] = dict(layer.named_parameters())
    given = {"x": leaf(data.x, case.dtype, True, case.batch_first)}
    given |= {name: leaf(getattr(data, name), case.dtype, True) for name in ("h0", "c0")}
    leaves |= {name: value for name, value in given.items() if value is not None}
    for name, value in leaves.items():
        value.requires_grad_(name.startswith(wanted))
    x, h0, c0 = given["x"], given["h0"], given["c0"]
    hx = None if h0 is None else (h0, c0) if case.is_lstm else h0
    if case.packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(case.lengths), case.batch_first, enforce_sorted=False
        )
    lengths = torch.tensor(case.lengths) if case.lengths and not case.packed else None
    y, state = layer(x, hx, lengths=lengths)
    if case.packed:
        y = torch.nn.utils.rnn.pad_packed_sequence(y, case.batch_first, total_length=case.T)[0]
    y = y.transpose(0, 1) if case.batch_first else y
    outputs = {"y": y, "h_n": state[0], "c_n": state[1]} if case.is_lstm else {"y": y, "h_n": state}
    found = gradients(case, data, case.dtype, outputs, {n: v for n, v in leaves.items() if v.requires_grad})
    if case.batch_first and "dx" in found:
        found["dx"] = found["dx"].transpose(0, 1)
    return {**{name: value.detach() for name, value in outputs.items()}, **found}


def assert_part_of(some: Results, everything: Results) -> None:
    assert some.keys() <= everything.keys()
    for name, value in some.items():
        assert_bit_equal(name, value, everything[name])


ROWS = pairwise(
    {
        "mode": MODES, "dtype": DTYPES, "shape": tuple(SHAPES), "layout": LAYOUTS, "both_ways": (False, True),
        "wanted": tuple(WANTED), "threads": (2, 3, 4), "bias": (True, False), "hx": (True, False),
    },
    allowed=lambda row: not (
        (row.get("wanted") == "bias" and row.get("bias") is False)
        or (row.get("wanted") in ("state", "x_state") and row.get("hx") is False)
    ),
)  # fmt: skip


def test_the_rows_cover_what_they_say() -> None:
    assert len(ROWS) < 60
    for wanted in WANTED:
        assert {row["shape"] for row in ROWS if row["wanted"] == wanted} == set(SHAPES)
        assert {row["threads"] for row in ROWS if row["wanted"] == wanted} == {2, 3, 4}
    for shape in SHAPES:
        assert {row["dtype"] for row in ROWS if row["shape"] == shape} == set(DTYPES)
        assert {row["mode"] for row in ROWS if row["shape"] == shape} == set(MODES)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_threads_chunks_and_frozen_parts(row: Row, isa: str, threads: Callable[[int], None]) -> None:
    case = case_of(row)
    data = make_data(case)
    threads(1)
    check_case(case)
    alone = run_layer(case, data, case.dtype, dlkernels.nn)
    threads(row["threads"])
    together = run_layer(case, data, case.dtype, dlkernels.nn)
    assert_same_results(together, alone)
    assert_part_of(run(case, data, WANTED[row["wanted"]]), alone)


@pytest.mark.parametrize("shape", ["rows", "units"])
@pytest.mark.parametrize("mode", MODES)
def test_these_shapes_are_split_and_cut(
    mode: str, shape: str, isa: str, native, threads: Callable[[int], None]
) -> None:
    threads(2)
    case = case_of({"mode": mode, "shape": shape, "layout": "padded", "both_ways": False, "dtype": torch.float32})
    run_layer(case, make_data(case), case.dtype, dlkernels.nn)
    ran = native.last_run()
    assert ran["members"] == 2, "or no test of several threads is one"
    assert ran["backward"] and ran["split"] == shape and 2 * ran["chunk_steps"] < case.T
    rest = case.T % ran["chunk_steps"] * case.B
    assert rest % 2 and rest % 16, "the last chunk is to end within a block of rows"


# Calls with many short chunks. A thread that does not wait at a barrier is noticed here, because buffers start as NaN.
RACES = [
    Case("lstm", T=14, B=384, I=65, H=20),
    Case("gru", T=14, B=384, I=65, H=20, dtype=torch.bfloat16),
    Case("rnn_tanh", T=14, B=385, I=65, H=20, dtype=torch.float16),
    Case("lstm", T=120, B=15, I=33, H=48, dtype=torch.bfloat16),
    Case("gru", T=120, B=15, I=33, H=48, dtype=torch.float16),
    Case("lstm_proj", T=120, B=15, I=33, H=48, P=20),
]


@pytest.mark.parametrize("wanted", ["x_state", "x", "weights", "all"])
@pytest.mark.parametrize("case", RACES, ids=lambda c: f"{c.mode}-{c.T}x{c.B}-{str(c.dtype).removeprefix('torch.')}")
def test_many_chunks_many_times(case: Case, wanted: str, best_isa: str, threads: Callable[[int], None]) -> None:
    data = make_data(case)
    threads(1)
    expected = run(case, data, WANTED[wanted])
    threads(2)
    for _ in range(6):
        assert_same_results(run(case, data, WANTED[wanted]), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_row_counts_in_a_bias(mode: str, count: int, isa: str, threads: Callable[[int], None]) -> None:
    """The gradient of a bias is the sum of the gate gradients of all rows. Here only one row has a gradient. The test
    moves it to each row where a block or a chunk begins or ends, including the last chunk, which has an odd size."""
    threads(count)
    T, B = 5, 129  # three chunks of 2, 2 and 1 steps with 258, 258 and 129 rows
    case = Case(mode, T, B, 3, 6, 4 if mode == "lstm_proj" else 0, hx=False, dtype=torch.float64)
    data = make_data(case)
    ours, theirs = new_layer(case, data, case.dtype), new_layer(case, data, case.dtype, torch.nn)
    x = data.x
    y, expected_y = ours(x)[0], theirs(x)[0]
    for t in range(T):
        for b in (0, 1, 15, 16, 126, 127, 128):
            dy = torch.zeros_like(y)
            dy[t, b] = data.dy[t, b]
            for name, p in ours.named_parameters():
                if name.startswith("bias"):
                    (grad,) = torch.autograd.grad(y, p, dy, retain_graph=True)
                    q = dict(theirs.named_parameters())[name]
                    (expected,) = torch.autograd.grad(expected_y, q, dy, retain_graph=True)
                    torch.testing.assert_close(grad, expected, msg=lambda m, at=(name, t, b): f"{at}: {m}")
