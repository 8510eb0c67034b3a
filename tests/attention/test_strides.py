"""The result of scaled_dot_product_attention has torch's strides for every rank and layout of its inputs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dlkernels
from dlkernels import functional

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="strides of results do not depend on the optimiser"),
]

B, H, M, N, D = 2, 3, 5, 7, 4
Call = tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]


def laid_out(order: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Returns a tensor whose dimensions are stored in `order`, from the outermost to the innermost."""
    return torch.randn([sizes[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])


def calls() -> Iterator[Call]:
    q, k = torch.randn(B, H, M, D), torch.randn(B, H, N, D)
    rows = laid_out((0, 2, 1, 3), (B, H, M, D))
    for order in itertools.permutations(range(4)):
        yield f"q {order}", (laid_out(order, (B, H, M, D)), k, k), {}
        other = laid_out(order, (B, H, N, D))
        yield f"k, v {order}", (q, other, other), {}
    for order in itertools.permutations(range(3)):
        of_k = laid_out(order, (H, N, D))
        yield f"3-D {order}", (laid_out(order, (H, M, D)), of_k, of_k), {}
    for name, (packed, dim) in {
        "qkv": (torch.randn(B, M, 3, H, D), 2), "first": (torch.randn(3, B, M, H, D), 0),
    }.items():  # fmt: skip
        yield name, tuple(x.transpose(1, 2) for x in packed.unbind(dim)), {}  # type: ignore[misc]
    yield "chunks", torch.randn(B, H, M, 3 * D).chunk(3, -1), {}  # type: ignore[misc]
    for name, x in {
        "batch": torch.randn(1, H, M, D), "head": torch.randn(B, 1, M, D), "row": torch.randn(B, H, 1, D),
        "rows of one head": torch.randn(B, M, 1, D).transpose(1, 2), "all": torch.randn(1, 1, 1, D),
    }.items():  # fmt: skip
        yield f"expanded {name}", (x.expand(B, H, M, D), k, k), {}
        yield f"broadcast {name}", (x, k, k), {}
    yield "one key head", (rows, k[:, :1], k[:, :1]), {}
    yield "one sequence of keys", (rows, k[:1], k[:1]), {}
    for heads in (3, 6):
        grouped = laid_out((0, 2, 1, 3), (B, heads, M, D))
        yield f"gqa {heads}", (grouped, k, k), {"enable_gqa": True}
        yield f"gqa {heads}, apart", (grouped, k[:, :1], k), {"enable_gqa": True}
    for sizes in ((B, H, 1, D), (B, 1, M, D), (1, H, M, D), (1, 1, M, D), (1, H, 1, D), (B, H, M, 1), (1, 1, 1, 1)):
        keys = torch.randn(*sizes[:2], N, sizes[3])
        for order in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)):
            yield f"{sizes} {order}", (laid_out(order, sizes), keys, keys), {}
    for name, part in {
        "no row": (..., slice(0), slice(None)), "no batch": (slice(0),), "no head": (slice(None), slice(0)),
        "no width": (..., slice(0)),
    }.items():  # fmt: skip
        yield name, (rows[part], k if name == "no row" else k[part], k if name == "no row" else k[part]), {}
    yield "no key", (rows, k[:, :, :0], k[:, :, :0]), {}
    yield "no Dv", (rows, k, k[..., :0]), {}
    yield "Dv", (rows, k, torch.randn(B, H, N, 6)), {}
    yield "every other of q", (torch.randn(B, H, M, 2 * D)[..., ::2], k, k), {}
    yield "every other of v", (rows, k, torch.randn(B, H, N, 2 * D)[..., ::2]), {}
    yield "dropout", (rows, k, k), {"dropout_p": 0.5}
    yield "causal", (rows, k, k), {"is_causal": True}
    for shape in ((M, N), (1, N), (M, 1), (H, M, N), (1, M, N), (B, H, M, N), (B, 1, 1, N)):
        yield f"mask {shape}", (rows, k, k), {"attn_mask": torch.randn(shape)}
        yield f"bool mask {shape}", (rows, k, k), {"attn_mask": torch.randn(shape) > -1}
        yield f"learned mask {shape}", (rows, k, k), {"attn_mask": torch.randn(shape, requires_grad=True)}
    for leads in itertools.product(((), (H,), (B, H), (4, B, H)), repeat=3):
        yield f"leading {leads}", tuple(torch.randn(*lead, n, D) for lead, n in zip(leads, (M, N, N), strict=True)), {}  # type: ignore[misc]
    yield "5-D", (torch.randn(4, B, M, H, D).transpose(2, 3), torch.randn(4, B, H, N, D), torch.randn(B, H, N, D)), {}


CALLS = {name: (tensors, options) for name, tensors, options in calls()}


def layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


@pytest.mark.parametrize("how", ["inference", "training", "no_grad", "autocast", "bfloat16", "math"])
def test_strides_are_torchs(how: str) -> None:
    for name, (tensors, options) in CALLS.items():
        kept = [x.bfloat16() if how == "bfloat16" else x for x in tensors]
        if how in ("training", "no_grad"):
            kept = [x.detach().requires_grad_() for x in kept]
        mask = options.get("attn_mask")
        if how == "bfloat16" and mask is not None and mask.is_floating_point():
            options = {**options, "attn_mask": mask.detach().bfloat16().requires_grad_(mask.requires_grad)}
        context: Any = {
            "no_grad": torch.no_grad(), "autocast": torch.autocast("cpu"), "math": sdpa_kernel(SDPBackend.MATH),
        }.get(how, contextlib.nullcontext())  # fmt: skip
        with context:
            theirs = F.scaled_dot_product_attention(*kept, **options)
            ours = functional.scaled_dot_product_attention(*kept, **options)
        assert layout(ours) == layout(theirs), (how, name)


def test_views_that_programs_take() -> None:
    q = torch.randn(H, M, D)
    functional.scaled_dot_product_attention(q, q, q).view(-1, D)
    q = torch.randn(B, H, M, D)
    functional.scaled_dot_product_attention(q, q, q).view(B * H, M, D)
    q = laid_out((0, 2, 1, 3), (B, H, M, D))
    functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).view(B, M, H * D)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_attention_lies_as_its_queries(order: tuple[int, ...]) -> None:
    q = laid_out((*order, 3), (B, H, M, D))
    assert functional.attention(q, q, q, causal=True).stride() == torch.empty_like(q).stride()
    assert functional.attention(q, q, q[..., :3]).is_contiguous()


def test_fakes_know_the_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, (tensors, options) in CALLS.items():
        q, k, v = tensors
        padded = q.dim() == k.dim() == v.dim() == 4
        if not padded or options or q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
            continue
        expected = functional.attention(q, k, v)
        with FakeTensorMode() as mode:
            found = functional.attention(*(mode.from_tensor(x) for x in tensors))
        # Strides of dimensions of size 1 have no meaning.
        told = [dim for dim in range(4) if expected.numel() and expected.shape[dim] > 1]
        assert found.shape == expected.shape, name
        assert [found.stride(dim) for dim in told] == [expected.stride(dim) for dim in told], name


def test_the_output_projection_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """MultiheadAttention merges the heads of its result without a copy, in both layouts and in both modes."""
    for batch_first, training in itertools.product((False, True), repeat=2):
        layer = dlkernels.nn.MultiheadAttention(8, 2, batch_first=batch_first).train(training)
        heads: list[Tensor] = []
        monkeypatch.setattr(layer, "_project_out", lambda o, into=heads: into.append(o) or o.flatten(-2))
        x = torch.randn(3, 5, 8)
        layer(x, x, x, need_weights=False)
        assert heads[0].flatten(-2).data_ptr() == heads[0].data_ptr()
