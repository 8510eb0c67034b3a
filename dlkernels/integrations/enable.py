"""`dlkernels.enable()`: torch's own operators on our kernels, for models that one does not want to change."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

from dlkernels.integrations import fast_path, recurrent_operators, sdpa_operator
from dlkernels.integrations.compile_settings import recurrent_layers_allowed
from dlkernels.integrations.counts import Counts, Pairs, counts, report
from dlkernels.integrations.switch import Switch

__all__ = ["Enabled", "disable", "enable"]

_ATTENTION = ("scaled_dot_product_attention", fast_path.NAME)
_NO_ATTENTION = (
    "no attention was reached: the model has none or computes its own, "
    'as transformers\' attn_implementation="eager" does'
)
_handles: list[Enabled] = []


class Enabled:
    """What `enable` returns. It may be used as a context manager, which turns off what it turned on."""

    def __init__(self, switches: list[Switch], compile: bool) -> None:
        self._attention = sdpa_operator.SWITCH in switches
        self._lock = threading.Lock()
        self._before = counts()
        self._after: Counts | None = None
        with contextlib.ExitStack() as turned_on:  # which an exception undoes
            for switch in switches:
                switch.enter()
                turned_on.callback(switch.leave)
            if compile:
                turned_on.enter_context(recurrent_layers_allowed())
            self._on = turned_on.pop_all()
        _handles.append(self)

    def disable(self) -> None:
        """Turns off what this call of `enable` turned on. What other calls turned on stays on. Twice does no harm."""
        with self._lock:
            if self._after is not None:
                return
            self._after = counts().since(self._before)
        self._on.close()
        _handles.remove(self)

    @property
    def is_on(self) -> bool:
        return self._after is None

    def _counts(self) -> Counts:
        return counts().since(self._before) if self._after is None else self._after

    @property
    def served(self) -> Pairs:
        """(operator, kernel) -> calls that our kernels served since `enable`, in the whole process."""
        return self._counts().served

    @property
    def left(self) -> Pairs:
        """(operator, reason) -> calls that went to torch since `enable`, in the whole process."""
        return self._counts().left

    def report(self) -> str:
        """`served` and `left` as a table, and a note if no call of attention came."""
        found = self._counts()
        lines = [report(found)]
        reached = any(operator in _ATTENTION for operator, _ in (*found.served, *found.left))
        if self._attention and not reached:
            lines.append(_NO_ATTENTION)
        return "\n".join(lines)

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        return f"<dlkernels.enable(): {'on' if self.is_on else 'off'}, {sum(self.served.values())} calls served>"


def enable(recurrent: bool = True, attention: bool = True, *, compile: bool = False) -> Enabled:
    """Serves torch's own operators with our kernels, until the handle that is returned is disabled or left as a block.

    recurrent: what torch.nn.RNN, LSTM, GRU and their cells call, padded and packed.
    attention: torch.nn.functional.scaled_dot_product_attention, which nn.MultiheadAttention and the Transformer layers
        call as well, and the operator that these call instead on their fast path for inference.
    compile: lets torch.compile put a recurrent layer of torch.nn into its graph (`torch._dynamo.config.allow_rnn`, in
        this thread), where otherwise the graph breaks. Compile while the switch is on, in the thread that turned it on.

    Modules keep their classes. Calls are served from all threads, eager, compiled and scripted, with and without
    gradients, under autocast and in recomputation. What our kernels do not serve runs in torch as if the switch were
    off; `handle.report()` tells what was served and what was left, and why. Calls nest and may be undone in any order.
    """
    switches = [recurrent_operators.SWITCH] if recurrent else []
    if attention:
        switches += [sdpa_operator.SWITCH, fast_path.SWITCH]
    return Enabled(switches, compile)


def disable() -> None:
    """Undoes all calls of `enable` that are in force, but no block of `patch_attention`."""
    for handle in list(_handles):
        handle.disable()
