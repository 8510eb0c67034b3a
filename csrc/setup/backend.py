"""The build backend: that of setuptools, with two changes.

An isolated build requires torch only if the target environment has none, and the tools that compile only if there is
a compiler. A wheel is assembled in an empty folder, because setuptools would also pack files of earlier builds that
no longer exist.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from find_torch import torch_requirement
from native import why_not_compiled
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks of setuptools that need no change)
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

Settings = dict[str, Any] | None


def _requirements(base: list[str]) -> list[str]:
    return base if why_not_compiled() else [*base, "ninja", "pybind11>=2.13", *torch_requirement()]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name
