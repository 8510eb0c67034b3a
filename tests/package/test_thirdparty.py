"""Tests what `make test-thirdparty` relies on: the judgement, the stand-ins, the table. The packages are not needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.fresh_python import run_python
from tests.thirdparty.case import case, tensors, training
from tests.thirdparty.judgement import by_nearness, by_reference
from tests.thirdparty.run import BEGIN, END, USERS, Failed, Found, command, is_wrong, report, rewrite

pytestmark = pytest.mark.o0_skip(reason="it is about a script alone")

F32 = torch.float32
EPS = torch.finfo(F32).eps
EXACT = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64), "d w": torch.tensor([0.5, 4.0], dtype=torch.float64)}
THEIRS = {name: value.float() for name, value in EXACT.items()}


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return {**THEIRS, name: value}


def test_what_the_judgement_lets_pass() -> None:
    assert by_reference(THEIRS, THEIRS, EXACT, F32).ok
    assert by_reference(changed("y", THEIRS["y"] * (1 + 8 * EPS)), THEIRS, EXACT, F32).ok
    # A gradient that is 0 but for rounding has a size of its own in each dtype.
    rounding = {"d zero": torch.tensor([1e-17], dtype=torch.float64)}
    theirs, ours = {"d zero": torch.tensor([1e-9])}, {"d zero": torch.tensor([-3e-8])}
    assert by_reference({**THEIRS, **ours}, {**THEIRS, **theirs}, {**EXACT, **rounding}, F32).ok


@pytest.mark.parametrize(
    "ours",
    [
        changed("y", THEIRS["y"] * (1 + 100 * EPS)),
        changed("d w", torch.zeros(2)),
        changed("y", torch.tensor([1.0, float("nan")])),
        changed("y", THEIRS["y"].double()),
        changed("y", torch.tensor([1.0])),
        changed("more", torch.tensor([1.0])),
        {"y": THEIRS["y"]},
    ],
    ids=["error", "zeros", "nan", "dtype", "shape", "more", "fewer"],
)
def test_what_the_judgement_refuses(ours: dict[str, Tensor]) -> None:
    assert not by_reference(ours, THEIRS, EXACT, F32).ok
    assert not by_nearness(ours, THEIRS, 1e-6).ok


def test_a_wrong_measure_does_not_excuse_zeros() -> None:
    assert not by_reference(changed("d w", torch.zeros(2)), changed("d w", torch.full((2,), 99.0)), EXACT, F32).ok


def test_a_gradient_of_zero_is_judged_by_the_largest() -> None:
    exact = {**EXACT, "d zero": torch.zeros(1, dtype=torch.float64)}
    theirs = {**THEIRS, "d zero": torch.zeros(1)}
    assert not by_reference({**THEIRS, "d zero": torch.tensor([1e-3])}, theirs, exact, F32).ok


def test_tokens_must_be_equal() -> None:
    tokens = {"tokens": torch.tensor([3, 4])}
    other = {"tokens": torch.tensor([3, 5])}
    assert by_reference(tokens, tokens, tokens, F32).ok and not by_reference(other, tokens, tokens, F32).ok


def test_a_step_has_all_gradients_and_repeats() -> None:
    @case("linear")
    def linear(dtype: torch.dtype) -> object:
        model = nn.Linear(3, 2)
        return training(model, lambda x: {"a": [model(x)], "b": (x,)}, torch.randn(4, 3), dtype=dtype)

    step = linear.make(torch.float64)
    found, again = step(), step()
    assert set(found) == {"y00", "y10", "d input 0", "d weight", "d bias"}
    assert all(torch.equal(found[name], again[name]) and found[name].dtype == torch.float64 for name in found)
    assert torch.equal(linear.make(F32)()["y00"], linear.make(F32)()["y00"])
    assert tensors(None) == {}


def test_stand_ins() -> None:
    run_python("""
        from tests.thirdparty.stand_ins import stand_in_for

        assert stand_in_for("json") == ""
        import json
        assert json.dumps(1) == "1"
        assert stand_in_for("no_such_vision").startswith("ModuleNotFoundError")
        from no_such_vision.ops.misc import FrozenBatchNorm2d as Frozen
        from no_such_vision.transforms import InterpolationMode

        class Mine(Frozen):
            pass

        assert InterpolationMode.BICUBIC == "BICUBIC"
        for cls in (Mine, Frozen):
            try:
                cls()
            except RuntimeError as error:
                assert "no_such_vision.ops.misc.FrozenBatchNorm2d is a stand-in" in str(error)
            else:
                raise AssertionError("a stand-in was made")
    """)


def test_every_user_has_cases() -> None:
    folder = Path(sys.modules["tests.thirdparty.run"].__file__ or "").parent / "users"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(USERS)


GOOD = {
    "case": "LSTM", "problems": [], "served": [["lstm.input", "cpu/avx2/lstm", 2]], "gradients": 5,
    "left": [["gru.input", "forward-mode differentiation", 1]], "off_ms": 2.0, "on_ms": 1.0, "speedup": 2.0,
    "agreements": {"float32": {"ours": 1e-7, "limit": 4e-7}},
}  # fmt: skip
BAD = {"case": "GRU", "problems": ["Traceback\n  File\nValueError: no"]}


def test_the_table() -> None:
    good, bad = Found("a", "1.0", ["torchvision: missing"], [GOOD], ""), Found("b", "2.0", [], [BAD], "")
    absent = Found("c", "", [], [], "not installed: no matching distribution")
    assert not is_wrong([good]) and is_wrong([bad]) and is_wrong([absent])
    text = report([good, bad, absent])
    assert "| a 1.0 | LSTM | lstm.input 2 | gru.input 1 (forward-mode differentiation) | 5 | 0.25 | - |" in text
    assert "| b 2.0 | GRU | FAILED: ValueError: no |" in text and "FAILED: not installed" in text
    assert "a has a stand-in for torchvision: missing." in text and "2 cases of 3 users, 2 failed." in text
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert rewrite(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="lacks"):
        rewrite("no markers", "new")


def test_a_failing_command_has_a_reason() -> None:
    with pytest.raises(Failed, match="exit status 1: ZeroDivisionError"):
        command([sys.executable, "-c", "1 / 0"])
    with pytest.raises(Failed, match="no end after"):
        command([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.5)
