"""The types that `dlkernels.explain` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.autocast import autocast_dtype

__all__ = ["Explanation", "LayerExplanation", "describe", "settings"]

_DETAILS = (
    "threads", "split", "recurrence", "chunk_steps", "block_m", "block_n",
    "kind", "blocks", "groups", "tile", "columns",
)  # fmt: skip


@dataclass(frozen=True)
class LayerExplanation:
    """How one layer of the stack, the cell, or one call of attention would run.

    path: "native" (a compiled kernel), "reference" (PyTorch operations), "torch" (torch's operator, which is faster
    here, or not a layer of dlkernels) or "nothing" (an empty batch). `forward` and `backward` are the plans of the
    native path. They hold kernel, isa, threads, split and reason. Plans of recurrent layers also hold recurrence (dot
    or tiles), chunk_steps and directions_side_by_side, or on CUDA kind (cluster, grid, steps or cell), blocks, slices,
    units, groups, tile, columns and shared_bytes. Plans of attention also hold block_m and block_n.
    """

    name: str
    path: str
    reason: str
    grad: bool
    forward: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)
    packed_weights: str = ""

    @property
    def kernel(self) -> str:
        """The kernel's name, for example "cpu/avx512/lstm", or the path if no kernel of dlkernels runs."""
        return str(self.forward.get("kernel", self.path))

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.kernel} ({self.reason})"]
        for title, plan in (("forward", self.forward), ("backward", self.backward)):
            if plan:
                details = ", ".join(f"{key} {plan[key]}" for key in _DETAILS if key in plan)
                lines += [f"  {title}: {details}", f"    {plan['reason']}"]
        if self.packed_weights:
            lines.append(f"  prepacked weights: {self.packed_weights}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The result of `dlkernels.explain`; `str()` makes text of it.

    `layers` has one entry for each layer of a recurrent stack, for each attention of a Transformer layer, and for a
    cell or a function."""

    module: str
    call: str
    layers: tuple[LayerExplanation, ...]

    @property
    def kernel(self) -> str:
        return self.layers[0].kernel

    @property
    def native(self) -> bool:
        return all(layer.path == "native" for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join([self.module, self.call, *map(str, self.layers)])


def describe(name: str, tensor: Tensor) -> str:
    shape = f"nested, {tensor.size(0)} sequences," if tensor.is_nested else str(list(tensor.shape))
    return f"{name} {shape} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}"


def settings(input: Tensor) -> str:
    parts = [f"grad mode {'on' if torch.is_grad_enabled() else 'off'}", f"{torch.get_num_threads()} threads"]
    if torch.are_deterministic_algorithms_enabled():
        parts.append("deterministic")
    dtype = autocast_dtype(input)
    if dtype is not None:
        parts.append(f"autocast {str(dtype).removeprefix('torch.')}")
    return ", ".join(parts)
