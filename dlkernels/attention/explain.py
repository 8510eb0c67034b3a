"""Tells which kernel runs a call of attention, and why: for the functions and for the layers that call them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from dlkernels._core import extension
from dlkernels._core.explanation import Explanation, LayerExplanation, describe, settings
from dlkernels.attention import functional, sdpa
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs
from dlkernels.attention.explain_layers import LAYERS, attention_calls
from dlkernels.attention.routing import route_of_call

__all__ = ["FUNCTIONS", "LAYERS", "explain_function", "explain_layer"]

_SDPA = (sdpa.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention)
FUNCTIONS = (functional.attention, *_SDPA)


def explain_function(function: Any, *args: Any, **kwargs: Any) -> Explanation:
    """What `function(*args, **kwargs)` would run. `F.scaled_dot_product_attention` is explained as it is inside of
    `dlkernels.patch_attention()`. A mistake raises the error of the call itself, except in calls of
    scaled_dot_product_attention, which are left to torch then."""
    inspect.signature(functional.attention if function not in _SDPA else _SDPA[0]).bind(*args, **kwargs)
    if function in _SDPA:
        query, only = _explain_sdpa(*args, **kwargs)
        return Explanation("scaled_dot_product_attention", f"{describe('query', query)}, {settings(query)}", (only,))
    q, *_ = tensors = [*args, *(kwargs[name] for name in ("q", "k", "v") if name in kwargs)]
    only = _explain_one("call", *args, **kwargs)
    given = [describe(name, tensor) for name, tensor in zip("qkv", tensors, strict=False)]
    return Explanation("attention", f"{', '.join(given)}, {settings(q)}", (only,))


def explain_layer(layer: Module, *args: Any, **kwargs: Any) -> Explanation:
    """What `layer(*args, **kwargs)` would run, for one of LAYERS."""
    explained = []
    for call in attention_calls(layer, *args, **kwargs):
        if call.reason:
            grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.sources)
            explained.append(LayerExplanation(call.name, "torch", call.reason, grad))
        else:
            options = {**call.options, "sources": call.sources}
            explained.append(_explain_one(call.name, call.q, call.k, call.v, **options))
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return Explanation(repr(layer), f"{describe('input', first)}, {settings(first)}", tuple(explained))


def _explain_one(name: str, *args: Any, **options: Any) -> LayerExplanation:
    """A call of `functional.attention`. `sources` as in `AttentionCall`."""
    return_lse, sources = options.pop("return_lse", False), options.pop("sources", ())
    options.pop("deterministic", None)
    cu_q, cu_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    if cu_q is not None and cu_k is not None and functional.has_own_mask(options.get("attn_mask")):
        # Each sequence is a call. That of the longest is explained.
        options = {key: value for key, value in options.items() if "seqlen" not in key}
        rows, keys = functional.longest(cu_q), functional.longest(cu_k)
        q, k, *rest = (x[None, :n].transpose(1, 2) for x, n in zip(args, (rows, keys, keys), strict=False))
        mask = options["attn_mask"]
        options["attn_mask"] = mask[..., : q.shape[2], : k.shape[2]][-1:] if mask.dim() == 4 else mask
        name, args = f"{name}, for each of {cu_q.shape[0] - 1} sequences", (q, k, *rest)
    return _explain(name, *functional.checked(*args, **options), return_lse, sources)


def _explain_sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, *,
    scale: Any = None, enable_gqa: Any = False,
) -> tuple[Any, LayerExplanation]:  # fmt: skip
    call = sdpa.arrange(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, str):
        return query, LayerExplanation("call", "torch", f"torch's own function: {call}", grad=False)
    return query, _explain("call", call.cfg, call.given)


def _explain(
    name: str, cfg: AttentionConfig, given: AttentionInputs, return_lse: bool = False, sources: tuple[Tensor, ...] = ()
) -> LayerExplanation:  # fmt: skip
    q = given.q
    tensors = (*given[:6], *sources)
    decided = route_of_call(cfg, given, return_lse, sources)
    grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if not decided.native:
        return LayerExplanation(name, decided.path, decided.reason, grad)
    sizes = _sizes(given)
    if sizes["B"] * sizes["H"] * sizes["M"] == 0:
        return LayerExplanation(name, "nothing", "there is nothing to compute", grad)
    if q.is_cuda:
        plans = [_cuda_plan(q, cfg, given.mask, sizes)]
    else:
        native = extension.native
        assert native is not None
        sides = (False, True) if grad else (False,)
        plans = [dict(native.attention_plan(q.dtype, **sizes, backward=backward)) for backward in sides]
    forward, *backward = plans
    return LayerExplanation(name, "native", decided.reason, grad, forward, backward[0] if backward else {})


def _sizes(given: AttentionInputs) -> dict[str, int]:
    """The sizes that a plan is made for. Packed sequences count as equally many sequences of their mean length."""
    q, k, v = given[:3]
    sizes = {"H": q.shape[1], "Hkv": k.shape[1], "D": q.shape[-1], "Dv": v.shape[-1]}
    if given.cu_seqlens_q is None:
        return {**sizes, "B": q.shape[0], "M": q.shape[2], "N": k.shape[2]}
    count = given.cu_seqlens_q.shape[0] - 1
    return {**sizes, "B": count, "M": -(-q.shape[0] // max(count, 1)), "N": -(-k.shape[0] // max(count, 1))}


def _cuda_plan(q: Tensor, cfg: AttentionConfig, mask: Tensor | None, sizes: dict[str, int]) -> dict[str, Any]:
    from dlkernels.attention.triton import heuristics

    properties = torch.cuda.get_device_properties(q.device)
    busy = bool(cfg.dropout_p or cfg.softcap or (mask is not None and mask.dtype != torch.bool))
    half = q.element_size() == 2
    mask_bytes = 0 if mask is None else mask.element_size()
    width = max(heuristics.padded(sizes["D"]), heuristics.padded(sizes["Dv"]))
    plan = heuristics.forward_plan(
        heuristics.family((properties.major, properties.minor)), properties.multi_processor_count,
        half, width, busy, mask_bytes, cfg.dropout_p > 0, sizes["B"], sizes["H"], sizes["H"] // max(sizes["Hkv"], 1),
        cfg.max_seqlen_q or sizes["M"], cfg.max_seqlen_k or sizes["N"],
    )  # fmt: skip
    block_m, block_n = plan.tile[:2]
    return {
        "kernel": f"cuda/{plan.kernel}", "split": plan.splits, "block_m": block_m, "block_n": block_n,
        "reason": plan.reason,
    }  # fmt: skip
