"""One side of a case made runnable: a module, its input, and the call that is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Case

Build = Callable[[Case], nn.Module]


def from_namespace(namespace: Any) -> Build:
    """Builds a case's module from `torch.nn` or anything with the same class names."""

    def build(case: Case) -> nn.Module:
        module: nn.Module = getattr(namespace, case.mode.upper() + ("Cell" if case.cell else ""))(case.I, case.H)
        return module

    return build


def ours(case: Case) -> nn.Module:
    import dlkernels.nn

    return from_namespace(dlkernels.nn)(case)


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
    def make(case: Case, seed: int = 0) -> Inputs:
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


class Workload:
    """Calling it runs the layer once: forward under inference_mode, or forward and backward of a fixed gradient."""

    def __init__(
        self, case: Case, inputs: Inputs, build: Build, dtype: torch.dtype | None = None, deterministic: bool = False
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
        """Puts torch into the mode this side runs in; called at the start of each block."""
        torch.use_deterministic_algorithms(self.deterministic)

    def __call__(self) -> Any:
        if not self.training:
            with torch.inference_mode():
                return self.module(*self.args)
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
