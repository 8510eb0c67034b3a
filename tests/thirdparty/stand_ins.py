"""Stand-ins for packages that do not import beside the torch in use, and whose functions no case calls.

A published torchvision or torchaudio is compiled for one torch. Where that is another one the import fails, and with it
the import of packages that use a few of its names.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from torch import nn


class _Constants(type):
    """A class with every attribute, such as InterpolationMode.BICUBIC: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _Module(ModuleType):
    """Has every name: each is a class, which can be inherited from but not be called."""

    __version__ = "0.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # a package has submodules

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: object, **keywords: object) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is a stand-in")

        made = _Constants(name, (nn.Module,), {"__init__": refuse, "__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for(package: str) -> str:
    """Puts a stand-in in the place of the package, unless it imports. Returns why it does not."""
    try:
        importlib.import_module(package)
    except Exception as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder(package))
        return f"{type(error).__name__}: {error}"
    return ""
