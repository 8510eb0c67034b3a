"""Autograd of attention, built as `dlkernels/rnn/autograd` is; vmap folds the mapped samples into the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import batching, extension, legacy
from dlkernels._core.gradients import differentiate, private, pullback
from dlkernels._core.private_torch import are_transforms_active, cpp_apply, unwrap_dead_wrappers
from dlkernels.attention import operators, reference
from dlkernels.attention.config import AttentionConfig, AttentionWanted
from dlkernels.attention.routing import route

# Where the heads are, by which vmap's samples are folded.
_HEADS = 1


def attention(
    cfg: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, rng: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse), with the arguments of `dlkernels.attention.operators.attention`."""
    path = route(q, k, v, mask, slopes, sinks).path
    if path == "op":
        return operators.attention(q, k, v, mask, slopes, sinks, cu_q, cu_k, rng, *cfg)[:2]
    if path == "reference":
        extension.announce_reference()
        return _reference(cfg, (cu_q, cu_k, rng), q, k, v, mask, slopes, sinks)
    tensors = (q, k, v, mask, slopes, sinks, cu_q, cu_k, rng)
    if path == "eager":
        o, lse, _ = _apply(cfg, *unwrap_dead_wrappers(tensors))
    else:
        o, lse, _ = Attention.apply(cfg, *private(tensors))  # type: ignore[no-untyped-call]
    return o.clone() if cfg.contiguous or torch.compiler.is_compiling() else o, lse


def attention_map(
    q: Tensor, k: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, cfg: AttentionConfig,
    rows: int, cols: int,
) -> Tensor:  # fmt: skip
    """See `dlkernels.reference.attention_map`; not differentiable."""
    scale, rules = cfg.softmax_scale, (cfg.causal, cfg.window_left, cfg.window_right, cfg.softcap)
    with torch.no_grad():
        decided = route(q, k, q, mask, slopes, sinks)
        if decided.native and not are_transforms_active():
            return operators.attention_map(q, k, mask, slopes, sinks, scale, *rules, rows, cols)
        extension.announce_reference()
        return reference.attention_map(
            q, k, mask=mask, alibi_slopes=slopes, sinks=sinks, softmax_scale=scale, causal=cfg.causal,
            window_left=cfg.window_left, window_right=cfg.window_right, softcap=cfg.softcap, rows=rows, cols=cols,
        )  # fmt: skip


class Attention(torch.autograd.Function):
    """(cfg, q, k, v, mask, slopes, sinks, cu_q, cu_k, rng) -> (o, lse, stats)."""

    @staticmethod
    def forward(
        cfg: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None,
        sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, rng: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return operators.attention(q, k, v, mask, slopes, sinks, cu_q, cu_k, rng, *cfg)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cfg, *tensors = inputs
        o, _, stats = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(*tensors, o, stats)
        ctx.cfg = cfg

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if do is None and dlse is None:
            return (None,) * len(needs)
        q, k, v, mask, slopes, sinks, cu_q, cu_k, rng, o, stats = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        wanted = AttentionWanted(needs[1], needs[2] or needs[3], *needs[4:7])
        args = (ctx.cfg, wanted, do, dlse, q, k, v, mask, slopes, sinks, cu_q, cu_k, rng, o, stats)
        grads = legacy.run_backward(AttentionBackward, (do, dlse), args, _apply_backward)
        wanted_grads = (grad if need else None for grad, need in zip(grads, needs[1:7], strict=True))
        return (None, *wanted_grads, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, *tensors), (_, *dims) = info.batch_size, args, in_dims
        if not _folds(cfg, dims[6:]):
            return batching.each_sample(Attention.apply, n, (None, *dims), args)
        packed = tensors[6] is not None
        folded = _fold_inputs(tensors[:6], dims[:6], n)
        outputs = Attention.apply(cfg, *folded, *tensors[6:])  # type: ignore[no-untyped-call]
        of_rows = 0 if packed else _HEADS
        return batching.unfold_all(outputs, (_HEADS, of_rows, of_rows), n)


class AttentionBackward(torch.autograd.Function):
    """(cfg, wanted, do, dlse, q, k, v, mask, slopes, sinks, cu_q, cu_k, rng, o, stats) -> the gradients of q to sinks.

    What is not wanted comes back empty.
    """

    @staticmethod
    def forward(
        cfg: AttentionConfig, wanted: AttentionWanted, do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
        rng: Tensor | None, o: Tensor, stats: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(
            operators.attention_backward(
                do, dlse, q, k, v, o, stats, mask, slopes, sinks, cu_q, cu_k, rng, *cfg.rules, *wanted
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cfg, wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(grad for grad, want in zip(output, _each(wanted), strict=True) if not want))
        ctx.save_for_backward(*tensors[:11])
        ctx.cfg, ctx.wanted = cfg, wanted

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(needs)
        cfg, each = ctx.cfg, _each(ctx.wanted)
        *tensors, cu_q, cu_k, rng = ctx.saved_tensors

        def gradients(*tensors: Tensor | None) -> list[Tensor | None]:
            inputs = tensors[2:]
            variable = [tensor if want else None for tensor, want in zip(inputs, each, strict=True)]

            def forward(*given: Tensor | None) -> tuple[Tensor, Tensor]:
                full = [old if new is None else new for old, new in zip(inputs, given, strict=True)]
                return _reference(cfg, (cu_q, cu_k, rng), *full)  # type: ignore[arg-type]

            return pullback(forward, variable, tensors[:2])

        grads = legacy.differentiate(lambda *given: differentiate(gradients, tensors, needs[2:10], given), cotangents)
        return (None, None, *grads, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, wanted, *tensors), (_, _, *dims) = info.batch_size, args, in_dims
        if not _folds(cfg, dims[8:11]):
            return batching.each_sample(AttentionBackward.apply, n, (None, None, *dims), args)
        do, dlse, *inputs, cu_q, cu_k, rng, o, stats = tensors
        of_rows = _HEADS if cu_q is None else 0
        do, dlse, o, stats = (
            batching.fold(tensor, dims[i], where, n)
            for i, tensor, where in ((0, do, _HEADS), (1, dlse, of_rows), (11, o, _HEADS), (12, stats, of_rows))
        )
        folded = _fold_inputs(inputs, dims[2:8], n, wanted.mask)
        grads = AttentionBackward.apply(  # type: ignore[no-untyped-call]
            cfg, wanted, do, dlse, *folded, cu_q, cu_k, rng, o, stats
        )
        return _unfold_gradients(grads, inputs, dims[2:8], wanted, n)


def _each(wanted: AttentionWanted) -> tuple[bool, ...]:
    return wanted.q, wanted.kv, wanted.kv, wanted.mask, wanted.slopes, wanted.sinks


def _reference(
    cfg: AttentionConfig, fixed: tuple[Tensor | None, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    slopes: Tensor | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cu_q, cu_k, rng = fixed
    return reference.attention(
        q, k, v, mask=mask, alibi_slopes=slopes, sinks=sinks, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, rng=rng,
        softmax_scale=cfg.softmax_scale, causal=cfg.causal, window_left=cfg.window_left, window_right=cfg.window_right,
        softcap=cfg.softcap, dropout_p=cfg.dropout_p,
    )  # fmt: skip


def _folds(cfg: AttentionConfig, fixed_dims: Sequence[int | None]) -> bool:
    """Folding would renumber the heads, by which the dropout mask is drawn; and the operator takes one cu_seqlens."""
    return cfg.dropout_p == 0 and not batching.is_mapped(fixed_dims)


def _heads_dim(index: int, tensor: Tensor | None, mapped: bool) -> int:
    """Of q, k, v, mask, slopes or sinks, by its place in that list."""
    if index < 4:
        return _HEADS
    return 0 if tensor is None else tensor.dim() - mapped - 1


def _fold_inputs(
    tensors: Sequence[Tensor | None], dims: Sequence[int | None], n: int, mask_gradient: bool = False
) -> list[Tensor | None]:
    """q, k, v, mask, slopes and sinks with n times as many heads."""
    folded: list[Tensor | None] = []
    heads = tensors[0].shape[_heads_of(dims[0])]  # type: ignore[union-attr]
    for index, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        if index == 3 and tensor is not None:
            if dim is not None:
                tensor, dim = tensor.movedim(dim, 0), 0
            shared = tensor.shape[_heads_of(dim)] == 1
            if shared and dim is None and not mask_gradient:
                folded.append(tensor)
                continue
            if shared:
                shape = list(tensor.shape)
                shape[_heads_of(dim)] = heads
                tensor = tensor.expand(shape)
        folded.append(batching.fold(tensor, dim, _heads_dim(index, tensor, dim is not None), n))
    return folded


def _heads_of(mapped_dim: int | None) -> int:
    """Where the heads are while the mapped dimension is still there."""
    return _HEADS if mapped_dim is None or mapped_dim > _HEADS else _HEADS + 1


def _unfold_gradients(
    grads: Sequence[Tensor], inputs: Sequence[Tensor | None], dims: Sequence[int | None], wanted: AttentionWanted,
    n: int,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:  # fmt: skip
    unfolded: list[tuple[Tensor, int | None]] = []
    for index, (grad, tensor, dim, want) in enumerate(zip(grads, inputs, dims, _each(wanted), strict=True)):
        if not want or tensor is None:
            unfolded.append((grad, None))
            continue
        out, where = batching.unfold(grad, _heads_dim(index, grad, False), n)
        if index == 3 and tensor.shape[_heads_of(dim)] == 1:
            out = out.sum(_HEADS + 1, keepdim=True)
        unfolded.append((out, where))
    return tuple(out for out, _ in unfolded), tuple(where for _, where in unfolded)


_apply: Callable[..., Any] = cpp_apply(Attention)
_apply_backward: Callable[..., Any] = cpp_apply(AttentionBackward)
