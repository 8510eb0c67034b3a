"""Mistakes with the arguments that torch.nn does not have, each under the name of the argument it is made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mistakes import LAYER_KINDS, B, Mistake, T, good_input, new_layer
from torch.nn.utils.rnn import pack_padded_sequence

GOOD_LENGTHS = torch.tensor([5, 3, 1])
BAD_LENGTHS: dict[str, Any] = {
    "list": [5, 3, 1], "tuple": (5, 3, 1), "int": 5, "str": "abc", "float": torch.tensor([5.0, 3.0, 1.0]),
    "bool": torch.tensor([True, True, True]), "complex": torch.ones(B, dtype=torch.complex64),
    "rank 0": torch.tensor(5), "rank 2": torch.tensor([[5, 3, 1]]), "too few": torch.tensor([5, 3]),
    "too many": torch.tensor([5, 3, 1, 1]), "empty": torch.empty(0, dtype=torch.int64),
    "negative": torch.tensor([5, -1, 1]),
    "most negative": torch.tensor([5, -(2**63), 1]), "beyond T": torch.tensor([5, T + 1, 1]),
    "far beyond T": torch.tensor([5, 2**62, 1]), "wraps in 32 bits": torch.tensor([5, 2**32 + 2, 1]),
}  # fmt: skip
BAD_STEPS: dict[str, Any] = {
    "-1": -1, "-2**40": -(2**40), "1.5": 1.5, "2.0": 2.0, "str": "2", "list": [2],
    "tensor of floats": torch.tensor(2.5), "2**70": 2**70,
}  # fmt: skip


def layer_options() -> Iterator[tuple[str, Mistake]]:
    for kind in LAYER_KINDS:
        x = good_input(kind)
        for name, bad in BAD_LENGTHS.items():
            for grad in (True, False):

                def with_lengths(
                    package: Any, kind: str = kind, bad: Any = bad, grad: bool = grad, x: torch.Tensor = x
                ) -> None:
                    with torch.set_grad_enabled(grad):
                        new_layer(package, kind)(x, lengths=bad)

                yield f"lengths of {kind}", Mistake(f"{name}{'' if grad else ', no_grad'}", with_lengths)
        batch_first = LAYER_KINDS[kind][1].get("batch_first", False)
        packed = pack_padded_sequence(x, GOOD_LENGTHS, batch_first)
        yield (
            f"lengths of {kind}",
            Mistake(
                "with a PackedSequence",
                lambda package, kind=kind, packed=packed: new_layer(package, kind)(packed, lengths=GOOD_LENGTHS),
            ),
        )
        yield (
            f"lengths of {kind}",
            Mistake(
                "unbatched", lambda package, kind=kind, x=x: new_layer(package, kind)(x[0], lengths=GOOD_LENGTHS[:1])
            ),
        )
        for name, bad in BAD_STEPS.items():
            yield (
                f"bptt_steps of {kind}",
                Mistake(name, lambda package, kind=kind, x=x, bad=bad: new_layer(package, kind)(x, bptt_steps=bad)),
            )


def all_mistakes() -> Iterator[tuple[str, Mistake]]:
    yield from layer_options()
