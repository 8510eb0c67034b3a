"""A program edits tensors in place after a call of attention: gradients are right, or autograd raises as with
torch's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dlkernels
from dlkernels import functional

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(
        reason="autograd, vmap and compilers are Python around the kernels, and higher derivatives are the reference's"
    ),
]

Edit = Callable[[Tensor], Any]


def _add(o: Tensor) -> None:
    o += 1


def _set(o: Tensor) -> None:
    o[0] = 0


def _through_data(o: Tensor) -> None:
    o.data[...] = 0


def _through_numpy(o: Tensor) -> None:
    o.detach().numpy()[...] = 3


RECORDED: dict[str, Edit] = {"relu_": torch.relu_, "+=": _add, "setitem": _set}
UNSEEN: dict[str, Edit] = {"data": _through_data, "numpy": _through_numpy}

# (shapes of q, k and v, other arguments) of calls that torch computes by matrix products, so that it does not save the
# result.
MASK = torch.linspace(-1, 1, 35).view(5, 7)
FREE: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
    "2-D": ([(5, 4), (7, 4), (7, 4)], {}),
    "3-D": ([(3, 5, 4), (3, 7, 4), (3, 7, 4)], {}),
    "5-D": ([(2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 4)], {}),
    "Dv": ([(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)], {}),
    "learned mask": ([(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)], {"attn_mask": MASK}),
    "dropout": ([(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)], {"dropout_p": 1.0}),
    "broadcast": ([(2, 3, 5, 4), (1, 3, 7, 4), (2, 1, 7, 4)], {}),
}
KEPT = ([(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)], {})


def gradients(
    function: Callable[..., Tensor], call: tuple[list[tuple[int, ...]], dict[str, Any]], edit: Edit
) -> list[Tensor]:
    """Returns the gradients of the sum of squares of an edited result."""
    shapes, options = call
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    if "attn_mask" in options:
        options = {**options, "attn_mask": options["attn_mask"].clone().requires_grad_()}
        leaves.append(options["attn_mask"])

    o = function(*leaves[:3], **options)
    edit(o)
    return list(torch.autograd.grad(o.square().sum(), leaves))


@pytest.mark.parametrize("edit", [*RECORDED, *UNSEEN])
@pytest.mark.parametrize("name", FREE)
def test_results_that_torch_does_not_keep(name: str, edit: str) -> None:
    change = {**RECORDED, **UNSEEN}[edit]
    expected = gradients(F.scaled_dot_product_attention, FREE[name], change)
    torch.testing.assert_close(gradients(functional.scaled_dot_product_attention, FREE[name], change), expected)


@pytest.mark.parametrize("edit", RECORDED)
def test_a_result_that_torch_keeps(edit: str) -> None:
    for function in (F.scaled_dot_product_attention, functional.scaled_dot_product_attention, functional.attention):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(function, KEPT, RECORDED[edit])


def test_lse_is_the_callers() -> None:
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    o, lse = functional.attention(q, q, q, return_lse=True)
    expected = torch.autograd.grad(o.sum(), q, retain_graph=True)
    lse.zero_()
    torch.testing.assert_close(torch.autograd.grad(o.sum(), q), expected)


def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)  # type: ignore[no-any-return]


SDPA, ATTENTION = functional.scaled_dot_product_attention, functional.attention
COMPILED = [(SDPA, FREE["3-D"]), (SDPA, FREE["learned mask"]), (SDPA, KEPT), (ATTENTION, KEPT)]


def _edited_results(separately: bool, *leaves: Tensor) -> Tensor:
    """Makes every call of COMPILED with every edit. With `separately` a copy of the result is edited, which gives the
    right gradients."""
    given, total = iter(leaves), torch.zeros(())
    for (function, (_, options)), edit in itertools.product(COMPILED, RECORDED.values()):
        q, k, v = next(given), next(given), next(given)
        o = function(q, k, v, **({"attn_mask": next(given)} if options else {}))
        o = o.clone() if separately else o
        edit(o)
        total = total + o.square().sum()
    return total


# tests/integrations/test_contract_compiled.py has results that are edited under Inductor, which takes the longest.
@pytest.mark.heavy
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_results(backend: str) -> None:
    """Compiled code does not check versions, so the caller must get a result that the backward does not use."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator, requires_grad=True)
        for (_, (shapes, options)), _ in itertools.product(COMPILED, RECORDED)
        for shape in (*shapes, *((5, 7) for _ in options))
    ]
    expected = torch.autograd.grad(_edited_results(True, *leaves), leaves)
    found = torch.autograd.grad(_compiled(_edited_results, backend)(False, *leaves), leaves)
    torch.testing.assert_close(found, expected)


ARGUMENTS = {
    "q": (1, 2, 5, 4), "k": (1, 2, 7, 4), "v": (1, 2, 7, 4), "attn_mask": (1, 1, 5, 7), "alibi_slopes": (2,),
    "sinks": (2,),
}  # fmt: skip


def _edited_inputs(inside: bool, edits: bool, factor: Tensor, *given: Tensor) -> Tensor:
    """Makes a call for each argument, which is edited after the call. With `inside` the edited argument is computed
    here from `factor`."""
    total, values = torch.zeros(()), iter(given)
    for edited in ARGUMENTS:
        args = {}
        for name in ARGUMENTS:
            value = next(values)
            args[name] = value if name == edited and not inside else value * factor
        o = functional.attention(**args)
        if edits:
            args[edited].mul_(3)
        total = total + o.square().sum()
    return total


@pytest.mark.heavy
@pytest.mark.parametrize(
    "backend, inside", [("eager", True), ("aot_eager", True), ("aot_eager", False), ("inductor", True)]
)
def test_compiled_inputs(backend: str, inside: bool) -> None:
    """Compiled gradients are right even where eager autograd raises because an edited tensor was saved."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.rand(shape, generator=generator) for _ in ARGUMENTS for shape in ARGUMENTS.values()]
    factor = torch.ones((), requires_grad=True)
    expected = torch.autograd.grad(_edited_inputs(inside, False, factor, *values), factor)
    loss = _compiled(_edited_inputs, backend)(inside, True, factor, *(x.clone() for x in values))
    torch.testing.assert_close(torch.autograd.grad(loss, factor), expected)


@pytest.mark.parametrize("frozen", ["out_proj.weight", "in_proj_weight", ""])
@pytest.mark.parametrize("same_sizes", [True, False])
def test_input_of_multihead_attention(frozen: str, same_sizes: bool) -> None:
    """torch transposes batch_first input, which copies it. So a program may edit the input after the call, whichever
    weights are trained."""
    sizes = {} if same_sizes else {"kdim": 8, "vdim": 8}
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **sizes)
    if not same_sizes:
        theirs._qkv_same_embed_dim = False
        for part in "qkv":
            setattr(theirs, f"{part}_proj_weight", nn.Parameter(torch.randn(8, 8, dtype=torch.float64)))
        theirs.register_parameter("in_proj_weight", None)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name != frozen)
    ours = dlkernels.patch(theirs, copy=True)
    found = []
    for layer in (theirs, ours):
        x = torch.linspace(-1, 1, 2 * 3 * 8, dtype=torch.float64).view(2, 3, 8)
        y = layer(x, x, x, need_weights=False)[0]
        x.mul_(2)
        found.append(torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad]))
    for mine, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("which", ["out_proj", "in_proj_weight"])
def test_a_parametrized_weight_is_computed_once(which: str) -> None:
    counts = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            counts[-1] += 1
            return weight * 1

    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    owner, name = (theirs.out_proj, "weight") if which == "out_proj" else (theirs, which)
    counts.append(0)
    parametrize.register_parametrization(owner, name, Counted())
    ours = dlkernels.patch(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 8)
    counts.clear()
    for layer in (theirs, ours):
        counts.append(0)
        layer(x, x, x, need_weights=False)
    assert counts[1] == 1 or counts[1] <= counts[0], counts
