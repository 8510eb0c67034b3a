"""Runs the short form of each example, and checks on held-out data that its models have learnt.

A limit lies between what the short form reaches and what a model can reach that learns nothing, or only how frequent
each answer is. The examples know these figures and return them too.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="what the examples learn, not the kernels"),
]
pytest.importorskip("matplotlib", reason="the examples need matplotlib: pip install -e '.[examples]'")
pytest.importorskip("sklearn", reason="the examples need scikit-learn: pip install -e '.[examples]'")


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `import common` work, as it does for `python examples/NAME.py`."""
    monkeypatch.syspath_prepend(FOLDER)


def run(name: str, out: Path) -> dict[str, float]:
    """The figures that the short form returns, after a check that it drew its picture."""
    found: dict[str, float] = importlib.import_module(name).main(["--quick", "--out", str(out)])
    assert (out / f"{name}.png").stat().st_size > 1000
    return found


def test_recurrent_compared(tmp_path: Path) -> None:
    """The frequencies of the characters alone give 3.2 nats. The four kinds reach 2.2 to 2.4."""
    found = run("recurrent_compared", tmp_path)
    assert found["frequencies"] > 3.0
    for kind in ("RNN", "LSTM", "GRU", "Transformer", "LSTM, bptt_steps=16"):
        assert found[kind] < found["frequencies"] - 0.4, kind


def test_gpt(tmp_path: Path) -> None:
    """The frequencies of the characters alone give 3.2 nats. The model reaches 2.5."""
    found = run("gpt", tmp_path)
    assert found["held out"] < found["frequencies"] - 0.3
    assert found["same text"], "the text differs between writing with and without a cache"


def test_translate(tmp_path: Path) -> None:
    """The most frequent character of each place is right in 0.54 of the places, and a guess hits no date. The model
    has 0.98 of the characters and 0.85 of the dates right."""
    found = run("translate", tmp_path)
    assert found["guessed characters"] < 0.65
    assert found["characters"] > 0.85
    assert found["dates"] > 0.3


def test_vision_transformer(tmp_path: Path) -> None:
    """By chance 0.1 is right. The Transformer reaches 0.7, the convolutional network 0.9."""
    found = run("vision_transformer", tmp_path)
    assert found["vision Transformer"] > 0.4
    assert found["convolutions"] > 0.6


def test_masked_language(tmp_path: Path) -> None:
    """The frequencies of the words alone give 4.67 nats, chance 0.25 of the packages. The model reaches 4.4, and 0.4
    from either start; the long form shows what pre-training is good for."""
    found = run("masked_language", tmp_path)
    assert found["hidden words"] < found["frequencies"] - 0.1
    for name in ("pre-trained", "from nothing"):
        assert found[name] > 0.3, name


def test_mixture_density(tmp_path: Path) -> None:
    """A normal distribution around the present value has a loss of 1.0. The models reach -0.2."""
    found = run("mixture_density", tmp_path)
    assert found["one normal distribution"] < found["without reading"] - 0.6
    assert found["mixture of five"] < found["without reading"] - 0.6


def test_generative(tmp_path: Path) -> None:
    """The mean image is wrong by 27.0 nats, exact greys by 13.6. The two autoencoders reach 24.4 and 20.0."""
    found = run("generative", tmp_path)
    assert found["variational"] < found["mean image"] - 1
    assert found["adversarial"] < found["mean image"] - 2.5


def test_policy(tmp_path: Path) -> None:
    """A guess at the junction is right in half of the corridors. The policy with a memory reaches 0.97."""
    found = run("policy", tmp_path)
    assert found["with a memory"] > 0.75
    assert found["without"] < 0.65


def test_a_program_of_its_own(tmp_path: Path) -> None:
    """An example starts as README says."""
    paths = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(FOLDER / "recurrent_compared.py"), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
