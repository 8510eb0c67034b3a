"""Checks that `dlkernels.patch` keeps the hooks of a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import dlkernels


def check_hooks_survive(module: nn.Module, inner: nn.Module, output: Callable[[], Tensor]) -> None:
    """Asserts that hooks run as before the swap and that handles from before the swap still remove them. Forward hooks
    are registered on `inner`, all others on `module`. `output` calls the module on inputs that require a gradient."""
    calls: list[str] = []
    handles = [
        inner.register_forward_pre_hook(lambda *_: calls.append("pre")),
        inner.register_forward_hook(lambda *_: calls.append("forward")),
        module.register_full_backward_hook(lambda *_: calls.append("backward")),
        module.register_state_dict_pre_hook(lambda *_: calls.append("state")),
        module.register_load_state_dict_post_hook(lambda *_: calls.append("load")),
    ]

    def run() -> list[str]:
        calls.clear()
        output().sum().backward()
        module.load_state_dict(module.state_dict())
        return list(calls)

    before = run()
    assert set(before) == {"pre", "forward", "backward", "state", "load"}
    dlkernels.patch(module)
    assert run() == before
    for handle in handles[:3]:
        handle.remove()
    assert run() == ["state", "load"]
    dlkernels.unpatch(module)
    for handle in handles[3:]:
        handle.remove()
    assert run() == []
