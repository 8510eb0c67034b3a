"""Describes a call of a recurrent layer (Case), makes its data, runs it with torch.nn or dlkernels, and compares the
results with float64. The oracle here uses torch.nn only, not dlkernels.reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dlkernels.nn
from dlkernels.testing import FACTOR_FORWARD, FACTOR_GRAD, Verdict, error, floor, within_rule

MODES = ("lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu")
CELL_MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLASS_NAMES = {"lstm": "LSTM", "lstm_proj": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
OP_MODES = {mode: mode.removesuffix("_proj") for mode in MODES}

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call of a layer. With `packed` the lengths are passed as a PackedSequence, not as lengths=. `resets` is the
    share of flags in the argument of that name, `cells` whether c of every step is returned."""

    mode: str
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 6
    P: int = 0
    layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    contiguous: bool = True
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    hx: bool = True
    bptt_steps: int = 0
    resets: float = 0.0
    cells: bool = False
    cotangents: str = "yhc"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def O(self) -> int:  # noqa: E743
        return self.P or self.H

    @property
    def is_lstm(self) -> bool:
        return self.mode.startswith("lstm")

    def __post_init__(self) -> None:
        if (self.mode == "lstm_proj") != (self.P > 0):
            raise ValueError(f"P={self.P} with mode {self.mode}")


def layer_kwargs(case: Case) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "input_size": case.I, "hidden_size": case.H, "num_layers": case.layers, "bias": case.bias,
        "batch_first": case.batch_first, "bidirectional": case.bidirectional,
    }  # fmt: skip
    if case.P:
        kwargs["proj_size"] = case.P
    if case.mode.startswith("rnn"):
        kwargs["nonlinearity"] = case.mode.removeprefix("rnn_")
    return kwargs


@dataclass
class Data:
    """Float64 values that are exact in the case's dtype, and flags; time-major."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    dy: Tensor
    dh: Tensor
    dc: Tensor
    params: dict[str, Tensor]
    dcells: Tensor | None = None
    resets: Tensor | None = None

    def to(self, device: str) -> Data:
        fields = {name: getattr(self, name) for name in ("x", "h0", "c0", "dy", "dh", "dc", "dcells", "resets")}
        moved = {name: None if value is None else value.to(device) for name, value in fields.items()}
        return Data(**moved, params={name: value.to(device) for name, value in self.params.items()})


def make_data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale
        return values.to(case.dtype).double()

    states = case.layers * case.D
    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in getattr(torch.nn, CLASS_NAMES[case.mode])(**layer_kwargs(case)).named_parameters()
        }
    # The weights are small enough that the recurrence does not amplify its state. Otherwise it also amplifies the first
    # rounding errors, in torch's result and in ours, and their comparison is left to chance.
    scale = min(1.0, 1.4 * case.H**-0.5)
    params = {name: draw(*shape, scale=scale) for name, shape in shapes.items()}
    x = draw(case.T, case.B, case.I)
    h0 = draw(states, case.B, case.O) if case.hx else None
    c0 = draw(states, case.B, case.H) if case.hx and case.is_lstm else None
    if case.mode == "rnn_relu":
        params = {
            name: (p * (2.0 / max(4, p.shape[-1])) if p.dim() == 2 else p).to(case.dtype).double()
            for name, p in params.items()
        }
        if case.dtype in (torch.bfloat16, torch.float16):
            # With 16-bit rounding the sign of a pre-activation near 0 is random, and relu's gradient depends on it. To
            # avoid this, all terms of a sum have one sign: x, h >= 0, and a unit's weights and biases share a sign.
            x, h0 = x.abs(), None if h0 is None else h0.abs()
            sign = torch.rand(case.H, generator=generator) < 0.3
            params = {
                name: torch.where(sign.view(-1, *[1] * (p.dim() - 1)), -p.abs(), p.abs()) for name, p in params.items()
            }
    dy, dh, dc = draw(case.T, case.B, case.D * case.O), draw(states, case.B, case.O), draw(states, case.B, case.H)
    dcells = draw(case.T, case.B, case.D * case.H) if case.cells else None
    resets = torch.rand(case.T, case.B, generator=generator) < case.resets if case.resets else None
    return Data(x, h0, c0, dy, dh, dc, params, dcells, resets)


def new_layer(case: Case, data: Data, dtype: torch.dtype, package: Any = dlkernels.nn, **more: Any) -> torch.nn.Module:
    device = data.x.device
    layer = getattr(package, CLASS_NAMES[case.mode])(**layer_kwargs(case), dtype=dtype, device=device, **more)
    layer.load_state_dict({name: p.to(dtype) for name, p in data.params.items()})
    return layer


def leaf(values: Tensor | None, dtype: torch.dtype, contiguous: bool, batch_first: bool = False) -> Tensor | None:
    """Returns a leaf that requires a gradient. If not `contiguous`, its last dimension has stride 2 and the others are
    transposed."""
    if values is None:
        return None
    values = values.to(dtype)
    if batch_first:
        values = values.transpose(0, 1)
    if contiguous:
        return values.contiguous().clone().requires_grad_()
    shape = [values.shape[1], values.shape[0], 2 * values.shape[2] + 1]
    view = torch.full(shape, float("nan"), dtype=dtype, device=values.device).transpose(0, 1)[..., 1::2]
    return view.copy_(values).detach().requires_grad_()


def gradients(case: Case, data: Data, dtype: torch.dtype, outputs: Results, leaves: dict[str, Tensor]) -> Results:
    wanted = [("y", data.dy), ("h_n", data.dh), ("c_n", data.dc), ("cells", data.dcells)]
    picked = [
        (outputs[k], d)
        for k, d in wanted
        if k in outputs and d is not None and k[0] in case.cotangents and outputs[k].requires_grad
    ]
    if not picked:  # the oracle, when every length is 0 and the states are not given
        return {f"d{name}": torch.zeros_like(at) for name, at in leaves.items()}
    grads = torch.autograd.grad(
        [o for o, _ in picked], list(leaves.values()), [d.to(dtype) for _, d in picked], allow_unused=True
    )
    # torch returns None for a leaf that no cotangent reaches; the comparison needs zeros.
    return {
        f"d{name}": torch.zeros_like(at) if g is None else g
        for (name, at), g in zip(leaves.items(), grads, strict=True)
    }


def run_layer(
    case: Case, data: Data, dtype: torch.dtype, package: Any, grad: bool = True, layer: torch.nn.Module | None = None
) -> Results:
    """Returns outputs and gradients, always time-major and padded with zeros. Lengths are passed to torch.nn as a
    PackedSequence, and to dlkernels as lengths= or as a PackedSequence, depending on the case."""
    ours = package is dlkernels.nn
    more: dict[str, Any] = {"bptt_steps": case.bptt_steps} if case.bptt_steps else {}
    if case.cells:
        more["return_cells"] = True
    if layer is None:
        layer = new_layer(case, data, dtype, package)
    layer.requires_grad_(grad)
    x = leaf(data.x, dtype, case.contiguous, case.batch_first)
    h0, c0 = leaf(data.h0, dtype, case.contiguous), leaf(data.c0, dtype, case.contiguous)
    hx = None if h0 is None else (h0, c0) if case.is_lstm else h0
    with torch.set_grad_enabled(grad):
        lengths = None if case.lengths is None else torch.tensor(case.lengths)
        if lengths is None or (ours and not case.packed):
            if data.resets is not None:
                more["resets"] = data.resets.transpose(0, 1) if case.batch_first else data.resets
            if lengths is not None:
                more["lengths"] = lengths.to(x.device)
            y, state, *cells = layer(x, hx, **more)
        else:
            if data.resets is not None:
                more["resets"] = pack_padded_sequence(data.resets, lengths, enforce_sorted=False).data
            packed = pack_padded_sequence(x, lengths, case.batch_first, enforce_sorted=False)
            y, state, *cells = layer(packed, hx, **more)
            y, *cells = (pad_packed_sequence(each, case.batch_first, total_length=case.T)[0] for each in (y, *cells))
        if case.batch_first:
            y, *cells = (each.transpose(0, 1) for each in (y, *cells))
        outputs = {"y": y, "h_n": state[0], "c_n": state[1]} if case.is_lstm else {"y": y, "h_n": state}
        if cells:
            outputs["cells"] = cells[0]
    assert all(o.dtype == dtype for o in outputs.values())
    if not grad:
        return outputs
    leaves = {"x": x, "h0": h0, "c0": c0, **dict(layer.named_parameters())}
    grads = gradients(case, data, dtype, outputs, {k: v for k, v in leaves.items() if v is not None})
    if case.batch_first:
        grads["dx"] = grads["dx"].transpose(0, 1)
    return {**{k: v.detach() for k, v in outputs.items()}, **grads}


def run_torch_alone(case: Case, data: Data, dtype: torch.dtype) -> Results:
    """Computes the defined results with torch.nn: it runs every layer, direction and sequence separately and cuts a
    sequence into pieces: of bptt_steps, with the state detached between them, where the state is reset, and of single
    steps for c of every step. This is the oracle for lengths of 0 and for what torch.nn lacks."""
    params = {name: p.to(dtype).requires_grad_() for name, p in data.params.items()}
    x, h0, c0 = leaf(data.x, dtype, True), leaf(data.h0, dtype, True), leaf(data.c0, dtype, True)
    lengths = case.lengths or (case.T,) * case.B
    zeros = torch.zeros(case.layers * case.D, case.B, max(case.O, case.H), dtype=dtype)
    layer_input, h_n, c_n = x, [], []
    for layer in range(case.layers):
        outputs, cells = [], []
        for direction in range(case.D):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            single = dataclasses.replace(
                case, layers=1, bidirectional=False, batch_first=False, I=layer_input.shape[-1]
            )
            module = getattr(torch.nn, CLASS_NAMES[case.mode])(**layer_kwargs(single), dtype=dtype)
            names = {name: f"{name[:-3]}{suffix}" for name, _ in module.named_parameters()}
            weights = {name: params[full] for name, full in names.items()}
            index = layer * case.D + direction
            columns, h_last, c_last, cell_columns = [], [], [], []
            for b, length in enumerate(lengths):
                h = (zeros[index, b : b + 1, : case.O] if h0 is None else h0[index, b : b + 1]).unsqueeze(0)
                c = (zeros[index, b : b + 1, : case.H] if c0 is None else c0[index, b : b + 1]).unsqueeze(0)
                sequence = layer_input[:length, b : b + 1]
                sequence = sequence.flip(0) if direction else sequence
                resets = reset_steps(data, b, length, direction)
                cuts = set(range(0, length, case.bptt_steps)) - {0} if case.bptt_steps else set()
                borders = sorted({0, length} | cuts | resets | set(range(length if case.cells else 0)))
                pieces, cell_pieces = [], []
                for start, end in itertools.pairwise(borders):
                    if start in cuts:
                        h, c = h.detach(), c.detach()
                    if start in resets:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    given = (sequence[start:end], (h, c) if case.is_lstm else h)
                    y, state = torch.func.functional_call(module, weights, given)
                    h, c = state if case.is_lstm else (state, c)
                    pieces.append(y)
                    cell_pieces.append(c)
                columns.append(padded_column(pieces, direction, case.T, case.O, dtype))
                h_last.append(h[0])
                c_last.append(c[0])
                if case.cells:
                    cell_columns.append(padded_column(cell_pieces, direction, case.T, case.H, dtype))
            outputs.append(torch.cat(columns, 1))
            if case.cells:
                cells.append(torch.cat(cell_columns, 1))
            h_n.append(torch.cat(h_last))
            c_n.append(torch.cat(c_last))
        layer_input = torch.cat(outputs, 2)
    results = {"y": layer_input, "h_n": torch.stack(h_n)}
    if case.is_lstm:
        results["c_n"] = torch.stack(c_n)
    if case.cells:
        results["cells"] = torch.cat(cells, 2)
    leaves = {k: v for k, v in {"x": x, "h0": h0, "c0": c0, **params}.items() if v is not None}
    return {**{k: v.detach() for k, v in results.items()}, **gradients(case, data, dtype, results, leaves)}


def reset_steps(data: Data, b: int, length: int, direction: int) -> set[int]:
    """The steps of sequence b, in the order of the direction, that begin with a state of zeros."""
    if data.resets is None:
        return set()
    flagged = [t for t in range(length) if data.resets[t, b]]
    return {length - t for t in flagged if t > 0} if direction else set(flagged)


def padded_column(pieces: list[Tensor], direction: int, steps: int, features: int, dtype: torch.dtype) -> Tensor:
    """The results of one sequence's steps, in the order of time and padded with zeros: [steps, 1, features]."""
    column = torch.cat(pieces) if pieces else torch.zeros(0, 1, features, dtype=dtype)
    column = column.flip(0) if direction else column
    return torch.cat([column, column.new_zeros(steps - column.shape[0], 1, features)])


def torch_results(case: Case, data: Data, dtype: torch.dtype) -> Results:
    if case.bptt_steps or case.resets or case.cells or (case.lengths is not None and 0 in case.lengths):
        return run_torch_alone(case, data, dtype)
    return run_layer(case, data, dtype, torch.nn)


@functools.lru_cache(maxsize=4096)
def _expected(case: Case) -> tuple[Data, Results, Results]:
    data = make_data(case)
    return data, torch_results(case, data, case.dtype), torch_results(case, data, torch.float64)


def expected(case: Case) -> tuple[Data, Results, Results]:
    """Returns the data, torch's results and those in float64, computed once for all ISAs and both forms of lengths."""
    return _expected(dataclasses.replace(case, packed=False))


# The largest error of a tensor of a few values is mostly chance: torch may have rounded almost every value correctly
# where we are off by some units, or the other way round. If a result breaks the rule, the case is therefore repeated
# with NEIGHBOURS slightly changed inputs. It passes if our median error there is within the rule, measured by torch's
# median error, and if the error of the original inputs is at most RETRY_CAP times the limit. A wrong kernel is wrong
# for the changed inputs as well.
NEIGHBOURS = 15
RETRY_CAP = 4.0
second_looks: list[str] = []


def neighbour(values: Tensor | None, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    """Changes every value by up to 1%, so that results round differently. The new values are exact in `dtype` and keep
    signs and zeros."""
    if values is None:
        return None
    factors = 1 + (torch.rand(values.shape, generator=generator, dtype=torch.float64) - 0.5) / 50
    return (values.detach().double() * factors).to(dtype).double()


def neighbours(case: Case, data: Data) -> Iterator[Data]:
    generator = torch.Generator().manual_seed(case.seed)
    for _ in range(NEIGHBOURS):
        floats = ("x", "h0", "c0", "dy", "dh", "dc", "dcells")
        moved = {k: neighbour(getattr(data, k), case.dtype, generator) for k in floats}
        params = {name: neighbour(p, case.dtype, generator) for name, p in data.params.items()}
        yield Data(**moved, params=params, resets=data.resets)


def errors_nearby(case: Case, data: Data, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Returns our median error and torch's in each result, over neighbours of the case."""
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for moved in neighbours(case, data):
        ref = torch_results(case, moved, torch.float64)
        for found, results in (
            (ours, run_layer(case, moved.to(device), case.dtype, dlkernels.nn)),
            (theirs, torch_results(case, moved, case.dtype)),
        ):
            for name, value in results.items():
                found.setdefault(name, []).append(error(value, ref[name]))
    return {name: (statistics.median(ours[name]), statistics.median(theirs[name])) for name in ref}


def acceptable_nearby(
    verdict: Verdict, nearby: tuple[float, float], ref: Tensor, dtype: torch.dtype, grad: bool
) -> bool:
    ours, theirs = nearby
    limit = (FACTOR_GRAD if grad else FACTOR_FORWARD) * theirs + floor(ref, dtype)
    return ours <= limit and verdict.ours <= RETRY_CAP * max(limit, verdict.limit)


def disagreements(
    case: Case, data: Data, ours: Results, theirs: Results, ref: Results, device: str = "cpu"
) -> list[str]:
    """Lists where `ours`, computed on `device`, breaks the tolerance rule. Padding must be exactly 0, which the rule
    alone does not demand."""
    assert ours.keys() <= theirs.keys() == ref.keys(), (ours.keys(), theirs.keys(), ref.keys())
    found: list[str] = []
    nearby: dict[str, tuple[float, float]] = {}
    for name, value in ours.items():
        is_grad = name not in ("y", "h_n", "c_n")
        verdict = within_rule(value, theirs[name], ref[name], case.dtype, grad=is_grad)
        if verdict.ok:
            continue
        nearby = nearby or errors_nearby(case, data, device)
        second_looks.append(f"{case}: {name} {verdict}, nearby {nearby[name]}")
        if not acceptable_nearby(verdict, nearby[name], ref[name], case.dtype, is_grad):
            found.append(
                f"{name}: error {verdict.ours:.2e}, limit {verdict.limit:.2e} (torch's error {verdict.theirs:.2e}; "
                f"nearby ours {nearby[name][0]:.2e}, torch's {nearby[name][1]:.2e})"
            )
    if case.lengths is not None:
        padding = torch.arange(case.T)[:, None] >= torch.tensor(case.lengths)
        padded = [name for name in ("y", "dx") if name in ours and ours[name].cpu()[padding].ne(0).any()]
        found += [f"{name}: padding is not 0" for name in padded]
    return found


def check_case(case: Case, device: str = "cpu") -> None:
    """Asserts that outputs and gradients of our layer keep the tolerance rule; torch's results are from the CPU."""
    data, theirs, ref = expected(case)
    ours = run_layer(case, data.to(device), case.dtype, dlkernels.nn)
    found = disagreements(case, data, ours, theirs, ref, device)
    assert not found, f"{case}\n  " + "\n  ".join(found)


def assert_bit_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} against {expected.dtype}"
    if not torch.equal(actual, expected):
        difference = (actual.double() - expected.double()).abs()
        count = int((actual != expected).sum())
        raise AssertionError(f"{name}: {count} of {actual.numel()} values differ, up to {difference.max():.3e}")


def assert_same_results(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_bit_equal(name, value, expected[name])
