"""Tests calls that need more memory than exists or more bytes than 64 bits can count. Ours raises torch's exception,
and the message names the number of bytes and their purpose, but no path of the build machine. The inputs are expanded
tensors, which take almost no memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dlkernels
from dlkernels import functional
from tests.support.rnn_op_calls import Call, op

pytestmark = pytest.mark.usefixtures("native")

LAYERS = {"LSTM": {"input_size": 4, "hidden_size": 8}, "GRU": {"input_size": 4, "hidden_size": 8},
          "RNN": {"input_size": 4, "hidden_size": 8}}  # fmt: skip
NO_MEMORY = r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (\d+) bytes"


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns an expanded tensor whose rows are dense and share the same memory."""
    return torch.zeros(shape[-1], dtype=dtype).expand(shape)


def error(call: Callable[[], object]) -> str:
    with torch.no_grad(), pytest.raises(RuntimeError) as raised:
        call()
    text = str(raised.value)
    assert type(raised.value) is RuntimeError
    assert not re.search(r"\.(h|cpp)\b|API call failed|/", text), text
    return text


def refused_by_torch(call: Callable[[], object], words: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=words):
        call()


@pytest.mark.parametrize("name", LAYERS)
def test_result_of_a_layer(name: str) -> None:
    x = wide(2, 2**41, 4)
    refused_by_torch(lambda: getattr(torch.nn, name)(**LAYERS[name])(x), NO_MEMORY)
    text = error(lambda: getattr(dlkernels.nn, name)(**LAYERS[name])(x))
    found = re.match(NO_MEMORY + r" for a result of shape \[2, 2199023255552, 8\]$", text)
    assert found and int(found[1]) == 2**42 * 8 * 4, text


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_result_of_a_cell(name: str) -> None:
    x = wide(2**42, 4)
    refused_by_torch(lambda: getattr(torch.nn, name)(4, 8)(x), NO_MEMORY)
    found = re.match(NO_MEMORY + r" for a result of shape \[4398046511104, 8\]$",
                     error(lambda: getattr(dlkernels.nn, name)(4, 8)(x)))  # fmt: skip
    assert found and int(found[1]) == 2**42 * 8 * 4


def test_result_of_attention() -> None:
    q = wide(2**16, 2**10, 2**16, 64)
    found = re.match(NO_MEMORY + r" for a result of shape \[65536, 1024, 65536, 64\]$",
                     error(lambda: functional.attention(q, q, q)))  # fmt: skip
    assert found and int(found[1]) == 2**50
    refused_by_torch(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), NO_MEMORY)


def test_what_the_backward_needs() -> None:
    # y, h_n and c_n fit into memory. The saved tensor is 20481 times as large as y.
    call = Call("lstm", proj=1)
    weights = [torch.zeros(shape) for shape in ((2**14, 1), (2**14, 1), (1, 2**12))]
    text = error(lambda: call.forward(x=wide(2**20, 2**5, 1), h0=None, c0=None, weights=weights))
    assert re.match(NO_MEMORY + r" for what the backward needs of shape \[1, 1048576, 32, 20481\]$", text), text


def test_copy_of_an_argument() -> None:
    x = torch.zeros(1, 1, 1).expand(2**22, 2**20, 4)  # its rows are not dense
    text = error(lambda: dlkernels.nn.GRU(4, 8)(x))
    assert re.match(NO_MEMORY + r" for the contiguous copy of an argument of shape \[4194304, 1048576, 4\]$", text), (
        text
    )


@pytest.mark.parametrize("name", [*LAYERS, "LSTMCell", "GRUCell", "RNNCell"])
def test_more_bytes_than_64_bits_count(name: str) -> None:
    x = wide(2**60, 1) if name.endswith("Cell") else wide(2, 2**59, 1)
    refused_by_torch(lambda: getattr(torch.nn, name)(1, 64)(x), "overflow|" + NO_MEMORY)
    assert re.match(r"Storage size calculation overflowed: the bytes of a result of shape \[.*, 64\] exceed 64 bits$",
                    error(lambda: getattr(dlkernels.nn, name)(1, 64)(x)))  # fmt: skip


def test_more_bytes_than_64_bits_count_in_attention() -> None:
    q, k, v = wide(1, 1, 2**58, 1), wide(1, 1, 1, 1), wide(1, 1, 1, 64)
    assert "the bytes of a result of shape [1, 1, 288230376151711744, 64] exceed" in error(
        lambda: functional.attention(q, k, v)
    )


# If one argument is wrong, no argument is copied before the check: a copy of this size would fail first.
HUGE = 2**44


def integers(dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(1, dtype=dtype).expand(HUGE)


def doubles(*shape: int) -> Tensor:
    return torch.zeros(1, dtype=torch.float64).expand(shape)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": integers()}, r"lengths must have shape \[3\], got"),
        ({"x": doubles(5, 4), "batch_sizes": integers()}, "batch_sizes must be positive and must sum to the rows of x"),
        ({"x": doubles(5, HUGE, 4), "h0": doubles(1, 2, 6)}, "h0 must have shape"),
        ({"x": doubles(5, HUGE, 4), "lengths": torch.zeros(3, dtype=torch.int64)}, "lengths must have shape"),
        ({"x": doubles(5, 3, HUGE), "weights": [doubles(24, HUGE), doubles(24, 6), doubles(23), doubles(24)]},
         "b_ih must have shape"),
        ({"h0": doubles(1, HUGE, 6)}, "h0 must have shape"),
    ],
)  # fmt: skip
def test_sizes_are_checked_before_anything_is_copied(changes: dict[str, Tensor], words: str) -> None:
    call = Call("lstm")
    with pytest.raises(RuntimeError, match=words):
        call.forward(**{"c0": None, "h0": None, **changes})


def test_sizes_of_attention_are_checked_before_anything_is_copied() -> None:
    q = doubles(HUGE, 1, 8)
    cu, huge = torch.zeros(2, dtype=torch.int32), integers(torch.int32)
    rest = (None, 0, 0, 1.0, 0, -1, -1, 0.0, 0.0, False)
    for cu_q, cu_k in ((cu, huge), (huge, cu)):
        with pytest.raises(RuntimeError, match="cu_seqlens_k must have shape"):
            op("attention")(q, q, q, None, None, None, cu_q, cu_k, *rest)
    for cu_q, cu_k in ((cu, huge), (huge, cu), (cu.long(), integers()), (integers(), cu.long())):
        with pytest.raises(RuntimeError, match="cu_seqlens_k: expected shape"):
            functional.attention(q, q, q, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def test_the_python_checks_copy_no_lengths() -> None:
    x, layer = torch.zeros(5, 3, 4), dlkernels.nn.GRU(4, 8)
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(RuntimeError, match="Expected lengths of size"):
            layer(x, lengths=integers(dtype))


WITHOUT_MEMORY = """
import resource, torch, dlkernels
from dlkernels import functional
torch.set_num_threads(1)
layer, x = dlkernels.nn.LSTM(1024, 1024), torch.randn(8, 32, 1024)
rows, cu = torch.zeros(1, 1, 8), torch.zeros(1, dtype=torch.int32)
def message(call):
    try:
        with torch.no_grad():
            call()
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("no error")
functional.attention(rows, rows, rows, cu_seqlens_q=cu.expand(2), cu_seqlens_k=cu.expand(2))
dlkernels.nn.LSTM(4, 4)(torch.zeros(2, 2, 4))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))
message(lambda: layer(x))
many = cu.expand(2**28)
message(lambda: functional.attention(rows, rows, rows, cu_seqlens_q=many, cu_seqlens_k=many))
"""


def test_working_memory() -> None:
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=120,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    layer, attention = done.stdout.splitlines()
    assert re.match("RuntimeError " + NO_MEMORY + " for the working memory of the kernels$", layer), layer
    assert attention == "RuntimeError DefaultCPUAllocator: can't allocate memory for the tables of this call"
