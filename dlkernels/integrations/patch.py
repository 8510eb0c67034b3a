"""Swaps torch.nn's recurrent, attention and Transformer layers inside a model for those of dlkernels, and back.

A layer is swapped by giving the module object another class. The object itself stays, with its parameters, buffers,
hooks and the handles that remove them, parametrizations, training flag, and every reference to it from elsewhere (a
module used in two places, an optimizer, a list outside the module tree).
"""

from __future__ import annotations

import copy as copylib
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from dlkernels._core.tools import mark_as_leaf
from dlkernels.attention.layers import MultiheadAttention
from dlkernels.attention.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from dlkernels.rnn.cells import GRUCell, LSTMCell, RNNCell
from dlkernels.rnn.layers import GRU, LSTM, RNN

__all__ = ["PatchEntry", "PatchReport", "patch", "patch_report", "unpatch"]

M = TypeVar("M", bound=Module)

_SWAPS: dict[type[Module], type[Module]] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
    torch.nn.MultiheadAttention: MultiheadAttention,
    # TransformerEncoder, TransformerDecoder and Transformer only call these layers and are not swapped.
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
}
_OURS = {ours: theirs for theirs, ours in _SWAPS.items()}
_OUR_CLASSES = tuple(_OURS)
_TORCH = tuple(_SWAPS)
_NAMES = {theirs.__name__ for theirs in _SWAPS}

# The attribute that marks a patched layer. unpatch leaves layers without it alone: they were built with dlkernels.
_MARK = "_dlkernels_patched"
_NOTE = (
    "note: tools that look a layer up by its exact type, such as torch.ao.quantization, opacus and operation counters, "
    "do not find these layers in their tables and pass them by; call dlkernels.unpatch(model) before such a tool"
)
_OWN_ATTENTION = (
    "note: patch does not change the model's own attention: {classes}. dlkernels.enable() serves it if it calls "
    "F.scaled_dot_product_attention, and its report() tells whether it does; models of transformers take "
    'attn_implementation="dlkernels" (dlkernels.integrations.transformers)'
)
# The attributes that torch's layers keep for cuDNN and that our layers do not use.
_CUDNN_STATE = ("_flat_weights", "_flat_weight_refs")


@dataclass(frozen=True)
class PatchEntry:
    """One layer that torch.nn and dlkernels both have. `state` is "patched", "native" (built with dlkernels), "torch"
    (could be patched) or "skipped" (cannot be, `reason` says why)."""

    name: str
    layer: str
    state: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or '(root)'}: {self.layer} {self.state}{f' ({self.reason})' if self.reason else ''}"


@dataclass(frozen=True)
class PatchReport:
    """The layers of a model that torch.nn and dlkernels both have, each under the first name by which it is found."""

    entries: list[PatchEntry] = field(default_factory=list)
    # The classes of modules outside of torch.nn that are called attention, and how many there are of each.
    own_attention: dict[str, int] = field(default_factory=dict)

    def names(self, state: str) -> list[str]:
        return [entry.name for entry in self.entries if entry.state == state]

    @property
    def patched(self) -> list[str]:
        return self.names("patched")

    @property
    def skipped(self) -> list[PatchEntry]:
        return [entry for entry in self.entries if entry.state == "skipped"]

    @property
    def note(self) -> str:
        """Remarks that hold for the whole model; empty if there are none."""
        notes = [_NOTE] if any(entry.state in ("patched", "native") for entry in self.entries) else []
        if self.own_attention:
            classes = ", ".join(f"{name} ({count})" for name, count in self.own_attention.items())
            notes.append(_OWN_ATTENTION.format(classes=classes))
        return "\n".join(notes)

    def __str__(self) -> str:
        lines = [str(entry) for entry in self.entries] or ["no layers that dlkernels has"]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def patch(model: M, *, copy: bool = False, verbose: bool = False) -> M:
    """Swaps every torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, MultiheadAttention, TransformerEncoderLayer and
    TransformerDecoderLayer in `model` and returns the model.

    Works in place, on the root too, unless `copy` asks for a deep copy. Layers that cannot be swapped (a subclass, a
    scripted module, an instance with its own `forward`) stay as they are, and a warning names them and the reason.
    `verbose` prints the report, which `patch_report(model)` gives at any time. Patching twice changes nothing.

    Tools that look a layer up by its exact type (torch.ao.quantization, opacus, operation counters) do not recognise
    patched layers, and torch.jit.script refuses them: `unpatch` the model first. docs/tools.md describes each tool.
    """
    _check_module("patch", model)
    if copy:
        model = copylib.deepcopy(model)
    for module in model.modules():
        _swap(module)
    report = patch_report(model)
    if report.skipped:
        skips = "; ".join(map(str, report.skipped))
        warnings.warn(f"dlkernels.patch left {len(report.skipped)} layer(s) to torch: {skips}", stacklevel=2)
    if verbose:
        print(report)
    return model


def unpatch(model: M) -> M:
    """Restores, in place, the torch.nn class of every layer that `patch` swapped, and returns the model."""
    _check_module("unpatch", model)
    for module in model.modules():
        if not module.__dict__.pop(_MARK, False):
            continue
        assigned = _assigned_weights(module)
        for name in ("_prepacked", "_flat"):
            module.__dict__.pop(name, None)
        _set_class(module, _OURS[type_before_parametrizations(module)])
        if isinstance(module, torch.nn.RNNBase):
            module._init_flat_weights()
            if assigned is not None:
                module._flat_weights = assigned
    return model


def patch_report(model: Module) -> PatchReport:
    """The state of every layer in `model` that torch.nn and dlkernels both have."""
    entries = []
    own_attention: dict[str, int] = {}
    for name, module in model.named_modules():
        cls = type_before_parametrizations(module)
        if _is_own_attention(module):
            own_attention[cls.__name__] = own_attention.get(cls.__name__, 0) + 1
        if isinstance(module, _OUR_CLASSES):
            state = "patched" if _MARK in module.__dict__ else "native"
            entries.append(PatchEntry(name, cls.__name__, state))
            continue
        reason = _obstacle(module)
        if reason:
            entries.append(PatchEntry(name, _layer_name(module), "skipped", reason))
        elif cls in _SWAPS:
            entries.append(PatchEntry(name, cls.__name__, "torch"))
    return PatchReport(entries, own_attention)


def _is_own_attention(module: Module) -> bool:
    """Whether this is the innermost of the modules that are called attention, by a class outside of torch.nn."""

    def called_attention(module: Module) -> bool:
        return "attention" in type(module).__name__.lower()

    if isinstance(module, (*_TORCH, *_OUR_CLASSES)) or not called_attention(module):
        return False
    return not any(called_attention(child) for child in module.modules() if child is not module)


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}(): argument 'model' must be a torch.nn.Module, not {type(model).__name__}")


def _layer_name(module: Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return str(module.original_name)
    return type_before_parametrizations(module).__name__


def _obstacle(module: Module) -> str:
    """Why a layer of torch cannot be swapped; empty if it can, or if the module is no layer of torch."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript" if module.original_name in _NAMES else ""
    cls: Any = type_before_parametrizations(module)
    if isinstance(module, _OUR_CLASSES) or not isinstance(module, _TORCH):
        return ""
    if cls not in _SWAPS:
        base: Any = next(theirs for theirs in _TORCH if isinstance(module, theirs))
        own = "with its own forward" if cls.forward is not base.forward else "whose methods may rely on its class"
        return f"a subclass of torch.nn.{base.__name__} {own}"
    if "forward" in module.__dict__:
        return "forward was replaced on the instance"
    return ""


def _assigned_weights(module: Module) -> list[Any] | None:
    """The list that a program assigned to `_flat_weights`, if forward would use it instead of the weights under their
    names, else None."""
    if not isinstance(module, torch.nn.RNNBase):
        return None
    module._update_flat_weights()
    named = [getattr(module, name, None) for name in module._flat_weights_names]
    flat: list[Any] = module._flat_weights
    same = len(flat) == len(named) and all(a is b for a, b in zip(flat, named, strict=True))
    return None if same or is_parametrized(module) else flat


def _swap(module: Module) -> None:
    """Swaps a layer of torch if it can be swapped, but not its children."""
    target = _SWAPS.get(type_before_parametrizations(module))
    if target is None or _obstacle(module):
        return
    assigned = _assigned_weights(module)
    for name in _CUDNN_STATE:
        module.__dict__.pop(name, None)
    _set_class(module, target)
    module.__dict__[_MARK] = True
    if assigned is not None:
        module._flat_weights = assigned  # type: ignore[assignment]


def _set_class(module: Module, target: type[Module]) -> None:
    """Sets `module.__class__` to `target`. A parametrized module has a class of its own, into which parametrize has
    injected properties; they are carried over to the new class."""
    current = type(module)
    if is_parametrized(module):
        injected = {name: value for name, value in vars(current).items() if name not in ("__dict__", "__weakref__")}
        target = type(f"Parametrized{target.__name__}", (target,), injected)
    module.__class__ = target
    mark_as_leaf(module)
