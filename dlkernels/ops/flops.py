"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: the matrix products that torch's own consist
of, two floating-point operations for each multiply-add. Elementwise work is not counted, as it never is there; padding
and masked scores are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["register_attention", "register_layers"]

Formula = Callable[..., int]

COUNTER = "torch.utils.flop_counter"


def register_layers(modes: Iterable[str]) -> None:
    """Formulas of the recurrent operators, from the moment that somebody imports torch's counter."""
    of_suffix: dict[str, Formula] = {
        "": _sequence,
        "_backward": _sequence_backward,
        "_cell": _cell,
        "_cell_backward": _cell_backward,
    }
    _once_counted({mode + suffix: formula for mode in modes for suffix, formula in of_suffix.items()})


def register_attention() -> None:
    """Formulas of attention's operators, likewise."""
    _once_counted({"attention": _attention, "attention_backward": _backward, "attention_map": _map})


def _once_counted(formulas: dict[str, Formula]) -> None:
    def register() -> None:
        for name, formula in formulas.items():
            _register(name, formula)

    if COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport(MetaPathFinder):
    """Runs `action` once the counter has been imported. The package does not import it: the counter imports triton,
    which takes longer than all of this package."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(name: str, formula: Formula) -> None:
    """`formula` takes the arguments of dlkernels::`name` by name, those that it does not want in `others`."""
    flop_counter = sys.modules[COUNTER]
    packet = getattr(torch.ops.dlkernels, name)
    names = [argument.name for argument in packet.default._schema.arguments]

    def by_name(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(**dict(zip(names, args, strict=False)), **kwargs)

    if packet not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(packet, get_raw=True)(by_name)


def _per_row(weights: Sequence[Tensor]) -> tuple[int, int]:
    """Multiply-adds per row of one direction: with the input, and with the state (its projection included)."""
    w_ih, w_hh = weights[0], weights[1]
    projection = weights[-1].numel() if len(weights) % 2 else 0
    return w_ih.numel(), w_hh.numel() + projection


def _rows(x: Tensor) -> int:
    """Steps x sequences; of packed input the valid ones."""
    return x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]


def _sequence(x: Tensor, weights: Sequence[Tensor], bidirectional: bool, **others: Any) -> int:
    directions = 2 if bidirectional else 1
    return 2 * _rows(x) * directions * sum(_per_row(weights[: len(weights) // directions]))


def _sequence_backward(
    x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None, bidirectional: bool,
    batch_first: bool, need_x: bool, need_state: bool, need_weights: bool, **others: Any,
) -> int:  # fmt: skip
    directions = 2 if bidirectional else 1
    with_input, with_state = _per_row(weights[: len(weights) // directions])
    rows = _rows(x)
    products = rows * directions * (with_input * (need_x + need_weights) + with_state * (1 + need_weights))
    if not (need_state and h0 is not None):
        # Nobody wants the gradient of the first step's state.
        products -= weights[1].numel() * sum(_first_rows(x, batch_sizes, batch_first)[:directions])
    return 2 * products


def _first_rows(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[int, int]:
    """The sequences of the first step, forward and in reverse."""
    if batch_sizes is None:
        batch = x.shape[0 if batch_first else 1]
        return batch, batch
    if isinstance(batch_sizes, FakeTensor) or batch_sizes.is_meta:
        return 0, 0
    return int(batch_sizes[0]), int(batch_sizes[-1])


def _cell(x: Tensor, w_ih: Tensor, w_hh: Tensor, **others: Any) -> int:
    return 2 * x.shape[0] * (w_ih.numel() + w_hh.numel())


def _cell_backward(
    x: Tensor, h: Tensor | None, w_ih: Tensor, w_hh: Tensor, need_x: bool, need_state: bool, need_weights: bool,
    **others: Any,
) -> int:  # fmt: skip
    of_state = need_state and h is not None
    return 2 * x.shape[0] * (w_ih.numel() * (need_x + need_weights) + w_hh.numel() * (of_state + need_weights))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, **others: Any,
) -> int:  # fmt: skip
    shapes = _shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return sum(sys.modules[COUNTER].sdpa_flop_count(*of_each) for of_each in shapes)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, **others: Any,
) -> int:  # fmt: skip
    shapes = _shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    count = sys.modules[COUNTER].sdpa_backward_flop_count
    return sum(count((*of_q[:3], of_v[3]), of_q, of_k, of_v) for of_q, of_k, of_v in shapes)


def _map(q: Tensor, k: Tensor, **others: Any) -> int:
    return 2 * q.numel() * k.shape[2]


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
) -> list[tuple[tuple[int, ...], ...]]:
    """[batch, heads, rows, width] of q, k and v; packed ones for each sequence."""
    if cu_q is None or cu_k is None:
        return [(tuple(q.shape), tuple(k.shape), tuple(v.shape))]
    lengths = zip(_lengths(cu_q, max_q), _lengths(cu_k, max_k), strict=True)
    return [
        ((1, q.shape[1], m, q.shape[2]), (1, k.shape[1], n, k.shape[2]), (1, v.shape[1], n, v.shape[2]))
        for m, n in lengths
    ]


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """What has no values is taken to be as long as can be, as torch takes its own."""
    if isinstance(cu_seqlens, FakeTensor) or cu_seqlens.is_meta:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()
