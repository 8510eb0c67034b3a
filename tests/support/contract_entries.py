"""A table of the modules and functions of torch.nn that dlkernels replaces. An entry makes torch's module and ours with
the same weights, and test_contract*.py tests every entry in every use. A new layer, cell or operator needs a line
here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import dlkernels

T, B, I, H = 5, 3, 4, 6
LENGTHS = (5, 2, 4)


def _patched(module: nn.Module) -> nn.Module:
    return dlkernels.patch(module, copy=True)


@dataclass(frozen=True)
class Entry:
    """`theirs(dtype)` makes torch's module, `swap` makes ours from it, and `inputs` draws the inputs of both.

    keeps_result: ours saves its result for the backward, so autograd raises an error if the result was edited in place.
    keeps_input: ours saves its input where torch saves a copy, so autograd raises an error if the input was edited.
    """

    name: str
    theirs: Callable[[torch.dtype], nn.Module]
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    swap: Callable[[nn.Module], nn.Module] = _patched
    keeps_result: bool = False
    keeps_input: bool = False

    @property
    def attends(self) -> bool:
        """Whether this is a use of attention, in whichever way it is made ours."""
        return any(self.theirs is entry.theirs for entry in ATTENTION)

    def pair(self, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(7)
        theirs = self.theirs(dtype)
        return theirs, self.swap(theirs)

    def draw(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        torch.manual_seed(11)
        return self.inputs(dtype)

    def __repr__(self) -> str:
        return self.name


def exactly() -> Any:
    """Makes torch compute attention by matrix products, for reference values. Its fused kernel has no second derivative
    and loses the sum of a row when the row's maximum is large."""
    return sdpa_kernel(SDPBackend.MATH)


def tensors(result: Any) -> list[Tensor]:
    """Returns the tensors of a result, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in tensors(part)]


class Packed(nn.Module):
    """A layer that is called with a PackedSequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False))


class Attend(nn.Module):
    """Calls scaled_dot_product_attention; `learned` adds a mask that is a parameter."""

    def __init__(self, dtype: torch.dtype, learned: bool = False, **options: Any) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(T, T, dtype=dtype)) if learned else None
        self.options = options
        self.attend: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, attn_mask=self.mask, **self.options)


def _swap_attend(attend: Callable[..., Tensor], module: nn.Module) -> nn.Module:
    swapped = copy.deepcopy(module)
    swapped.attend = attend  # type: ignore[assignment]
    return swapped


_sdpa = functools.partial(_swap_attend, dlkernels.functional.scaled_dot_product_attention)
_attention = functools.partial(_swap_attend, dlkernels.functional.attention)


class SelfAttention(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Beyond(nn.Module):
    """A layer of ours with what torch.nn lacks. `by_steps` computes it in PyTorch operations from the same parameters,
    and takes torch's place in the table."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_ours = False

    def forward(self, x: Tensor) -> Any:
        return self.by_kernels(x) if self.is_ours else self.by_steps(x)

    def by_kernels(self, x: Tensor) -> Any:
        return self.layer(x)

    def by_steps(self, x: Tensor) -> Any:
        raise NotImplementedError


class Resetting(Beyond):
    """An LSTM with `resets=` and `return_cells=True`."""

    resets: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dlkernels.nn.LSTM(I, H, dtype=dtype))
        self.register_buffer("resets", torch.rand(T, B) < 0.4)

    def by_kernels(self, x: Tensor) -> Any:
        return self.layer(x, resets=self.resets, return_cells=True)

    def by_steps(self, x: Tensor) -> Any:
        w_ih, w_hh, b_ih, b_hh = self.layer.parameters()
        h = c = x.new_zeros(B, H)
        ys, cells = [], []
        for step, flags in zip(x, self.resets, strict=True):
            kept = ~flags[:, None]
            gates = step @ w_ih.t() + b_ih + (h * kept) @ w_hh.t() + b_hh
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * (c * kept) + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            ys.append(h)
            cells.append(c)
        return torch.stack(ys), (h[None], c[None]), torch.stack(cells)


class Normalised(Beyond):
    """A LayerNormGRU."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dlkernels.nn.LayerNormGRU(I, H, dtype=dtype))

    def by_steps(self, x: Tensor) -> Any:
        w_ih, w_hh, b_ih, b_hh, norm_ih, norm_hh = self.layer.parameters()

        def normalised(products: Tensor) -> Tensor:
            parts = products.split([2 * H, H], -1)
            return torch.cat([nn.functional.layer_norm(part, part.shape[-1:]) for part in parts], -1)

        h = x.new_zeros(B, H)
        ys = []
        for step in x:
            gi, gh = normalised(step @ w_ih.t()) * norm_ih + b_ih, normalised(h @ w_hh.t()) * norm_hh + b_hh
            (ri, zi, ni), (rh, zh, nh) = gi.chunk(3, -1), gh.chunk(3, -1)
            z, n = (zi + zh).sigmoid(), (ni + (ri + rh).sigmoid() * nh).tanh()
            h = (1 - z) * n + z * h
            ys.append(h)
        return torch.stack(ys), h[None]


def _by_kernels(module: nn.Module) -> nn.Module:
    ours = copy.deepcopy(module)
    ours.is_ours = True  # type: ignore[assignment]
    return ours


class Enabled(nn.Module):
    """torch's own module, called while `dlkernels.enable` is on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Any:
        with dlkernels.enable() as handle:
            result = self.module(*given)
        assert handle.served or handle.left
        return result


def _draw(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    return lambda dtype: tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def _layer(name: str, cls: Any, *, packed: bool = False, keeps_input: bool = False, **options: Any) -> Entry:
    def theirs(dtype: torch.dtype) -> nn.Module:
        layer = cls(I, H, dtype=dtype, **options)
        return Packed(layer) if packed else layer

    state = (options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1), B, H)
    shapes = [(B, T, I) if options.get("batch_first") else (T, B, I)]
    if cls is not nn.LSTM and not packed:
        shapes.append(state)
    return Entry(name, theirs, _draw(*shapes), keeps_input=keeps_input)


LAYERS = [
    _layer("RNN", nn.RNN),
    _layer("RNN relu", nn.RNN, nonlinearity="relu", batch_first=True),
    _layer("LSTM", nn.LSTM),
    _layer("LSTM batch_first bidirectional", nn.LSTM, keeps_input=True, batch_first=True, bidirectional=True),
    _layer("LSTM projected", nn.LSTM, proj_size=2),
    _layer("LSTM packed", nn.LSTM, packed=True),
    _layer("GRU", nn.GRU),
    _layer("GRU two layers", nn.GRU, num_layers=2, bidirectional=True),
    _layer("GRU packed", nn.GRU, packed=True),
]
CELLS = [
    Entry("RNNCell", lambda dtype: nn.RNNCell(I, H, dtype=dtype), _draw((B, I), (B, H))),
    Entry("RNNCell relu", lambda dtype: nn.RNNCell(I, H, nonlinearity="relu", dtype=dtype), _draw((B, I), (B, H))),
    Entry("LSTMCell", lambda dtype: nn.LSTMCell(I, H, dtype=dtype), _draw((B, I))),
    Entry("GRUCell", lambda dtype: nn.GRUCell(I, H, dtype=dtype), _draw((B, I), (B, H))),
]
_HEADS = (2, 3, T, 8)
ATTENTION = [
    Entry("sdpa", Attend, _draw(_HEADS, _HEADS, _HEADS), _sdpa),
    Entry(
        "sdpa causal, q transposed",
        functools.partial(Attend, is_causal=True),
        lambda dtype: tuple(torch.randn(2, T, 3, 8, dtype=dtype).transpose(1, 2) for _ in range(3)),
        _sdpa,
    ),
    Entry("sdpa 3-D", Attend, _draw(*[_HEADS[1:]] * 3), _sdpa),
    Entry("sdpa 5-D", Attend, _draw(*[(2, *_HEADS)] * 3), _sdpa),
    Entry("sdpa, wide values", Attend, _draw(_HEADS, _HEADS, (*_HEADS[:3], 4)), _sdpa),
    Entry("sdpa learned mask", functools.partial(Attend, learned=True), _draw(_HEADS, _HEADS, _HEADS), _sdpa),
    Entry("attention", Attend, _draw(_HEADS, _HEADS, _HEADS), _attention, keeps_result=True),
    Entry(
        "attention learned mask",
        functools.partial(Attend, learned=True),
        _draw(_HEADS, _HEADS, _HEADS),
        _attention,
        keeps_result=True,
    ),
    Entry("MultiheadAttention", SelfAttention, _draw((2, T, 8))),
    Entry(
        "TransformerEncoderLayer",
        lambda dtype: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=dtype),
        _draw((2, T, 8)),
    ),
]
BEYOND = [
    Entry("LSTM with resets and cells", Resetting, _draw((T, B, I)), _by_kernels),
    Entry("LayerNormGRU", Normalised, _draw((T, B, I)), _by_kernels),
]
ENTRIES = [*LAYERS, *CELLS, *ATTENTION, *BEYOND]
ENABLED = [
    replace(entry, name=f"enabled {entry.name}", swap=Enabled)
    for entry in ENTRIES
    if entry.name in ("RNN relu", "LSTM", "LSTM packed", "GRU two layers", "LSTMCell", "GRUCell", "sdpa", "sdpa 3-D")
]


def leaves(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [*inputs, *module.parameters()]


def gradients(module: nn.Module, inputs: tuple[Tensor, ...], loss: Callable[..., Tensor]) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    grads = torch.autograd.grad(loss(module, *inputs), leaves(module, inputs), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves(module, inputs), strict=True)]


def weighted(results: list[Tensor]) -> Tensor:
    """Returns a scalar in which every element of every result has a different weight."""
    total = results[0].new_zeros(())
    for result in results:
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
        total = total + (result * weights).sum()
    return total


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        return error


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], right: Any, kept: bool = False) -> None:
    """Asserts that `ours()` returns `right` or that both raise the same type of error. With `kept`, ours may raise
    autograd's error about an edited tensor where torch does not."""
    mine, other = outcome(ours), outcome(theirs)
    if isinstance(mine, Exception):
        if kept:
            assert "modified by an inplace operation" in str(mine)
            return
        if not isinstance(other, Exception):
            raise AssertionError("torch allows it") from mine
        assert type(mine) is type(other) and "inplace" in str(mine), (mine, other)
        return
    assert_same(mine, right)


def doubles_its_inputs(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Edits the inputs of a module in place after the call."""
    copies = [x * 1 for x in inputs]
    results = tensors(module(*copies))
    for x in copies:
        x.mul_(2)
    return weighted([*results, *copies])


def uses_doubled_inputs(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Computes the same as `doubles_its_inputs` without an edit."""
    return weighted([*tensors(module(*(x * 1 for x in inputs))), *(x * 2 for x in inputs)])
