"""Builds the compiled part of the package; everything else is declared in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "setup"))

import native  # noqa: E402


class BuildNative(build_ext):
    """Compiles the one module by csrc/setup/native.py."""

    def build_extension(self, ext: Extension) -> None:
        native.build(Path(self.get_ext_fullpath(ext.name)).resolve())


def extensions() -> list[Extension]:
    reason = native.why_not_compiled()
    if reason:
        print(f"dlkernels: installing without the compiled module: {reason}", file=sys.stderr)
        return []
    return [Extension("dlkernels._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
