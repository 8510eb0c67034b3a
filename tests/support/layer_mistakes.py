"""Wrong values for each argument of the layers and cells; rnn/test_bad_input.py tests them all."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

import dlkernels

T, B, I, H, P, LAYERS = 5, 3, 4, 6, 2, 2


@dataclass(frozen=True)
class Mistake:
    """`call(package)` makes the wrong call with the classes of that package (torch.nn or dlkernels.nn)."""

    name: str
    call: Callable[[Any], Any]


def bad_values(good: Any) -> dict[str, Any]:
    """Returns wrong replacements of the tensor `good`: other objects, and tensors of a wrong shape, dtype or device."""
    values: dict[str, Any] = {
        "list": [[1.0]], "int": 3, "str": "x", "dict": {}, "tuple": (), "bool": True,
        "scalar": torch.tensor(1.0), "empty": torch.empty(0), "sparse": torch.zeros(good.shape).to_sparse(),
    }  # fmt: skip
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        values[str(dtype)] = torch.ones(good.shape, dtype=dtype)
    values["meta"] = torch.empty(good.shape, device="meta")
    values["rank + 1"] = good[None]
    values["rank + 2"] = good[None, None]
    if good.dim() > 1:
        values["rank - 1"] = good[0]
    for dim in range(good.dim()):
        values[f"size of dim {dim} + 1"] = good.new_zeros([n + (d == dim) for d, n in enumerate(good.shape)])
        values[f"size of dim {dim} = 0"] = good.new_zeros([n * (d != dim) for d, n in enumerate(good.shape)])
        values[f"size of dim {dim} = 1"] = good.new_zeros([1 if d == dim else n for d, n in enumerate(good.shape)])
    return values


# (class, arguments) of every layer that has its own code path.
LAYER_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": P, "bidirectional": True}),
    "gru": ("GRU", {"batch_first": True}),
    "rnn": ("RNN", {"bias": False}),
}


def good_state(kind: str, batch: int = B) -> Any:
    name, options = LAYER_KINDS[kind]
    states = LAYERS * (2 if options.get("bidirectional") else 1)
    h = torch.zeros(states, batch, options.get("proj_size", H))
    return (h, torch.zeros(states, batch, H)) if name == "LSTM" else h


def good_input(kind: str) -> torch.Tensor:
    return torch.zeros(B, T, I) if LAYER_KINDS[kind][1].get("batch_first") else torch.zeros(T, B, I)


def new_layer(package: Any, kind: str) -> torch.nn.Module:
    name, options = LAYER_KINDS[kind]
    return getattr(package, name)(I, H, LAYERS, **options)


def bad_states(good: Any) -> dict[str, Any]:
    if not isinstance(good, tuple):
        return {**bad_values(good), "pair": (good, good)}
    h, c = good
    values = {f"h: {name}": (bad, c) for name, bad in bad_values(h).items()}
    values |= {f"c: {name}": (h, bad) for name, bad in bad_values(c).items()}
    return {
        **values, "h alone": h, "one": (h,), "three": (h, c, c), "none": (), "h None": (None, c), "c None": (h, None),
        "int": 3, "str": "ab", "a stack": torch.stack([h, h]),
    }  # fmt: skip


def bad_packed(kind: str) -> dict[str, Any]:
    sizes = torch.tensor([3, 3, 2, 1, 1])
    data = torch.zeros(10, I)
    values: dict[str, Any] = {f"data: {name}": PackedSequence(bad, sizes) for name, bad in bad_values(data).items()
                              if isinstance(bad, torch.Tensor) and not name.startswith("size of dim 0")}  # fmt: skip
    values["batch_sizes too many"] = PackedSequence(data, torch.tensor([3, 3, 2, 2, 1]))
    values["batch_sizes empty"] = PackedSequence(data, torch.empty(0, dtype=torch.int64))
    values["batch_sizes float"] = PackedSequence(data, sizes.float())
    return values


def layer_mistakes(kind: str) -> Iterator[Mistake]:
    x, hx = good_input(kind), good_state(kind)
    for name, bad in [("None", None), *bad_values(x).items()]:
        yield Mistake(f"input {name}", lambda package, bad=bad: new_layer(package, kind)(bad))
        yield Mistake(f"input {name} with hx", lambda package, bad=bad: new_layer(package, kind)(bad, hx))
    for name, bad in bad_states(hx).items():
        yield Mistake(f"hx {name}", lambda package, bad=bad: new_layer(package, kind)(x, bad))
        packed = PackedSequence(torch.zeros(10, I), torch.tensor([3, 3, 2, 1, 1]))
        yield Mistake(
            f"packed, hx {name}", lambda package, bad=bad, packed=packed: new_layer(package, kind)(packed, bad)
        )
    unbatched = x[0] if LAYER_KINDS[kind][1].get("batch_first") else x[:, 0]
    state = good_state(kind, 1)
    state = tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]
    for name, bad in bad_values(unbatched).items():
        yield Mistake(f"unbatched input {name}", lambda package, bad=bad: new_layer(package, kind)(bad, state))
    for name, bad in bad_states(state).items():
        yield Mistake(f"unbatched, hx {name}", lambda package, bad=bad: new_layer(package, kind)(unbatched, bad))
    for name, bad in bad_packed(kind).items():
        yield Mistake(f"packed {name}", lambda package, bad=bad: new_layer(package, kind)(bad))
    yield Mistake("no input", lambda package: new_layer(package, kind)())
    yield Mistake("too many arguments", lambda package: new_layer(package, kind)(x, hx, None, None, None))
    yield Mistake("unknown argument", lambda package: new_layer(package, kind)(x, hidden=hx))


def constructor_mistakes(name: str) -> Iterator[Mistake]:
    cell = name.endswith("Cell")
    options: dict[str, list[Any]] = {
        "input_size": [-1, 2.5, "4", None, [4], torch.tensor(2.5)],
        "hidden_size": [-1, 2.5, "4", None, [4]],
        "bias": [] if cell else [0, 1, "True", None],
        "dtype": [torch.int64, "float32", 3],
        "device": ["nonsense", 3.5],
    }
    if not cell:
        options["input_size"] += [0]
        options["hidden_size"] += [0, True]
        options |= {
            "num_layers": [0, -1, 1.5, "2", None],
            "batch_first": [0, 1, "x", None],
            "dropout": [-0.1, 1.1, True, "a", None, float("nan")],
            "bidirectional": ["x", None, 2],
            "proj_size": [-1, H, H + 1, 1.5, "2"] if name == "LSTM" else [2, 0],
        }
    if name == "RNN":
        options["nonlinearity"] = ["sigmoid", None, 3, "TANH"]
    if name == "RNNCell":
        options["nonlinearity"] = ["sigmoid", None]
    for option, values in options.items():
        for value in values:
            arguments = {"input_size": I, "hidden_size": H, **({} if cell else {"num_layers": 2}), option: value}
            call = arguments.copy()

            def construct(package: Any, call: dict[str, Any] = call) -> None:
                # A cell rejects an unknown nonlinearity only when it is called.
                module = getattr(package, name)(**call)
                module(torch.zeros(2, 3, I) if not cell else torch.zeros(3, I))

            yield Mistake(f"{option}={value!r}", construct)
    yield Mistake("no arguments", lambda package: getattr(package, name)())
    yield Mistake("unknown argument", lambda package: getattr(package, name)(I, H, hidden=3))


def cell_mistakes(name: str) -> Iterator[Mistake]:
    x, h = torch.zeros(B, I), torch.zeros(B, H)
    state = (h, torch.zeros(B, H)) if name == "LSTMCell" else h
    for rank in (2, 1):
        own_x = x if rank == 2 else x[0]
        own_state = state if rank == 2 else tuple(s[0] for s in state) if isinstance(state, tuple) else state[0]
        for what, bad in [("None", None), *bad_values(own_x).items()]:
            yield Mistake(f"{rank}-D input {what}", lambda package, bad=bad: getattr(package, name)(I, H)(bad))
            yield Mistake(
                f"{rank}-D input {what} with hx",
                lambda package, bad=bad, own_state=own_state: getattr(package, name)(I, H)(bad, own_state),
            )
        for what, bad in bad_states(own_state).items():
            yield Mistake(
                f"{rank}-D input, hx {what}",
                lambda package, bad=bad, own_x=own_x: getattr(package, name)(I, H)(own_x, bad),
            )
    yield Mistake("no input", lambda package: getattr(package, name)(I, H)())
    yield Mistake("too many arguments", lambda package: getattr(package, name)(I, H)(x, state, None))


def weight_mistakes(module: str) -> Iterator[Mistake]:
    """Replaces each parameter by tensors of a wrong shape, dtype or device."""
    cell = module.endswith("Cell")
    names = (
        ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        if cell
        else ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    )
    x = torch.zeros(B, I) if cell else torch.zeros(T, B, I)
    for name in names:
        good = getattr(getattr(torch.nn, module)(I, H), name).detach()
        values: dict[str, Any] = {
            "rows + 1": torch.zeros(good.shape[0] + 1, *good.shape[1:]), "rank + 1": good[None],
            "scalar": torch.tensor(1.0), "empty": torch.empty(0), "float64": good.double(),
            "bfloat16": good.bfloat16(), "meta": good.to("meta"),
        }  # fmt: skip
        if good.dim() == 2:
            values["columns + 1"] = torch.zeros(good.shape[0], good.shape[1] + 1)
            values["rank - 1"] = good[0]
            values["columns = 0"] = good[:, :0]
        for what, bad in values.items():

            def replaced(package: Any, name: str = name, bad: torch.Tensor = bad) -> Any:
                layer = getattr(package, module)(I, H)
                setattr(layer, name, torch.nn.Parameter(bad))
                return layer(x)

            yield Mistake(f"{name} {what}", replaced)


CELLS = ("LSTMCell", "GRUCell", "RNNCell")
MODULES = ("LSTM", "GRU", "RNN", *CELLS)
GROUPS: dict[str, Callable[[], Iterator[Mistake]]] = {
    **{f"layer {kind}": lambda kind=kind: layer_mistakes(kind) for kind in LAYER_KINDS},
    **{f"cell {name}": lambda name=name: cell_mistakes(name) for name in CELLS},
    **{f"constructor {name}": lambda name=name: constructor_mistakes(name) for name in MODULES},
    **{f"weights {name}": lambda name=name: weight_mistakes(name) for name in MODULES},
}


def all_mistakes() -> Iterator[tuple[str, Mistake]]:
    for group, mistakes in GROUPS.items():
        for mistake in mistakes():
            yield group, mistake


def mistakes_for(package: str) -> Iterator[tuple[str, Mistake]]:
    """Yields wrong calls of torch.nn's interface or, with "own", of what only dlkernels has. "enabled" is torch.nn on
    our kernels."""
    if package == "own":
        from tests.support import extension_mistakes

        yield from extension_mistakes.all_mistakes()
    else:
        yield from all_mistakes()


def outcome_of(mistake: Mistake, module: Any) -> dict[str, Any]:
    try:
        mistake.call(module)
    except Exception as error:
        return {"bases": [base.__name__ for base in type(error).__mro__], "message": str(error)}
    return {}


def main(package: str) -> None:
    """Makes every wrong call and prints a line of JSON for each. torch's own layers crash on some, so a child process
    makes the calls; after a crash a new child continues with the next call."""
    if package == "enabled":
        dlkernels.enable()
    module = importlib.import_module({"own": "dlkernels.nn", "enabled": "torch.nn"}.get(package, package))
    warnings.simplefilter("ignore")
    mistakes = list(mistakes_for(package))
    at = multiprocessing.RawValue("l", 0)
    while at.value < len(mistakes):
        child = os.fork()
        if child == 0:
            while at.value < len(mistakes):
                group, mistake = mistakes[at.value]
                print(json.dumps({"group": group, "name": mistake.name, **outcome_of(mistake, module)}), flush=True)
                at.value += 1
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if at.value < len(mistakes):
            group, mistake = mistakes[at.value]
            print(json.dumps({"group": group, "name": mistake.name, "crash": status}), flush=True)
            at.value += 1


if __name__ == "__main__":
    main(sys.argv[1])
