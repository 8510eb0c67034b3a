"""The cases of the recurrent layers and cells, and a workload that runs one side of such a case."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .. import nn as our_nn
from .cases import SHORT_DTYPE, packed_lengths

MODES = ("lstm", "gru", "rnn")

Shape = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """`against` is what our side is measured against: torch.nn, or our own layer in another mode of use:
    "padded" (this case is packed; compared per valid step) or "default" (this case is deterministic)."""

    mode: str
    B: int
    T: int
    I: int
    H: int
    cell: bool = False
    training: bool = False
    packed: bool = False
    dtype: str = "float32"
    threads: int = 1
    against: str = "torch"
    target: float | None = None

    @property
    def workload(self) -> str:
        """The name without the thread count."""
        return "-".join(
            [
                self.mode + ("cell" if self.cell else ""),
                "train" if self.training else "infer",
                *(["packed"] if self.packed else []),
                *(["deterministic"] if self.against == "default" else []),
                *(["vs-padded"] if self.against == "padded" else []),
                SHORT_DTYPE[self.dtype],
                self.shape_text,
            ]
        )

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.threads}t"

    @property
    def shape_text(self) -> str:
        return f"B{self.B}-I{self.I}-H{self.H}" if self.cell else f"B{self.B}-T{self.T}-I{self.I}-H{self.H}"

    @property
    def regime(self) -> str:
        if self.B <= 4:
            return "latency"
        return "GEMM-bound" if self.B * self.H * self.H >= 16_000_000 else "middle"

    @property
    def lengths(self) -> list[int]:
        """The lengths of the sequences of a packed case, spaced evenly from T down to T/4."""
        return packed_lengths(self.T, self.B)

    @property
    def valid_fraction(self) -> float:
        return sum(self.lengths) / (self.B * self.T)


GRID_SHAPES: tuple[Shape, ...] = (
    (1, 1, 128, 128),
    (1, 100, 128, 128),
    (1, 100, 512, 512),
    (16, 100, 256, 256),
    (256, 100, 64, 64),
    (64, 100, 512, 512),
)
PACKED_SHAPES: tuple[Shape, ...] = ((32, 200, 64, 64), (64, 100, 256, 256))
CELL_SHAPES: tuple[Shape, ...] = ((1, 1, 128, 128), (16, 1, 256, 256), (128, 1, 512, 512))
# The other dtypes have one shape per regime.
DTYPE_SHAPES: tuple[Shape, ...] = ((1, 100, 128, 128), (16, 100, 256, 256), (64, 100, 512, 512))
QUICK_SHAPES: tuple[Shape, ...] = ((1, 100, 128, 128), (16, 100, 256, 256))


def grid(threads: Sequence[int], dtypes: Sequence[str], quick: bool = False) -> list[LayerCase]:
    """Thread counts vary fastest, so the runner computes each reference once."""
    first = dtypes[0]
    made: list[LayerCase] = []
    if quick:
        threads, dtypes = threads[-1:], (first,)
    padded, packed, cells = (
        (QUICK_SHAPES, PACKED_SHAPES[:1], CELL_SHAPES[:1]) if quick else (GRID_SHAPES, PACKED_SHAPES, CELL_SHAPES)
    )
    for dtype, cell, is_packed in itertools.product(dtypes, (True, False), (False, True)):
        if cell and is_packed:
            continue
        shapes = cells if cell else packed if is_packed else padded
        counts = threads
        if dtype != first:
            # The other dtypes are sampled: the first dtype's grid already shows the effect of layout and threads.
            shapes = () if is_packed else CELL_SHAPES[:1] if cell else DTYPE_SHAPES
            counts = threads[-1:]
        for shape, mode, training, count in itertools.product(shapes, MODES, (False, True), counts):
            made.append(
                LayerCase(mode, *shape, cell=cell, training=training, packed=is_packed, dtype=dtype, threads=count)
            )
    if not quick:
        for mode in MODES:
            shape = (16, 100, 256, 256)
            made.append(LayerCase(mode, *shape, training=True, dtype=first, threads=threads[-1], against="default"))
    return made


Build = Callable[[LayerCase], nn.Module]


def from_namespace(namespace: Any) -> Build:
    """Returns a function that builds a case's module from `torch.nn` or anything with the same class names."""

    def build(case: LayerCase) -> nn.Module:
        module: nn.Module = getattr(namespace, case.mode.upper() + ("Cell" if case.cell else ""))(case.I, case.H)
        return module

    return build


ours = from_namespace(our_nn)
theirs = from_namespace(nn)


@dataclasses.dataclass
class Inputs:
    """Fixed random data of a case, made in float32 and rounded to its dtype, so both sides and the reference see the
    same numbers."""

    x: Tensor
    state: list[Tensor]
    grads: list[Tensor]
    weights: dict[str, Tensor]

    @staticmethod
    def make(case: LayerCase, seed: int = 0) -> Inputs:
        gen = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, case.dtype)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen).to(dtype)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = {k: v.detach().to(dtype) for k, v in theirs(case).state_dict().items()}
        if case.cell:
            count = 2 if case.mode == "lstm" else 1
            state = [randn(case.B, case.H) for _ in range(count)]
            return Inputs(randn(case.B, case.I), state, [randn(case.B, case.H) for _ in range(count)], weights)
        rows: tuple[int, ...] = (sum(case.lengths),) if case.packed else (case.T, case.B)
        return Inputs(randn(case.T, case.B, case.I), [], [randn(*rows, case.H)], weights)


def inferred(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call under inference_mode, which is entered only if it is not on."""
    if torch.is_inference_mode_enabled():
        return function(*args)
    with torch.inference_mode():
        return function(*args)


class Workload:
    """Calling it runs the layer once: the forward under inference_mode, or in training the forward and the backward
    with fixed output gradients."""

    def __init__(
        self,
        case: LayerCase,
        inputs: Inputs,
        build: Build,
        dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ):
        dtype = dtype or getattr(torch, case.dtype)
        self.training = case.training
        self.deterministic = deterministic
        self.module = build(case).to(dtype)
        self.module.load_state_dict({k: v.to(dtype) for k, v in inputs.weights.items()})
        self.params = dict(self.module.named_parameters())
        self.state = [s.to(dtype, copy=True).requires_grad_(case.training) for s in inputs.state]
        self.grads = [g.to(dtype, copy=True) for g in inputs.grads]
        x = inputs.x.to(dtype, copy=True)
        self.input: Tensor | PackedSequence
        if case.packed:
            packed = pack_padded_sequence(x, torch.tensor(case.lengths))
            self.leaf = packed.data.detach().requires_grad_(case.training)
            self.input = PackedSequence(self.leaf, packed.batch_sizes)
        else:
            self.input = self.leaf = x.requires_grad_(case.training)
        self.args: tuple[Any, ...] = (self.input,)
        if self.state:
            self.args += (tuple(self.state) if len(self.state) > 1 else self.state[0],)

    def prepare(self) -> None:
        """Puts torch into the mode in which this side runs. It is called at the start of each block."""
        torch.use_deterministic_algorithms(self.deterministic)

    def __call__(self) -> Any:
        if not self.training:
            return inferred(self.module, *self.args)
        out = self.module(*self.args)
        torch.autograd.backward(self._differentiated(out), self.grads)
        self._clear()
        return None

    def results(self) -> dict[str, Tensor]:
        """Every output and, in training, every gradient (d...), by name."""
        self.prepare()
        with torch.inference_mode(not self.training):
            out = self.module(*self.args)
        found: dict[str, Tensor] = {}
        if isinstance(out, Tensor):
            found["h"] = out
        elif self.state:
            found["h"], found["c"] = out
        else:
            y, last = out
            found["y"] = y.data if isinstance(y, PackedSequence) else y
            found.update(zip(("h_n", "c_n"), (last,) if isinstance(last, Tensor) else last, strict=False))
        if self.training:
            torch.autograd.backward(self._differentiated(out), self.grads)
            for name, tensor in self._leaves().items():
                if tensor.grad is None:
                    raise RuntimeError(f"no gradient for {name}")
                found["d" + name] = tensor.grad
            self._clear()
        return {name: value.detach() for name, value in found.items()}

    def _differentiated(self, out: Any) -> list[Tensor]:
        if isinstance(out, Tensor):
            return [out]
        if self.state:
            return list(out)
        y = out[0]
        return [y.data if isinstance(y, PackedSequence) else y]

    def _leaves(self) -> dict[str, Tensor]:
        return {"x": self.leaf, **{f"h{i}": s for i, s in enumerate(self.state)}, **self.params}

    def _clear(self) -> None:
        self.leaf.grad = None
        for tensor in self.state:
            tensor.grad = None
        for param in self.params.values():
            param.grad = None
