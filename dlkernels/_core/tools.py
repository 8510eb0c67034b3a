"""What the layers tell programs that take a model apart: torch.fx, TorchScript, torch.ao.quantization."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

__all__ = ["PUBLIC_MODULE", "KnownLayer", "is_tracing", "mark_as_leaf"]

# What the layers have for __module__: where users find them, and what pickles name.
PUBLIC_MODULE = "dlkernels.nn"

# Whether torch.jit.trace runs; unlike the function behind it, this one is known to Dynamo.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

# torch.fx asks an instance for __module__ and keeps whole what begins with torch.nn. Only fx is meant: Dynamo's prefix
# is "torch.nn.", and the class keeps the name by which it is pickled.
_LEAF = "torch.nn, but dlkernels.nn"


def mark_as_leaf(module: Module) -> None:
    """Lets torch.fx keep this module whole if it is one of ours; a subclass of ours is traced through, as one of
    torch's is."""
    if type(module).__module__ == PUBLIC_MODULE:
        module.__dict__["__module__"] = _LEAF
    else:
        module.__dict__.pop("__module__", None)


class _QConfig:
    """`qconfig`, which torch.ao.quantization gives to every module it passes. It replaces modules by their exact type,
    so it passes ours by; this is the only moment at which a layer can say so."""

    def __get__(self, module: Module | None, owner: type) -> Any:
        if module is None:
            raise AttributeError("qconfig")
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError(f"'{owner.__name__}' object has no attribute 'qconfig'") from None

    def __set__(self, module: Module, value: Any) -> None:
        module.__dict__["qconfig"] = value
        if _torch_replaces(module, value):
            name = type(module).__name__
            warnings.warn(
                f"torch.ao.quantization does not know dlkernels.nn.{name} and leaves it in floating point. If it is to "
                f"be quantized, call dlkernels.unpatch(model) first, or build the model with torch.nn.{name}.",
                stacklevel=2,
            )

    def __delete__(self, module: Module) -> None:
        del module.__dict__["qconfig"]


def _torch_replaces(module: Module, qconfig: Any) -> bool:
    """Whether torch.ao.quantization has something else for torch's module of this name: for LSTM, GRU and the cells
    when it quantizes dynamically, for LSTM and MultiheadAttention when it is given observers."""
    name = type(module).__name__
    return name in ("LSTM", "GRU") or name.endswith("Cell") or (name == "MultiheadAttention" and qconfig is not None)


class KnownLayer(Module):
    """Base of every layer of dlkernels.nn."""

    qconfig = _QConfig()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        module = super().__new__(cls)
        mark_as_leaf(module)
        return module

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script calls this before it compiles anything."""
        name = type(self).__name__
        raise RuntimeError(
            f"torch.jit.script cannot compile dlkernels.nn.{name}. Call dlkernels.unpatch(model) first if the layer "
            f"was patched, or build the model with torch.nn.{name}: parameters and state_dict are the same. "
            f"torch.jit.trace takes the layer as it is."
        )
