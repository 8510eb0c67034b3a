"""Training needs memory linear in the number of steps and no more than torch's, and calls leave no memory behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fresh_python import ROOT, environment, run_python
from tests.support.memory_probes import ALLOCATOR

pytestmark = [pytest.mark.heavy, pytest.mark.o0_skip(reason="memory is the same at -O0, only slower")]

PEAKS = """
import ctypes, gc, json
import torch
import dlkernels.nn
torch.set_num_threads(2)

def peak_of(run):
    '''MiB that the call needed on top of what was there, from the kernel's own high-water mark.'''
    def field(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the call would grow into what earlier ones left free
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = field("VmRSS")
    run()
    return (field("VmHWM") - before) / 1024

B, I, H = 32, 128, 256

def train(layer, x):
    y, _ = layer(x)
    y.backward(torch.ones_like(y))
    layer.zero_grad()
    x.grad = None

results = {}
for name, kwargs in (("LSTM", {}), ("GRU", {}), ("RNN", {}), ("LSTM proj", {"proj_size": 64})):
    for package in (torch.nn, dlkernels.nn):
        layer = getattr(package, name.split()[0])(I, H, **kwargs)
        peaks = []
        for steps in (8, 50, 100, 150):
            x = torch.randn(steps, B, I, requires_grad=True)
            if steps == 8:
                for _ in range(3):
                    train(layer, x)
                continue
            # The kernel may give out huge pages in one run and not in the next.
            peaks.append(min(peak_of(lambda: train(layer, x)) for _ in range(2)))
        results[name + (" ours" if package is dlkernels.nn else " torch")] = peaks
print("RESULT", json.dumps(results))
"""


def test_peak_of_training() -> None:
    output = run_python(PEAKS, timeout=240, **ALLOCATOR)
    peaks: dict[str, list[float]] = json.loads(output.split("RESULT", 1)[1])
    for name, values in peaks.items():
        print(name, [f"{v:.1f} MiB" for v in values])
    for name in ("LSTM", "GRU", "RNN", "LSTM proj"):
        ours, theirs = peaks[f"{name} ours"], peaks[f"{name} torch"]
        first, second = ours[1] - ours[0], ours[2] - ours[1]
        assert first > 0 and abs(second - first) < 0.15 * first + 2, f"{name}: not linear in T, {ours} MiB"
        assert ours[0] < 1.25 * first + 8, f"{name}: a large part does not depend on T, {ours} MiB"
        assert ours[2] <= theirs[2] + 1, f"{name}: {ours[2]:.1f} MiB, torch {theirs[2]:.1f} MiB"


# The cases in which a step of ours allocates more than torch's (docs/cpu.md, "Records"). At its peak a GRUCell has 7
# tensors of [B, H] beside the weight gradients: h', the record r, z, n, W_hn h + b_hn, dx and dh. torch has 6, because
# it frees what it saved while it computes the gradients one after another.
MORE_THAN_TORCH = {"grucell-train-f32-B16-I256-H256-1t": 1.01, "grucell-train-f32-B128-I512-H512-1t": 1.04}
# The working memory that is kept for later calls, which comes in units of 2 MiB.
KEPT_MIB = {"lstm-train-f32": 6, "gru-train-f32": 6, "lstm-train-bf16": 8}


def test_allocations_of_the_benchmark(tmp_path: Path) -> None:
    """Counts bytes, so the result is the same on every run."""
    out, only = tmp_path / "peaks.json", ("f32-B16", "lstm-train-bf16-B16", "grucell-train-f32-B128")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak_memory", "--out", str(out), "--only", *only],
        capture_output=True, text=True, timeout=240, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 8
    for name, row in cases.items():
        step = row["step"]
        assert step["ratio"] <= MORE_THAN_TORCH.get(name, 1.0), f"{name}: {step}"
    for kind, kept in KEPT_MIB.items():
        row = cases[f"{kind}-B16-T100-I256-H256-1t"]
        assert row["all"]["ours"] - row["step"]["ours"] <= kept * 2**20 + 65536, f"{kind}: {row}"


LEAKS = """
import torch
import dlkernels.nn
from tests.support.memory_probes import leaves_nothing
from torch.nn.utils.rnn import pack_padded_sequence

lstm = dlkernels.nn.LSTM(24, 48, num_layers=2, bidirectional=True, proj_size=16)
gru, rnn, cell = dlkernels.nn.GRU(24, 48), dlkernels.nn.RNN(24, 48), dlkernels.nn.LSTMCell(24, 48)
packed_gru = dlkernels.nn.GRU(24, 48).requires_grad_(False)
lengths = torch.tensor([6, 3, 4, 6, 1, 2, 5, 5])

def once():
    x = torch.randn(6, 8, 24, requires_grad=True)
    for layer in (lstm, gru, rnn):
        layer(x, lengths=lengths)[0].square().sum().backward()
        layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data.sum().backward()
        with torch.no_grad():
            layer(x[:, :1])
    h, c = cell(x[0])
    (h + c).sum().backward()
    packed_gru.prepack()
    packed_gru(x)
    packed_gru.unpack()
    try:
        gru(x, lengths=lengths + 30)
    except (RuntimeError, ValueError):
        pass
    gru(x, bptt_steps=4)[0].sum().backward()

leaves_nothing(once, 100, 250)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_no_leak_in_many_calls(count: int) -> None:
    run_python(LEAKS, timeout=240, OMP_NUM_THREADS=str(count), **ALLOCATOR)


THREAD_LEAK = """
import threading
import torch
import dlkernels.nn

layer = dlkernels.nn.GRU(32, 96, bidirectional=True)
x = torch.randn(20, 16, 32)

def work():
    layer(x)[0].sum().backward()

def rss():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

sizes = []
for rounds in (50, 100, 100):
    for _ in range(rounds):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    sizes.append(rss())
print(sizes)
assert sizes[2] - sizes[1] < 2048, f"what a thread allocates for itself outlives it: {sizes} KiB"
"""


def test_threads_that_end_leave_nothing() -> None:
    run_python(THREAD_LEAK, timeout=120, OMP_NUM_THREADS="1", **ALLOCATOR)
