"""The operators of one layer over whole sequences: their arguments, fakes and autograd.

`sequence` is the entry point. `Sequence` and `SequenceBackward` are new-style Functions around the forward and the
backward operator; the second exists so that the first can be differentiated twice and mapped by vmap.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Tensors
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import batching, legacy
from dlkernels._core.dtypes import compute_dtype
from dlkernels._core.gradients import differentiate, private
from dlkernels._core.private_torch import cpp_apply, is_tracing, unwrap_dead_wrappers
from dlkernels._core.routing import announce
from dlkernels.rnn import flops, records
from dlkernels.rnn.dtypes import dtype_of
from dlkernels.rnn.kinds import KINDS, Kind, sizes
from dlkernels.rnn.operators import overloads, per_sample, variants
from dlkernels.rnn.operators.arguments import Places, SequenceConfig, SequenceInputs, Wanted
from dlkernels.rnn.operators.formulas import run_sequence, sequence_gradients
from dlkernels.rnn.operators.truncated import truncated_sequence
from dlkernels.rnn.routing import route

__all__ = ["sequence"]

# Positions of the first weight among the inputs of the two Functions.
_WEIGHTS = 8
_BACKWARD_WEIGHTS = 13


def _forward(cfg: SequenceConfig, given: SequenceInputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (y, h_n, c_n, saved, cells). y and cells are stored time-major, as in torch. With `save`, `saved` holds
    what the backward needs: [D, rows, `records.size`] in float32 (float64 for float64), where rows is [T, B] for padded
    input, even with `batch_first`, and padding rows are undefined. `records` reads it."""
    if cfg.variant is not None:
        return variants.forward(cfg, given, save)
    x, h0, c0, packed, batch_sizes, lengths, weights, resets = given
    return _operators[cfg.mode](  # type: ignore[no-any-return]
        x, h0, c0, weights, packed, batch_sizes, lengths, cfg.bidirectional, cfg.batch_first, save, cfg.deterministic,
        *cfg.types, resets, cfg.cells,
    )  # fmt: skip


def _backward(
    cfg: SequenceConfig, wanted: Wanted, cotangents: Tensors[Tensor | None], given: SequenceInputs, saved: Tensor
) -> list[Tensor]:
    """[dx, dh0, dc0, *dweights] from cotangents = (dy, dh_n, dc_n, dcells), followed by dgates and dproj if there are
    groups.

    `bptt_steps` = k > 0 computes the gradients as if the state had been detached before every k-th step of a sequence.
    dgates: [D, rows, `Kind.gate_grads`, H]. dproj: [D, rows, P].
    """
    if cfg.variant is not None:
        return variants.backward(cfg, wanted, cotangents, given, saved)
    x, h0, c0, _, batch_sizes, lengths, weights, resets = given
    *cotangents, dcells = cotangents
    return _backward_operators[cfg.mode](  # type: ignore[no-any-return]
        *cotangents, x, h0, c0, weights, saved, batch_sizes, lengths, cfg.bidirectional, cfg.batch_first,
        cfg.bptt_steps, cfg.deterministic, *wanted.flags, cfg.types.product, resets, dcells,
    )  # fmt: skip


def _batch(x: Tensor, states: Iterable[Tensor | None], batch_sizes: Tensor | None, batch_first: bool) -> int:
    if batch_sizes is None:
        return x.shape[0 if batch_first else 1]
    for state in states:
        if state is not None:
            return state.shape[1]
    # The batch is batch_sizes[0], a value that tracing does not have.
    return torch.library.get_ctx().new_dynamic_size()  # type: ignore[return-value]


def _rows(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[int, ...]:
    """The leading dimensions of tensors with an entry per row, which are time-major even if x is not."""
    if batch_sizes is not None:
        return (x.shape[0],)
    return (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])


def _fake(
    kind: Kind, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Tensors[Tensor], batch_sizes: Tensor | None,
    bidirectional: bool, batch_first: bool, save: bool, product_dtype: int = -1, h_dtype: int = -1, c_dtype: int = -1,
    cells: bool = False, **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    directions = 2 if bidirectional else 1
    hidden, proj, out = sizes(kind, weights, directions)
    batch = _batch(x, (h0, c0), batch_sizes, batch_first)
    record = records.size(kind, hidden, proj, dtype_of(product_dtype, x), x.device)
    rows = _rows(x, batch_sizes, batch_first)
    saved = (directions, *rows, record) if save else (0,)
    of_h, of_c = dtype_of(h_dtype, x), dtype_of(c_dtype, x)

    def of_steps(features: int, dtype: torch.dtype) -> Tensor:
        steps = x.new_empty((*rows, directions * features), dtype=dtype)
        return steps.transpose(0, 1) if batch_first and batch_sizes is None else steps

    return (
        of_steps(out, of_h),
        x.new_empty((directions, batch, out), dtype=of_h),
        x.new_empty((directions, batch, hidden), dtype=of_c) if kind.has_cell_state else x.new_empty(0, dtype=of_h),
        x.new_empty(saved, dtype=compute_dtype(x.dtype)),
        of_steps(hidden, of_c) if cells else x.new_empty(0, dtype=of_c if kind.has_cell_state else of_h),
    )


def _backward_fake(
    kind: Kind, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor, h0: Tensor | None, c0: Tensor | None,
    weights: Tensors[Tensor], batch_sizes: Tensor | None, bidirectional: bool, batch_first: bool, need_x: bool,
    need_state: bool, need_weights: bool, gate_grads: bool, **others: Any,
) -> list[Tensor]:  # fmt: skip
    directions = 2 if bidirectional else 1
    hidden, proj, out = sizes(kind, weights, directions)
    dh0: tuple[int, ...] = (0,)
    dc0: tuple[int, ...] = (0,)
    if need_state:
        batch = _batch(x, (h0, c0, dh_n, dc_n), batch_sizes, batch_first)
        dh0 = (directions, batch, out)
        if kind.has_cell_state:
            dc0 = (directions, batch, hidden)
    rows = _rows(x, batch_sizes, batch_first)
    grads = [
        x.new_empty(x.shape if need_x else (0,)),
        (x if h0 is None else h0).new_empty(dh0),
        (x if c0 is None else c0).new_empty(dc0),
    ]
    grads += [weight.new_empty(weight.shape if need_weights else (0,)) for weight in weights]
    if gate_grads:
        dtype = compute_dtype(x.dtype)
        grads.append(x.new_empty((directions, *rows, len(kind.gate_grads), hidden), dtype=dtype))
        grads.append(x.new_empty((directions, *rows, proj) if proj else (0,), dtype=dtype))
    return grads


_operators = overloads("", _fake, flops.sequence)
_backward_operators = overloads("_backward", _backward_fake, flops.sequence_backward)
variants.register(_fake, _backward_fake)


def sequence(cfg: SequenceConfig, given: SequenceInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer of one or two directions -> (y, h_n, c_n, cells); the shapes are those of
    `dlkernels.reference.sequence`, and cells is empty unless `cfg.cells`.

    The arguments are taken as checked: one device, fitting dtypes and sizes.
    """
    x, h0, c0, *others, weights, resets = given
    varies = cfg.variant is not None
    projected = not varies and len(weights) // (2 if cfg.bidirectional else 1) % 2 == 1
    more = varies and (resets is not None or cfg.cells)
    decided = route(x, h0, c0, *weights, projected=projected, more=more)
    path = decided.path
    if path == "op":
        y, h_n, c_n, _, cells = _forward(cfg, given, False)
        return y, h_n, c_n, cells
    if path == "reference":
        announce(decided)
        if cfg.bptt_steps and not torch.compiler.is_compiling() and not is_tracing():
            return truncated_sequence(cfg, given)
        return run_sequence(cfg, given)
    tensors = (x, h0, c0, *others, resets, *weights)
    if path == "eager":
        y, h_n, c_n, _, cells = _apply(cfg, *unwrap_dead_wrappers(tensors))
    else:
        # The tensors are copied here and not where they are saved, because Dynamo refuses a Function that gets one
        # tensor twice.
        y, h_n, c_n, _, cells = Sequence.apply(cfg, *private(tensors, first_weight=7))  # type: ignore[no-untyped-call]
    return y, h_n, c_n, cells


def _gathered(tensors: Tensors[Any]) -> SequenceInputs:
    """The inputs of the forward Function."""
    x, h0, c0, packed, batch_sizes, lengths, resets, *weights = tensors
    return SequenceInputs(x, h0, c0, packed, batch_sizes, lengths, weights, resets)


class Sequence(torch.autograd.Function):
    """(cfg, x, h0, c0, packed, batch_sizes, lengths, resets, *weights) -> (y, h_n, c_n, saved, cells)."""

    @staticmethod
    def forward(cfg: SequenceConfig, *tensors: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _forward(cfg, _gathered(tensors), True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # y, h_n, c_n and cells are not saved, because the caller may edit them; `saved` has what the backward needs.
        cfg, x, h0, c0, _, batch_sizes, lengths, resets, *weights = inputs
        _, _, c_n, saved, cells = output
        ctx.set_materialize_grads(False)
        constant = [saved]
        if not KINDS[cfg.mode].has_cell_state:
            constant.append(c_n)
        if not cfg.cells:
            constant.append(cells)
        ctx.mark_non_differentiable(*constant)
        ctx.save_for_backward(x, h0, c0, saved, batch_sizes, lengths, resets, *weights)
        ctx.cfg = cfg

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: None, dcells: Tensor | None
    ) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        # Dynamo passes zeros instead of None.
        if not KINDS[ctx.cfg.mode].has_cell_state:
            dc_n = None
        if not ctx.cfg.cells:
            dcells = None
        cotangents = (dy, dh_n, dc_n, dcells)
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(needs)
        x, h0, c0, saved, batch_sizes, lengths, resets, *weights = ctx.saved_tensors
        wanted = Wanted(needs[1], needs[2] or needs[3], any(needs[_WEIGHTS:]))
        args = (ctx.cfg, wanted, *cotangents, x, h0, c0, saved, batch_sizes, lengths, resets, *weights)
        grads = legacy.run_backward(SequenceBackward, cotangents, args, _apply_backward)
        dx, dh0, dc0, *dweights = grads
        return (
            None, dx if needs[1] else None, dh0 if needs[2] else None, dc0 if needs[3] else None,
            None, None, None, None,
            *(grad if need else None for grad, need in zip(dweights, needs[_WEIGHTS:], strict=True)),
        )  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, x, h0, c0, packed, batch_sizes, lengths, resets, *weights) = info.batch_size, args
        _, x_dim, h0_dim, c0_dim, packed_dim, batch_sizes_dim, lengths_dim, resets_dim, *weight_dims = in_dims
        if batch_sizes is not None and batching.is_mapped((x_dim, h0_dim, c0_dim, batch_sizes_dim, resets_dim)):
            raise NotImplementedError(
                "vmap over the data or the states of a PackedSequence: its samples share no batch dimension; pass "
                "padded input with lengths= instead"
            )
        if batching.is_mapped((packed_dim, *weight_dims)) or cfg.variant is not None:  # masks belong to a batch
            return batching.each_sample(Sequence.apply, n, (None, *in_dims[1:]), args)
        outputs = Sequence.apply(  # type: ignore[no-untyped-call]
            cfg, batching.fold(x, x_dim, cfg.batch_dim, n), batching.fold(h0, h0_dim, 1, n),
            batching.fold(c0, c0_dim, 1, n), packed, batch_sizes, batching.fold(lengths, lengths_dim, 0, n),
            batching.fold(resets, resets_dim, 1, n), *weights,
        )  # fmt: skip
        return batching.unfold_all(outputs, (cfg.batch_dim, 1, 1, 2, cfg.batch_dim), n)


class SequenceBackward(torch.autograd.Function):
    """(cfg, wanted, dy, dh_n, dc_n, dcells, x, h0, c0, saved, batch_sizes, lengths, resets, *weights)
    -> (dx, dh0, dc0, *dweights).

    Gradients that are not wanted are returned empty. The backward of this Function differentiates the reference:
    `saved` is a function of the other inputs and gets no gradient of its own.
    """

    @staticmethod
    def forward(
        cfg: SequenceConfig, wanted: Wanted, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None,
        dcells: Tensor | None, x: Tensor, h0: Tensor | None, c0: Tensor | None, saved: Tensor,
        batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given = SequenceInputs(x, h0, c0, None, batch_sizes, lengths, weights, resets)
        grads = _backward(cfg, wanted, (dy, dh_n, dc_n, dcells), given, saved)
        if not wanted.groups:
            return tuple(grads)
        *grads, dgates, dproj = grads
        return (*grads[:3], *per_sample.sequence_weight_grads(cfg, wanted.groups, given, saved, dgates, dproj))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cfg, wanted, *cotangents, x, h0, c0, _, batch_sizes, lengths, resets = inputs[:_BACKWARD_WEIGHTS]
        weights = inputs[_BACKWARD_WEIGHTS:]
        ctx.set_materialize_grads(False)
        given = (wanted.x, wanted.state and h0 is not None, wanted.state and c0 is not None)
        unwanted = [grad for grad, want in zip(output[:3], given, strict=True) if not want]
        ctx.mark_non_differentiable(*unwanted, *(() if wanted.weights else output[3:]))
        ctx.save_for_backward(*cotangents, x, h0, c0, batch_sizes, lengths, resets, *weights)
        ctx.cfg, ctx.groups = cfg, wanted.groups

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(needs)
        dy, dh_n, dc_n, dcells, x, h0, c0, batch_sizes, lengths, resets, *weights = ctx.saved_tensors
        cfg, groups = ctx.cfg, ctx.groups
        places = Places(batch_sizes, lengths, resets)

        def gradients(*tensors: Tensor | None) -> list[Tensor | None]:
            if groups:
                return _grouped_gradients(cfg, groups, places, tensors[:4], tensors[4:])
            return sequence_gradients(cfg, places, tensors[:4], tensors[4:])

        wanted = (*needs[2:9], *needs[_BACKWARD_WEIGHTS:])
        tensors = (dy, dh_n, dc_n, dcells, x, h0, c0, *weights)
        grads = legacy.differentiate(lambda *given: differentiate(gradients, tensors, wanted, given), cotangents)
        return (None, None, *grads[:7], None, None, None, None, *grads[7:])

    @staticmethod
    def by_reference(
        cfg: SequenceConfig, wanted: Wanted, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None,
        dcells: Tensor | None, x: Tensor, h0: Tensor | None, c0: Tensor | None, saved: Tensor,
        batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, *weights: Tensor,
    ) -> list[Tensor | None]:  # fmt: skip
        """The gradients in differentiable operations."""
        places = Places(batch_sizes, lengths, resets)
        return sequence_gradients(cfg, places, (dy, dh_n, dc_n, dcells), (x, h0, c0, *weights))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, wanted, *row_tensors) = info.batch_size, args[:_BACKWARD_WEIGHTS]
        *batched, batch_sizes, lengths, resets = row_tensors
        weights = args[_BACKWARD_WEIGHTS:]
        _, _, *dims = in_dims
        if batching.is_mapped(in_dims[_BACKWARD_WEIGHTS:]) or batch_sizes is not None or cfg.variant is not None:
            return batching.each_sample(SequenceBackward.apply, n, (None, None, *dims), args)
        batch_dims = (cfg.batch_dim, 1, 1, cfg.batch_dim, cfg.batch_dim, 1, 1, 2)
        folded = [
            batching.fold(tensor, dim, batch_dim, n)
            for tensor, dim, batch_dim in zip(batched, dims, batch_dims, strict=False)
        ]
        lengths, resets = batching.fold(lengths, dims[9], 0, n), batching.fold(resets, dims[10], 1, n)
        # Samples that an inner vmap has folded are groups already; the samples of this vmap are the outer dimension.
        groups = n * max(wanted.groups, 1) if wanted.weights else 0
        grads = SequenceBackward.apply(  # type: ignore[no-untyped-call]
            cfg, wanted._replace(groups=groups), *folded, None, lengths, resets, *weights
        )
        inputs, inputs_dims = batching.unfold_all(grads[:3], (cfg.batch_dim, 1, 1), n)
        dweights, dweights_dims = per_sample.unfold_groups(grads[3:], wanted.groups, n)
        return inputs + dweights, inputs_dims + dweights_dims


def _grouped_gradients(
    cfg: SequenceConfig, groups: int, places: Places, cotangents: Tensors[Tensor | None],
    inputs: Tensors[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """`sequence_gradients` of a batch of groups x B: weight gradients per group, [groups, *shape]."""
    tensors = (places.lengths, places.resets, *cotangents, *inputs)
    batch_dims = (0, 1, cfg.batch_dim, 1, 1, cfg.batch_dim, cfg.batch_dim, 1, 1)
    split = [
        None if t is None else batching.unfold(t, dim, groups)[0] for t, dim in zip(tensors, batch_dims, strict=False)
    ]
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def one_group(lengths: Tensor | None, resets: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        grads = sequence_gradients(cfg, Places(None, lengths, resets), tensors[:4], tensors[4:])
        return tuple(grads[i] for i in present)  # type: ignore[misc]

    in_dims = [None if t is None else dim for t, dim in zip(split, batch_dims, strict=True)]
    out_dims = (*(batch_dims[6 + i] if i < 3 else 0 for i in present),)
    results = torch.vmap(one_group, (*in_dims, *(None for _ in inputs[3:])), out_dims)(*split, *inputs[3:])
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, results, strict=True):
        grads[i] = grad.flatten(out_dims[present.index(i)], out_dims[present.index(i)] + 1) if i < 3 else grad
    return grads


_apply = cpp_apply(Sequence)
_apply_backward = cpp_apply(SequenceBackward)
