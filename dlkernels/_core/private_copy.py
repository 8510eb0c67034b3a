"""An operator that copies and that no compiler looks into.

Inductor takes a clone of a graph's input to be the input itself, even where the graph edits it later: what the backward
reads is then edited too. (torch 2.13; code of torch alone meets it as well.)
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
    """x in memory of its own; not differentiable."""
    return _operator(x)  # type: ignore[no-any-return]
