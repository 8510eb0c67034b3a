"""Settings of torch.compile that a switch changes while it is on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["recurrent_layers_allowed"]

_lock = threading.Lock()
_users = 0
_before = False


@contextlib.contextmanager
def recurrent_layers_allowed() -> Iterator[None]:
    """Dynamo traces torch.nn's recurrent layers in the block. Blocks may overlap; the last one restores the setting."""
    import torch._dynamo  # takes a second

    global _users, _before
    with _lock:
        if _users == 0:
            _before = torch._dynamo.config.allow_rnn
        _users += 1
        torch._dynamo.config.allow_rnn = True
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                torch._dynamo.config.allow_rnn = _before
