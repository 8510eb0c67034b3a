"""The part of this package in the keys of torch.compile's caches on disk.

A cache entry depends on the shapes and strides that our fakes returned, but its key has only the operators' names. A
program compiled with another release of the package would be taken from the cache and fail. So each fake that runs adds
a tag to `torch.compiler.config.cache_key_tag`, from which torch makes the keys after the trace. torch's configuration
belongs to a thread, and so does the tag.
"""

from __future__ import annotations

import functools
import re
import zlib
from pathlib import Path

import torch

from dlkernels._core import extension
from dlkernels._version import __version__

__all__ = ["add", "contains", "remove"]


_TAG = re.compile(r"\[dlkernels [^]]*\]")


@functools.cache
def _digest() -> str:
    """Names this build: its release, whether it has the compiled module, and a checksum of its Python sources, to which
    the fakes belong."""
    root = Path(__file__).resolve().parents[1]
    checksum = 0
    for path in sorted(root.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return f"{__version__} {extension.HAVE_NATIVE} {checksum:08x}"


def add(what: str = "") -> None:
    """Adds the tag to the keys of what this thread compiles from now on. `what` names a switch that is on."""
    if not contains(what):
        _set({*_tags(), _tag(what)})


def remove(what: str) -> None:
    if contains(what):
        _set(_tags() - {_tag(what)})


def contains(what: str) -> bool:
    return _tag(what) in torch.compiler.config.cache_key_tag


def _tags() -> set[str]:
    return set(_TAG.findall(torch.compiler.config.cache_key_tag))


def _set(tags: set[str]) -> None:
    """Puts the tags in an order that does not depend on the order in which they came."""
    others = _TAG.sub("", torch.compiler.config.cache_key_tag)
    torch.compiler.config.cache_key_tag = others + "".join(sorted(tags))


@functools.cache
def _tag(what: str) -> str:
    return f"[dlkernels{what and ' ' + what} {_digest()}]"
