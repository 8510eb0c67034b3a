"""Tests the suite itself: no test module imports another, and each test runs on all its instruction sets."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import pytest

from tests.support.instruction_sets import available_isas

pytestmark = pytest.mark.o0_skip(reason="it is about pytest alone")

TESTS = Path(__file__).parents[1]
# The pattern also matches in the scripts that tests run in a fresh interpreter.
IMPORT = re.compile(
    r"^\s*(?:from\s+(?:[\w.]*\.)?test_\w+\s+import|(?:from\s+[\w.]+\s+)?import\s+(?:.*[\s.,(])?test_\w+)", re.M
)


def test_no_test_module_imports_another() -> None:
    assert IMPORT.search("x\n    from tests.rnn import test_nan") and IMPORT.search("from tests.rnn.test_nan import x")
    assert IMPORT.search("import test_nan") and not IMPORT.search("from tests.support.sdpa_calls import draw")
    files = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    assert len(files) > 80
    assert {path.relative_to(TESTS): found[0] for path in files if (found := IMPORT.search(path.read_text()))} == {}


def test_one_source_owns_the_namespace_of_the_operators() -> None:
    """A second owner ends `import dlkernels` in a segmentation fault, without a message."""
    sources = list((TESTS.parent / "csrc").rglob("*.cpp"))
    owners = [path.name for path in sources if "STABLE_TORCH_LIBRARY(dlkernels" in path.read_text()]
    assert sources and len(owners) == 1, owners


def test_every_isa_runs_every_test_that_asks_for_one(request: pytest.FixtureRequest) -> None:
    """Each collected test has the same number of cases for every instruction set that it must run on."""
    if request.config.getoption("keyword"):
        pytest.skip("-k leaves tests out")
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for item in request.session.items:
        if isinstance(item, pytest.Function) and "isa" in item.fixturenames:
            counts[item.nodeid.partition("[")[0]][item.callspec.params["isa"]] += 1
    for test, found in counts.items():
        assert set(found) == set(available_isas()), test
        assert len(set(found.values())) == 1, f"{test}: {found}"
