"""Truncated back-propagation through time (`bptt_steps`) in PyTorch operations: for calls that have no kernel.

A cut is no property of the outputs: the state that enters a cut step is a constant for the derivative of the call, and
a function of every input for a derivative of that derivative. `Tensor.detach` cuts all of them at once. Here an
autograd.Function has the formula of each derivative, and torch calls the one of the derivative that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.private_torch import forward_ad
from dlkernels.rnn.kinds import KINDS
from dlkernels.rnn.operators.arguments import Places, SequenceConfig, SequenceInputs
from dlkernels.rnn.operators.formulas import run_sequence, sequence_gradients

__all__ = ["truncated_sequence"]


def truncated_sequence(cfg: SequenceConfig, given: SequenceInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, cells) of one layer."""
    x, h0, c0, _, batch_sizes, lengths, weights, resets = given
    return Truncated.apply(_Call(cfg), batch_sizes, lengths, resets, x, h0, c0, *weights)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class _Call:
    """Holds the configuration, which torch would take apart as the tuple that it is."""

    cfg: SequenceConfig

    @property
    def outputs(self) -> int:
        """How many of y, h_n, c_n and cells there are."""
        return 2 + KINDS[self.cfg.mode].has_cell_state + self.cfg.cells

    def run(self, places: Sequence[Tensor | None], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        x, h0, c0, *weights = inputs
        return run_sequence(self.cfg._replace(bptt_steps=0), Places(*places).inputs(x, h0, c0, weights))

    def gradients(
        self, places: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        of_all = [*cotangents[: self.outputs], None, None][:4]
        return sequence_gradients(self.cfg, Places(*places), of_all, inputs)


class Truncated(torch.autograd.Function):
    """(call, *Places, x, h0, c0, *weights) -> (y, h_n, c_n, cells)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return call.run(tensors[:3], tensors[3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[call.outputs :])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.call = call

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        return (None, None, None, None, *ctx.call.gradients(tensors[:3], cotangents, tensors[3:]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """The gradients are linear in the cotangents, and the transpose of that map takes tangents to tangents."""
        call: _Call = ctx.call
        places = ctx.saved_tensors[:3]
        inputs = [None if tensor is None else _primal(tensor) for tensor in ctx.saved_tensors[3:]]
        present = {at: t for at, t in enumerate(inputs) if t is not None and t.is_floating_point()}

        def gradients(*cotangents: Tensor) -> tuple[Tensor | None, ...]:
            found = call.gradients(places, cotangents, inputs)
            return tuple(found[at] for at in present)

        of_inputs = tangents[4:]
        # torch turns forward mode off for this method, but the formula may have tangents of another, outer jvp.
        with forward_ad._set_fwd_grad_enabled(True):
            outputs = call.run(places, inputs)[: call.outputs]
            transpose = torch.func.vjp(gradients, *map(torch.zeros_like, outputs))[1]
            found = transpose(tuple(
                torch.zeros_like(tensor) if of_inputs[at] is None else of_inputs[at] for at, tensor in present.items()
            ))  # fmt: skip
        return (*found, None, None)[:4]


def _primal(dual: Tensor) -> Tensor:
    return forward_ad.unpack_dual(dual).primal  # type: ignore[no-untyped-call, no-any-return]
