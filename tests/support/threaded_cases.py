"""Calls that cover every way in which the planners split work among threads."""

from __future__ import annotations

import torch

from tests.support.attention_oracle import Case as Attention
from tests.support.layer_cases import Case

# The planner splits these shapes over rows, over hidden units, or not at all; half of them have lengths.
SHAPES = [(6, 32, 24, 48, 16), (12, 1, 32, 256, 64), (3, 2, 4, 6, 2), (8, 5, 64, 192, 32)]
# The planner splits these over rows, over rows and keys, over keys alone and over packed sequences; the last is serial.
ATTENTION_CASES = [
    Attention(B=2, H=4, Hkv=2, M=130, N=130, D=32, Dv=32, causal=1),
    Attention(B=1, H=2, Hkv=1, M=70, N=700, D=59, Dv=33, causal=2, mask="mn", mask_kind="own", slopes="h", dropout=0.2),
    Attention(B=1, H=8, Hkv=2, M=1, N=1500, D=64, Dv=64, sinks=True),
    Attention(B=3, H=2, Hkv=1, D=32, Dv=32, lengths_q=(3, 0, 90), lengths_k=(80, 5, 300), dtype=torch.bfloat16),
    Attention(M=3, N=4),
]


def cases_of(mode: str, dtype: torch.dtype = torch.float32) -> list[Case]:
    cases = []
    for number, (t, b, i, h, p) in enumerate(SHAPES):
        lengths = tuple(1 + (3 * k + t - 1) % t for k in range(b)) if number % 2 == 0 else None
        cases.append(
            Case(
                mode,
                t,
                b,
                i,
                h,
                p if mode == "lstm_proj" else 0,
                bidirectional=number != 1,
                lengths=lengths,
                dtype=dtype,
            )
        )
    return cases
