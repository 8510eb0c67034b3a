"""A copy as an operator that is opaque to the compiler.

Inductor replaces a clone of a graph's input by the input itself, even if the graph edits the input later; the backward
then reads the edited values. (torch 2.13; this also happens in code that uses torch alone.)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["private_copy"]

_library = torch.library.Library("dlkernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("private_copy(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("private_copy", torch.clone, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("dlkernels::private_copy", torch.empty_like)

_operator = torch.ops.dlkernels.private_copy.default


def private_copy(x: Tensor) -> Tensor:
    """A copy of x in its own memory; not differentiable."""
    return _operator(x)  # type: ignore[no-any-return]
