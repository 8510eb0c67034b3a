"""Tests the training steps of whole models with enable() off and on: benchmarks/switched.py and models.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dlkernels
from benchmarks import switched
from benchmarks.models import MODELS, Model
from dlkernels.bench.timing import Budget

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="Python around kernels that other tests call as well"),
]

BUDGET = Budget(0.01, block_seconds=0.001, discard_seconds=0.0, min_pairs=2, max_pairs=2)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head, self.dropout = nn.GRU(5, 6), nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.rnn(x)[0]))


TINY = Model(Tiny, lambda: (torch.randn(4, 2, 5),), lambda model, x: model(x).square().mean())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)


def measured(dtype: str) -> switched.Result:
    (result,) = switched.ModelRunner(BUDGET).run(switched.cases(["tiny"], [dtype], [1], 1.0))  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured(tiny: None, dtype: str) -> None:
    result = measured(dtype)
    assert result.status == "ok", result.message
    assert result.kernel["kernel"].startswith("cpu/")
    assert result.kernel["kernel"].endswith("/gru")
    assert result.as_json()["speedup"] > 0
    assert result.agreement is not None
    assert 0 < result.agreement.ours < result.agreement.limit < 0.1


def test_wrong_gradients_are_noticed(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = switched.results

    def wrong(step: switched.Step) -> list[Tensor]:
        return [t * 1.001 if step.on else t for t in right(step)]

    monkeypatch.setattr(switched, "results", wrong)
    result = measured("float32")
    assert result.status == "disagree"
    assert result.sample is None


def test_all_models_and_dtypes_are_cases() -> None:
    cases = switched.cases(tuple(MODELS), ["float32", "float64", "bfloat16"], [1, 2], 1.0)
    assert len({case.name for case in cases}) == len(MODELS) * 2 * 2
    assert {case.target for case in cases} == {1.0}


@pytest.mark.parametrize("name", ["speech-ctc", "llama-gqa"])
def test_gradients_of_models(name: str) -> None:
    """Loss and gradients of the model are those of torch, and our kernels are reached."""
    torch.manual_seed(0)
    model, batch = MODELS[name].make().eval(), MODELS[name].batch()

    def gradients() -> list[Tensor]:
        loss = MODELS[name].loss(model, *batch)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = gradients()
    with dlkernels.enable() as handle:
        found = gradients()
    assert handle.served
    assert not handle.left
    assert switched.distance(found, [t.double() for t in expected]) < 1e-5
