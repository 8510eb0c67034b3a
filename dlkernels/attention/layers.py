"""MultiheadAttention: torch.nn's class with another forward.

Sizes: B batch, H heads, D features a head, E = H * D, M queries, N keys. The heads are strided views of the
projections, [B, H, M, D], and masks keep the size-1 dimensions that they have, so nothing of M x N elements is made
unless the caller gives a mask of that size or asks for the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as apply_dropout
from torch.nn.functional import linear

from dlkernels._core import extension
from dlkernels._core.autocast import autocast_dtype
from dlkernels._core.private_torch import safe_softmax
from dlkernels._core.tools import PUBLIC_MODULE, KnownLayer, is_tracing
from dlkernels.attention import by_torch, functional, masks
from dlkernels.attention.nested import from_rows, to_rows

__all__ = ["MultiheadAttention"]

Triple = tuple[Tensor, Tensor, Tensor]
Weighted = tuple[Tensor, Tensor | None]


class MultiheadAttention(KnownLayer, torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fused attention kernels.

    Nested tensors, strided and jagged, are accepted in training and for cross attention too. Queries that may attend to
    nothing get zeros, never NaN.
    """

    __module__ = PUBLIC_MODULE

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As in torch.nn. The fused kernels run with `need_weights=False`; with weights, PyTorch operations compute the
        M x N probabilities, and the output from them."""
        for mask in (attn_mask, key_padding_mask):
            if mask is not None:
                torch.is_floating_point(mask)  # raises TypeError if it is no tensor
        given = (query, key, value, attn_mask, key_padding_mask)
        # torch.jit.trace records torch's own operators.
        if is_tracing() or (extension.prefers_torch and self._is_torchs(*given)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        attn_mask, key_padding_mask = masks.same_kind(
            attn_mask, "attn_mask", key_padding_mask, "key_padding_mask", query.dtype
        )
        if query.is_nested or key.is_nested or value.is_nested:
            if attn_mask is not None or key_padding_mask is not None:
                raise AssertionError("MultiheadAttention does not support masks beside NestedTensor input")
            return self._nested_forward(query, key, value, need_weights, average_attn_weights, is_causal)
        batched = masks.check_inputs(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        _check_hint(is_causal, attn_mask)
        if not batched:
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
            same_kv, same_qk = key is value, query is key
            query = query.unsqueeze(0)
            key = query if same_qk else key.unsqueeze(0)
            value = key if same_kv else value.unsqueeze(0)
        batch_first = self.batch_first or not batched
        out, weights = self._dense_forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, batch_first
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _is_torchs(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> bool:
        """Whether torch.nn's forward runs the call. Not where its gradient is wanted: torch's fused kernel has no
        second derivative. `dlkernels.explain` overrides this."""
        if torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad or self._trains_in_projection()
        ):
            return False
        return by_torch.serves_layer(query, key, value, *masks)

    def _dense_forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None, need_weights: bool,
        attn_mask: Tensor | None, is_causal: bool, batch_first: bool,
    ) -> Weighted:  # fmt: skip
        self._check_sizes(query, key, value)
        batch_dim, seq_dim = (0, 1) if batch_first else (1, 0)
        batch, queries, keys = query.size(batch_dim), query.size(seq_dim), key.size(seq_dim)
        hint = bool(is_causal) and not need_weights
        if self.batch_first and batch_first:
            query, key, value = self._private(query, key, value)
        q, k, v = self._project(query, key, value)
        if attn_mask is not None and (padding_mask is not None or not hint):
            masks.check_attn_mask(attn_mask, batch, self.num_heads, queries, keys)
        if key.size(batch_dim) != batch:
            raise RuntimeError(f"expected key and value of batch size {batch}, as query has, got {key.size(batch_dim)}")
        if padding_mask is not None:
            masks.check_key_padding_mask(padding_mask, batch, keys)
        k, v, extra = self._append_keys(k, v, batch, batch_dim, seq_dim)
        q, k, v = (self._split_heads(projected, batch_first) for projected in (q, k, v))
        mask, causal = masks.combine(attn_mask, padding_mask, hint, self.num_heads, extra)
        o, weights = self._attend(q, k, v, need_weights, attn_mask=mask, causal=causal)
        if batch_first and not self.training:
            return self._project_out(o.transpose(1, 2)), weights
        # The memory order of torch.nn's result: in training a dropout often follows, which draws its mask in it.
        out = self._project_out(o.permute(2, 0, 1, 3))
        return out.transpose(0, 1) if batch_first else out, weights

    def _nested_forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool, is_causal: bool
    ) -> Weighted:  # fmt: skip
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise AssertionError("MultiheadAttention: query, key and value should be NestedTensors, or none of them")
        if not self.batch_first:
            raise AssertionError("MultiheadAttention does not support NestedTensor where batch_first is not True")
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            raise AssertionError("MultiheadAttention does not support NestedTensor with add_bias_kv or add_zero_attn")
        _check_hint(is_causal, None)
        of_query = to_rows(query)
        of_key = of_query if key is query else to_rows(key)
        of_value = of_key if value is key else to_rows(value)
        self._check_sizes(of_query.rows, of_key.rows, of_value.rows)
        if of_value is not of_key and not torch.equal(of_key.cu_seqlens, of_value.cu_seqlens):
            raise AssertionError("key's sequence lengths do not match value's")
        if len(of_query.cu_seqlens) != len(of_key.cu_seqlens):
            raise RuntimeError("expected query and key to have the same number of sequences")
        q, k, v = (
            torch.unflatten(rows, -1, (self.num_heads, -1))
            for rows in self._project(of_query.rows, of_key.rows, of_value.rows)
        )
        if not need_weights:
            o, _ = self._attend(
                q, k, v, False, cu_seqlens_q=of_query.cu_seqlens, cu_seqlens_k=of_key.cu_seqlens,
                max_seqlen_q=of_query.max_seqlen, max_seqlen_k=of_key.max_seqlen,
            )  # fmt: skip
            return from_rows(self._project_out(o), query), None
        here, there = of_query.places(), of_key.places()
        padded = [
            projected.new_zeros(*places.shape, *projected.shape[1:]).index_put((places,), projected).transpose(1, 2)
            for projected, places in ((q, here), (k, there), (v, there))
        ]
        o, weights = self._attend(padded[0], padded[1], padded[2], True, attn_mask=there[:, None, None, :])
        assert weights is not None
        weights = weights.masked_fill(~here[:, None, :, None], 0.0)
        out = from_rows(self._project_out(o.transpose(1, 2)[here]), query)
        return out, weights.mean(dim=1) if average else weights

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        features = query.size(-1)
        if features != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {features}")
        if self._qkv_same_embed_dim:
            if key.shape != value.shape:
                raise AssertionError(f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}")
            return
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {tuple(key.shape[:-1])} do not match value's {tuple(value.shape[:-1])}"
            )
        for name, weight, x in (("key", self.k_proj_weight, key), ("value", self.v_proj_weight, value)):
            if weight.shape != (features, x.size(-1)):
                raise AssertionError(
                    f"expecting {name} weights shape of {(features, x.size(-1))}, but got {tuple(weight.shape)}"
                )

    def _private(self, query: Tensor, key: Tensor, value: Tensor) -> Triple:
        """Copies of the inputs, which the gradients of the in-projection's weights read. A program may edit its inputs
        after the call (`x += attention(x)`), as with torch.nn, which copies batch_first inputs to another order."""
        if not torch.is_grad_enabled() or not self._trains_in_projection():
            return query, key, value
        own_query = query.clone()
        own_key = own_query if key is query else key.clone()
        return own_query, own_key, own_query if value is query else own_key if value is key else value.clone()

    def _trains_in_projection(self) -> bool:
        """Whether a weight of the in-projection requires a gradient. Parametrized weights are not computed to find out,
        since that may have side effects (spectral norm's power iteration)."""
        names = ("in_proj_weight",) if self._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        computed: Any = self._modules.get("parametrizations", {})
        return any(
            any(p.requires_grad for p in computed[name].parameters())
            if name in computed
            else getattr(self, name).requires_grad
            for name in names
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Triple:
        """q, k and v [.., E] in as few products as the identities among the inputs allow."""
        e, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = (linear(*args) for args in zip((query, key, value), weights, biases, strict=True))
            return q, k, v
        weight: Any = self.in_proj_weight
        if key is value:
            if query is key:
                q, k, v = linear(query, weight, bias).chunk(3, dim=-1)
                return q, k, v
            b_q, b_kv = (None, None) if bias is None else (bias[:e], bias[e:])
            k, v = linear(key, weight[e:], b_kv).chunk(2, dim=-1)
            return linear(query, weight[:e], b_q), k, v
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (linear(*args) for args in zip((query, key, value), weight.chunk(3), biases, strict=True))
        return q, k, v

    def _append_keys(
        self, k: Tensor, v: Tensor, batch: int, batch_dim: int, seq_dim: int
    ) -> tuple[Tensor, Tensor, int]:
        """Appends bias_k and bias_v, then zeros, to the projected keys and values; also returns how many keys."""
        if (self.bias_k is None) != (self.bias_v is None):
            raise AssertionError("bias_k and bias_v should be set both or neither")
        added: list[tuple[Tensor, Tensor]] = []
        shape = list(k.shape)
        shape[seq_dim], shape[batch_dim] = 1, batch
        if self.bias_k is not None and self.bias_v is not None:
            added.append((self.bias_k.to(k.dtype).expand(shape), self.bias_v.to(v.dtype).expand(shape)))
        if self.add_zero_attn:
            added.append((k.new_zeros(shape), v.new_zeros(shape)))
        if added:
            k = torch.cat([k, *(pair[0] for pair in added)], dim=seq_dim)
            v = torch.cat([v, *(pair[1] for pair in added)], dim=seq_dim)
        return k, v, len(added)

    def _split_heads(self, projected: Tensor, batch_first: bool) -> Tensor:
        """[B, N, E] or [N, B, E] -> [B, H, N, D], a view."""
        heads = torch.unflatten(projected, -1, (self.num_heads, -1))
        return heads.transpose(1, 2) if batch_first else heads.permute(1, 2, 0, 3)

    def _project_out(self, o: Tensor) -> Tensor:
        """[.., H, D] -> [.., E], through the output projection."""
        return linear(o.flatten(-2), self.out_proj.weight, self.out_proj.bias)

    def _dropout_p(self) -> float:
        if not self.training:
            return 0.0
        if not isinstance(self.dropout, (int, float)):
            raise TypeError(f"dropout should be a number, got: {type(self.dropout).__name__}")
        if not 0.0 <= self.dropout <= 1.0:
            raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {self.dropout}")
        return float(self.dropout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool, **options: Any) -> Weighted:
        """The attention itself; `options` as `functional.attention` has them. `dlkernels.explain` overrides it."""
        if not need_weights:
            return functional.attention(q, k, v, dropout_p=self._dropout_p(), **options), None
        # torch.nn returns the weights as they are after dropout, so the probabilities have to be a tensor here. The
        # output is computed from them too, which takes fewer products and draws the same dropout mask as torch.
        weights = _probabilities(q, k, options["attn_mask"])
        p = self.dropout if self.training else 0.0
        if p > 0.0:
            weights = apply_dropout(weights, p)
        return weights @ v, weights


def _check_hint(is_causal: bool, attn_mask: Tensor | None) -> None:
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, M, N], with zeros where a query may attend to nothing."""
    scores = (q * math.sqrt(1.0 / q.size(-1))) @ k.transpose(-2, -1)
    if mask is None:
        return torch.softmax(scores, dim=-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), float("-inf"))
    else:
        if mask.dtype != scores.dtype and autocast_dtype(scores) is None:
            raise RuntimeError(f"attn_mask: expected bool or {scores.dtype}, as the input has, got {mask.dtype}")
        scores = scores + mask.to(scores.dtype)
    # On CUDA, autocast computes torch.softmax in float32, but does nothing for the operator behind `safe_softmax`.
    widen = scores.is_cuda and autocast_dtype(scores) is not None
    return safe_softmax(scores, -1, torch.float32 if widen else None)
