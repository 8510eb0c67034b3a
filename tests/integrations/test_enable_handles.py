"""Tests the handles of `dlkernels.enable`: on and off in any order, reports, threads, the environment and forks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from tests.support.enabled_calls import MARKS, H, I, Q, X, assert_close, served
from tests.support.enabled_calls import off_again as off_again
from tests.support.fresh_python import run_python

pytestmark = MARKS


def test_handles() -> None:
    layer = nn.GRU(I, H)

    def is_served() -> bool:
        with dlkernels.enable(False, False) as counter, torch.no_grad():
            layer(X)
        return bool(counter.served)

    assert not is_served()
    first, second = dlkernels.enable(), dlkernels.enable()
    first.disable()
    assert is_served() and second.is_on and not first.is_on
    first.disable()
    assert is_served()
    with dlkernels.enable():
        second.disable()
        assert is_served()
    assert not is_served()
    with pytest.raises(KeyError), dlkernels.enable():
        raise KeyError
    assert not is_served()
    dlkernels.enable()
    dlkernels.enable(attention=False)
    dlkernels.disable()
    dlkernels.disable()
    assert not is_served()


def test_counts_end_with_the_handle() -> None:
    layer = nn.GRU(I, H)
    outer = dlkernels.enable()
    layer(X)
    with dlkernels.enable() as inner:
        layer(X)
    layer(X)
    assert served(inner) == {"gru.input": 1} and served(outer) == {"gru.input": 3}
    assert outer.report().splitlines()[1].split()[:2] == ["gru.input", "3"]
    assert "3 calls" in repr(outer)
    assert dlkernels.enable(attention=False).report() == "no call of an operator that dlkernels serves"


def test_a_model_whose_attention_is_not_reached() -> None:
    class MyAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.mT, -1) @ x

    class AttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MyAttention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x)  # type: ignore[no-any-return]

    model = nn.Sequential(AttentionBlock(), AttentionBlock())
    with dlkernels.enable() as handle:
        model(Q)
        assert "the model has none or" in handle.report()
        assert 'attn_implementation="eager"' in handle.report()
        nn.functional.scaled_dot_product_attention(Q, Q, Q)
        assert "eager" not in handle.report()
    report = dlkernels.patch_report(model)
    assert report.own_attention == {"MyAttention": 2} and "MyAttention (2)" in str(report)
    assert "own attention" not in str(dlkernels.patch_report(nn.MultiheadAttention(4, 2)))


def test_threads() -> None:
    """Threads turn the switch on and off while others call: each call is served by one of the two kernels."""
    layer = nn.LSTM(I, H)
    with torch.no_grad():
        expected = layer(X)
    failed: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                with torch.no_grad():
                    for _ in range(200):
                        function()
            except BaseException as error:
                failed.append(error)

        return run

    def switch() -> None:
        with dlkernels.enable():
            pass

    threads = [threading.Thread(target=guarded(f)) for f in (switch, switch, lambda: assert_close(layer(X), expected))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    with dlkernels.enable() as handle:
        thread = threading.Thread(target=lambda: layer(X))
        thread.start()
        thread.join()
    assert served(handle) == {"lstm.input": 1}


def test_the_environment_turns_it_on_at_import() -> None:
    code = """
        import torch
        layer, x = torch.nn.LSTM(4, 6), torch.randn(5, 3, 4)
        import dlkernels
        layer(x)
        assert type(layer(x)[0].grad_fn).__name__ == {name!r}, layer(x)[0].grad_fn
        dlkernels.disable()
        assert type(layer(x)[0].grad_fn).__name__ != "SequenceBackward"
    """
    run_python(code.format(name="SequenceBackward"), DLKERNELS_ENABLE="1")


def test_import_registers_nothing_and_forks_inherit() -> None:
    run_python("""
        import torch, dlkernels
        from tests.support.regions_and_forks import in_forked_child
        found = torch._C._dispatch_has_kernel_for_dispatch_key
        names = [f"aten::{mode}.{form}" for mode in ("lstm", "gru", "rnn_relu") for form in ("input", "data")]
        names += ["aten::scaled_dot_product_attention", "aten::lstm_cell"]
        def registered():
            return [found(name, key) for name in names for key in ("AutogradCPU", "CPU", "CUDA")]
        assert not any(registered())
        layer, x = torch.nn.LSTM(4, 6), torch.randn(5, 3, 4)
        def child():
            with torch.no_grad():
                layer(x)
            with dlkernels.enable() as inner:
                layer(x)
            assert sum(inner.served.values()) == 1
            handle.disable()
            assert type(layer(x)[0].grad_fn).__name__ != "SequenceBackward"
        with dlkernels.enable() as handle:
            assert all(registered())
            in_forked_child(child)
            assert type(layer(x)[0].grad_fn).__name__ == "SequenceBackward"
        assert not any(registered())
    """)
