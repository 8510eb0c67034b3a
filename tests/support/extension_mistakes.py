"""Wrong arguments of functions that torch.nn lacks. A group is called "argument of function", and the message of the
error must name the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels
import dlkernels.nn
from dlkernels import functional
from tests.support.layer_mistakes import LAYER_KINDS, B, H, I, Mistake, P, T, bad_values, good_input, new_layer
from tests.support.rnn_op_calls import Call, op

GOOD_LENGTHS = torch.tensor([5, 3, 1])
BAD_LENGTHS: dict[str, Any] = {
    "list": [5, 3, 1], "tuple": (5, 3, 1), "int": 5, "str": "abc", "float": torch.tensor([5.0, 3.0, 1.0]),
    "bool": torch.tensor([True, True, True]), "complex": torch.ones(B, dtype=torch.complex64),
    "rank 0": torch.tensor(5), "rank 2": torch.tensor([[5, 3, 1]]), "too few": torch.tensor([5, 3]),
    "too many": torch.tensor([5, 3, 1, 1]), "empty": torch.empty(0, dtype=torch.int64),
    "negative": torch.tensor([5, -1, 1]), "most negative": torch.tensor([5, -(2**63), 1]),
    "beyond T": torch.tensor([5, T + 1, 1]), "far beyond T": torch.tensor([5, 2**62, 1]),
    "wraps in 32 bits": torch.tensor([5, 2**32 + 2, 1]),
}  # fmt: skip
BAD_STEPS: dict[str, Any] = {
    "-1": -1, "-2**40": -(2**40), "1.5": 1.5, "2.0": 2.0, "str": "2", "list": [2],
    "tensor of floats": torch.tensor(2.5),
}  # fmt: skip
BAD_BATCH_SIZES: dict[str, Any] = {
    "list": [3, 3, 2, 1, 1], "int": 3, "float": torch.tensor([3.0, 3.0, 2.0, 1.0, 1.0]),
    "int32": torch.tensor([3, 3, 2, 1, 1], dtype=torch.int32), "rank 0": torch.tensor(10),
    "rank 2": torch.tensor([[3, 3, 2, 1, 1]]), "ascending": torch.tensor([1, 1, 2, 3, 3]),
    "sum too small": torch.tensor([3, 3, 2, 1]), "sum too large": torch.tensor([3, 3, 3, 1, 1]),
    "negative": torch.tensor([12, -1, -1]), "zero inside": torch.tensor([5, 5, 0]),
    "overflows": torch.tensor([2**62, 2**62, 2**62, 2**62]),
}  # fmt: skip

Group = Iterator[tuple[str, Mistake]]


def calls(group: str, values: dict[str, Any], call: Callable[[Any], Any]) -> Group:
    for name, bad in values.items():
        for grad in (True, False):

            def run(package: Any, bad: Any = bad, grad: bool = grad) -> None:
                with torch.set_grad_enabled(grad):
                    call(bad)

            yield group, Mistake(f"{name}{'' if grad else ', no_grad'}", run)


def layer_options() -> Group:
    for kind in LAYER_KINDS:
        x, layer = good_input(kind), new_layer(dlkernels.nn, kind)
        packed = pack_padded_sequence(x, GOOD_LENGTHS, LAYER_KINDS[kind][1].get("batch_first", False))
        yield from calls(f"lengths of {kind}", BAD_LENGTHS, lambda bad, layer=layer, x=x: layer(x, lengths=bad))
        twice = {"with a PackedSequence": packed, "unbatched": x[0]}
        yield from calls(f"lengths of {kind}", twice, lambda bad, layer=layer: layer(bad, lengths=GOOD_LENGTHS[:1]))
        yield from calls(f"bptt_steps of {kind}", BAD_STEPS, lambda bad, layer=layer, x=x: layer(x, bptt_steps=bad))


def functional_options() -> Group:
    x, rows = torch.zeros(T, B, I), torch.zeros(10, I)
    for name in ("lstm", "gru", "rnn"):
        call = getattr(functional, name)
        weights = list(getattr(torch.nn, name.upper())(I, H, 2).parameters())
        group = f"of functional.{name}"

        def run(x: Any = x, hx: Any = None, w: Any = weights, call: Any = call, **options: Any) -> Any:
            return call(x, hx, w, **{"num_layers": 2, **options})

        yield from calls(f"lengths {group}", BAD_LENGTHS, lambda bad, run=run: run(lengths=bad))
        yield from calls(f"bptt_steps {group}", BAD_STEPS, lambda bad, run=run: run(bptt_steps=bad))
        yield from calls(f"batch_sizes {group}", BAD_BATCH_SIZES, lambda bad, run=run: run(rows, batch_sizes=bad))
        not_tensors = {"None": None, "list": [1.0], "int": 3, "str": "x"}
        yield from calls(f"input {group}", not_tensors, lambda bad, run=run: run(bad))
        lists: dict[str, Any] = {
            "None": None, "int": 3, "tensor": weights[0], "empty": [], "one short": weights[:-1],
            "one too many": [*weights, weights[0]], "holds None": [None, *weights[1:]],
            "holds a list": [[1.0], *weights[1:]],
        }  # fmt: skip
        yield from calls(f"weights {group}", lists, lambda bad, run=run: run(w=bad))
        shapes = {
            f"{at}: {what}": [*weights[:at], bad, *weights[at + 1 :]]
            for at in range(8) for what, bad in bad_values(weights[at].detach()).items()
            if isinstance(bad, torch.Tensor) and bad.dtype == torch.float32 and bad.layout == torch.strided
            and bad.device.type == "cpu" and not (at == 0 and "dim 1" in what)  # the message may blame the input
        }  # fmt: skip
        yield from calls(f"w {group}", shapes, lambda bad, run=run: run(w=bad))
        layers = {"0": 0, "-1": -1, "3": 3, "1.5": 1.5, "None": None, "str": "2"}
        yield from calls(f"layers {group}", layers, lambda bad, run=run: run(num_layers=bad))
        chances = {"-0.1": -0.1, "1.1": 1.1, "str": "a"}
        yield from calls(f"dropout {group}", chances, lambda bad, run=run: run(dropout=bad, training=True))
        buffers: dict[str, Any] = {
            "floats": [torch.zeros(64)] * 2, "zeros": [torch.zeros(4096, dtype=torch.uint8)] * 2,
            "too few": [torch.zeros(8, dtype=torch.uint8)],
        }  # fmt: skip
        yield from calls(f"pack {group}", buffers, lambda bad, run=run: run(packed=bad))
    tanh = {"sigmoid": "sigmoid", "None": None, "int": 3}
    w = list(torch.nn.RNN(I, H).parameters())
    yield from calls("nonlinearity of functional.rnn", tanh, lambda bad: functional.rnn(x, None, w, nonlinearity=bad))
    w = list(torch.nn.RNNCell(I, H).parameters())
    yield from calls(
        "nonlinearity of functional.rnn_cell", tanh, lambda bad: functional.rnn_cell(x[0], None, *w, nonlinearity=bad)
    )


def cells() -> Group:
    x, h = torch.zeros(B, I), torch.zeros(B, H)
    for name in ("lstm", "gru", "rnn"):
        call = getattr(functional, f"{name}_cell")
        weights = [p.detach() for p in getattr(torch.nn, f"{name.upper()}Cell")(I, H).parameters()]
        hx = (h, h) if name == "lstm" else h
        arguments = {"input": x, "w_ih": weights[0], "w_hh": weights[1], "b_ih": weights[2], "b_hh": weights[3]}
        for at, (argument, good) in enumerate(arguments.items()):
            bad_ones = {what: bad for what, bad in bad_values(good).items() if what not in ("sparse", "meta")}
            if argument == "input":  # x[0] is a valid unbatched input, only hx does not fit it
                bad_ones = {what: bad for what, bad in bad_ones.items() if what != "rank - 1"}

            def replaced(bad: Any, at: int = at, call: Any = call, weights: Any = weights, hx: Any = hx) -> Any:
                args: list[Any] = [x, hx, *weights]
                args[at if at == 0 else at + 1] = bad
                return call(*args)

            # The message follows torch's here, so the test only asks for a clean error ("*" in the name of the group).
            yield from calls(f"* {argument} of functional.{name}_cell", bad_ones, replaced)


def tools() -> Group:
    layer, x = dlkernels.nn.LSTM(I, H, proj_size=P), torch.zeros(T, B, I)
    not_modules = {"None": None, "int": 3, "str": "x", "class": torch.nn.LSTM, "list": [torch.nn.LSTM(I, H)]}
    yield from calls("patch of dlkernels", not_modules, lambda bad: dlkernels.patch(bad))
    yield from calls("patch of dlkernels.unpatch", not_modules, lambda bad: dlkernels.unpatch(bad))
    other = {**not_modules, "Linear": torch.nn.Linear(3, 4)}
    yield from calls("explain of dlkernels, layer", other, lambda bad: dlkernels.explain(bad, x))
    inputs = {"None": None, "list": [1.0], "rank 4": x[None], "rank 0": torch.tensor(1.0), "str": "x"}
    yield from calls("explain of dlkernels, input", inputs, lambda bad: dlkernels.explain(layer, bad))


def operators() -> Group:
    """Calls the operators directly, without the checks in Python. Some of these calls are valid by chance; none may
    crash."""
    for mode in ("lstm", "gru", "rnn_relu"):
        for layout in ("padded", "lengths", "packed_h0"):
            call = Call(mode, P if mode == "lstm" else 0, True, layout)
            for name, arguments in ((mode, call.args), (f"{mode}_backward", call.backward_args())):
                yield from operator_mistakes(name, layout, arguments)


def operator_mistakes(name: str, layout: str, arguments: dict[str, Any]) -> Group:
    def run(changes: dict[str, Any]) -> Any:
        return op(name)(**{**arguments, **changes})

    run({})
    changes: dict[str, Any] = {}
    for argument, good in arguments.items():
        if isinstance(good, torch.Tensor):
            bad_ones = {**bad_values(good), "None": None}
            changes |= {f"{argument} {what}": {argument: bad} for what, bad in bad_ones.items()}
        elif argument == "weights":
            for at, weight in enumerate(good):
                for what, bad in bad_values(weight).items():
                    changes[f"weight {at} {what}"] = {"weights": [*good[:at], bad, *good[at + 1 :]]}
            changes |= {f"{count} weights": {"weights": good[:count]} for count in range(len(good))}
        elif isinstance(good, bool):
            changes[f"not {argument}"] = {argument: not good}
    extremes = {"lengths": [2**62, -1, 5], "batch_sizes": [2**62, 2**62, 1]}
    changes |= {f"{key} of extremes": {key: torch.tensor(values)} for key, values in extremes.items()}
    yield from calls(f"! {name}, {layout}", changes, run)


def all_mistakes() -> Group:
    for part in (layer_options, functional_options, cells, tools, operators):
        yield from part()
