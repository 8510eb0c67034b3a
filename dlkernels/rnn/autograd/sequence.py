"""Autograd of one layer over whole sequences.

`sequence` is the entry point. `Sequence` and `SequenceBackward` are new-style Functions around the forward and the
backward operator; the second exists so that the first can be differentiated twice and mapped over.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tensors
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import batching, extension, legacy
from dlkernels._core.gradients import differentiate, private
from dlkernels._core.private_torch import cpp_apply, unwrap_dead_wrappers
from dlkernels.rnn import operators
from dlkernels.rnn.autograd import per_sample
from dlkernels.rnn.autograd.formulas import run_sequence, sequence_gradients
from dlkernels.rnn.config import SequenceConfig, Wanted
from dlkernels.rnn.dtypes import dtype_of
from dlkernels.rnn.routing import route

# Positions of the first weight among the inputs of the two Functions.
_WEIGHTS = 7
_BACKWARD_WEIGHTS = 11


def sequence(
    cfg: SequenceConfig, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Tensors[Tensor],
    packed: Tensor | None = None, batch_sizes: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer of one or two directions -> (y, h_n, c_n); the shapes are those of `dlkernels.reference.sequence`.

    The arguments are taken as checked: one device, fitting dtypes and sizes. `packed` is what
    `dlkernels.rnn.operators.pack` made of the weights, or None.
    """
    projected = len(weights) // (2 if cfg.bidirectional else 1) % 2 == 1
    path = route(x, h0, c0, *weights, projected=projected).path
    if path == "op":
        return operators.sequence_forward(
            cfg.mode, x, h0, c0, weights, packed, batch_sizes, lengths, cfg.bidirectional, cfg.batch_first, False,
            cfg.deterministic, cfg.types,
        )[:3]  # fmt: skip
    if path == "reference":
        extension.announce_reference()
        return run_sequence(cfg, x, h0, c0, weights, batch_sizes, lengths)
    tensors = (x, h0, c0, packed, batch_sizes, lengths, *weights)
    if path == "eager":
        y, h_n, c_n, _ = _apply(cfg, *unwrap_dead_wrappers(tensors))
    else:
        # Copied here and not where they are saved: Dynamo refuses a Function that is given one tensor twice.
        y, h_n, c_n, _ = Sequence.apply(cfg, *private(tensors, first_weight=6))  # type: ignore[no-untyped-call]
    return y, h_n, c_n


class Sequence(torch.autograd.Function):
    """(cfg, x, h0, c0, packed, batch_sizes, lengths, *weights) -> (y, h_n, c_n, saved)."""

    @staticmethod
    def forward(
        cfg: SequenceConfig, x: Tensor, h0: Tensor | None, c0: Tensor | None, packed: Tensor | None,
        batch_sizes: Tensor | None, lengths: Tensor | None, *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return operators.sequence_forward(
            cfg.mode, x, h0, c0, weights, packed, batch_sizes, lengths, cfg.bidirectional, cfg.batch_first, True,
            cfg.deterministic, cfg.types,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # Not y, h_n or c_n, which the caller may edit: `saved` has what the backward wants of them.
        cfg, x, h0, c0, _, batch_sizes, lengths, *weights = inputs
        _, _, c_n, saved = output
        ctx.set_materialize_grads(False)
        if cfg.mode == "lstm":
            ctx.mark_non_differentiable(saved)
        else:
            ctx.mark_non_differentiable(c_n, saved)
        ctx.save_for_backward(x, h0, c0, saved, batch_sizes, lengths, *weights)
        ctx.cfg = cfg

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if ctx.cfg.mode != "lstm":
            dc_n = None  # Dynamo makes zeros of it
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(needs)
        x, h0, c0, saved, batch_sizes, lengths, *weights = ctx.saved_tensors
        wanted = Wanted(needs[1], needs[2] or needs[3], any(needs[_WEIGHTS:]))
        args = (ctx.cfg, wanted, dy, dh_n, dc_n, x, h0, c0, saved, batch_sizes, lengths, *weights)
        grads = legacy.run_backward(SequenceBackward, (dy, dh_n, dc_n), args, _apply_backward)
        dx, dh0, dc0, *dweights = grads
        return (
            None, dx if needs[1] else None, dh0 if needs[2] else None, dc0 if needs[3] else None, None, None, None,
            *(grad if need else None for grad, need in zip(dweights, needs[_WEIGHTS:], strict=True)),
        )  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, x, h0, c0, packed, batch_sizes, lengths, *weights) = info.batch_size, args
        _, x_dim, h0_dim, c0_dim, packed_dim, batch_sizes_dim, lengths_dim, *weight_dims = in_dims
        if batch_sizes is not None and batching.is_mapped((x_dim, h0_dim, c0_dim, batch_sizes_dim)):
            raise NotImplementedError(
                "vmap over the data or the states of a PackedSequence: its samples share no batch dimension; pass "
                "padded input with lengths= instead"
            )
        if batching.is_mapped((packed_dim, *weight_dims)):
            return batching.each_sample(Sequence.apply, n, (None, *in_dims[1:]), args)
        outputs = Sequence.apply(  # type: ignore[no-untyped-call]
            cfg, batching.fold(x, x_dim, cfg.batch_dim, n), batching.fold(h0, h0_dim, 1, n),
            batching.fold(c0, c0_dim, 1, n), packed, batch_sizes, batching.fold(lengths, lengths_dim, 0, n), *weights,
        )  # fmt: skip
        return batching.unfold_all(outputs, (cfg.batch_dim, 1, 1, 2), n)


class SequenceBackward(torch.autograd.Function):
    """(cfg, wanted, dy, dh_n, dc_n, x, h0, c0, saved, batch_sizes, lengths, *weights) -> (dx, dh0, dc0, *dweights).

    What is not wanted comes back empty. Its own backward differentiates the reference: `saved` is a function of the
    other inputs and gets no gradient of its own.
    """

    @staticmethod
    def forward(
        cfg: SequenceConfig, wanted: Wanted, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor,
        h0: Tensor | None, c0: Tensor | None, saved: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        grouped = wanted.groups > 0
        grads = operators.sequence_backward(
            cfg.mode, dy, dh_n, dc_n, x, h0, c0, weights, saved, batch_sizes, lengths, cfg.bidirectional,
            cfg.batch_first, cfg.bptt_steps, cfg.deterministic, wanted.x, wanted.state,
            wanted.weights and not grouped, grouped, cfg.types,
        )  # fmt: skip
        if not grouped:
            return tuple(grads)
        *grads, dgates, dproj = grads
        return (
            *grads[:3],
            *per_sample.sequence_weight_grads(
                cfg.mode, cfg.batch_first, wanted.groups, x, h0, saved, lengths, weights, dgates, dproj,
                dtype_of(cfg.types.product, x),
            ),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cfg, wanted, dy, dh_n, dc_n, x, h0, c0, _, batch_sizes, lengths, *weights = inputs
        ctx.set_materialize_grads(False)
        given = (wanted.x, wanted.state and h0 is not None, wanted.state and c0 is not None)
        unwanted = [grad for grad, want in zip(output[:3], given, strict=True) if not want]
        ctx.mark_non_differentiable(*unwanted, *(() if wanted.weights else output[3:]))
        ctx.save_for_backward(dy, dh_n, dc_n, x, h0, c0, batch_sizes, lengths, *weights)
        ctx.cfg, ctx.groups = cfg, wanted.groups

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(needs)
        dy, dh_n, dc_n, x, h0, c0, batch_sizes, lengths, *weights = ctx.saved_tensors
        cfg, groups = ctx.cfg, ctx.groups

        def gradients(*tensors: Tensor | None) -> list[Tensor | None]:
            if groups:
                return _grouped_gradients(cfg, groups, lengths, tensors[:3], tensors[3:])
            return sequence_gradients(cfg, batch_sizes, lengths, tensors[:3], tensors[3:])

        wanted = (*needs[2:8], *needs[_BACKWARD_WEIGHTS:])
        tensors = (dy, dh_n, dc_n, x, h0, c0, *weights)
        grads = legacy.differentiate(lambda *given: differentiate(gradients, tensors, wanted, given), cotangents)
        return (None, None, *grads[:6], None, None, None, *grads[6:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, wanted, dy, dh_n, dc_n, x, h0, c0, saved, batch_sizes, lengths, *weights) = info.batch_size, args
        _, _, *dims = in_dims
        if batching.is_mapped(dims[9:]) or batch_sizes is not None:
            return batching.each_sample(SequenceBackward.apply, n, (None, None, *dims), args)
        batch_dims = (cfg.batch_dim, 1, 1, cfg.batch_dim, 1, 1, 2)
        folded = [
            batching.fold(tensor, dim, batch_dim, n)
            for tensor, dim, batch_dim in zip((dy, dh_n, dc_n, x, h0, c0, saved), dims, batch_dims, strict=False)
        ]
        # Samples that an inner vmap folded before are groups already, and this one's go around them.
        groups = n * max(wanted.groups, 1) if wanted.weights else 0
        grads = SequenceBackward.apply(  # type: ignore[no-untyped-call]
            cfg, wanted._replace(groups=groups), *folded, None, batching.fold(lengths, dims[8], 0, n), *weights
        )
        inputs, inputs_dims = batching.unfold_all(grads[:3], (cfg.batch_dim, 1, 1), n)
        dweights, dweights_dims = per_sample.unfold_groups(grads[3:], wanted.groups, n)
        return inputs + dweights, inputs_dims + dweights_dims


def _grouped_gradients(
    cfg: SequenceConfig, groups: int, lengths: Tensor | None, cotangents: Tensors[Tensor | None],
    inputs: Tensors[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """`sequence_gradients` of a batch of groups x B: weight gradients per group, [groups, *shape]."""
    tensors = (*cotangents, *inputs)
    batch_dims = (cfg.batch_dim, 1, 1, cfg.batch_dim, 1, 1)
    split = [
        None if t is None else batching.unfold(t, dim, groups)[0] for t, dim in zip(tensors, batch_dims, strict=False)
    ]
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]

    def one_group(lengths: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        grads = sequence_gradients(cfg, None, lengths, tensors[:3], tensors[3:])
        return tuple(grads[i] for i in present)  # type: ignore[misc]

    in_dims = [None if t is None else dim for t, dim in zip(split, batch_dims, strict=True)]
    out_dims = (*(batch_dims[3 + i] if i < 3 else 0 for i in present),)
    results = torch.vmap(one_group, (None if lengths is None else 0, *in_dims, *(None for _ in inputs[3:])), out_dims)(
        None if lengths is None else batching.unfold(lengths, 0, groups)[0], *split, *inputs[3:]
    )
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, results, strict=True):
        grads[i] = grad.flatten(out_dims[present.index(i)], out_dims[present.index(i)] + 1) if i < 3 else grad
    return grads


_apply: Callable[..., Any] = cpp_apply(Sequence)
_apply_backward: Callable[..., Any] = cpp_apply(SequenceBackward)
