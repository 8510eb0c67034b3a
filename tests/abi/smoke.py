"""Loads dlkernels under the torch of this interpreter and compares its layers with torch's, forward and backward."""

from __future__ import annotations

import sys

import torch

import dlkernels
from dlkernels._core import extension


def results(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, state = layer(x)
    states = state if isinstance(state, tuple) else (state,)
    sum(t.double().square().sum() for t in (y, *states)).backward()
    return [y, *states, x.grad, *(p.grad for p in layer.parameters())]


def check(name: str, **settings: object) -> bool:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(12, 20, **settings)
    ours = getattr(dlkernels.nn, name)(12, 20, **settings)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 3, 12)
    expected = results(theirs, x)
    pairs = list(zip(results(ours, x), expected, strict=True))
    with torch.no_grad():  # another way to the kernels
        pairs.append((ours(x)[0], expected[0]))
    with dlkernels.enable() as handle:
        pairs += zip(results(theirs, x), expected, strict=True)
    worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
    if not handle.served:
        print(f"  {name}: {handle.report()}")
        return False
    print(f"  {name} {settings or ''}: largest difference {worst:.1e}")
    return worst < 1e-4


def main() -> int:
    print(f"torch {torch.__version__} (CUDA {torch.version.cuda}), {extension.native.__file__}")
    print(f"  {extension.native.build_info()}, ISA {extension.native.isa()}")
    good = [
        check("LSTM"),
        check("LSTM", num_layers=2, bidirectional=True),
        check("LSTM", proj_size=8),
        check("GRU", bidirectional=True),
        check("RNN", nonlinearity="relu"),
    ]
    kernel = extension.native.last_run()["kernel"]
    print(f"  last kernel: {kernel}")
    return 0 if all(good) and kernel.startswith("cpu/") else 1


if __name__ == "__main__":
    sys.exit(main())
