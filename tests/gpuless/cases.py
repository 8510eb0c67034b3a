"""Attention calls that combine every feature with every other, and the judge of their results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from oracle import Piece, attention
from torch import Tensor

from dlkernels.testing import Verdict, error, within_rule

FACTORS: dict[str, tuple[Any, ...]] = {
    "lengths": tuple(itertools.product((1, 7, 81), repeat=2)),
    "widths": ((8, 8), (59, 59), (64, 64), (128, 128), (64, 40), (59, 128)),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "causal": (0, 1, 2),
    "window": ((-1, -1), (5, -1), (40, 3), (-1, 2), (0, 0)),
    "mask": (
        "none", "varlen", "bool full", "bool keys", "bool queries", "float full", "float MN", "float HMN", "float BMN",
        "float keys", "float queries", "float heads", "float32 MN",
    ),
    "group": (1, 2, 4),
    "alibi": ("none", "H", "BH"),
    "softcap": (0.0, 3.0),
    "sinks": (False, True),
    "dropout": (0.0, 0.3),
    "dlse": (False, True),
    "order": ("BHMD", "BMHD"),
    "scale": (None, 0.5, -0.3),
}  # fmt: skip


def _gain(missing: set[tuple[int, int, int, int]], row: dict[int, int], c: int, z: int) -> int:
    return sum(((d, w, c, z) if d < c else (c, z, d, w)) in missing for d, w in row.items())


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """A small set of combinations in which every pair of values of two factors occurs, built greedily and always the
    same."""
    names = list(factors)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    rows = []
    while missing:
        a, x, b, y = min(missing)
        row: dict[int, int] = {a: x, b: y}
        for c in range(len(names)):
            if c not in row:
                values = range(len(factors[names[c]]))
                # Among values of equal gain the choice rotates, so that a factor with all pairs covered still varies.
                row[c] = max(values, key=lambda z: (_gain(missing, row, c, z), (z + len(rows)) % len(values)))
        pairs = itertools.combinations(sorted(row.items()), 2)
        missing -= {(*first, *second) for first, second in pairs}
        rows.append({names[c]: factors[names[c]][z] for c, z in row.items()})
    return rows


class Inputs(NamedTuple):
    """All inputs of a forward and a backward call. `features` are the operator's arguments after q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor
    features: dict[str, Any]
    do: Tensor
    dlse: Tensor | None


def build(case: dict[str, Any], seed: int, batch: int = 2, place: Callable[[Tensor], Tensor] = lambda x: x) -> Inputs:
    """The inputs of a case. `place` copies each tensor to memory of its choice."""
    generator = torch.Generator().manual_seed(seed)
    M, N = case["lengths"]
    D, DV = case["widths"]
    dtype, kind = case["dtype"], case["mask"]
    heads = max(2, case["group"])
    kv_heads = heads // case["group"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def padded(h: int, rows: int, width: int) -> Tensor:
        if case["order"] == "BMHD":
            return normal(batch, rows, h, width).transpose(1, 2)
        return normal(batch, h, rows, width)

    cu_q = cu_k = None
    longest = (0, 0)
    if kind == "varlen":
        # The second sequence has no queries and the third no keys.
        q_lengths, k_lengths = (M, 0, 3, M // 2), (N, 4, 0, N)
        cu_q = place(torch.tensor([0, *itertools.accumulate(q_lengths)], dtype=torch.int32))
        cu_k = place(torch.tensor([0, *itertools.accumulate(k_lengths)], dtype=torch.int32))
        longest = (max(q_lengths), max(k_lengths))
        rows, cols, batch = sum(q_lengths), sum(k_lengths), 4
        q, k, v = normal(rows, heads, D), normal(cols, kv_heads, D), normal(cols, kv_heads, DV)
        do, dlse = normal(rows, heads, DV), torch.randn(heads, rows, generator=generator)
    else:
        q, k, v = padded(heads, M, D), padded(kv_heads, N, D), padded(kv_heads, N, DV)
        do, dlse = padded(heads, M, DV), torch.randn(batch, heads, M, generator=generator)
    causal, (left, right) = case["causal"], case["window"]
    features = {
        "mask": _mask(kind, batch, heads, M, N, dtype, generator),
        "alibi_slopes": None if case["alibi"] == "none" else torch.rand(
            (heads,) if case["alibi"] == "H" else (batch, heads), generator=generator
        ),
        "sinks": normal(heads) if case["sinks"] else None, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
        "rng": torch.tensor([-(2**40) - seed, 2**33 + 7]) if case["dropout"] else None, "max_seqlen_q": longest[0],
        "max_seqlen_k": longest[1], "softmax_scale": D**-0.5 if case["scale"] is None else case["scale"],
        "causal": causal, "window_left": left, "window_right": right, "softcap": case["softcap"],
        "dropout_p": case["dropout"],
    }  # fmt: skip
    features = {name: place(x) if isinstance(x, Tensor) and name != "rng" else x for name, x in features.items()}
    return Inputs(
        place(q), place(k), place(v), features, place(do), place(dlse.to(torch.float32)) if case["dlse"] else None
    )


def _mask(kind: str, B: int, H: int, M: int, N: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    if kind in ("none", "varlen"):
        return None
    name, _, shape_name = kind.partition(" ")
    shape = {
        "full": (B, H, M, N), "MN": (1, 1, M, N), "HMN": (1, H, M, N), "BMN": (B, 1, M, N), "keys": (B, 1, 1, N),
        "queries": (1, H, M, 1), "heads": (1, H, 1, 1),
    }[shape_name]  # fmt: skip
    if name == "bool":
        return torch.rand(shape, generator=generator) < 0.7
    mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Some pairs are hidden by -inf, but no whole heads, since nothing would be left to compare in those.
    hidden = torch.rand(shape, generator=generator) < (0.0 if shape_name == "heads" else 0.15)
    mask = mask.masked_fill(hidden, float("-inf"))
    return mask.to(torch.float32 if name == "float32" else dtype)


GRADIENTS = ("dq", "dk", "dv", "dmask", "dslopes", "dsinks")


class Leaves:
    """The inputs of a call in `dtype`, with a leaf for each input that needs a gradient."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype) -> None:
        self.by_gradient: dict[str, Tensor] = {}
        self.q, self.k, self.v = (
            self._leaf(name, x, dtype) for name, x in (("dq", inputs.q), ("dk", inputs.k), ("dv", inputs.v))
        )
        self.features = {x: y for x, y in inputs.features.items() if not x.startswith("max_seqlen")}
        for name, feature in (("dmask", "mask"), ("dslopes", "alibi_slopes"), ("dsinks", "sinks")):
            x = self.features[feature]
            if x is not None and x.is_floating_point():
                self.features[feature] = self._leaf(name, x, dtype)
        self.do = inputs.do.to(dtype)
        self.dlse = torch.zeros(()) if inputs.dlse is None else inputs.dlse.to(dtype)

    def _leaf(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        self.by_gradient[name] = x.detach().to(dtype).requires_grad_()
        return self.by_gradient[name]

    def gradients(self, outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, Tensor]:
        leaves = list(self.by_gradient.values())
        found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, retain_graph=True)
        filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))
        return dict(zip(self.by_gradient, filled, strict=True))


Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]


def exact(inputs: Inputs) -> Outcome:
    """(o, lse, gradients) in float64, by autograd."""
    x = Leaves(inputs, torch.float64)
    o, lse, _ = attention(x.q, x.k, x.v, **x.features)
    # The lse of a query that sees no key is -inf, and its gradient is 0.
    bounded = lse.masked_fill(lse == float("-inf"), 0.0)
    return o.detach(), lse.detach(), x.gradients((o, bounded), (x.do, x.dlse.expand_as(lse)))


def peer(inputs: Inputs, dtype: torch.dtype, draw: int = 0) -> Outcome:
    """The results that a fused op of torch would have in `dtype` if it had these features. It computes in float32,
    rounds p and ds for the matrix units, rounds o once, and starts the backward pass from that o and the log-sum-exp.

    Its error is random, and varies the more the fewer elements a result has. Each `draw` adds in another order and
    rounds p at another scale, as another tiling would."""
    generator = torch.Generator().manual_seed(draw)
    scale = 2.0 ** torch.rand((), generator=generator).item() if draw else 1.0

    def rounded(x: Tensor) -> Tensor:
        return (x * scale).to(dtype).float() / scale if dtype != torch.float32 else x

    def shuffled(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    x = Leaves(inputs, torch.float32)
    order, again = shuffled(x.q.size(-1)), shuffled(x.q.size(-1))
    o, lse, _ = attention(x.q[..., order], x.k[..., order], x.v, **x.features)
    # The backward pass computes the scores again and adds up their products in another order.
    _, _, pieces = attention(x.q[..., again], x.k[..., again], x.v, **x.features)
    dlse = x.dlse.expand_as(lse)
    gradients: dict[str, Tensor] = {}
    outputs = []
    for piece in pieces:
        p, keep = piece.p.detach(), piece.keep
        part_lse = piece.of_rows(lse.detach(), False)[..., None]
        # This is exp(scores - part_lse), computed from p, since in the difference the log-sum-exp of large scores would
        # lose the logarithm of the sum to rounding.
        again_lse = piece.lse.detach()[..., None]
        p_again = p * (again_lse - part_lse).exp().masked_fill(part_lse == float("-inf"), 0.0)
        do = piece.of_rows(x.do, True)
        values = piece.v.detach()
        keys, widths = shuffled(values.size(-2)), shuffled(values.size(-1))
        factor = keep.max() if keep.numel() else 1.0
        weights = rounded(p * (keep > 0))
        out = (weights[..., keys] @ values[..., keys, :] * factor).to(dtype).float()
        outputs.append(out)
        delta = (out * do)[..., widths].sum(-1, keepdim=True) - piece.of_rows(dlse, False)[..., None]
        dp = do[..., widths] @ values[..., widths].transpose(-1, -2) * keep
        ds = (p_again * (dp - delta)).masked_fill(p_again == 0, 0.0)
        dv = rounded(p_again * keep).transpose(-1, -2) @ do
        # What is added to the scores gets its gradient from the exact ds; operands of products from the rounded one.
        for names, weight in ((("dmask", "dslopes"), ds), (("dq", "dk"), rounded(ds))):
            found = x.gradients((piece.scores,), (weight,))
            for name in names:
                if name in found:
                    gradients[name] = gradients.get(name, 0.0) + found[name]
        gradients["dv"] = gradients.get("dv", 0.0) + x.gradients((piece.v,), (dv,))["dv"]
        if "dsinks" in x.by_gradient:
            p_sink = (x.features["sinks"].detach()[:, None] - part_lse[..., 0]).exp()
            gradients["dsinks"] = gradients.get("dsinks", 0.0) - (p_sink * delta[..., 0]).sum((0, 2))
    return _joined(o, pieces, outputs), lse.detach(), gradients


class Judge:
    """Compares results with float64 by the rule of dlkernels.testing, measured by the worst of four peers."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype) -> None:
        self.o, self.lse, self.gradients = exact(inputs)
        self.peers = [peer(inputs, dtype, draw) for draw in range(4)]
        # An upper bound of dp times the largest factor by which it is multiplied in a gradient.
        q, k, v, _, do, _ = (x.double() if isinstance(x, Tensor) else x for x in inputs)
        dp = (do.norm(dim=-1).max() * v.norm(dim=-1).max()) if v.numel() and do.numel() else torch.zeros(())
        factor = max([1.0, *(float(x.abs().max()) for x in (q, k) if x.numel())])
        self.largest_term = float(dp) * factor * q.size(-2)

    def output(self, o: Tensor, dtype: torch.dtype) -> Verdict:
        return within_rule(o, _worst([peer[0] for peer in self.peers], self.o), self.o, dtype)

    def logarithm(self, lse: Tensor) -> Verdict:
        return within_rule(lse, _worst([peer[1] for peer in self.peers], self.lse), self.lse, torch.float32)

    def gradient(self, name: str, actual: Tensor) -> Verdict:
        dtype, ref = actual.dtype, self.gradients[name]
        if name != "dv" and ref.numel() and ref.abs().max() <= 1e-9 * self.largest_term:
            # In a softmax over one key ds = p * (dp - delta) is 0, and only the rounding errors of dp and delta remain.
            found, limit = error(actual, ref), torch.finfo(dtype).eps * self.largest_term
            return Verdict(found <= limit, found, 0.0, limit)
        peers = [peer[2][name].to(dtype) for peer in self.peers]
        return within_rule(actual, _worst(peers, ref), ref, dtype, grad=True)


def _worst(peers: Sequence[Tensor], ref: Tensor) -> Tensor:
    return max(peers, key=lambda x: error(x, ref))


def _joined(o: Tensor, pieces: Sequence[Piece], outputs: Sequence[Tensor]) -> Tensor:
    if o.dim() == 4:
        return outputs[0]
    return torch.cat([out[0].transpose(0, 1) for out in outputs])


def label(case: dict[str, Any]) -> str:
    parts: Sequence[str] = [
        "x".join(map(str, case["lengths"])), "d" + "-".join(map(str, case["widths"])), str(case["dtype"])[6:],
        f"causal{case['causal']}", f"win{case['window'][0]},{case['window'][1]}", case["mask"].replace(" ", "_"),
        f"g{case['group']}", f"alibi{case['alibi']}", f"cap{case['softcap']:g}", "sinks" * case["sinks"],
        "drop" * bool(case["dropout"]), "dlse" * case["dlse"], case["order"], f"scale{case['scale']}",
    ]  # fmt: skip
    return "-".join(part for part in parts if part)
