"""Calls the operators without autograd: torch's own checks of custom operators, and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from dlkernels.rnn import operators
from dlkernels.rnn.kinds import MODES
from tests.support.rnn_op_calls import GATES, LENGTHS, SLOTS, B, Call, CellCall, H, I, P, T, op

pytestmark = pytest.mark.usefixtures("native")

OPCHECK = pytest.mark.o0_skip(reason="schemas, fakes and aliasing are the same at -O0")
LAYOUTS = ("padded", "batch_first", "packed", "packed_h0", "lengths")
VARIANTS = [(mode, 0) for mode in MODES] + [("lstm", P)]

variants = pytest.mark.parametrize(("mode", "proj"), VARIANTS, ids=lambda value: str(value))
layouts = pytest.mark.parametrize("layout", LAYOUTS)
directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
modes = pytest.mark.parametrize("mode", MODES)


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


def has_two_directions(mode: str, proj: int, layout: str) -> bool:
    """Spreads both directions over modes and layouts. opcheck takes half a second, mostly to trace."""
    return (VARIANTS.index((mode, proj)) + LAYOUTS.index(layout)) % 2 == 0


@variants
@layouts
@OPCHECK
def test_opcheck_forward(mode: str, proj: int, layout: str) -> None:
    call = Call(mode, proj, has_two_directions(mode, proj, layout), layout)
    # The padding rows of `saved` are undefined and opcheck compares two runs, so `saved` is left out with lengths.
    call.args["save"] = layout != "lengths"
    torch.library.opcheck(op(mode), tuple(call.args.values()))


@variants
@layouts
@OPCHECK
def test_opcheck_backward(mode: str, proj: int, layout: str) -> None:
    args = Call(mode, proj, has_two_directions(mode, proj, layout), layout).backward_args(bptt_steps=2, gate_grads=True)
    torch.library.opcheck(op(f"{mode}_backward"), tuple(args.values()))


@modes
@OPCHECK
def test_opcheck_of_a_backward_that_wants_little(mode: str) -> None:
    args = Call(mode).backward_args(dh_n=None, dc_n=None, need_x=False, need_state=False, need_weights=False)
    torch.library.opcheck(op(f"{mode}_backward"), tuple(args.values()))


@modes
@pytest.mark.parametrize("full", [True, False])
@OPCHECK
def test_opcheck_cell(mode: str, full: bool) -> None:
    call = CellCall(mode, bias=full, states=full)
    torch.library.opcheck(op(f"{mode}_cell"), tuple(call.args.values()))
    torch.library.opcheck(op(f"{mode}_cell_backward"), tuple(call.backward_args(gate_grads=full).values()))


@variants
@directions
@OPCHECK
def test_opcheck_pack(mode: str, proj: int, bidirectional: bool) -> None:
    call = Call(mode, proj, bidirectional)
    torch.library.opcheck(op("pack"), (mode, call.args["weights"], bidirectional))


@variants
@layouts
@directions
def test_values(mode: str, proj: int, layout: str, bidirectional: bool) -> None:
    call = Call(mode, proj, bidirectional, layout)
    a = call.args
    y, h_n, c_n, saved, _ = call.forward()
    hx = None
    if a["h0"] is not None:
        a["h0"].requires_grad_()
        hx = a["h0"] if mode != "lstm" else (a["h0"], a["c0"].requires_grad_())
    x = a["x"].requires_grad_()
    if layout.startswith("packed"):
        data = call.packed_x._replace(data=x)
    elif layout == "lengths":
        data = pack_padded_sequence(x, a["lengths"], enforce_sorted=False)
    else:
        data = x
    expected, states = call.peer(data, hx)
    if layout == "lengths":
        expected, _ = torch.nn.utils.rnn.pad_packed_sequence(expected, total_length=T)
    elif layout.startswith("packed"):
        expected = expected.data
    expected_h, expected_c = states if mode == "lstm" else (states, None)
    assert_close(y, expected, "y")
    assert_close(h_n, expected_h, "h_n")
    loss = [(expected, dy := torch.randn_like(y)), (expected_h, dh_n := torch.randn_like(h_n))]
    dc_n = None
    if mode == "lstm":
        assert_close(c_n, expected_c, "c_n")
        loss.append((expected_c, dc_n := torch.randn_like(c_n)))
    else:
        assert c_n.shape == (0,)
    rows = (x.shape[0],) if layout.startswith("packed") else (T, B)
    assert saved.shape == (call.directions, *rows, SLOTS[mode] * H + proj)
    assert y.stride() == expected.stride()

    sum((tensor * grad).sum() for tensor, grad in loss).backward()
    dx, dh0, dc0, *dweights = call.backward(dy=dy, dh_n=dh_n, dc_n=dc_n)
    assert_close(dx, x.grad, "dx")
    if hx is not None:
        assert_close(dh0, a["h0"].grad, "dh0")
        if mode == "lstm":
            assert_close(dc0, a["c0"].grad, "dc0")
    for index, (dweight, weight) in enumerate(zip(dweights, call.peer._flat_weights, strict=True)):
        assert_close(dweight, weight.grad, f"dweights[{index}]")


@variants
def test_packed_weights(mode: str, proj: int) -> None:
    call = Call(mode, proj, True)
    packed = operators.pack(mode, call.args["weights"], True)
    for ours, expected in zip(call.forward(packed=packed), call.forward(), strict=True):
        assert_close(ours, expected)
    # This buffer does not start at the boundary of a cache line, as can happen after loading from a file.
    shifted = torch.cat([packed.new_zeros(1), packed])[1:]
    assert_close(call.forward(packed=shifted)[0], call.forward()[0])


@modes
@pytest.mark.parametrize("full", [True, False])
def test_cell_values(mode: str, full: bool) -> None:
    call = CellCall(mode, bias=full, states=full)
    a = {name: t.requires_grad_() if isinstance(t, Tensor) else t for name, t in call.args.items()}
    zeros = torch.zeros(B, H, dtype=torch.float64)
    h = zeros if a["h"] is None else a["h"]
    weights = [a[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    if mode == "lstm":
        expected = torch.lstm_cell(a["x"], (h, zeros if a["c"] is None else a["c"]), *weights)
    else:
        expected = [{"gru": torch.gru_cell}.get(mode, getattr(torch, f"{mode}_cell"))(a["x"], h, *weights)]
    ours = call.forward()
    cotangents = [torch.randn_like(t) for t in expected]
    for new, reference in zip(ours, expected, strict=False):
        assert_close(new, reference)
    torch.autograd.backward(expected, cotangents)
    grads = call.backward(dh=cotangents[0], dc=cotangents[1] if mode == "lstm" else None)
    for name, grad in zip(("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh"), grads[:7], strict=True):
        if a[name] is not None:
            assert_close(grad, a[name].grad, name)
        elif name[0] == "b" or (name == "c" and mode != "lstm"):
            assert grad.shape == (0,)
    without_records = call.forward(save=False)
    assert len(without_records) == len(expected)
    assert grads[7].shape == (B, {"lstm": 4, "gru": 4}.get(mode, 1), H)


@variants
@directions
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed_h0"])
def test_truncated_backward(mode: str, proj: int, bidirectional: bool, steps: int, layout: str) -> None:
    """The gradients are those of a loop that detaches the state before each step s > 0 with s % steps == 0, where s
    counts in the direction's own order."""
    call = Call(mode, proj, bidirectional, layout)
    args = call.backward_args(bptt_steps=steps)
    lengths = {"padded": [T] * B, "lengths": list(LENGTHS), "packed_h0": sorted(LENGTHS, reverse=True)}[layout]
    weights = [w.clone().requires_grad_() for w in args["weights"]]
    x, h0 = args["x"].clone().requires_grad_(), args["h0"].clone().requires_grad_()
    c0 = args["c0"].clone().requires_grad_() if mode == "lstm" else None
    padded, dy = x, args["dy"]
    if layout == "packed_h0":
        padded, dy = (torch.nn.utils.rnn.pad_packed_sequence(call.packed_x._replace(data=t))[0] for t in (x, dy))
    count = len(weights) // call.directions
    loss = 0.0
    for d in range(call.directions):
        own = weights[d * count : (d + 1) * count]
        for b, length in enumerate(lengths):
            h, c = h0[d, b : b + 1], None if c0 is None else c0[d, b : b + 1]
            for s in range(length):
                if s > 0 and s % steps == 0:
                    h, c = h.detach(), None if c is None else c.detach()
                t = s if d == 0 else length - 1 - s
                row = padded[t, b : b + 1]
                if mode == "lstm":
                    gates = row @ own[0].T + h @ own[1].T + own[2] + own[3]
                    i, f, g, o = gates.chunk(4, 1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    h = h @ own[4].T if proj else h
                elif mode == "gru":
                    h = torch.gru_cell(row, h, *own)
                else:
                    h = getattr(torch, f"{mode}_cell")(row, h, *own)
                loss = loss + (h * dy[t, b].chunk(call.directions)[d]).sum()
            loss = loss + (h * args["dh_n"][d, b]).sum()
            if c is not None:
                loss = loss + (c * args["dc_n"][d, b]).sum()
    leaves = [x, h0, *([c0] if c0 is not None else []), *weights]
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    ours = [grad for grad in op(f"{mode}_backward")(*args.values()) if grad.shape != (0,)]
    for index, (grad, reference) in enumerate(zip(ours, expected, strict=True)):
        assert_close(grad, reference, str(index))


@variants
@pytest.mark.parametrize("layout", ["padded", "lengths"])
def test_gate_gradients_make_the_weight_gradients(mode: str, proj: int, layout: str) -> None:
    call = Call(mode, proj, False, layout)
    *grads, dgates, dproj = call.backward(gate_grads=True)
    dw_ih, _, db_ih, db_hh = grads[3:7]
    dgates = dgates[0]
    assert dgates.shape == (T, B, 4 if GATES[mode] > 1 else 1, H)
    into_x = dgates[:, :, : GATES[mode]]
    into_h = torch.cat([dgates[:, :, :2], dgates[:, :, 3:]], 2) if mode == "gru" else dgates
    assert_close(into_x.flatten(2).flatten(0, 1).sum(0), db_ih, "b_ih")
    assert_close(into_h.flatten(2).flatten(0, 1).sum(0), db_hh, "b_hh")
    assert_close(torch.einsum("tbg,tbi->gi", into_x.flatten(2), call.args["x"]), dw_ih, "w_ih")
    if layout == "lengths":
        for b, length in enumerate(LENGTHS):
            assert not dgates[length:, b].any()
    if proj:
        assert dproj.shape == (1, T, B, P)
    else:
        assert dproj.shape == (0,)


@variants
def test_strides_do_not_matter(mode: str, proj: int) -> None:
    def strided(tensor: Any) -> Any:
        """Returns the same numbers as every second element of a larger tensor whose dimensions are reversed."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() == 0:
            return tensor
        larger = torch.full([2 * n for n in reversed(tensor.shape)], torch.nan, dtype=tensor.dtype)
        view = larger.permute(*reversed(range(tensor.dim())))[(slice(None, None, 2),) * tensor.dim()]
        return view.copy_(tensor)

    def all_strided(args: dict[str, Any]) -> list[Any]:
        return [[strided(w) for w in a] if isinstance(a, list) else strided(a) for a in args.values()]

    call = Call(mode, proj, True)
    for ours, expected in zip(op(mode)(*all_strided(call.args)), call.forward(), strict=True):
        assert_close(ours, expected)
        assert ours.is_contiguous()
    args = call.backward_args()
    args["dy"] = torch.ones((), dtype=torch.float64).expand_as(args["dy"])
    expected = op(f"{mode}_backward")(*args.values())
    for ours, grad in zip(op(f"{mode}_backward")(*all_strided(args)), expected, strict=True):
        assert_close(ours, grad)
    # x may have any strides if the last one is 1; it is then not copied.
    x = call.args["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(call.forward(x=x)[0], call.forward()[0])
    cell = CellCall(mode)
    for ours, expected in zip(op(f"{mode}_cell")(*all_strided(cell.args)), cell.forward(), strict=True):
        assert_close(ours, expected)


@modes
def test_what_is_not_wanted_is_empty(mode: str) -> None:
    call = Call(mode)
    grads = call.backward(need_x=False, need_state=False, need_weights=False)
    assert [tuple(grad.shape) for grad in grads] == [(0,)] * 7
    wanted = call.backward(need_x=True, need_state=False, need_weights=False)
    assert wanted[0].shape == (T, B, I) and all(grad.shape == (0,) for grad in wanted[1:])
    assert call.forward(save=False)[3].shape == (0,)


@variants
@directions
def test_an_empty_batch(mode: str, proj: int, bidirectional: bool) -> None:
    call = Call(mode, proj, bidirectional)
    d = call.directions
    call.args.update(x=torch.empty(T, 0, I, dtype=torch.float64), h0=None, c0=None)
    y, h_n, c_n, *_ = call.forward()
    assert y.shape == (T, 0, d * (proj or H)) and h_n.shape == (d, 0, proj or H)
    assert c_n.shape == ((d, 0, H) if mode == "lstm" else (0,))
    dx, _, _, *dweights = call.backward()
    assert dx.shape == (T, 0, I)
    for grad, weight in zip(dweights, call.args["weights"], strict=True):
        assert_close(grad, torch.zeros_like(weight))


@variants
@directions
def test_sequences_of_no_steps(mode: str, proj: int, bidirectional: bool) -> None:
    """With lengths of 0 the final state is the initial state, and so are their gradients."""
    call = Call(mode, proj, bidirectional, "lengths")
    none = torch.zeros(B, dtype=torch.int64)
    call.args["lengths"] = none
    y, h_n, c_n, *_ = call.forward()
    assert not y.any() and torch.equal(h_n, call.args["h0"])
    args = call.backward_args()
    dx, dh0, dc0, *dweights = op(f"{mode}_backward")(*args.values())
    assert not dx.any() and torch.equal(dh0, args["dh_n"])
    if mode == "lstm":
        assert torch.equal(c_n, call.args["c0"]) and torch.equal(dc0, args["dc_n"])
    assert not any(grad.any() for grad in dweights)


@modes
@pytest.mark.parametrize(("batch", "hidden"), [(0, H), (B, 0), (0, 0)])
def test_an_empty_cell(mode: str, batch: int, hidden: int) -> None:
    call = CellCall(mode, batch=batch, hidden=hidden)
    assert call.forward()[0].shape == (batch, hidden)
    dx, *_, dw_ih, dw_hh, db_ih, db_hh, _ = call.backward()
    for grad, name in ((dx, "x"), (dw_ih, "w_ih"), (dw_hh, "w_hh"), (db_ih, "b_ih"), (db_hh, "b_hh")):
        assert_close(grad, torch.zeros_like(call.args[name]), name)


@modes
def test_no_input_features(mode: str) -> None:
    gates = GATES[mode] * H
    weights = [torch.empty(gates, 0), torch.randn(gates, H), torch.randn(gates), torch.randn(gates)]
    x = torch.empty(T, B, 0)
    y, h_n, _, saved, _ = op(mode)(x, None, None, weights, None, None, None, False, False, True, False)
    assert y.isfinite().all() and torch.equal(y[-1], h_n[0])
    dc_n = torch.ones(1, B, H) if mode == "lstm" else None
    grads = op(f"{mode}_backward")(
        torch.ones_like(y), None, dc_n, x, None, None, weights, saved, None, None, False, False, 0, False, True,
        True, True, False,
    )  # fmt: skip
    assert grads[0].shape == x.shape and grads[3].shape == (gates, 0)
    assert all(grad.isfinite().all() for grad in grads)


@modes
def test_on_the_meta_device(mode: str) -> None:
    call = Call(mode, bidirectional=True)

    def meta(value: Any) -> Any:
        if isinstance(value, list):
            return [meta(v) for v in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    outputs = op(mode)(*(meta(value) for value in call.args.values()))
    for ours, expected in zip(outputs, call.forward(), strict=True):
        assert ours.is_meta and (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
