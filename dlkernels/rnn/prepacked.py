"""`prepack()` of layers and cells: copies of the weights in the order in which the kernels of the CPU read them, in the
dtype of the layer or in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Self

from dlkernels._core import extension
from dlkernels._core.autocast import autocast_dtype
from dlkernels._core.private_torch import are_transforms_active
from dlkernels.rnn import operators
from dlkernels.rnn.operators import direct

__all__ = ["BITS", "Prepackable", "Prepacked", "check_weights", "why_not_packable"]

_PACKABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The dtypes in which prepack() can keep the weights of a float32 layer, and the bits of a weight.
BITS = {torch.bfloat16: 16, torch.int8: 8}


class Prepacked(NamedTuple):
    """The packed weights of a layer, one buffer for each entry of its stack, and which tensors they were made from.
    `dtype` is that of the packed weights if they have fewer bits than the layer's, else None. Direct calls read it by
    position (csrc/rnn/torch/direct_modules.cpp).

    `aliases` share the memory of `weights`, which so is not used again for other values: a weight that is still the
    same object, but has been given other memory (`.data = ...`, `torch.utils.swap_tensors`), is recognized by its
    address. The weights themselves must not have another owner, with which `swap_tensors` would refuse them. `held` is
    what direct calls use of `aliases` and `buffers`."""

    weights: tuple[Tensor, ...]
    versions: tuple[int, ...]
    buffers: tuple[Tensor, ...]
    dtype: torch.dtype | None
    aliases: tuple[Tensor, ...]
    held: Any

    def why_not(self, weights: list[Tensor], given: Iterable[Any]) -> str:
        """Why these buffers must not replace `weights` in a call with the tensors `given`, made now; empty if they may.
        Tensors may be None."""
        if torch.compiler.is_compiling():
            return "compiled code could not notice that the weights were written to"
        # A loop: with any() and map() this took 5 of the 25 us of a small call.
        for now, then, alias, version in zip(weights, self.weights, self.aliases, self.versions, strict=True):
            if now is not then or now.data_ptr() != alias.data_ptr():
                return "the weights are no longer the tensors that were packed"
            if version >= 0 and now._version != version:
                return "the weights were written to after prepack()"
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return "gradients of the weights are wanted"
        if autocast_dtype(weights[0]) not in (None, weights[0].dtype):
            return "autocast computes in another dtype"
        if self.dtype is None:
            return ""
        # The backward would compute with other weights than the forward did.
        if are_transforms_active():
            return "weights of fewer bits are not used under transforms of torch.func"
        if torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in given):
            return "a gradient is wanted, which weights of fewer bits do not have"
        return ""


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors have no version counter


def check_weights(function: str, weights: Any) -> None:
    """Checks the argument `weights` of `prepack` or `quantize`."""
    if weights not in BITS:
        names = " or ".join(map(str, BITS))
        raise ValueError(f"{function}: weights must be {names}, got {weights!r}")


class Packing(NamedTuple):
    """What prepack() packs: the mode of the operators, the weights of all layers, and how they are stacked."""

    mode: str
    weights: list[Tensor]
    num_layers: int = 1
    bidirectional: bool = False


class Prepackable(Module):
    """A layer or cell with `prepack()`. `_NO_STATE` names the attributes of an instance that copies leave out."""

    _NO_STATE: tuple[str, ...] = ("_prepacked",)
    _prepacked: Prepacked | None = None

    def _packing(self) -> Packing:
        """Raises RuntimeError if a weight is not a parameter."""
        raise NotImplementedError

    def prepack(self, weights: torch.dtype | None = None) -> Self:
        """Packs the weights for inference on the CPU; calls that want no weight gradients then use the packed copy.

        weights: keeps the copy of a float32 layer in fewer bits, which few sequences are bound by. Sums and states stay
        float32. torch.bfloat16: products may be rounded to bfloat16, as under autocast. torch.int8: each row of a
        weight matrix is rounded to 255 multiples of its own scale, and where the processor multiplies int8, so are x
        and h of each sequence and step; a row that is not finite gives NaN. Calls that want any gradient, and those
        under torch.func, do not use such a copy. None keeps the layer's own dtype.

        The copy is not part of the state: saving, copying, pickling and `to()` leave it out. Replacing a parameter or
        writing to it in a way that autograd can see (an optimizer's step, `load_state_dict`, `copy_`) disables the
        copy, and so does giving it other memory (`.data = ...`). But writing to its memory through `.data` or numpy is
        NOT noticed: call `prepack()` again after it, or `unpack()`.
        Under torch.compile the copy is not used.
        """
        self.unpack()
        if weights is not None:
            check_weights("prepack", weights)
        mode, own, num_layers, bidirectional = self._packing()
        reason = why_not_packable(own, weights)
        if reason:
            raise (RuntimeError if weights is None else ValueError)(f"prepack: {reason}")
        if not extension.HAVE_NATIVE:
            extension.announce_reference()
            return self
        per_layer = len(own) // num_layers
        bits = () if weights is None else (BITS[weights],)
        with torch.no_grad():
            buffers = tuple(
                operators.pack(mode, own[at : at + per_layer], bidirectional, *bits)
                for at in range(0, len(own), per_layer)
            )
            aliases = tuple(weight.detach() for weight in own)
        self._prepacked = Prepacked(
            tuple(own), tuple(map(_version, own)), buffers, weights, aliases, direct.hold(aliases, buffers)
        )
        return self

    def unpack(self) -> Self:
        """Discards the copy that `prepack()` made."""
        self.__dict__.pop("_prepacked", None)
        return self

    def _usable_buffers(self, weights: list[Tensor], *given: Any) -> tuple[Tensor, ...] | None:
        """The packed weights if a call with the tensors `given` uses them."""
        prepacked = self._prepacked
        return None if prepacked is None or prepacked.why_not(weights, given) else prepacked.buffers

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _replicate_for_data_parallel(self) -> Any:
        replica = Module._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
        for name in self._NO_STATE:
            replica.__dict__.pop(name, None)
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self._NO_STATE}

    def extra_repr(self) -> str:
        prepacked = self._prepacked
        if prepacked is None:
            return super().extra_repr()
        text = "prepacked=True" if prepacked.dtype is None else f"weights={str(prepacked.dtype).removeprefix('torch.')}"
        return f"{super().extra_repr()}, {text}"


def why_not_packable(weights: list[Tensor], dtype: torch.dtype | None) -> str:
    """Why prepack(dtype) cannot pack these weights; empty if it can."""
    first = weights[0]
    if first.device.type != "cpu" or first.dtype not in _PACKABLE:
        return f"expected weights of a floating dtype on the CPU, got {first.dtype} {first.device}"
    if dtype is not None and first.dtype != torch.float32:
        return f"weights={dtype} takes a layer of torch.float32, got {first.dtype}"
    return ""
