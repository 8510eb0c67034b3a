"""The operators of a single step: their arguments, fakes and autograd; the structure is that of `sequence.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import batching, extension, legacy
from dlkernels._core.dtypes import compute_dtype
from dlkernels._core.gradients import differentiate, private
from dlkernels._core.private_torch import (
    are_transforms_active,
    cpp_apply,
    forward_ad,
    is_any_autocast_enabled,
    is_tracing,
    unwrap_dead_wrapper,
    unwrap_dead_wrappers,
)
from dlkernels._core.routing import announce
from dlkernels.rnn import flops, records
from dlkernels.rnn.dtypes import dtype_of
from dlkernels.rnn.kinds import KINDS, Kind
from dlkernels.rnn.operators import by_torch, direct, overloads, per_sample
from dlkernels.rnn.operators.arguments import CellConfig, CellInputs, Wanted
from dlkernels.rnn.operators.formulas import cell_gradients, run_cell
from dlkernels.rnn.routing import route

__all__ = ["cell", "plain_cell"]

_is_grad_enabled = torch.is_grad_enabled
_is_deterministic = torch.are_deterministic_algorithms_enabled


def _forward(cfg: CellConfig, given: Sequence[Any], save: bool) -> list[Tensor]:
    """[h'], followed by c' if there is a cell state and by `saved` [B, `records.size`] if `save`. Here and below,
    `given` holds the fields of CellInputs."""
    return _operators[cfg.mode](*given, save, cfg.deterministic, *cfg.types)  # type: ignore[no-any-return]


def _backward(
    cfg: CellConfig, wanted: Wanted, cotangents: Sequence[Tensor | None], given: Sequence[Any], saved: Tensor
) -> list[Tensor]:
    """[dx, dh, dc, dw_ih, dw_hh, db_ih, db_hh] from cotangents = (dh', dc'), followed by dgates [B, `Kind.gate_grads`,
    H] if there are groups."""
    return _backward_operators[cfg.mode](  # type: ignore[no-any-return]
        *cotangents, *given, saved, cfg.deterministic, *wanted.flags, cfg.types.product
    )


def _fake(
    kind: Kind, x: Tensor, w_hh: Tensor, save: bool, product_dtype: int = -1, h_dtype: int = -1, c_dtype: int = -1,
    **others: Any,
) -> list[Tensor]:  # fmt: skip
    B, H = x.shape[0], w_hh.shape[1]
    results = [x.new_empty((B, H), dtype=dtype_of(h_dtype, x))]
    if kind.has_cell_state:
        results.append(x.new_empty((B, H), dtype=dtype_of(c_dtype, x)))
    if save:
        record = records.size(kind, H, 0, dtype_of(product_dtype, x), x.device, one_step=True)
        results.append(x.new_empty((B, record), dtype=compute_dtype(x.dtype)))
    return results


def _backward_fake(
    kind: Kind, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, need_x: bool, need_state: bool, need_weights: bool, gate_grads: bool, **others: Any,
) -> list[Tensor]:  # fmt: skip
    state = (x.shape[0], w_hh.shape[1])
    grads = [
        x.new_empty(x.shape if need_x else (0,)),
        (x if h is None else h).new_empty(state if need_state else (0,)),
        (x if c is None else c).new_empty(state if need_state and kind.has_cell_state else (0,)),
        *(w_ih.new_empty(w.shape if need_weights and w is not None else (0,)) for w in (w_ih, w_hh, b_ih, b_hh)),
    ]
    if gate_grads:
        slots = (x.shape[0], len(kind.gate_grads), w_hh.shape[1])
        grads.append(x.new_empty(slots, dtype=compute_dtype(x.dtype)))
    return grads


_operators = overloads("_cell", _fake, flops.cell)
_backward_operators = overloads("_cell_backward", _backward_fake, flops.cell_backward)


def cell(cfg: CellConfig, given: CellInputs) -> tuple[Tensor, ...] | list[Tensor]:
    """Runs one step and returns h', then c' for the lstm; what follows these is for the backward."""
    decided = route(*given)
    path = decided.path
    if path == "op":
        return _forward(cfg, given, False)
    if path == "reference":
        announce(decided)
        new_h, new_c = run_cell(cfg, *given)
        return (new_h,) if new_c is None else (new_h, new_c)
    if path == "eager":
        return _apply(cfg, *unwrap_dead_wrappers(given))  # type: ignore[no-any-return]
    return Cell.apply(cfg, *private(given, first_weight=3))  # type: ignore[no-any-return, no-untyped-call]


class Cell(torch.autograd.Function):
    """(cfg, x, h, c, w_ih, w_hh, b_ih, b_hh) -> (h', [c' if lstm], saved)."""

    @staticmethod
    def forward(cfg: CellConfig, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(cfg, tensors, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # h' and c' are not saved, because the caller may edit them; `saved` has what the backward needs of them.
        cfg, *tensors = inputs
        saved = output[-1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        ctx.save_for_backward(*tensors, saved)
        ctx.cfg = cfg

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        dc = others[0] if KINDS[ctx.cfg.mode].has_cell_state else None
        if dh is None and dc is None:
            return (None,) * len(needs)
        wanted = Wanted(needs[1], needs[2] or needs[3], any(needs[4:]))
        args = (ctx.cfg, wanted, dh, dc, *ctx.saved_tensors)
        grads = legacy.run_backward(CellBackward, (dh, dc), args, _apply_backward)
        return (None, *(grad if need else None for grad, need in zip(grads, needs[1:], strict=True)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, x, h, c, *weights) = info.batch_size, args
        _, x_dim, h_dim, c_dim, *weight_dims = in_dims
        if batching.is_mapped(weight_dims):
            return batching.each_sample(Cell.apply, n, (None, *in_dims[1:]), args)
        outputs = Cell.apply(  # type: ignore[no-untyped-call]
            cfg, batching.fold(x, x_dim, 0, n), batching.fold(h, h_dim, 0, n), batching.fold(c, c_dim, 0, n), *weights
        )
        return batching.unfold_all(outputs, (0,) * len(outputs), n)


class CellBackward(torch.autograd.Function):
    """(cfg, wanted, dh', dc', x, h, c, w_ih, w_hh, b_ih, b_hh, saved) -> the gradients of x to b_hh.

    Gradients that are not wanted are returned empty.
    """

    @staticmethod
    def forward(
        cfg: CellConfig, wanted: Wanted, dh: Tensor | None, dc: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:  # fmt: skip
        *given, saved = tensors
        grads = _backward(cfg, wanted, (dh, dc), given, saved)
        if not wanted.groups:
            return tuple(grads)
        return (*grads[:3], *per_sample.cell_weight_grads(cfg.mode, wanted.groups, CellInputs(*given), grads[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cfg, wanted, *tensors = inputs
        _, _, _, h, c, _, _, b_ih, *_ = tensors
        given = (
            wanted.x, wanted.state and h is not None, wanted.state and c is not None, wanted.weights, wanted.weights,
            wanted.weights and b_ih is not None, wanted.weights and b_ih is not None,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(grad for grad, want in zip(output, given, strict=True) if not want))
        ctx.save_for_backward(*tensors[:9])
        ctx.cfg, ctx.groups = cfg, wanted.groups

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(needs)
        cfg, groups = ctx.cfg, ctx.groups

        def gradients(*tensors: Tensor | None) -> list[Tensor | None]:
            if groups:
                return _grouped_gradients(cfg, groups, tensors[:2], tensors[2:])
            return cell_gradients(cfg, tensors[:2], tensors[2:])

        tensors = ctx.saved_tensors
        grads = legacy.differentiate(lambda *given: differentiate(gradients, tensors, needs[2:11], given), cotangents)
        return (None, None, *grads, None)

    @staticmethod
    def by_reference(
        cfg: CellConfig, wanted: Wanted, dh: Tensor | None, dc: Tensor | None, *tensors: Tensor | None
    ) -> list[Tensor | None]:
        """The gradients in differentiable operations."""
        return cell_gradients(cfg, (dh, dc), tensors[:-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, wanted, *tensors) = info.batch_size, args
        _, _, *dims = in_dims
        if batching.is_mapped(dims[5:9]):  # the weights
            return batching.each_sample(CellBackward.apply, n, (None, None, *dims), args)
        folded = [
            tensor if 5 <= i < 9 else batching.fold(tensor, dim, 0, n)
            for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True))
        ]
        groups = n * max(wanted.groups, 1) if wanted.weights else 0
        grads = CellBackward.apply(  # type: ignore[no-untyped-call]
            cfg, wanted._replace(groups=groups), *folded
        )
        inputs, inputs_dims = batching.unfold_all(grads[:3], (0, 0, 0), n)
        dweights, dweights_dims = per_sample.unfold_groups(grads[3:], wanted.groups, n)
        return inputs + dweights, inputs_dims + dweights_dims


def _grouped_gradients(
    cfg: CellConfig, groups: int, cotangents: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """`cell_gradients` of a batch of groups x B: weight gradients per group, [groups, *shape]."""
    batched = (*cotangents, *inputs[:3])
    split = [None if t is None else batching.unfold(t, 0, groups)[0] for t in batched]
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def one_group(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        grads = cell_gradients(cfg, tensors[:2], tensors[2:])
        return tuple(grads[i] for i in present)  # type: ignore[misc]

    in_dims = (*(None if t is None else 0 for t in split), None, None, None, None)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, torch.vmap(one_group, in_dims)(*split, *inputs[3:]), strict=True):
        grads[i] = grad.flatten(0, 1) if i < 3 else grad
    return grads


class Refused(Exception):
    """The operator refused the arguments of `UncheckedCell`."""


class UncheckedCell(Cell):
    """A `Cell` that raises `Refused` for an error of the operator, but not for errors of other code that runs in the
    call, such as hooks on saved tensors and the tracer of torch.jit."""

    @staticmethod
    def forward(cfg: CellConfig, *tensors: Any) -> tuple[Tensor, ...]:
        try:
            return Cell.forward(cfg, *tensors)
        except (RuntimeError, TypeError, ValueError) as error:
            raise Refused from error


def plain_cell(mode: str, given: Sequence[Any]) -> Sequence[Tensor] | None:
    """Runs a cell without checks in Python and returns h', then c' for the lstm. Returns None if the call is not a
    common one (batched, on the CPU, no transform, no autocast) or the operator refuses it. `given` holds the fields of
    CellInputs, of any type."""
    if extension.prefers_torch:
        return by_torch.plain_cell(mode, given)
    if not _is_grad_enabled():
        return direct.cell(mode, *given)
    try:
        if not (given[4].requires_grad or any(t is not None and t.requires_grad for t in given)):
            return direct.cell(mode, *given)
        if not given[0].is_cpu or are_transforms_active() or is_any_autocast_enabled() or is_tracing():
            return None
        if forward_ad._current_level >= 0:  # the operator would drop the tangents
            return None
        tensors = [t if t is None else unwrap_dead_wrapper(t) for t in given]
    except (AttributeError, TypeError):  # not tensors
        return None
    try:
        return _apply_unchecked(CellConfig(mode, _is_deterministic()), *tensors)  # type: ignore[no-any-return]
    except Refused:
        return None


_apply = cpp_apply(Cell)
_apply_unchecked = cpp_apply(UncheckedCell)
_apply_backward = cpp_apply(CellBackward)
