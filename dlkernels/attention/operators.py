"""The attention operators `torch.ops.dlkernels.attention*`: their arguments, fakes and autograd. CPU tensors are served
by C++, CUDA tensors by Triton.

`attention` and `attention_map` are the entry points. `Attention` and `AttentionBackward` are new-style Functions around
the forward and the backward operator; the second exists so that the first can be differentiated twice and mapped over.
vmap folds the mapped samples into the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from dlkernels._core import batching, legacy
from dlkernels._core.devices import register_fake
from dlkernels._core.dtypes import compute_dtype
from dlkernels._core.flops import Formula, register_formulas
from dlkernels._core.gradients import differentiate, private, pullback
from dlkernels._core.private_torch import are_transforms_active, cpp_apply, unwrap_dead_wrappers
from dlkernels._core.routing import announce
from dlkernels._core.schema import schema_of
from dlkernels.attention import flops, reference, triton
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs, AttentionWanted
from dlkernels.attention.routing import route

__all__ = ["OPERATORS", "attention", "attention_map", "run_backward", "run_forward", "schema"]

# The dimension of the heads, into which vmap folds its samples.
_HEADS = 1


class Operator(NamedTuple):
    arrange: Callable[..., tuple[Any, ...]]  # the arguments in the order of the schema
    fake: Callable[..., Any]  # takes by name those arguments that it reads
    formula: Formula


def _arguments(given: AttentionInputs, cfg: AttentionConfig) -> tuple[Any, ...]:
    return (*given, *cfg)


def _backward_arguments(
    do: Tensor, dlse: Tensor | None, given: AttentionInputs, o: Tensor, stats: Tensor, cfg: AttentionConfig,
    wanted: AttentionWanted,
) -> tuple[Any, ...]:  # fmt: skip
    q, k, v, *others = given
    return (do, dlse, q, k, v, o, stats, *others, *cfg.of_both, *wanted)


def _map_arguments(given: AttentionInputs, cfg: AttentionConfig, rows: int, cols: int) -> tuple[Any, ...]:
    q, k, _, mask, alibi_slopes, sinks, *_ = given
    return (q, k, mask, alibi_slopes, sinks, *cfg.of_scores, rows, cols)


def _fake(
    q: Tensor, v: Tensor, contiguous: bool, **others: Any
) -> Annotated[tuple[Tensor, Tensor, Tensor], "o", "lse", "stats"]:
    """o, [B, H, M, Dv] or [rows, H, Dv]; lse, float32 (float64 for float64), [B, H, M] or [H, rows]; and stats, which
    the backward needs, [B, H, 2, M] or [H, 2, rows] of lse's dtype.

    The strides of o are those of `torch.empty_like(q)`. It is contiguous if that is asked for, if Dv != D and if the
    last stride of q is not 1.
    """
    dtype, rows = compute_dtype(q.dtype), (q.shape[0] if q.dim() == 3 else q.shape[2])
    heads = (q.shape[1],) if q.dim() == 3 else q.shape[:2]
    o = _result(q, v.shape[-1], contiguous)
    return o, q.new_empty((*heads, rows), dtype=dtype), q.new_empty((*heads, 2, rows), dtype=dtype)


def _result(q: Tensor, width: Any, contiguous: bool) -> Tensor:
    if q.dim() == 4 and not contiguous and q.shape[-1] == width and q.stride(-1) == 1:
        o = torch.empty_like(q)
        if o.stride(-1) == 1 or width == 1:
            return o
    return q.new_empty((*q.shape[:-1], width))


def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    need_q: bool, need_kv: bool, need_mask: bool, need_slopes: bool, need_sinks: bool, **others: Any,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dmask, dslopes, dsinks], of shape [0] where not wanted; dmask has the mask's own shape."""
    grads = [_heads_like(x, x.shape[-1]) if need else None for x, need in ((q, need_q), (k, need_kv), (v, need_kv))]
    for x, need in ((mask, need_mask), (alibi_slopes, need_slopes), (sinks, need_sinks)):
        grads.append(x.new_empty(x.shape) if need and x is not None else None)
    return [q.new_empty((0,)) if grad is None else grad for grad in grads]


def _heads_like(x: Tensor, width: Any) -> Tensor:
    """As x, but of this width; padded ones in the memory order [B, rows, heads, width]."""
    if x.dim() == 3:
        return x.new_empty((*x.shape[:2], width))
    B, heads, rows = x.shape[:3]
    return x.new_empty((B, rows, heads, width)).transpose(1, 2)


def _map_fake(q: Tensor, rows: int, cols: int, **others: Any) -> Tensor:
    """[B, H, rows, cols] in float32 (float64 for float64); see `dlkernels.reference.attention_map`."""
    return q.new_empty((*q.shape[:2], rows, cols), dtype=compute_dtype(q.dtype))


OPERATORS = {
    "attention": Operator(_arguments, _fake, flops.attention),
    "attention_backward": Operator(_backward_arguments, _backward_fake, flops.attention_backward),
    "attention_map": Operator(_map_arguments, _map_fake, flops.attention_map),
}


def schema(name: str) -> str:
    """Of one of OPERATORS. The compiled module has its own, from csrc/attention/torch/arguments.h; a test compares."""
    return schema_of(name, OPERATORS[name].arrange, OPERATORS[name].fake)


triton.register(schema)
for _name, _operator in OPERATORS.items():
    register_fake(_name, _operator.fake)
register_formulas({name: operator.formula for name, operator in OPERATORS.items()})
# Fetched once: a lookup through torch.ops costs as much as a good part of a short call.
_forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.dlkernels.attention.default
_backward: Callable[..., list[Tensor]] = torch.ops.dlkernels.attention_backward.default
_map: Callable[..., Tensor] = torch.ops.dlkernels.attention_map.default


def run_forward(given: AttentionInputs, cfg: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse, stats) from the operator, without autograd."""
    return _forward(*_arguments(given, cfg))


def run_backward(
    do: Tensor, dlse: Tensor | None, given: AttentionInputs, o: Tensor, stats: Tensor, cfg: AttentionConfig,
    wanted: AttentionWanted,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dmask, dslopes, dsinks] from the operator, without autograd."""
    return _backward(*_backward_arguments(do, dlse, given, o, stats, cfg, wanted))


def attention(cfg: AttentionConfig, given: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(o, lse); the shapes are those of `dlkernels.reference.attention`.

    The arguments are taken as checked: one device, fitting dtypes and sizes.
    """
    decided = route(*given[:6])
    path = decided.path
    if path == "op":
        return run_forward(given, cfg)[:2]
    if path == "reference":
        announce(decided)
        return _reference(cfg, given)
    if path == "eager":
        o, lse, _ = _apply(cfg, *unwrap_dead_wrappers(given))
    else:
        o, lse, _ = Attention.apply(cfg, *private(given))  # type: ignore[no-untyped-call]
    return o.clone() if cfg.contiguous or torch.compiler.is_compiling() else o, lse


def attention_map(cfg: AttentionConfig, given: AttentionInputs, rows: int, cols: int) -> Tensor:
    """See `dlkernels.reference.attention_map`; not differentiable."""
    with torch.no_grad():
        decided = route(*given[:6])
        if decided.native and not are_transforms_active():
            return _map(*_map_arguments(given, cfg, rows, cols))
        announce(decided)
        q, k, _, mask, alibi_slopes, sinks, *_ = given
        return reference.attention_map(
            q, k, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, **cfg.keywords, rows=rows, cols=cols
        )


def _reference(cfg: AttentionConfig, given: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    named: dict[str, Any] = dict(zip(AttentionInputs._fields, given, strict=True))
    return reference.attention(**named, **cfg.keywords, dropout_p=cfg.dropout_p)


class Attention(torch.autograd.Function):
    """(cfg, q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rng) -> (o, lse, stats)."""

    @staticmethod
    def forward(cfg: AttentionConfig, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run_forward(AttentionInputs(*tensors), cfg)

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
        *given, o, stats = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        wanted = AttentionWanted(needs[1], needs[2] or needs[3], *needs[4:7])
        args = (ctx.cfg, wanted, do, dlse, *given, o, stats)
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
    """(cfg, wanted, do, dlse, *inputs, o, stats) -> the gradients of q to sinks. `inputs` are those of Attention.

    Gradients that are not wanted are empty.
    """

    @staticmethod
    def forward(
        cfg: AttentionConfig, wanted: AttentionWanted, do: Tensor, dlse: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        *given, o, stats = tensors
        return tuple(run_backward(do, dlse, AttentionInputs(*given), o, stats, cfg, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        cfg, wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(grad for grad, want in zip(output, wanted.each, strict=True) if not want))
        ctx.save_for_backward(*tensors[:11])
        ctx.cfg, ctx.wanted = cfg, wanted

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(needs)
        cfg, each = ctx.cfg, ctx.wanted.each
        *tensors, cu_seqlens_q, cu_seqlens_k, rng = ctx.saved_tensors

        def gradients(*tensors: Tensor | None) -> list[Tensor | None]:
            return _gradients(cfg, each, tensors[:2], tensors[2:], (cu_seqlens_q, cu_seqlens_k, rng))

        grads = legacy.differentiate(lambda *given: differentiate(gradients, tensors, needs[2:10], given), cotangents)
        return (None, None, *grads, None, None, None, None, None)

    @staticmethod
    def by_reference(
        cfg: AttentionConfig, wanted: AttentionWanted, do: Tensor, dlse: Tensor | None, *tensors: Any
    ) -> list[Tensor | None]:
        """The gradients in differentiable operations, None for those that are not wanted."""
        return _gradients(cfg, wanted.each, (do, dlse), tensors[:6], tensors[6:9])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        n, (cfg, wanted, *tensors), (_, _, *dims) = info.batch_size, args, in_dims
        if not _folds(cfg, dims[8:11]):
            return batching.each_sample(AttentionBackward.apply, n, (None, None, *dims), args)
        do, dlse, *inputs, cu_seqlens_q, cu_seqlens_k, rng, o, stats = tensors
        of_rows = _HEADS if cu_seqlens_q is None else 0
        do, dlse, o, stats = (
            batching.fold(tensor, dims[i], where, n)
            for i, tensor, where in ((0, do, _HEADS), (1, dlse, of_rows), (11, o, _HEADS), (12, stats, of_rows))
        )
        folded = _fold_inputs(inputs, dims[2:8], n, wanted.need_mask)
        grads = AttentionBackward.apply(  # type: ignore[no-untyped-call]
            cfg, wanted, do, dlse, *folded, cu_seqlens_q, cu_seqlens_k, rng, o, stats
        )
        return _unfold_gradients(grads, inputs, dims[2:8], wanted, n)


def _gradients(
    cfg: AttentionConfig, each: Sequence[bool], cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None],
    fixed: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of q to sinks where `each` says that they are wanted, else None. `fixed` are the inputs after
    these."""
    variable = [tensor if want else None for tensor, want in zip(inputs, each, strict=True)]

    def forward(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        full = [old if new is None else new for old, new in zip(inputs, given, strict=True)]
        return _reference(cfg, (*full, *fixed))

    return pullback(forward, variable, cotangents)


def _folds(cfg: AttentionConfig, fixed_dims: Sequence[int | None]) -> bool:
    """Whether vmap may fold its samples into the heads. With dropout it may not, because the mask depends on the number
    of the head; with mapped cu_seqlens or rng it may not, because the operator takes one."""
    return cfg.dropout_p == 0 and not batching.is_mapped(fixed_dims)


def _heads_dim(index: int, tensor: Tensor | None, mapped: bool) -> int:
    """The dimension of the heads of q, k, v, mask, alibi_slopes or sinks, by the index in that list."""
    if index < 4:
        return _HEADS
    return 0 if tensor is None else tensor.dim() - mapped - 1


def _fold_inputs(
    tensors: Sequence[Tensor | None], dims: Sequence[int | None], n: int, mask_gradient: bool = False
) -> list[Tensor | None]:
    """q, k, v, mask, alibi_slopes and sinks with n times as many heads."""
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
    """The dimension of the heads in a tensor that still has the mapped dimension."""
    return _HEADS if mapped_dim is None or mapped_dim > _HEADS else _HEADS + 1


def _unfold_gradients(
    grads: Sequence[Tensor], inputs: Sequence[Tensor | None], dims: Sequence[int | None], wanted: AttentionWanted,
    n: int,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:  # fmt: skip
    unfolded: list[tuple[Tensor, int | None]] = []
    for index, (grad, tensor, dim, want) in enumerate(zip(grads, inputs, dims, wanted.each, strict=True)):
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
