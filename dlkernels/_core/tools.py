"""How the layers behave under tools that transform a model: torch.fx, TorchScript, torch.ao.quantization."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

__all__ = ["PUBLIC_MODULE", "KnownLayer", "is_tracing", "mark_as_leaf"]

# `__module__` of the layers: the module from which users import them and which pickles name.
PUBLIC_MODULE = "dlkernels.nn"

# Whether torch.jit.trace is running. Dynamo knows this function, unlike the C function that it calls.
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

# torch.fx does not trace into a module whose instance has a `__module__` that begins with "torch.nn". This value
# affects only fx: Dynamo tests for "torch.nn.", with a dot, and pickle uses the `__module__` of the class, which stays.
_LEAF = "torch.nn, but dlkernels.nn"


def mark_as_leaf(module: Module) -> None:
    """Makes torch.fx treat this module as a leaf if its class is a layer of dlkernels. fx traces into a subclass of
    such a layer, as it does into a subclass of a layer of torch."""
    if type(module).__module__ == PUBLIC_MODULE:
        module.__dict__["__module__"] = _LEAF
    else:
        module.__dict__.pop("__module__", None)


class _QConfig:
    """The attribute `qconfig`, which torch.ao.quantization sets on every module that it visits. It then replaces
    modules by their exact type, so it leaves our layers as they are. Only the setting of `qconfig` gives a layer the
    chance to warn about it."""

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
    """Whether torch.ao.quantization would replace torch's module of this name: LSTM, GRU and the cells in dynamic
    quantization, LSTM and MultiheadAttention if it is given observers."""
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
        """Raises an error with advice: torch.jit.script calls this before it compiles anything."""
        name = type(self).__name__
        raise RuntimeError(
            f"torch.jit.script cannot compile dlkernels.nn.{name}. Call dlkernels.unpatch(model) first if the layer "
            f"was patched, or build the model with torch.nn.{name}: parameters and state_dict are the same. "
            f"torch.jit.trace takes the layer as it is."
        )
