"""The counts of torch.utils.flop_counter.FlopCounterMode for the operators. As for torch's own operators, they cover
the matrix products, at two floating-point operations per multiply-add, and no elementwise work. Padding and masked
scores are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlkernels._core.private_torch import FakeTensor, schema_of

__all__ = ["COUNTER", "Formula", "has_no_values", "register_formulas"]

Formula = Callable[..., int]

COUNTER = "torch.utils.flop_counter"


def register_formulas(formulas: dict[str, Formula]) -> None:
    """Registers `formulas` (from operator name to formula) with torch's counter, as soon as that is imported."""

    def register() -> None:
        for name, formula in formulas.items():
            _register(name, formula)

    if COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport(MetaPathFinder):
    """An import hook that runs `action` after torch's counter has been imported. This package does not import the
    counter itself, because the counter imports triton, which takes longer than importing all of this package."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(name: str, formula: Formula) -> None:
    """Registers `formula` for the operator dlkernels::`name`. `formula` takes the operator's arguments by name and
    collects those that it does not use in `**others`."""
    flop_counter = sys.modules[COUNTER]
    packet = getattr(torch.ops.dlkernels, name)
    names = [argument.name for argument in schema_of(packet.default).arguments]

    def by_name(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(**dict(zip(names, args, strict=False)), **kwargs)

    if packet not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(packet, get_raw=True)(by_name)


def has_no_values(tensor: Tensor) -> bool:
    """Whether a formula cannot read the values of this tensor, because it is a fake or meta tensor."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
