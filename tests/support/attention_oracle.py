"""A second implementation of the attention operators: a short PyTorch oracle that works in any dtype. A Case describes
a call, and Data holds its tensors. Nothing here is imported from dlkernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call. `mask` names the dimensions of [B, H, M, N] that are not 1 in the shape of the mask ("bhmn", "mn", "n",
    ...); None means no mask. `lengths_q` and `lengths_k` are the lengths of packed sequences. Dropout is seeded from
    `seed`."""

    B: int = 2
    H: int = 2
    Hkv: int = 2
    M: int = 7
    N: int = 7
    D: int = 8
    Dv: int = 8
    dtype: torch.dtype = torch.float32
    mask: str | None = None
    mask_kind: str = "bool"  # bool, own (dtype of q) or float32
    offset: float = 0.0  # if not 0, most rows of a float mask are filled with this value
    causal: int = 0
    window: tuple[int, int] = (-1, -1)
    slopes: str | None = None  # "h" or "bh"
    sinks: bool = False
    sink: float | None = None  # the value of the first head's sink
    softcap: float = 0.0
    scale: float | None = None
    dropout: float = 0.0
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    layout: str = "bhmd"  # memory order of q, k, v
    dlse: bool = True
    seed: int = 0

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name in "BHMND" or getattr(self, f.name) != f.default
        ]
        return " ".join(changed).replace("torch.", "")

    @property
    def varlen(self) -> bool:
        return self.lengths_q is not None

    @property
    def small(self) -> torch.dtype:
        """The dtype of slopes and sinks."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def softmax_scale(self) -> float:
        return self.scale if self.scale is not None else (self.D**-0.5 if self.D else 1.0)


@dataclass
class Data:
    """Float64 values that are exact in the case's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor | None
    mask: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    rng: Tensor | None


def make_data(case: Case) -> Data:
    g = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype or case.dtype).double()

    def cu(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    c = case
    cu_q = cu_k = None
    if c.lengths_q is not None and c.lengths_k is not None:
        cu_q, cu_k = cu(c.lengths_q), cu(c.lengths_k)
        q, k, v = (
            draw(n, h, w)
            for n, h, w in (
                (sum(c.lengths_q), c.H, c.D),
                (sum(c.lengths_k), c.Hkv, c.D),
                (sum(c.lengths_k), c.Hkv, c.Dv),
            )
        )
        do, dlse = draw(sum(c.lengths_q), c.H, c.Dv), draw(c.H, sum(c.lengths_q), dtype=torch.float32)
    else:
        q, k, v = draw(c.B, c.H, c.M, c.D), draw(c.B, c.Hkv, c.N, c.D), draw(c.B, c.Hkv, c.N, c.Dv)
        do, dlse = draw(c.B, c.H, c.M, c.Dv), draw(c.B, c.H, c.M, dtype=torch.float32)
    mask = None
    if c.mask is not None:
        shape = [size if letter in c.mask else 1 for letter, size in zip("bhmn", (c.B, c.H, c.M, c.N), strict=True)]
        visible = torch.rand(shape, generator=g) < 0.7
        if c.mask_kind == "bool":
            mask = visible
        else:
            of_mask = torch.float32 if c.mask_kind == "float32" else c.dtype
            mask = draw(*shape, dtype=of_mask)
            if c.offset:
                far = torch.tensor(max(c.offset, torch.finfo(c.dtype).min), dtype=of_mask).double()
                mask = torch.where(torch.rand(*shape[:3], 1, generator=g) < 0.7, far, mask)
            mask = mask.masked_fill(~visible, -math.inf)
    slopes = None
    if c.slopes is not None:
        slopes = draw(*((c.B, c.H) if c.slopes == "bh" else (c.H,)), dtype=torch.float32, scale=0.3).abs()
    sinks = draw(c.H, dtype=torch.float32) if c.sinks else None
    if sinks is not None and c.sink is not None:
        sinks[0] = torch.tensor(c.sink, dtype=c.small).double()
    return Data(
        q, k, v, do, dlse if c.dlse else None, mask,
        slopes=slopes,
        sinks=sinks,
        cu_q=cu_q, cu_k=cu_k,
        rng=torch.tensor([c.seed + (1 << 40), 5 + c.seed]) if c.dropout else None,
    )  # fmt: skip


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b
    total = (high & 0xFFFF) * 65536 + low
    return ((high >> 16) + (total >> 32)) & 0xFFFFFFFF, total & 0xFFFFFFFF


def keep_mask(case: Case, rng: Tensor, b: int, H: int, M: int, N: int) -> Tensor:
    """Returns a boolean tensor [H, M, N]: the elements that dropout keeps, drawn with Philox4x32-10."""
    seed, offset = (int(x) for x in rng.tolist())
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    groups = (N + 3) // 4
    shape = (H, M, groups)
    c = [
        torch.arange(groups).expand(shape),
        torch.arange(M)[:, None].expand(shape),
        (torch.arange(H) + b * H)[:, None, None].expand(shape),
        torch.full(shape, offset & 0xFFFFFFFF),
    ]
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c[0])
        hi1, lo1 = _mulhilo(0xCD9E8D57, c[2])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = torch.stack(c, -1).reshape(H, M, groups * 4)[..., :N]
    return words >= math.floor(case.dropout * 2**32)


def visible_keys(case: Case, M: int, N: int) -> Tensor:
    """Returns a boolean tensor [M, N]: the keys that the causal mask and the window leave visible."""
    i, j = torch.arange(M)[:, None], torch.arange(N)
    p = i + (N - M if case.causal == 2 else 0)
    visible = torch.ones(M, N, dtype=torch.bool)
    if case.causal:
        visible &= j <= p
    if case.window[0] >= 0:
        visible &= j >= p - case.window[0]
    if case.window[1] >= 0:
        visible &= j <= p + case.window[1]
    return visible


def scores(case: Case, q: Tensor, k: Tensor, slopes: Tensor | None, mask: Tensor | None) -> Tensor:
    """Returns the scores [H, M, N] of one sequence; those of hidden keys are -inf."""
    H, M, N = q.shape[0], q.shape[1], k.shape[1]
    k = k.repeat_interleave(H // k.shape[0], 0) if k.shape[0] else k
    s = (q @ k.transpose(-1, -2)) * case.softmax_scale
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    if slopes is not None:
        p = torch.arange(M, dtype=s.dtype)[:, None] + (N - M if case.causal == 2 else 0)
        s = s - slopes.to(s.dtype)[:, None, None] * (p - torch.arange(N, dtype=s.dtype)).abs()
    visible = visible_keys(case, M, N).expand(H, M, N)
    if mask is not None:
        mask = mask.expand(H, M, N)
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            visible = visible & (mask != -math.inf)
            s = s + mask.to(s.dtype).masked_fill(~visible, 0.0)
    return s.masked_fill(~visible, -math.inf)


class FlashSoftmax(torch.autograd.Function):
    """Computes softmax, dropout and the product with v of one sequence as a flash attention does: o is rounded to
    `storage`, and the backward computes delta from the rounded o. The error of this function measures the accuracy that
    such a backward can reach."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, v: Tensor, kept: Tensor, sink: Tensor | None, storage: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        lse, p, top, total = softmax(s, sink)
        o = ((p * kept) @ v).to(storage).to(s.dtype)
        ctx.save_for_backward(s, v, kept, sink, o, top, total)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        s, v, kept, sink, o, top, total = ctx.saved_tensors
        p = torch.exp(s - top[..., None]) / total[..., None]
        delta = (do * o).sum(-1) - dlse
        ds = p * ((do @ v.transpose(-1, -2)) * kept - delta[..., None])
        dsink = None if sink is None else -(torch.exp(sink[:, None] - top) / total * delta).sum(-1)
        return ds, (p * kept).transpose(-1, -2) @ do, None, dsink, None


def softmax(s: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns, for scores [H, M, N], lse and the probabilities, and the largest score and the sum that both are
    computed from. The probabilities are not computed from lse, because the logarithm of the sum is rounded away in it
    when the largest score is large."""
    logits = s if sink is None else torch.cat([s, sink.to(s.dtype)[:, None, None].expand(*s.shape[:2], 1)], -1)
    top = logits.detach().amax(-1) if logits.shape[-1] else s.new_full(s.shape[:2], -math.inf)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = torch.exp(logits - top[..., None]).sum(-1)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, -math.inf)
    return lse, torch.exp(s - top[..., None]) / total[..., None], top, total


def one_sequence(
    case: Case, d: Data, b: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flash: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    slopes = None if d.slopes is None else (d.slopes if d.slopes.dim() == 1 else d.slopes[b])
    s = scores(case, q, k, slopes, mask)
    H, M, N = s.shape
    v = v.repeat_interleave(H // v.shape[0], 0) if v.shape[0] else v
    kept = torch.ones((), dtype=s.dtype)
    if case.dropout:
        assert d.rng is not None
        kept = keep_mask(case, d.rng, b, H, M, N).to(s.dtype) * (0.0 if case.dropout == 1 else 1 / (1 - case.dropout))
    if flash is not None:
        sink = None if d.sinks is None else d.sinks.to(s.dtype)
        return FlashSoftmax.apply(s, v, kept, sink, flash)  # type: ignore[no-any-return, no-untyped-call]
    lse, p, *_ = softmax(s, d.sinks)
    return (p * kept) @ v, lse


def oracle(case: Case, d: Data, flash: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Returns o and lse in the dtype of d.q. Both are differentiable."""
    if case.B == 0:
        return d.v.sum() + d.v.new_zeros(0, case.H, case.M, case.Dv), d.q.sum() + d.v.new_zeros(0, case.H, case.M)
    if d.cu_q is None or d.cu_k is None:
        masks = [None if d.mask is None else d.mask[b % d.mask.shape[0]] for b in range(case.B)]
        parts = [one_sequence(case, d, b, d.q[b], d.k[b], d.v[b], masks[b], flash) for b in range(case.B)]
        return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    cu_q, cu_k = d.cu_q.tolist(), d.cu_k.tolist()
    outs, lses = [], []
    for b in range(len(cu_q) - 1):
        q = d.q[cu_q[b] : cu_q[b + 1]].transpose(0, 1)
        k, v = (t[cu_k[b] : cu_k[b + 1]].transpose(0, 1) for t in (d.k, d.v))
        o, lse = one_sequence(case, d, b, q, k, v, None, flash)
        outs.append(o.transpose(0, 1))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, -1)


def pooled_map(case: Case, d: Data, rows: int, cols: int) -> Tensor:
    """Returns [B, H, rows, cols], the definition of the operator attention_map."""
    pictures = []
    for b in range(case.B):
        slopes = None if d.slopes is None else (d.slopes if d.slopes.dim() == 1 else d.slopes[b])
        mask = None if d.mask is None else d.mask[b % d.mask.shape[0]]
        p = softmax(scores(case, d.q[b], d.k[b], slopes, mask), d.sinks)[1]
        row_bin = torch.arange(case.M) * rows // max(case.M, 1)
        col_bin = torch.arange(case.N) * cols // max(case.N, 1)
        into_rows = (torch.arange(rows)[:, None] == row_bin).to(p.dtype)
        into_cols = (col_bin[:, None] == torch.arange(cols)).to(p.dtype)
        pictures.append(into_rows / into_rows.sum(-1, keepdim=True).clamp(min=1) @ p @ into_cols)
    return torch.stack(pictures)


def leaves(d: Data) -> Results:
    found = {"q": d.q, "k": d.k, "v": d.v, "mask": d.mask, "slopes": d.slopes, "sinks": d.sinks}
    return {name: t for name, t in found.items() if t is not None and t.dtype != torch.bool}


def cast(d: Data, dtype: torch.dtype) -> Data:
    """Returns the same values in another dtype. dlse, slopes and sinks are at least float32; bool masks stay bool."""
    small = torch.float32 if dtype != torch.float64 else torch.float64

    def to(t: Tensor | None, to_dtype: torch.dtype) -> Tensor | None:
        return t if t is None or t.dtype == torch.bool else t.to(to_dtype)

    q, k, v, do = (t.to(dtype) for t in (d.q, d.k, d.v, d.do))
    return dataclasses.replace(
        d, q=q, k=k, v=v, do=do, dlse=to(d.dlse, small), mask=to(d.mask, dtype), slopes=to(d.slopes, small),
        sinks=to(d.sinks, small),
    )  # fmt: skip


def run_oracle(
    case: Case, data: Data, dtype: torch.dtype, grads: bool = True, flash: torch.dtype | None = None
) -> Results:
    """Computes o, lse and the gradients in `dtype`."""
    d = cast(data, dtype)
    variables = {name: t.detach().clone().requires_grad_(grads) for name, t in leaves(d).items()}
    o, lse = oracle(case, dataclasses.replace(d, **variables), flash)
    results = {"o": o.detach(), "lse": lse.detach()}
    if not grads:
        return results
    # A row that sees no key has lse = -inf, which has no gradient.
    lse_term = 0.0 if d.dlse is None else (lse.masked_fill(lse == -math.inf, 0.0) * d.dlse.to(lse.dtype)).sum()
    found = torch.autograd.grad((o * d.do.to(o.dtype)).sum() + lse_term, list(variables.values()), allow_unused=True)
    for (name, variable), gradient in zip(variables.items(), found, strict=True):
        results["d" + name] = torch.zeros_like(variable) if gradient is None else gradient
    return results


def measures(case: Case, data: Data, grads: bool = True) -> list[Results]:
    """Returns plain PyTorch's results in the case's dtype, once with its own softmax and once as flash attention."""
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    flash = run_oracle(case, data, compute, grads, flash=case.dtype)
    return [run_oracle(case, data, case.dtype, grads), {n: t.to(result_dtype(case, n)) for n, t in flash.items()}]


def other_orders(case: Case, data: Data) -> Iterator[Results]:
    """Yields `measures` of the same call with D and Dv permuted, which changes the order of every sum over them."""
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        d, dv = (torch.randperm(width, generator=g) for width in (case.D, case.Dv))
        moved = dataclasses.replace(data, q=data.q[..., d], k=data.k[..., d], v=data.v[..., dv], do=data.do[..., dv])
        back = {"o": dv.argsort(), "dv": dv.argsort(), "dq": d.argsort(), "dk": d.argsort()}
        for results in measures(case, moved):
            yield {name: t[..., back[name]] if name in back else t for name, t in results.items()}


def result_dtype(case: Case, name: str) -> torch.dtype:
    if name in ("lse", "dslopes", "dsinks"):
        return case.small
    return torch.float32 if name == "dmask" and case.mask_kind == "float32" else case.dtype


def op_arguments(case: Case, d: Data) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns (q, k, v) and the arguments after them, in the operators' order and the case's dtypes."""

    def arrange(t: Tensor) -> Tensor:
        t = t.to(case.dtype)
        if case.layout == "bmhd" and not case.varlen:
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if case.layout == "strided":
            return torch.stack([t, t], -1)[..., 0]
        return t

    mask = d.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(torch.float32 if case.mask_kind == "float32" else case.dtype)
    small = (None if t is None else t.to(case.small) for t in (d.slopes, d.sinks))
    lengths = (max(case.lengths_q or (0,)), max(case.lengths_k or (0,)))
    rules = (case.softmax_scale, case.causal, *case.window, case.softcap, case.dropout)  # both operators take these
    return tuple(map(arrange, (d.q, d.k, d.v))), (mask, *small, d.cu_q, d.cu_k, d.rng, *lengths, *rules)


def run_op(case: Case, d: Data, grads: bool = True, needs: tuple[bool, ...] | None = None) -> Results:
    qkv, rest = op_arguments(case, d)
    o, lse, stats = torch.ops.dlkernels.attention(*qkv, *rest, False)
    results = {"o": o, "lse": lse}
    if not grads:
        return results
    wanted = needs or (True, True, "mask" in leaves(d), d.slopes is not None, d.sinks is not None)
    dlse = None if d.dlse is None else d.dlse.to(lse.dtype)
    found = torch.ops.dlkernels.attention_backward(d.do.to(case.dtype), dlse, *qkv, o, stats, *rest, *wanted)
    for name, gradient in zip(("dq", "dk", "dv", "dmask", "dslopes", "dsinks"), found, strict=True):
        if gradient.shape != (0,):
            results[name] = gradient
    return results
