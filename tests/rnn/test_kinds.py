"""Compares the description of each cell in Python with that in C++."""

import pytest

from dlkernels._core import extension
from dlkernels.rnn.kinds import KINDS

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.o0_skip(reason="constants")]


def test_python_and_the_kernels_agree() -> None:
    traits = extension.native.cell_traits()
    assert list(traits) == list(KINDS)
    for mode, kind in KINDS.items():
        parted = next((gate for gate, slot in enumerate(kind.of_hidden) if slot != kind.of_input[gate]), -1)
        assert traits[mode] == {
            "gates": kind.gates,
            "saved": len(kind.slots),
            "bounded": kind.bounded,
            "narrow": kind.narrow,
            "state_follows": kind.state_follows,
            "gate_grads": len(kind.gate_grads),
            "parted_gate": parted,
            "cell_state": kind.has_cell_state,
            "direct_path": kind.direct_path,
            "projection": kind.may_project,
        }
        assert kind.slots[-1] == ("c'" if kind.has_cell_state else "h'")
