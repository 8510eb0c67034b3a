"""A switch that puts our kernels in the place of torch's operators in the dispatcher, and takes them out again.

A kernel under a backend's key precedes torch's composite one, or takes the place of torch's for that backend. So it
serves calls from every thread, from C++ and TorchScript, and from the recomputation that torch.utils.checkpoint does
during a backward.
"""

from __future__ import annotations

import _thread
import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import compile_cache
from dlkernels._core.private_torch import unregister

__all__ = ["OFF", "OTHER_THREAD", "PLAIN", "SMALL", "Kernels", "Switch"]

# Of operators that consist of others. Both the keys with and without autograd are needed, because inference mode skips
# the autograd keys.
_KEYS = ("AutogradCPU", "CPU", "AutogradCUDA", "CUDA")

# Tensors of these types are not traced.
PLAIN = (Tensor, torch.nn.Parameter)

# Why a call is left to torch. Calls are not counted while the switch is off.
OFF = ""
SMALL = "faster in torch, as it is small"
OTHER_THREAD = "traced in a thread that has not turned the switch on"


class Kernels:
    """Kernels in Python for operators of torch, {"lstm.input": kernel}, until `remove` is called. They ask their switch
    whether it is on.

    keys: the dispatch keys under which each kernel is registered.
    with_keyset: gives the kernels the set of keys of a call as their first argument.
    """

    def __init__(
        self, kernels: Mapping[str, Callable[..., Any]], keys: Sequence[str] = _KEYS, with_keyset: bool = False
    ) -> None:
        self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        impl: Callable[..., None] = functools.partial(self._library.impl, with_keyset=with_keyset)
        try:
            for name, kernel in kernels.items():
                for key in keys:
                    impl(name, kernel, key)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        unregister(self._library)


class _OfThread(threading.local):
    """How many times the thread has turned the switch on and not off. torch's configuration, which holds the tag for
    torch.compile's caches, belongs to a thread as well."""

    depth = 0


class Switch:
    """On while it has been entered more often than left, by any threads.

    name: the switch's tag in the keys of torch.compile's caches, which see torch's operator but not ours, to which it
        is traced.
    register: puts the kernels into the dispatcher.
    is_needed: whether the kernels have to stay registered after the switch is off.
    """

    def __init__(
        self, name: str, register: Callable[[], Kernels], is_needed: Callable[[], bool] = lambda: False
    ) -> None:
        self.name = name
        self.lock = threading.Lock()
        self._register = register
        self._is_needed = is_needed
        self._kernels: Kernels | None = None
        self._users = 0
        self.is_on = False
        self._of_thread = _OfThread()
        _switches.add(self)

    def enter(self) -> None:
        with self.lock:
            if self._kernels is None:
                self._kernels = self._register()
            self._users += 1
            self.is_on = True
        self._of_thread.depth += 1
        compile_cache.add(self.name)

    def leave(self) -> None:
        with self.lock:
            self._users -= 1
            off = self._users == 0
            self.is_on = not off
            # The kernels stay registered while another thread may be about to call one.
            if off and self._kernels is not None and not _thread._count() and not self._is_needed():
                self._kernels.remove()
                self._kernels = None
        self._of_thread.depth = 0 if off else max(self._of_thread.depth - 1, 0)
        if self._of_thread.depth == 0:
            compile_cache.remove(self.name)

    def why_not(self, tensor: Tensor) -> str | None:
        """Why a call with this tensor is left to torch; None if it is ours to serve. A traced call is ours only in a
        thread that turned the switch on, because its result may be cached under a key that has the tag of that thread.
        """
        if type(tensor) in PLAIN:
            return None if self.is_on else OFF
        if not self.is_on:
            compile_cache.remove(self.name)  # another thread left the block that this one entered
            return OFF
        return None if compile_cache.contains(self.name) else OTHER_THREAD

    def _renew_lock(self) -> None:
        self.lock = threading.Lock()


_switches: weakref.WeakSet[Switch] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child the thread that held a lock may not exist."""
    for switch in _switches:
        switch._renew_lock()


os.register_at_fork(after_in_child=_renew_locks)
