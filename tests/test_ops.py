"""The operators themselves, called without autograd: torch's own checks of custom operators, values, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from dlkernels import ops

pytestmark = pytest.mark.usefixtures("native")

T, B, I, H, P = 5, 3, 4, 6, 2
LENGTHS = (5, 2, 4)
LAYOUTS = ("padded", "batch_first", "packed", "packed_h0", "lengths")
VARIANTS = [(mode, 0) for mode in ops.MODES] + [("lstm", P)]
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
SLOTS = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}

variants = pytest.mark.parametrize(("mode", "proj"), VARIANTS, ids=lambda value: str(value))
layouts = pytest.mark.parametrize("layout", LAYOUTS)
directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
modes = pytest.mark.parametrize("mode", ops.MODES)


def op(name: str) -> Any:
    return getattr(torch.ops.dlkernels, name).default


def peer(mode: str, proj: int = 0, bidirectional: bool = False, **options: Any) -> torch.nn.RNNBase:
    """torch's layer of the same kind, in float64."""
    options = {"bidirectional": bidirectional, "dtype": torch.float64, **options}
    if mode == "lstm":
        return torch.nn.LSTM(I, H, proj_size=proj, **options)
    if mode == "gru":
        return torch.nn.GRU(I, H, **options)
    return torch.nn.RNN(I, H, nonlinearity=mode.removeprefix("rnn_"), **options)


class Call:
    """Arguments of the forward operator by name, and of the backward operator that follows it."""

    def __init__(self, mode: str, proj: int = 0, bidirectional: bool = False, layout: str = "padded") -> None:
        self.mode, self.layout, self.directions = mode, layout, 2 if bidirectional else 1
        self.peer = peer(mode, proj, bidirectional, batch_first=layout == "batch_first")
        out = proj or H
        x = torch.randn((B, T, I) if layout == "batch_first" else (T, B, I), dtype=torch.float64)
        h0 = torch.randn(self.directions, B, out, dtype=torch.float64)
        c0 = torch.randn(self.directions, B, H, dtype=torch.float64) if mode == "lstm" else None
        batch_sizes = lengths = None
        if layout.startswith("packed"):
            self.packed_x = pack_padded_sequence(x, torch.tensor(sorted(LENGTHS, reverse=True)))
            x, batch_sizes = self.packed_x.data, self.packed_x.batch_sizes
        if layout == "packed":
            h0 = c0 = None
        if layout == "lengths":
            lengths = torch.tensor(LENGTHS)
        self.args = {
            "x": x, "h0": h0, "c0": c0, "weights": [w.detach() for w in self.peer._flat_weights], "packed": None,
            "batch_sizes": batch_sizes, "lengths": lengths, "bidirectional": bidirectional,
            "batch_first": layout == "batch_first", "save": True, "deterministic": False,
        }  # fmt: skip

    def forward(self, **changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return op(self.mode)(*{**self.args, **changes}.values())

    def backward_args(self, **changes: Any) -> dict[str, Any]:
        y, h_n, c_n, saved = self.forward()
        a = self.args
        args = {
            "dy": torch.randn_like(y), "dh_n": torch.randn_like(h_n),
            "dc_n": torch.randn_like(c_n) if self.mode == "lstm" else None, "x": a["x"], "h0": a["h0"], "c0": a["c0"],
            "weights": a["weights"], "y": y, "saved": saved, "batch_sizes": a["batch_sizes"], "lengths": a["lengths"],
            "bidirectional": a["bidirectional"], "batch_first": a["batch_first"], "bptt_steps": 0,
            "deterministic": False, "need_x": True, "need_state": True, "need_weights": True, "gate_grads": False,
        }  # fmt: skip
        return {**args, **changes}

    def backward(self, **changes: Any) -> list[Tensor]:
        return op(f"{self.mode}_backward")(*self.backward_args(**changes).values())


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


# torch.library.opcheck


@variants
@layouts
@directions
def test_opcheck_forward(mode: str, proj: int, layout: str, bidirectional: bool) -> None:
    call = Call(mode, proj, bidirectional, layout)
    # Of `saved` the padding rows are not defined, so opcheck, which compares two runs, is not shown them.
    call.args["save"] = layout != "lengths"
    torch.library.opcheck(op(mode), tuple(call.args.values()))


@variants
@layouts
@directions
def test_opcheck_backward(mode: str, proj: int, layout: str, bidirectional: bool) -> None:
    args = Call(mode, proj, bidirectional, layout).backward_args(bptt_steps=2, gate_grads=True)
    torch.library.opcheck(op(f"{mode}_backward"), tuple(args.values()))


@modes
def test_opcheck_of_a_backward_that_wants_little(mode: str) -> None:
    args = Call(mode).backward_args(dh_n=None, dc_n=None, need_x=False, need_state=False, need_weights=False)
    torch.library.opcheck(op(f"{mode}_backward"), tuple(args.values()))


class CellCall:
    def __init__(self, mode: str, bias: bool = True, states: bool = True, batch: int = B, hidden: int = H) -> None:
        self.mode = mode

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        g = GATES[mode] * hidden
        self.args = {
            "x": draw(batch, I), "h": draw(batch, hidden) if states else None,
            "c": draw(batch, hidden) if states and mode == "lstm" else None, "w_ih": draw(g, I),
            "w_hh": draw(g, hidden), "b_ih": draw(g) if bias else None, "b_hh": draw(g) if bias else None, "save": True,
            "deterministic": False,
        }  # fmt: skip

    def forward(self, **changes: Any) -> list[Tensor]:
        return op(f"{self.mode}_cell")(*{**self.args, **changes}.values())

    def backward_args(self, **changes: Any) -> dict[str, Any]:
        h, *others = self.forward()
        inputs = dict(list(self.args.items())[:7])
        args = {
            "dh": torch.randn_like(h), "dc": torch.randn_like(others[0]) if self.mode == "lstm" else None, **inputs,
            "h_new": h, "saved": others[-1] if SLOTS[self.mode] else h.new_empty(0), "deterministic": False,
            "need_x": True, "need_state": True, "need_weights": True, "gate_grads": True,
        }  # fmt: skip
        return {**args, **changes}

    def backward(self, **changes: Any) -> list[Tensor]:
        return op(f"{self.mode}_cell_backward")(*self.backward_args(**changes).values())


@modes
@pytest.mark.parametrize("full", [True, False])
def test_opcheck_cell(mode: str, full: bool) -> None:
    call = CellCall(mode, bias=full, states=full)
    torch.library.opcheck(op(f"{mode}_cell"), tuple(call.args.values()))
    torch.library.opcheck(op(f"{mode}_cell_backward"), tuple(call.backward_args(gate_grads=full).values()))


@variants
@directions
def test_opcheck_pack(mode: str, proj: int, bidirectional: bool) -> None:
    call = Call(mode, proj, bidirectional)
    torch.library.opcheck(op("pack"), (mode, call.args["weights"], bidirectional))


# Values


@variants
@layouts
@directions
def test_values(mode: str, proj: int, layout: str, bidirectional: bool) -> None:
    call = Call(mode, proj, bidirectional, layout)
    a = call.args
    y, h_n, c_n, saved = call.forward()
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
    assert saved.shape == ((call.directions, *rows, SLOTS[mode], H) if SLOTS[mode] else (0,))

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
    packed = ops.pack(mode, call.args["weights"], True)
    for ours, expected in zip(call.forward(packed=packed), call.forward(), strict=True):
        assert_close(ours, expected)
    # A buffer that begins off a cache line's boundary, as after loading from a file.
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
    """As if the state had been detached before every step s > 0 of its own direction's order with s % steps == 0."""
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
        """The same numbers, every second element of a larger tensor with its dimensions reversed."""
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
    args["dy"] = torch.ones((), dtype=torch.float64).expand_as(args["y"])
    expected = op(f"{mode}_backward")(*args.values())
    for ours, grad in zip(op(f"{mode}_backward")(*all_strided(args)), expected, strict=True):
        assert_close(ours, grad)
    # Only the last stride of x must be 1; the others are used as they come.
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
    y, h_n, c_n, _ = call.forward()
    assert y.shape == (T, 0, d * (proj or H)) and h_n.shape == (d, 0, proj or H)
    assert c_n.shape == ((d, 0, H) if mode == "lstm" else (0,))
    dx, _, _, *dweights = call.backward()
    assert dx.shape == (T, 0, I)
    for grad, weight in zip(dweights, call.args["weights"], strict=True):
        assert_close(grad, torch.zeros_like(weight))


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
    y, h_n, _, saved = op(mode)(x, None, None, weights, None, None, None, False, False, True, False)
    assert y.isfinite().all() and torch.equal(y[-1], h_n[0])
    dc_n = torch.ones(1, B, H) if mode == "lstm" else None
    grads = op(f"{mode}_backward")(
        torch.ones_like(y), None, dc_n, x, None, None, weights, y, saved, None, None, False, False, 0, False, True,
        True, True, False,
    )  # fmt: skip
    assert grads[0].shape == x.shape and grads[3].shape == (gates, 0)
    assert all(grad.isfinite().all() for grad in grads)


# Refusals

D = torch.float64


def zeros(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


FORWARD_MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of two dimensions": ({"x": zeros(T, I)}, RuntimeError, r"x must have shape \[T, B, input_size\]"),
    "x of wrong size": ({"x": zeros(T, B, I + 1)}, RuntimeError, r"w_ih must have shape \[24, 5\], got \[24, 4\]"),
    "x of integers": ({"x": zeros(T, B, I, dtype=torch.int64)}, RuntimeError, "x must be float32, .*got int64"),
    "x of another dtype": ({"x": zeros(T, B, I, dtype=torch.float32)}, RuntimeError, "w_ih must be float32"),
    "no steps": ({"x": zeros(0, B, I)}, RuntimeError, "at least one time step"),
    "h0 of wrong batch": ({"h0": zeros(1, 1, H)}, RuntimeError, r"h0 must have shape \[1, 3, 6\], got \[1, 1, 6\]"),
    "h0 of wrong rank": ({"h0": zeros(B, H)}, RuntimeError, "h0 must have shape"),
    "c0 of wrong size": ({"c0": zeros(1, B, H + 1)}, RuntimeError, "c0 must have shape"),
    "no weights": ({"weights": []}, RuntimeError, "weights must hold"),
    "one weight": ({"weights": [zeros(24, I)]}, RuntimeError, "weights must hold .* got 1 tensor"),
    "w_hh of wrong size": (
        {"weights": [zeros(24, I), zeros(24, H + 1), zeros(24), zeros(24)]}, RuntimeError, "w_hh must have shape",
    ),
    "w_hh of one dimension": ({"weights": [zeros(24, I), zeros(24)]}, RuntimeError, "w_hh must have shape"),
    "hidden size 0": ({"weights": [zeros(0, I), zeros(0, 0)]}, RuntimeError, "hidden_size must be positive"),
    "w_hr of wrong rank": ({"weights": [zeros(24, I), zeros(24, H), zeros(H)]}, RuntimeError, "w_hr must have shape"),
    "biases of wrong size": (
        {"weights": [zeros(24, I), zeros(24, H), zeros(23), zeros(24)]}, RuntimeError, "b_ih must have shape",
    ),
    "one direction's weights for two": ({"bidirectional": True}, RuntimeError, "w_ih|w_hh|h0|weights"),
    "lengths too long": (
        {"lengths": torch.tensor([5, 0, 9])}, ValueError, r"lengths must lie in 0..T \(T=5\), got 9 at position 2",
    ),
    "lengths negative": ({"lengths": torch.tensor([5, -1, 2])}, ValueError, "got -1 at position 1"),
    "lengths of floats": ({"lengths": torch.tensor([1.0, 2.0, 3.0])}, RuntimeError, "lengths must be int64"),
    "lengths too few": ({"lengths": torch.tensor([1, 2])}, RuntimeError, r"lengths must have shape \[3\], got \[2\]"),
    "lengths of two dimensions": ({"lengths": torch.ones(1, 3).long()}, RuntimeError, "one-dimensional"),
    "batch_sizes for padded x": ({"batch_sizes": torch.tensor([3, 2])}, RuntimeError, "x must be packed"),
    "batch_sizes that grow": (
        {"x": zeros(5, I), "batch_sizes": torch.tensor([2, 3])}, ValueError, "must not increase, got 3 at step 1",
    ),
    "batch_sizes of 0": ({"x": zeros(5, I), "batch_sizes": torch.tensor([5, 0])}, ValueError, "must be positive"),
    "batch_sizes too large": ({"x": zeros(5, I), "batch_sizes": torch.tensor([2**62])}, ValueError, "batch_sizes"),
    "batch_sizes of another sum": ({"x": zeros(5, I), "batch_sizes": torch.tensor([3, 1])}, ValueError, "must sum"),
    "no batch_sizes": ({"x": zeros(0, I), "batch_sizes": torch.tensor([]).long()}, RuntimeError, "must not be empty"),
    "lengths and batch_sizes": (
        {"x": zeros(3, I), "batch_sizes": torch.tensor([3]), "lengths": torch.tensor([1, 1, 1])}, RuntimeError,
        "give one of them",
    ),
    "packed of floats": ({"packed": zeros(9)}, RuntimeError, "packed must be what"),
    "packed of nothing": ({"packed": zeros(9, dtype=torch.uint8)}, RuntimeError, "packed does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD_MISTAKES)
def test_forward_refuses(name: str) -> None:
    changes, kind, message = FORWARD_MISTAKES[name]
    call = Call("lstm")
    with pytest.raises(kind, match=message):
        call.forward(**changes)
    if "packed" not in changes:
        args = {key: value for key, value in call.backward_args().items() if key not in changes}
        with pytest.raises(kind, match=message):
            op("lstm_backward")(**{**args, **changes})


BACKWARD_MISTAKES = {
    "dy of wrong size": ({"dy": zeros(T, B, H + 1)}, "dy must have shape"),
    "dy of another dtype": ({"dy": zeros(T, B, H, dtype=torch.float32)}, "dy must be float64"),
    "dh_n of wrong size": ({"dh_n": zeros(1, B + 1, H)}, "dh_n must have shape"),
    "dc_n of wrong size": ({"dc_n": zeros(2, B, H)}, "dc_n must have shape"),
    "y of wrong size": ({"y": zeros(T + 1, B, H)}, "y must have shape"),
    "saved of an inference run": ({"saved": zeros(0)}, r"saved must have shape \[1, 5, 3, 5, 6\], got \[0\]"),
}


@pytest.mark.parametrize("name", BACKWARD_MISTAKES)
def test_backward_refuses(name: str) -> None:
    changes, message = BACKWARD_MISTAKES[name]
    with pytest.raises(RuntimeError, match=message):
        Call("lstm").backward(**changes)


def test_backward_refuses_negative_steps() -> None:
    with pytest.raises(ValueError, match="bptt_steps must not be negative, got -1"):
        Call("gru").backward(bptt_steps=-1)


CELL_MISTAKES = {
    "x of three dimensions": ({"x": zeros(1, B, I)}, "x must have shape"),
    "x of wrong size": ({"x": zeros(B, I + 1)}, "w_ih must have shape"),
    "h of wrong batch": ({"h": zeros(B + 1, H)}, "h must have shape"),
    "c of wrong size": ({"c": zeros(B, H + 1)}, "c must have shape"),
    "one bias": ({"b_hh": None}, "b_ih and b_hh must both"),
    "b_hh of wrong size": ({"b_hh": zeros(3)}, "b_hh must have shape"),
    "w_hh of wrong rank": ({"w_hh": zeros(24)}, "w_hh must have two dimensions"),
    "another dtype": ({"w_hh": zeros(24, H, dtype=torch.float32)}, "w_hh must be float64, got float32"),
}


@pytest.mark.parametrize("name", CELL_MISTAKES)
def test_cell_refuses(name: str) -> None:
    changes, message = CELL_MISTAKES[name]
    call = CellCall("lstm")
    with pytest.raises(RuntimeError, match=message):
        call.forward(**changes)
    with pytest.raises(RuntimeError, match=message):
        call.backward(**changes)


@pytest.mark.parametrize("mode", ["gru", "rnn_tanh", "rnn_relu"])
def test_only_the_lstm_has_a_cell_state_and_projections(mode: str) -> None:
    call = Call(mode)
    with pytest.raises(RuntimeError, match="c0 must be None"):
        call.forward(c0=zeros(1, B, H))
    with pytest.raises(RuntimeError, match="c must be None"):
        CellCall(mode).forward(c=zeros(B, H))
    with pytest.raises(RuntimeError, match="only lstm has projections"):
        call.forward(weights=[*call.args["weights"], zeros(P, H)])


def test_pack_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="unknown mode 'peephole', expected lstm, gru, rnn_tanh or rnn_relu"):
        ops.pack("peephole", [zeros(24, I), zeros(24, H)], False)


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
