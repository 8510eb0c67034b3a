"""The attention cases, and a workload that runs one side of such a case."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import functional, reference
from ..attention.functional import draw_seed
from .cases import SHORT_DTYPE, packed_lengths
from .layers import inferred

# torch's backends, which a case may name instead of torch's own choice. On the CPU there are no others.
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Sizes as in `dlkernels.functional.attention`; 0 for Hkv, N and Dv means H, M and D. mask: "bool" [B, 1, 1, N],
    "bias" [1, H, M, N], or "grad", such a bias with a gradient. packed: sequences of M down to M / 4 rows, given by
    cu_seqlens to us and padded with a mask to torch. against: "torch" (its own choice) or one of its BACKENDS."""

    B: int
    H: int
    M: int
    D: int
    N: int = 0
    Hkv: int = 0
    Dv: int = 0
    causal: bool = False
    mask: str = ""
    dropout: float = 0.0
    training: bool = False
    packed: bool = False
    dtype: str = "float32"
    threads: int = 1
    against: str = "torch"
    target: float | None = None
    mode: str = "attention"
    cell: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Hkv, N and Dv."""
        return self.Hkv or self.H, self.N or self.M, self.Dv or self.D

    @property
    def features(self) -> list[str]:
        names = ["causal"] * self.causal + [f"{self.mask}-mask"] * bool(self.mask) + ["packed"] * self.packed
        return names + ([f"dropout{self.dropout:g}"] if self.dropout else [])

    @property
    def shape_text(self) -> str:
        sizes = {"B": self.B, "H": self.H, "Hkv": self.Hkv, "M": self.M, "N": self.N, "D": self.D, "Dv": self.Dv}
        return "-".join(f"{name}{size}" for name, size in sizes.items() if size)

    @property
    def workload(self) -> str:
        """The name without the thread count."""
        against = [f"vs-{self.against}"] if self.against != "torch" else []
        what = "train" if self.training else "infer"
        return "-".join([self.mode, what, *self.features, *against, SHORT_DTYPE[self.dtype], self.shape_text])

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.threads}t"

    @property
    def regime(self) -> str:
        if self.M * (self.H // self.sizes[0]) <= 16:
            return "latency"
        return "GEMM-bound" if self.B * self.H * self.M * self.sizes[1] * self.D >= 2**29 else "middle"

    @property
    def lengths(self) -> list[int]:
        """The lengths of the sequences of a packed case."""
        return packed_lengths(self.M, self.B)

    @property
    def valid_fraction(self) -> float:
        return 1.0  # both sides do the same work


# (B, H, M, D)
SQUARE = ((1, 8, 1024, 64), (4, 8, 512, 64))
GRID = (*SQUARE, (8, 12, 197, 64), (1, 8, 1024, 128), (2, 8, 128, 32), (1, 2, 4096, 64))
DECODE = AttentionCase(1, 32, 1, 128, N=2048, Hkv=8)
CROSS = AttentionCase(2, 8, 97, 80, N=1025)


def grid(threads: Sequence[int], dtypes: Sequence[str], quick: bool = False) -> list[AttentionCase]:
    """All variants for the first dtype; for the others only the shapes, with the largest thread count. Thread counts
    vary fastest."""
    made: list[AttentionCase] = []
    for dtype, training in itertools.product(dtypes[:1] if quick else dtypes, (False, True)):
        new = functools.partial(AttentionCase, dtype=dtype, training=training)
        shapes = GRID[1:2] if quick else GRID
        found = [new(*shape, causal=causal) for shape in shapes for causal in (False, True)]
        if dtype == dtypes[0] and not quick:
            first = SQUARE[0]
            found += [new(*first, mask=mask) for mask in ("bool", "bias")]
            found += [
                new(*first, Hkv=2),
                new(*first, Dv=32),
                new(*SQUARE[1], packed=True),
                dataclasses.replace(CROSS, dtype=dtype, training=training),
            ]
            found += [new(*first, against=backend) for backend in BACKENDS]
            if training:
                found += [new(*first, mask="grad"), new(*first, dropout=0.1)]
        if not training:
            found.append(dataclasses.replace(DECODE, dtype=dtype))
        made += found

    def counts(case: AttentionCase) -> Sequence[int]:
        return threads[-1:] if quick or case.dtype != dtypes[0] else threads

    return [dataclasses.replace(case, threads=count) for case in made for count in counts(case)]


Tensors = dict[str, Tensor]


def make_inputs(case: AttentionCase, seed: int = 0) -> Tensors:
    """q, k, v, do and mask, made in float32 and rounded to the dtype; for packed cases [rows, heads, width]."""
    generator = torch.Generator().manual_seed(seed)
    Hkv, N, Dv = case.sizes

    def draw(heads: int, rows: int, width: int) -> Tensor:
        shape = (sum(case.lengths), heads, width) if case.packed else (case.B, heads, rows, width)
        return torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))

    made = {"q": draw(case.H, case.M, case.D), "k": draw(Hkv, N, case.D), "v": draw(Hkv, N, Dv)}
    made["do"] = draw(case.H, case.M, Dv)
    if case.mask == "bool":
        made["mask"] = torch.rand((case.B, 1, 1, N), generator=generator) < 0.9
    elif case.mask:
        made["mask"] = torch.randn((1, case.H, case.M, N), generator=generator).to(made["q"].dtype)
    return made


Run = Callable[[AttentionCase, Tensors], Tensor]


def ours(case: AttentionCase, t: Tensors) -> Tensor:
    return functional.attention(  # type: ignore[no-any-return]
        t["q"], t["k"], t["v"], attn_mask=t.get("mask"), causal=case.causal, dropout_p=case.dropout,
        cu_seqlens_q=t.get("cu"), cu_seqlens_k=t.get("cu"),
    )  # fmt: skip


def theirs(case: AttentionCase, t: Tensors) -> Tensor:
    def run() -> Tensor:
        return scaled_dot_product_attention(
            t["q"], t["k"], t["v"], attn_mask=t.get("mask"), dropout_p=case.dropout, is_causal=case.causal,
            enable_gqa=case.Hkv not in (0, case.H),
        )  # fmt: skip

    if case.against not in BACKENDS:
        return run()
    with sdpa_kernel(BACKENDS[case.against]):
        return run()


def exact(case: AttentionCase, t: Tensors) -> Tensor:
    """The reference, with the dropout mask that `ours` would draw next."""
    return reference.attention(
        t["q"], t["k"], t["v"], mask=_four(t.get("mask")), cu_seqlens_q=t.get("cu"), cu_seqlens_k=t.get("cu"),
        softmax_scale=case.D**-0.5, causal=int(case.causal), dropout_p=case.dropout,
        rng=draw_seed() if case.dropout else None,
    )[0]  # fmt: skip


def _four(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


class AttentionWorkload:
    """Calling it runs attention once: the forward under inference_mode, or in training the forward and the backward
    with a fixed output gradient. `padded` puts the sequences of a packed case into a padded batch with a mask."""

    def __init__(
        self, case: AttentionCase, inputs: Tensors, run: Run, padded: bool = False, dtype: torch.dtype | None = None
    ):
        self.case, self.run, self.padded = case, run, padded and case.packed
        made = {name: t if dtype is None or t.dtype == torch.bool else t.to(dtype) for name, t in inputs.items()}
        if self.padded:
            made = {name: self._pad(t) for name, t in made.items()}
            made["mask"] = self._rows()[:, None, None]
        elif case.packed:
            made["cu"] = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32)
        self.grad = made.pop("do")
        wanted = ["q", "k", "v"] + ["mask"] * (case.mask == "grad") if case.training else []
        self.tensors = {name: t.clone().requires_grad_(name in wanted) for name, t in made.items()}
        self.leaves = {name: self.tensors[name] for name in wanted}

    def prepare(self) -> None:
        torch.use_deterministic_algorithms(False)

    def __call__(self) -> Any:
        if not self.case.training:
            return inferred(self.run, self.case, self.tensors)
        torch.autograd.backward(self.run(self.case, self.tensors), self.grad)
        for tensor in self.leaves.values():
            tensor.grad = None
        return None

    def results(self) -> Tensors:
        """o and, in training, every gradient, by name; for packed cases [rows, heads, width]."""
        self.prepare()
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(self.case.training):
            torch.manual_seed(0)
            found = {"o": self.run(self.case, self.tensors)}
        if self.leaves:
            grads = torch.autograd.grad(found["o"], list(self.leaves.values()), self.grad)
            found |= {f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        return {name: self._unpad(t.detach()) for name, t in found.items()}

    def _rows(self) -> Tensor:
        return torch.arange(self.case.M) < torch.tensor(self.case.lengths)[:, None]

    def _pad(self, rows: Tensor) -> Tensor:
        batch = rows.new_zeros(self.case.B, self.case.M, *rows.shape[1:])
        batch[self._rows()] = rows
        return batch.transpose(1, 2)

    def _unpad(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2)[self._rows()] if self.padded else t
