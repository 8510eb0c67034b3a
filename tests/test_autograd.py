"""Derivatives of every order, vmap, functorch and torch.compile of the recurrent Functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dlkernels import functional, reference
from dlkernels.rnn.operators.arguments import CellConfig, CellInputs, SequenceConfig, SequenceInputs
from dlkernels.rnn.operators.cell import cell
from dlkernels.rnn.operators.sequence import sequence
from dlkernels.rnn.routing import route

MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
T, B, I, H, P = 3, 2, 2, 3, 2
BATCH_SIZES = torch.tensor([2, 2, 1])
LENGTHS = torch.tensor([1, 3])

# (projection, bias, bidirectional, batch_first, lengths, packed, bptt_steps)
VARIANTS = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-directions": {"bidirectional": True},
    "batch-first": {"batch_first": True},
    "projected": {"projected": True, "bidirectional": True},
    "projected-lengths": {
        "projected": True, "bias": False, "bidirectional": True, "lengths": True, "batch_first": True
    },
    "lengths": {"lengths": True, "bidirectional": True},
    "packed": {"packed": True, "bidirectional": True},
    "truncated": {"bptt_steps": 2, "bidirectional": True},
    "truncated-every-step": {"bptt_steps": 1, "lengths": True, "bidirectional": True},
    "truncated-packed": {"bptt_steps": 2, "packed": True, "bidirectional": True},
    "no-state": {"state": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def cases() -> list[Any]:
    return [
        pytest.param(mode, name, id=f"{mode}-{name}")
        for mode in MODES
        for name, variant in VARIANTS.items()
        if mode == "lstm" or "projected" not in variant
    ]


class Case:
    """A layer call as a function of its floating-point tensors."""

    def __init__(
        self, mode: str, projected: bool = False, bias: bool = True, bidirectional: bool = False,
        batch_first: bool = False, lengths: bool = False, packed: bool = False, bptt_steps: int = 0, state: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        self.cfg = SequenceConfig(mode, bidirectional, batch_first, bptt_steps)
        self.lengths = LENGTHS if lengths else None
        self.batch_sizes = BATCH_SIZES if packed else None
        directions, outputs, rows = 1 + bidirectional, P if projected else H, reference.GATES[mode] * H
        shape = (5, I) if packed else (B, T, I) if batch_first else (T, B, I)
        sizes: list[tuple[int, ...]] = [shape]
        self.states = (1 + (mode == "lstm")) if state else 0
        sizes += [(directions, B, outputs), (directions, B, H)][: self.states]
        per_direction: list[tuple[int, ...]] = [(rows, I), (rows, outputs)]
        per_direction += [(rows,), (rows,)] if bias else []
        per_direction += [(P, H)] if projected else []
        sizes += per_direction * directions
        self.tensors = tuple(torch.randn(size, dtype=dtype).mul_(0.7).requires_grad_() for size in sizes)

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        x, *rest = tensors
        h0 = rest[0] if self.states > 0 else None
        c0 = rest[1] if self.states > 1 else None
        return x, h0, c0, tuple(rest[self.states :])

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, h0, c0, weights = self.split(tensors)
        outs = sequence(self.cfg, SequenceInputs(x, h0, c0, None, self.batch_sizes, self.lengths, weights))
        return outs if self.cfg.mode == "lstm" else outs[:2]

    def expected(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, h0, c0, weights = self.split(tensors)
        cfg = self.cfg
        outs = reference.sequence(
            cfg.mode, x, h0, c0, weights, self.batch_sizes, self.lengths, cfg.bidirectional, cfg.batch_first,
            cfg.bptt_steps,
        )  # fmt: skip
        return outs if cfg.mode == "lstm" else outs[:2]


class CellCase:
    def __init__(self, mode: str, bias: bool = True, state: bool = True) -> None:
        self.cfg, self.bias = CellConfig(mode), bias
        self.states = (1 + (mode == "lstm")) if state else 0
        rows = reference.GATES[mode] * H
        sizes: list[tuple[int, ...]] = [(B, I), *[(B, H)] * self.states, (rows, I), (rows, H)]
        sizes += [(rows,), (rows,)] if bias else []
        self.tensors = tuple(torch.randn(size, dtype=torch.float64).mul_(0.7).requires_grad_() for size in sizes)

    def full(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        x, *rest = tensors
        states = [*rest[: self.states], None, None][:2]
        weights = [*rest[self.states :], *([] if self.bias else [None, None])]
        return [x, *states, *weights]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(cell(self.cfg, CellInputs(*self.full(tensors)))[: 1 + (self.cfg.mode == "lstm")])

    def expected(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(out for out in reference.cell(self.cfg.mode, *self.full(tensors)) if out is not None)


def loss(outs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(out * out.detach().cos() + out.sin()).sum() for out in outs]).sum()


def smooth_loss(outs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(out.square() + out.sin()).sum() for out in outs]).sum()


def all_close(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode, variant", cases())
def test_first_derivative(mode: str, variant: str) -> None:
    case = Case(mode, **VARIANTS[variant])
    all_close(case(*case.tensors), case.expected(*case.tensors))
    all_close(
        torch.autograd.grad(loss(case(*case.tensors)), case.tensors),
        torch.autograd.grad(loss(case.expected(*case.tensors)), case.tensors),
    )
    if not case.cfg.bptt_steps:  # truncation is not the derivative of the outputs, by definition
        assert gradcheck(case, case.tensors, fast_mode=True)


@pytest.mark.parametrize("mode, variant", cases())
def test_second_derivative(mode: str, variant: str) -> None:
    case = Case(mode, **VARIANTS[variant])
    assert gradgradcheck(case, case.tensors, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ({}, {"bias": False}, {"state": False}), ids=("plain", "no-bias", "no-state"))
def test_cell_derivatives(mode: str, variant: dict[str, bool]) -> None:
    case = CellCase(mode, **variant)
    all_close(case(*case.tensors), case.expected(*case.tensors))
    assert gradcheck(case, case.tensors)
    assert gradgradcheck(case, case.tensors)


def test_truncated_second_derivative_in_full() -> None:
    case = Case("lstm", bptt_steps=2, bidirectional=True)
    assert gradgradcheck(case, case.tensors)


def test_third_derivative() -> None:
    case = Case("lstm", lengths=True)

    def second(*tensors: Tensor) -> Tensor:
        grads = torch.autograd.grad(smooth_loss(case(*tensors)), tensors, create_graph=True)
        return torch.stack([grad.square().sum() for grad in grads]).sum()

    assert gradgradcheck(second, case.tensors, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output", (0, 1))
def test_outputs_without_a_gradient(mode: str, output: int) -> None:
    case = Case(mode)
    all_close(
        torch.autograd.grad(case(*case.tensors)[output].sin().sum(), case.tensors),
        torch.autograd.grad(case.expected(*case.tensors)[output].sin().sum(), case.tensors),
    )


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_needed_gets_a_gradient(mode: str) -> None:
    case = Case(mode, bidirectional=True)
    for i, wanted in enumerate(case.tensors):
        tensors = [t.detach().requires_grad_(t is wanted) for t in case.tensors]
        got = torch.autograd.grad(loss(case(*tensors)), tensors[i], create_graph=True)
        expected = torch.autograd.grad(loss(case.expected(*tensors)), tensors[i], create_graph=True)
        all_close(got, expected)
        if got[0].requires_grad:
            second, expected_second = (torch.autograd.grad(g[0].sin().sum(), tensors[i]) for g in (got, expected))
            all_close(second, expected_second)


# vmap and functorch


def per_sample_grads(case: Any, run: Callable[..., tuple[Tensor, ...]], n: int) -> tuple[Any, Any]:
    """vmap(grad) over n inputs and states, and the same by a loop over the reference."""
    tensors = [t.detach() for t in case.tensors]
    batched = 1 + case.states
    inputs = [torch.randn(n, *t.shape, dtype=t.dtype) for t in tensors[:batched]]
    names = tuple(range(len(tensors)))

    def objective(*args: Tensor) -> Tensor:
        return loss(run(*args))

    in_dims = (*(0 for _ in inputs), *(None for _ in tensors[batched:]))
    got = torch.vmap(torch.func.grad(objective, argnums=names), in_dims)(*inputs, *tensors[batched:])
    each = []
    for i in range(n):
        leaves = [t.clone().requires_grad_() for t in (*(t[i] for t in inputs), *tensors[batched:])]
        each.append(torch.autograd.grad(loss(case.expected(*leaves)), leaves))
    return got, [torch.stack(grads) for grads in zip(*each, strict=True)]


@pytest.mark.parametrize("mode, variant", [case for case in cases() if "packed" not in case.id])
def test_per_sample_gradients(mode: str, variant: str) -> None:
    case = Case(mode, **VARIANTS[variant])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_close(*per_sample_grads(case, case, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias, state", ((True, True), (False, False)))
def test_per_sample_gradients_of_cells(mode: str, bias: bool, state: bool) -> None:
    case = CellCase(mode, bias, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_close(*per_sample_grads(case, case, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", (False, True))
def test_vmap_forward(mode: str, batch_first: bool) -> None:
    case = Case(mode, batch_first=batch_first, bidirectional=True)
    x, *rest = (t.detach() for t in case.tensors)
    xs = torch.randn(x.shape[0], 4, *x.shape[1:], dtype=x.dtype)
    got = torch.vmap(case, (1, *(None for _ in rest)), 0)(xs, *rest)
    alone = [case.expected(xs[:, i], *rest) for i in range(4)]
    all_close(got, [torch.stack(outs) for outs in zip(*alone, strict=True)])


def test_vmap_over_states_lengths_and_two_levels() -> None:
    case = Case("lstm", lengths=True, bidirectional=True)
    x, h0, c0, weights = case.split(tuple(t.detach() for t in case.tensors))
    lengths = torch.tensor([[1, 3], [2, 0], [3, 3]])
    got = torch.vmap(lambda n: sequence(case.cfg, SequenceInputs(x, h0, c0, None, None, n, weights)))(lengths)
    for i, n in enumerate(lengths):
        all_close([t[i] for t in got], reference.sequence("lstm", x, h0, c0, weights, None, n, True))
    hs = torch.randn(3, 2, *h0.shape, dtype=h0.dtype)  # type: ignore[union-attr]
    inner = torch.vmap(lambda h: sequence(case.cfg, SequenceInputs(x, h, c0, None, None, LENGTHS, weights)))
    got = torch.vmap(inner)(hs)
    all_close([t[2, 1] for t in got], reference.sequence("lstm", x, hs[2, 1], c0, weights, None, LENGTHS, True))


def test_vmap_in_vmap_of_grad() -> None:
    case = Case("gru", lengths=True, bidirectional=True)
    tensors = tuple(t.detach() for t in case.tensors)
    xs = torch.randn(2, 3, *tensors[0].shape, dtype=torch.float64)
    grad = torch.func.grad(lambda w, x: loss(case(x, tensors[1], w, *tensors[3:])))
    expected = torch.func.grad(lambda w, x: loss(case.expected(x, tensors[1], w, *tensors[3:])))
    got = torch.vmap(torch.vmap(grad, (None, 0)), (None, 0))(tensors[2], xs)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], expected(tensors[2], xs[i, j]))


@pytest.mark.parametrize("make", (Case, CellCase))
def test_vmap_over_weights_is_an_ensemble(make: Any) -> None:
    case = make("lstm")
    x, *rest = (t.detach() for t in case.tensors)
    many = [torch.stack([t, 2 * t, -t]) for t in rest]
    grad = torch.func.grad(lambda *ts: loss(case(*ts)), argnums=(0, len(rest)))
    got = torch.vmap(grad, (None, *(0 for _ in rest)))(x, *many)
    expected = torch.func.grad(lambda *ts: loss(case.expected(*ts)), argnums=(0, len(rest)))
    all_close(got, [torch.stack(g) for g in zip(*(expected(x, *(t[i] for t in many)) for i in range(3)), strict=True)])


@pytest.mark.parametrize("make", (Case, CellCase))
def test_derivatives_through_per_sample_gradients(make: Any) -> None:
    """grad(vmap(grad)), by functorch and by plain autograd outside: the gradient of gradient penalties."""
    case = make("gru")
    tensors = tuple(t.detach() for t in case.tensors)
    xs = torch.randn(3, *tensors[0].shape, dtype=torch.float64)

    def penalty(run: Any, w: Tensor) -> Tensor:
        inner = torch.func.grad(lambda w, x: smooth_loss(run(x, tensors[1], w, *tensors[3:])), argnums=(0, 1))
        per_sample = torch.vmap(inner, (None, 0))(w, xs)
        return torch.stack([g.square().sum() for g in per_sample]).sum()

    w = tensors[2]
    expected = torch.func.grad(lambda w: penalty(case.expected, w))(w)
    torch.testing.assert_close(torch.func.grad(lambda w: penalty(case, w))(w), expected)
    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(penalty(case, leaf), leaf)[0], expected)


@pytest.mark.parametrize("variant", ({}, {"bptt_steps": 1}, {"packed": True}), ids=("plain", "truncated", "packed"))
def test_jacrev_and_hessian(variant: dict[str, Any]) -> None:
    case = Case("lstm", **variant)
    x, *rest = (t.detach() for t in case.tensors)
    torch.testing.assert_close(
        torch.func.jacrev(lambda x: case(x, *rest)[0])(x), torch.func.jacrev(lambda x: case.expected(x, *rest)[0])(x)
    )
    if not variant:
        got = torch.func.jacrev(torch.func.grad(lambda x: smooth_loss(case(x, *rest))))(x)
        want = torch.func.jacrev(torch.func.grad(lambda x: smooth_loss(case.expected(x, *rest))))(x)
        torch.testing.assert_close(got, want)


def test_vjp_function_used_after_the_transform() -> None:
    case = Case("lstm")
    tensors = [t.detach() for t in case.tensors]
    outs, pull = torch.func.vjp(case, *tensors)
    expected_outs, expected_pull = torch.func.vjp(case.expected, *tensors)
    ones = tuple(torch.ones_like(out) for out in outs)
    all_close(outs, expected_outs)
    all_close(pull(ones), expected_pull(ones))


def test_packed_data_under_vmap_is_refused() -> None:
    case = Case("gru", packed=True)
    if not route(*case.tensors).native:
        pytest.skip("the reference maps over anything")
    x, *rest = case.tensors
    with pytest.raises(NotImplementedError, match="PackedSequence"):
        torch.vmap(case, (0, *(None for _ in rest)))(torch.stack([x, x]), *rest)


@pytest.mark.parametrize("make", (Case, CellCase))
def test_forward_mode_is_refused(make: Any) -> None:
    case = make("lstm")
    tensors = [t.detach() for t in case.tensors]
    if not route(*tensors).native:
        pytest.skip("the reference knows forward mode")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(case, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            case(dual, *tensors[1:])
        case(*tensors)


# torch.compile


def call(mode: str, x: Tensor, h: Tensor, weights: list[Tensor]) -> Tensor:
    if mode == "lstm":
        y, (h_n, c_n) = functional.lstm(x, (h, h), weights, num_layers=2, batch_first=True)
        return y.sin().sum() + h_n.cos().sum() + c_n.sum()
    y, h_n = functional.gru(x, h, weights, num_layers=2, batch_first=True)
    return y.sin().sum() + h_n.cos().sum()


def compile_arguments(mode: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    layer = (torch.nn.LSTM if mode == "lstm" else torch.nn.GRU)(I, H, 2, batch_first=True)
    return torch.randn(B, T, I), torch.randn(2, B, H), [w.detach() for w in layer._flat_weights]  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ("lstm", "gru"))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("training", (False, True))
def test_compiles_whole(mode: str, backend: str, training: bool) -> None:
    x, h, weights = compile_arguments(mode)
    leaves = [t.requires_grad_(training) for t in (x, h, *weights)]
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    got, expected = compiled(mode, x, h, weights), call(mode, x, h, weights)
    torch.testing.assert_close(got, expected)
    if training:
        all_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("training", (False, True))
def test_cell_compiles_whole(backend: str, training: bool) -> None:
    case = CellCase("lstm")
    leaves = [t.detach().requires_grad_(training) for t in case.tensors]

    def run(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        h, c = functional.lstm_cell(x, (h, c), *weights)
        return h.sin().sum() + c.cos().sum()

    got, expected = torch.compile(run, fullgraph=True, backend=backend)(*leaves), run(*leaves)
    torch.testing.assert_close(got, expected)
    if training:
        all_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("mapped", (False, True))
def test_compiled_functorch_gradients_are_right(backend: str, mapped: bool) -> None:
    """Dynamo drops a Function's own backward here, without a word: the values are what matters."""
    x, h, weights = compile_arguments("gru")

    def gradient(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.grad(lambda w, x: call("gru", x, h, [w, *weights[1:]]))(w, x)

    function = torch.vmap(gradient, (None, 0)) if mapped else gradient
    argument = torch.stack([x, -x, 2 * x]) if mapped else x
    expected = function(weights[0], argument)
    got = torch.compile(function, fullgraph=True, backend=backend)(weights[0], argument)
    torch.testing.assert_close(got, expected)
    leaf = weights[0].clone().requires_grad_()
    plain = torch.autograd.grad(call("gru", x, h, [leaf, *weights[1:]]), leaf)[0]
    torch.testing.assert_close(got[0] if mapped else got, plain)


def test_compiled_function_inside_a_transform() -> None:
    x, h, weights = compile_arguments("gru")

    def run(w: Tensor) -> Tensor:
        return call("gru", x, h, [w, *weights[1:]])

    compiled = torch.compile(run, backend="aot_eager")
    torch.testing.assert_close(torch.func.grad(compiled)(weights[0]), torch.func.grad(run)(weights[0]))


# routes


def test_routes() -> None:
    case = Case("lstm")
    with torch.no_grad():
        direct = route(*case.tensors)
    if not direct.native:
        assert "no compiled kernels" in direct.reason
        return
    assert direct.path == "op"
    assert route(*case.tensors).path == "eager"
    assert route(*(t.detach() for t in case.tensors), None).path == "op"
    seen = []

    def spy(x: Tensor) -> Tensor:
        seen.append(route(x, *case.tensors[1:]).path)
        return x.sum()

    torch.func.grad(spy)(case.tensors[0].detach())
    assert seen == ["function"]
    meta = route(torch.empty(1, device="meta"))
    assert meta.path == "reference" and "meta" in meta.reason
    assert "no kernel for torch.float8" in route(torch.empty(1, dtype=torch.float8_e4m3fn)).reason
