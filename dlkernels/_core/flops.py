"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: the matrix products that torch's own consist
of, two floating-point operations for each multiply-add. Elementwise work is not counted, as it never is there; padding
and masked scores are."""

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
    """From operator to formula, from the moment that somebody imports torch's counter."""

    def register() -> None:
        for name, formula in formulas.items():
            _register(name, formula)

    if COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport(MetaPathFinder):
    """Runs `action` once the counter has been imported. The package does not import it: the counter imports triton,
    which takes longer than all of this package."""

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
    """`formula` takes the arguments of dlkernels::`name` by name, those that it does not want in `others`."""
    flop_counter = sys.modules[COUNTER]
    packet = getattr(torch.ops.dlkernels, name)
    names = [argument.name for argument in schema_of(packet.default).arguments]

    def by_name(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(**dict(zip(names, args, strict=False)), **kwargs)

    if packet not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(packet, get_raw=True)(by_name)


def has_no_values(tensor: Tensor) -> bool:
    """Whether a count has to do without the values of this tensor."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
