"""Under torch.use_deterministic_algorithms a sequence's result is bit-equal in every batch."""

from __future__ import annotations

import pytest
import torch

import dlkernels.nn
from tests.support.layer_cases import (
    MODES,
    Case,
    Data,
    Results,
    assert_bit_equal,
    assert_same_results,
    make_data,
    run_layer,
)
from tests.support.settings import num_threads

pytestmark = pytest.mark.usefixtures("isa")

# (T, B, I, H, P) of a small shape with remainders, of more rows than a tile, of more hidden units than a block, and of
# many steps.
SHAPES = [(5, 3, 4, 6, 2), (13, 17, 20, 33, 8), (7, 40, 64, 130, 40), (50, 5, 16, 48, 16)]


def lengths_for(t: int, b: int) -> tuple[int, ...]:
    """Returns unsorted lengths with repetitions, including the full length and 1."""
    return tuple([t, 1, *(1 + (5 * k * k + 3) % t for k in range(b - 2))][:b])


def sequence_alone(case: Case, data: Data, b: int, length: int) -> tuple[Case, Data]:
    rows = slice(b, b + 1)
    single = Case(
        **{
            **vars(case),
            "B": 1,
            "T": length,
            "lengths": None,
            "packed": False,
            "contiguous": True,
            "batch_first": False,
        }
    )

    def pick(state: torch.Tensor | None) -> torch.Tensor | None:
        return None if state is None else state[:, rows]

    return single, Data(
        data.x[:length, rows],
        pick(data.h0),
        pick(data.c0),
        data.dy[:length, rows],
        data.dh[:, rows],
        data.dc[:, rows],
        data.params,
    )


def assert_rows_equal_alone(case: Case, data: Data, batch: Results) -> None:
    for b, length in enumerate(case.lengths or (case.T,) * case.B):
        single, own = sequence_alone(case, data, b, length)
        alone = run_layer(single, own, case.dtype, dlkernels.nn)
        for name in ("y", "dx"):
            assert_bit_equal(f"{name} of sequence {b} (length {length})", batch[name][:length, b], alone[name][:, 0])
        for name in ("h_n", "c_n", "dh0", "dc0"):
            if name in batch:
                assert_bit_equal(f"{name} of sequence {b} (length {length})", batch[name][:, b], alone[name][:, 0])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["full", "lengths", "packed"])
def test_batch_equals_each_alone(form: str, mode: str, shape: tuple[int, ...], deterministic: None) -> None:
    t, b, i, h, p = shape
    lengths = None if form == "full" else lengths_for(t, b)
    large = b * h > 2000
    for dtype in (torch.float32,) if large else (torch.float32, torch.bfloat16):
        case = Case(
            mode, t, b, i, h, p if mode == "lstm_proj" else 0, layers=1 if large else 2, bidirectional=True,
            lengths=lengths, packed=form == "packed", dtype=dtype,
        )  # fmt: skip
        data = make_data(case)
        assert_rows_equal_alone(case, data, run_layer(case, data, dtype, dlkernels.nn))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_other_dtypes_and_layouts(mode: str, dtype: torch.dtype, deterministic: None) -> None:
    for batch_first, contiguous, bptt_steps in ((True, True, 0), (False, False, 3), (True, False, 2)):
        case = Case(
            mode, 7, 6, 9, 21, 5 if mode == "lstm_proj" else 0, layers=2, batch_first=batch_first,
            contiguous=contiguous, lengths=lengths_for(7, 6), bptt_steps=bptt_steps, dtype=dtype,
        )  # fmt: skip
        data = make_data(case)
        assert_rows_equal_alone(case, data, run_layer(case, data, dtype, dlkernels.nn))


@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_matter(mode: str, deterministic: None) -> None:
    case = Case(mode, 9, 11, 12, 70, 20 if mode == "lstm_proj" else 0, bidirectional=True, lengths=lengths_for(9, 11))
    data = make_data(case)
    results = []
    for count in (1, 2, 3):
        with num_threads(count):
            results.append(run_layer(case, data, case.dtype, dlkernels.nn))
    for other in results[1:]:
        for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
            if name in other:
                assert_bit_equal(name, other[name], results[0][name])


@pytest.mark.parametrize("mode", MODES)
def test_inference_equals_training(mode: str, deterministic: None) -> None:
    case = Case(mode, 6, 5, 8, 40, 12 if mode == "lstm_proj" else 0, bidirectional=True, lengths=lengths_for(6, 5))
    data = make_data(case)
    training = run_layer(case, data, case.dtype, dlkernels.nn)
    for name, value in run_layer(case, data, case.dtype, dlkernels.nn, grad=False).items():
        assert_bit_equal(name, value, training[name])


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(cell: str, deterministic: None) -> None:
    torch.manual_seed(3)
    module = getattr(dlkernels.nn, cell)(19, 67)
    x, h, c = torch.randn(23, 19), torch.randn(23, 67), torch.randn(23, 67)

    def run(rows: slice) -> list[torch.Tensor]:
        leaves = [v[rows].clone().requires_grad_() for v in ((x, h, c) if cell == "LSTMCell" else (x, h))]
        out = module(leaves[0], tuple(leaves[1:]) if cell == "LSTMCell" else leaves[1])
        outputs = list(out) if isinstance(out, tuple) else [out]
        return outputs + list(torch.autograd.grad([o.square().sum() for o in outputs], leaves))

    batch = run(slice(None))
    for b in range(23):
        for index, (of_batch, alone) in enumerate(zip(batch, run(slice(b, b + 1)), strict=True)):
            assert_bit_equal(f"result {index} of row {b}", of_batch[b : b + 1], alone)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_run_to_run_without_the_flag(mode: str, count: int) -> None:
    """With the same shapes and number of threads, results and weight gradients are bit-equal in every run."""
    assert not torch.are_deterministic_algorithms_enabled()
    cases = [
        Case(mode, 8, b, 24, h, 20 if mode == "lstm_proj" else 0, bidirectional=True, lengths=lengths, dtype=dtype)
        for b, h, lengths, dtype in (
            (1, 96, None, torch.float32),
            (19, 64, lengths_for(8, 19), torch.float32),
            (16, 128, None, torch.bfloat16),
        )
    ]
    with num_threads(count):
        for case in cases:
            data = make_data(case)
            first = run_layer(case, data, case.dtype, dlkernels.nn)
            for _ in range(5):
                assert_same_results(run_layer(case, data, case.dtype, dlkernels.nn), first)
