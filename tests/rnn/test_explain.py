"""`explain` and `info` report the kernels and plans that really run."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import dlkernels
from dlkernels.__main__ import main
from dlkernels._core import extension
from dlkernels.info import format_info
from tests.support.instruction_sets import kernels_of

MODES = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru", "RNNCell": "rnn_tanh", "LSTMCell": "lstm", "GRUCell": "gru"}


def make(name: str, **kwargs: Any) -> tuple[Any, torch.Tensor]:
    module = getattr(dlkernels.nn, name)(8, 16, **kwargs)
    return module, torch.randn((3, 8) if name.endswith("Cell") else (5, 3, 8))


@pytest.mark.parametrize("name", MODES)
def test_the_kernel_named_is_the_kernel_that_ran(name: str, isa: str) -> None:
    module, x = make(name)
    explanation = dlkernels.explain(module, x)
    assert explanation.layers[0].grad
    with torch.no_grad():
        inference = dlkernels.explain(module, x)
        module(x)
    assert not inference.layers[0].grad
    assert not inference.layers[0].backward
    if isa == "reference":
        assert explanation.kernel == "reference"
        return
    assert inference.native
    assert inference.kernel == f"cpu/{kernels_of(isa)}/{MODES[name]}"
    ran = extension.native.last_run()
    assert {key: ran[key] for key in inference.layers[0].forward} == inference.layers[0].forward
    result = module(x)
    (result if name in ("RNNCell", "GRUCell") else result[0]).sum().backward()
    ran = extension.native.last_run()
    assert ran["backward"]
    assert {key: ran[key] for key in explanation.layers[0].backward} == explanation.layers[0].backward


@pytest.mark.parametrize("threads_count", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(5,) * 70, (60, 2, 1, 1), (9, 9, 8, 1, 1, 1, 1, 1), (40, *[1] * 60)], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_the_plan_of_packed_input_is_what_runs(
    name: str, lengths: tuple[int, ...], threads_count: int, isa: str, threads: Callable[[int], None]
) -> None:
    """A packed call has as many rows as the sum of its lengths, not steps times sequences, and the plan uses that."""
    if isa == "reference":
        pytest.skip("nothing is planned on the reference path")
    threads(threads_count)
    layer = getattr(dlkernels.nn, name)(24, 40)
    packed = pack_sequence([torch.randn(n, 24) for n in lengths])
    with torch.no_grad():
        inference = dlkernels.explain(layer, packed).layers[0].forward
        layer(packed)
    ran = extension.native.last_run()
    assert {key: ran[key] for key in inference} == inference
    training = dlkernels.explain(layer, packed).layers[0]
    y, _ = layer(packed)
    ran = extension.native.last_run()
    assert {key: ran[key] for key in training.forward} == training.forward
    y.data.sum().backward()
    ran = extension.native.last_run()
    assert ran["backward"] and {key: ran[key] for key in training.backward} == training.backward


def test_packed_and_padded_plans_differ_somewhere(isa: str, threads: Callable[[int], None]) -> None:
    """The two plans must differ for some call; otherwise the test above could not tell which number of rows is used."""
    if isa == "reference":
        pytest.skip("nothing is planned on the reference path")
    threads(2)
    layer, lengths = dlkernels.nn.LSTM(24, 40), (60, 2, 1, 1)
    packed, padded = pack_sequence([torch.randn(n, 24) for n in lengths]), torch.randn(60, 4, 24)
    plans = [dlkernels.explain(layer, x).layers[0].backward for x in (packed, padded)]
    assert plans[0] != plans[1]


def test_one_entry_for_each_layer_of_the_stack() -> None:
    layer = dlkernels.nn.LSTM(8, 16, num_layers=3, bidirectional=True, proj_size=4)
    layer.requires_grad_(False)
    layer.weight_ih_l1.requires_grad_(True)
    explanation = dlkernels.explain(layer, torch.randn(5, 3, 8))
    assert [entry.name for entry in explanation.layers] == ["layer 0", "layer 1", "layer 2"]
    # A layer above one that requires a gradient requires one too.
    assert [entry.grad for entry in explanation.layers] == [False, True, True]
    text = str(explanation)
    assert text.startswith("LSTM(8, 16, proj_size=4, num_layers=3, bidirectional=True)\n")
    assert "input [5, 3, 8] float32 cpu" in text
    assert "layer 2" in text


def test_every_form_of_input() -> None:
    layer = dlkernels.nn.GRU(8, 16, batch_first=True)
    packed = pack_sequence([torch.randn(5, 8), torch.randn(2, 8)])
    assert "of 2 sequences, up to 5 steps" in dlkernels.explain(layer, packed).call
    assert "with lengths" in dlkernels.explain(layer, torch.randn(2, 5, 8), lengths=torch.tensor([5, 1])).call
    assert "every 2 steps" in dlkernels.explain(layer, torch.randn(2, 5, 8), bptt_steps=2).call
    assert "given hx" in dlkernels.explain(layer, torch.randn(5, 8), torch.zeros(1, 16)).call
    with pytest.raises(ValueError, match="2D or 3D"):
        dlkernels.explain(layer, torch.randn(8))
    if extension.HAVE_NATIVE:
        assert dlkernels.explain(layer, torch.randn(0, 5, 8)).layers[0].path == "nothing"


def test_reference_path_says_why() -> None:
    explanation = dlkernels.explain(dlkernels.nn.GRU(8, 16, device="meta"), torch.empty(5, 3, 8, device="meta"))
    assert explanation.kernel == "reference"
    assert not explanation.native
    assert explanation.layers[0].reason


def test_layers_of_torch_and_other_modules() -> None:
    layer, x = nn.LSTM(8, 16), torch.randn(5, 3, 8)
    explanation = dlkernels.explain(layer, x)
    assert explanation.layers[0].path == "torch"
    assert "not patched" in str(explanation)
    assert dlkernels.explain(dlkernels.patch(layer), x).layers[0].path != "torch"
    with pytest.raises(TypeError, match="recurrent layer"):
        dlkernels.explain(nn.Linear(8, 16), x)


def test_what_is_missing_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GRU(8, 16), nn.MultiheadAttention(8, 2)), torch.randn(5, 3, 8)
    with pytest.raises(TypeError, match=r"with that layer's input: 1 \(GRU\), 2 \(MultiheadAttention\)$"):
        dlkernels.explain(model, x)
    for layer in (model[1], dlkernels.nn.GRU(8, 16), dlkernels.nn.LSTMCell(8, 16)):
        with pytest.raises(TypeError, match="the input of the call is missing"):
            dlkernels.explain(layer)


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_mistakes_raise_what_the_call_raises(name: str) -> None:
    module, x = make(name)
    complex_module, _ = make(name, dtype=torch.complex64)
    mistakes = [
        (module, x[..., :5]),
        (module, x.double()),
        (module, x.long()),
        (module, x.to("meta")),
    ]
    for wrong, input in [*mistakes, (complex_module, x.to(torch.complex64))]:
        with pytest.raises((RuntimeError, ValueError)) as called:
            wrong(input)
        with pytest.raises(called.type, match=re.escape(str(called.value))):
            dlkernels.explain(wrong, input)
    with torch.autocast("cpu", torch.bfloat16):
        assert dlkernels.explain(module, x.bfloat16()).native


def test_a_layer_of_torch_while_enable_is_on() -> None:
    x = torch.randn(5, 3, 8)
    for layer in (nn.GRU(8, 16), nn.MultiheadAttention(8, 2)):
        with dlkernels.enable():
            assert "enable() is on" in str(dlkernels.explain(layer, x))
        with dlkernels.enable(recurrent=isinstance(layer, nn.MultiheadAttention), attention=isinstance(layer, nn.GRU)):
            assert "enable()" not in str(dlkernels.explain(layer, x))


def test_later_layers_are_planned_for_the_width_of_the_one_below(isa: str, threads: Callable[[int], None]) -> None:
    threads(2)
    for batch, steps, hidden in itertools.product((1, 4, 64), (1, 5), (16, 64)):
        stack = dlkernels.explain(dlkernels.nn.LSTM(4, hidden, 2), torch.zeros(steps, batch, 4)).layers[1]
        alone = dlkernels.explain(dlkernels.nn.LSTM(hidden, hidden), torch.zeros(steps, batch, hidden)).layers[0]
        assert (stack.forward, stack.backward) == (alone.forward, alone.backward), (batch, steps, hidden)


@pytest.mark.skipif(not extension.HAVE_NATIVE, reason="nothing is packed on the reference path")
def test_prepacked_weights_are_explained() -> None:
    layer, x = make("GRU")
    layer.prepack()
    assert "gradients" in dlkernels.explain(layer, x).layers[0].packed_weights
    with torch.no_grad():
        assert dlkernels.explain(layer, x).layers[0].packed_weights == "used"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "autocast" in dlkernels.explain(layer, x).layers[0].packed_weights
            assert dlkernels.explain(layer.bfloat16().prepack(), x).layers[0].packed_weights == "used"
        layer.float().prepack()
        layer.weight_hh_l0.mul_(2)
        assert "written to" in dlkernels.explain(layer, x).layers[0].packed_weights
        layer.weight_hh_l0 = nn.Parameter(torch.zeros(48, 16))
        assert "no longer" in str(dlkernels.explain(layer, x))


def test_settings_in_force_are_named(deterministic: None) -> None:
    layer, x = make("LSTM")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = dlkernels.explain(layer, x).call
    assert "autocast bfloat16" in call
    assert "deterministic" in call


def test_info_is_complete_plain_data() -> None:
    data = dlkernels.info()
    assert json.loads(json.dumps(data, default=str))["versions"]["torch"] == torch.__version__
    ops = {row["op"] for row in data["kernels"]}
    assert len(ops) == 19 and "attention_map" in ops
    assert data["native"]["loaded"] is extension.HAVE_NATIVE
    assert all(row["reason"] for row in data["kernels"] if row["kernel"] == "reference")
    if extension.HAVE_NATIVE:
        assert data["isa"]["in_force"] == extension.native.isa()
        for op, cell, of in (("attention", "attention", "attention"), ("gru_cell_backward", "gru", "layer")):
            served = {dtype: row["kernel"] for row in data["kernels"] if row["op"] == op and row["device"] == "cpu"
                      for dtype in row["dtypes"].split(", ")}  # fmt: skip
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                isa = kernels_of(extension.native.isa(), **{of: dtype})
                assert served.pop(str(dtype).removeprefix("torch.")) == f"cpu/{isa}/{cell}"
            assert not served


def printed_kernels(text: str) -> list[tuple[str, ...]]:
    """(op, device, dtypes, kernel, reason) of every operator, read from the merged table that `info` prints."""
    lines = text.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("operators "))
    end = lines.index("", start)
    legend = dict(line.split(": ", 1) for line in lines[end + 1 :])
    patterns, modes = legend["recurrent"].split("; MODE is one of ")
    operators = {
        "all recurrent": [
            pattern.replace("MODE", mode) for mode in modes.split(", ") for pattern in patterns.split(", ")
        ],
        "all attention": legend["attention"].split(", "),
    }
    found = []
    for line in lines[start + 1 : end]:
        named, device, dtypes, kernel = re.split(r"  +", line, maxsplit=3)
        kernel, _, reason = kernel.partition(" (")
        for op in operators.get(named) or named.split(", "):
            of_op = kernel.replace("MODE", re.sub(r"(_cell)?(_backward)?$", "", op))
            found.append((op, device, dtypes, of_op, reason.removesuffix(")")))
    return found


def test_printed_table_merges_without_loss() -> None:
    """The few rows printed say of every operator what the rows of `info()` say."""
    data = dlkernels.info()
    expected = []
    for row in data["kernels"]:
        dtypes = "all" if row["kernel"] == "reference" else row["dtypes"]
        expected.append((row["op"], row["device"], dtypes, row["kernel"], row["reason"]))
    text = format_info(data)
    assert sorted(printed_kernels(text)) == sorted(expected)
    table = text[text.index("\noperators ") :].strip().split("\n\n")[0]
    assert 4 <= len(table.splitlines()) - 1 <= 8


@pytest.mark.parametrize(("op", "kernel"), [("gru_cell", "cpu/other/gru"), ("attention", "cpu/other/attention")])
def test_printed_table_names_the_operators_that_differ(op: str, kernel: str) -> None:
    data = dlkernels.info()
    row = next(row for row in data["kernels"] if row["op"] == op and row["device"] == "cpu")
    row |= {"kernel": kernel, "dtypes": "float32", "reason": ""}
    found = printed_kernels(format_info(data))
    assert [entry for entry in found if "other" in entry[3]] == [(op, "cpu", "float32", kernel, "")]
    assert len(found) == len(data["kernels"])


@pytest.mark.o0_skip(reason="the command line is Python alone")
def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "dlkernels", "info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ISA:" in done.stdout
    assert any(op == "lstm_backward" for op, *_ in printed_kernels(done.stdout))
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__
    assert main(["--help"]) == 0
    capsys.readouterr()
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"dlkernels {dlkernels.__version__}\n"
    assert main(["doctr"]) == 2 and "there is no command 'doctr'" in capsys.readouterr().err
    for wrong in ([], ["nonsense"], ["info", "--nonsense"]):
        capsys.readouterr()
        assert main(wrong) == 2
        assert "usage" in capsys.readouterr().err
