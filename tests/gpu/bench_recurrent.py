"""Microseconds a step of the recurrent layers, by every plan that a call can have, beside torch.nn's, which are
cuDNN's, and beside the predictions of tests/cuda/predict.py. check.py runs this file.

A step costs about a microsecond, less than Python takes to queue a call, so CUDA graphs are replayed. A time is that of
the whole layer divided by its steps. For the forward the input product, which is measured alone, is subtracted: what is
left is the recurrence, which is what predict.py predicts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device import KINDS, best_plan, plan_of
from journal import Result, run_cases, why
from timing import DEVICE, REHEARSAL, context_broken, host_microseconds, microseconds
from torch.nn.utils.rnn import pack_padded_sequence

import dlkernels

sys.path.append(str(Path(__file__).resolve().parents[1] / "cuda"))
from predict import predict

T = 4 if REHEARSAL else 128
HIDDEN = (16,) if REHEARSAL else (512, 256, 1024, 128, 768, 2048)
BATCHES = (2,) if REHEARSAL else (64, 16, 1, 128)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
STEPS_OF_REFERENCE = 128 * 16  # B * T up to which the reference path, which runs step by step, is timed
_CUDNN: dict[tuple[Any, ...], Result] = {}


def name_of(kind: str) -> str:
    return {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[kind]


def inputs(dtype: torch.dtype, batch: int, hidden: int, packed: bool) -> Any:
    x = torch.randn(T, batch, hidden, device=DEVICE, dtype=dtype, requires_grad=True)
    if not packed:
        return x
    # Evenly spaced lengths from T down to T / 4, which are 0.625 of the tokens of a padded case.
    given = pack_padded_sequence(x, torch.linspace(T, max(1, T // 4), batch).long())
    return given._replace(data=given.data.detach().requires_grad_())


def calls(layer: Any, given: Any) -> dict[str, Callable[[], Any]]:
    x = given if isinstance(given, torch.Tensor) else given.data
    leaves = [x, *layer.parameters()]

    def output() -> Any:
        y = layer(given)[0]
        return y if isinstance(y, torch.Tensor) else y.data

    def forward() -> Any:
        with torch.no_grad():
            return output()

    gradient = torch.randn_like(forward())
    return {"forward": forward, "training": lambda: torch.autograd.grad(output(), leaves, gradient)}


def timed(layer: Any, given: Any) -> Result:
    found: Result = {}
    for what, call in calls(layer, given).items():
        one = microseconds(call)
        found[what] = {"us_per_step": one["us"] / T, "spread": one["spread_us"] / T, "method": one["method"]}
    return found


def input_product(layer: Any, given: Any) -> float | None:
    """Microseconds a step of the input product alone, which is torch's, with sums and results of float32."""
    x = (given if isinstance(given, torch.Tensor) else given.data).detach().flatten(0, -2)
    w = layer.weight_ih_l0.detach().t()
    more = {} if x.dtype == torch.float32 or REHEARSAL else {"out_dtype": torch.float32}
    try:
        return float(microseconds(lambda: torch.mm(x, w, **more))["us"]) / T
    except Exception:
        return None


def prediction(plan: Result, mode: str, dtype: str, batch: int, hidden: int) -> float | None:
    """Microseconds of a step of a forward without gradients. predict.py knows 16-bit layers."""
    if dtype == "float32" or mode == "rnn_relu":
        return None
    return predict(plan, mode, batch, hidden, training=False)["seconds"] * 1e6


def judged(forward: Result, product: float | None, predicted: float | None) -> None:
    """Puts the prediction beside the measurement and marks one that is off by more than a third."""
    forward |= {"input_product": product, "predicted": predicted}
    if product is None or predicted is None:
        return
    forward["recurrence"] = forward["us_per_step"] - product
    forward["off_by_more_than_a_third"] = abs(forward["recurrence"] - predicted) > predicted / 3


def difference(peer: Any, mine: Any, given: Any) -> float:
    with torch.no_grad():
        a, b = (layer(given)[0] for layer in (peer, mine))
    a, b = (y if isinstance(y, torch.Tensor) else y.data for y in (a, b))
    return float((a.float() - b.float()).abs().max())


def case(kind: str, dtype: str, batch: int, hidden: int, best: str, packed: bool = False, tf32: bool = False) -> Result:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    mode = name_of(kind)
    given = inputs(DTYPES[dtype], batch, hidden, packed)
    peer = getattr(torch.nn, kind)(hidden, hidden, device=DEVICE, dtype=DTYPES[dtype])
    mine = getattr(dlkernels.nn, kind)(hidden, hidden, device=DEVICE, dtype=DTYPES[dtype])
    mine.load_state_dict(peer.state_dict())
    shape = (kind, dtype, batch, hidden, packed, tf32)
    with best_plan(best):
        plan = plan_of(mode, DTYPES[dtype], T, batch, hidden, 1)
        row: Result = {
            "layer": kind, "dtype": f"{dtype}-tf32" if tf32 else dtype, "B": batch, "T": T, "I": hidden, "H": hidden,
            "form": "packed" if packed else "padded", "plan": plan["kind"], "blocks": plan["blocks"],
        }  # fmt: skip
        if plan["kind"] != best:
            return row | {"left_out": f"{best} is not possible: {plan['reason']}"}
        row["backward_plan"] = plan_of(mode, DTYPES[dtype], T, batch, hidden, 1, backward=True)["kind"]
        if shape not in _CUDNN:
            try:
                _CUDNN[shape] = timed(peer, given)
            except Exception as error:  # cuDNN may refuse a call; ours is still measured
                if context_broken():
                    raise
                _CUDNN[shape] = {"not_run": why(error)}
        row["cudnn"] = _CUDNN[shape]
        explained = dlkernels.explain(mine, given).layers[0]
        row["path"] = explained.path
        if explained.path == "reference" and batch * T > STEPS_OF_REFERENCE:
            return row | {"left_out": f"the reference path, step by step: {explained.reason}"}
        row |= timed(mine, given)
        product = input_product(mine, given)
        judged(row["forward"], product, None if packed else prediction(plan, mode, dtype, batch, hidden))
        for what in ("forward", "training") if "forward" in row["cudnn"] else ():
            row[f"{what}_speedup"] = row["cudnn"][what]["us_per_step"] / row[what]["us_per_step"]
        row["largest_difference"] = difference(peer, mine, given)
    return row


def host(kind: str) -> Result:
    """What a call of a small layer takes on the host, which bounds short sequences."""
    row: Result = {"layer": kind, "host_us": {}}
    for name, package in (("cudnn", torch.nn), ("dlkernels", dlkernels.nn)):
        layer = getattr(package, kind)(32, 32, device=DEVICE, dtype=torch.bfloat16)
        x = torch.randn(1, 4, 32, device=DEVICE, dtype=torch.bfloat16)
        try:
            with torch.no_grad():
                row["host_us"][name] = host_microseconds(lambda layer=layer, x=x: layer(x))
        except Exception as error:  # cuDNN may refuse; ours must not
            row["host_us"][name] = why(error)
            if name == "dlkernels":
                raise
    return row


def cases() -> list[tuple[str, Callable[[], Result]]]:
    found: list[tuple[str, Callable[[], Result]]] = []

    def add(kind: str, dtype: str, batch: int, hidden: int, best: str, **more: bool) -> None:
        key = " ".join([kind, dtype, f"B{batch}", f"H{hidden}", best, *(name for name, on in more.items() if on)])
        found.append((key, functools.partial(case, kind, dtype, batch, hidden, best, **more)))

    kinds = KINDS[:1] if REHEARSAL else KINDS
    for hidden in HIDDEN:
        for batch in BATCHES:
            for layer in ("LSTM", "GRU"):
                for best in kinds:
                    add(layer, "bfloat16", batch, hidden, best)
    found += [(f"host {layer}", functools.partial(host, layer)) for layer in ("LSTM", "GRU")]
    middle, batch = HIDDEN[: 1 if REHEARSAL else 3], BATCHES[0]
    for hidden in middle:
        for best in kinds:
            add("LSTM", "float32", batch, hidden, best)
        add("LSTM", "float32", batch, hidden, KINDS[0], tf32=True)
        add("RNN", "bfloat16", batch, hidden, KINDS[0])
        add("LSTM", "float16", batch, hidden, KINDS[0])
        add("GRU", "bfloat16", batch, hidden, KINDS[0], packed=True)
    for small in () if REHEARSAL else (1, 16):
        add("LSTM", "float32", small, HIDDEN[0], KINDS[0])
    return found


if __name__ == "__main__":
    sys.exit(run_cases(cases(), context_broken))
