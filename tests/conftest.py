"""Session set-up: requires the compiled module, fills new buffers with NaN and restores global settings."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ALLOW_REFERENCE = os.environ.get("DLKERNELS_TEST_ALLOW_REFERENCE") == "1"
if not ALLOW_REFERENCE:
    # This is set before the first import of dlkernels. A missing `_C` then raises an error; without it the tests would
    # silently run on the reference path.
    os.environ["DLKERNELS_REQUIRE_NATIVE"] = "1"

import torch  # noqa: E402

from dlkernels._core import extension  # noqa: E402
from dlkernels.integrations import fast_path, sdpa_operator  # noqa: E402
from tests.support.instruction_sets import available_isas, optimised  # noqa: E402

# Time limit of one test in seconds, including its fixtures. `--timeout` and the marker `timeout` override it.
LIMIT, HEAVY_LIMIT = 300.0, 900.0
# The least time in microseconds that a call waits for its worker threads before it proceeds without them.
PATIENCE_US = 1_000_000


def pytest_sessionstart(session: pytest.Session) -> None:
    if extension.HAVE_NATIVE:
        return
    if not ALLOW_REFERENCE:
        pytest.exit(
            "dlkernels._C is not loaded: the suite would only test the reference path against itself", returncode=3
        )
    bar = "!" * 100
    print(
        f"{bar}\n!!! dlkernels._C IS NOT LOADED: only the reference path is tested. This proves no kernel.\n{bar}",
        file=sys.stderr,
    )


_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        raise pytest.UsageError("the tests need pytest-timeout: pip install -e '.[test]'")
    config.stash[_stderr] = os.dup(2)  # pytest captures file descriptor 2 while tests run
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")
    config.addinivalue_line("markers", "heavy: takes more than a few seconds")
    config.addinivalue_line(
        "markers",
        "o0_skip(reason): would say no more in an -O0 build than in the other; DLKERNELS_TEST_O0_ALL=1 runs it",
    )


def _limit(item: pytest.Item) -> float:
    marker, option = item.get_closest_marker("timeout"), item.config.getoption("timeout")
    if marker is not None:
        return float(marker.args[0] if marker.args else marker.kwargs["timeout"])
    if option is not None:
        return float(option)
    return HEAVY_LIMIT if item.get_closest_marker("heavy") else LIMIT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # The method "signal" runs a Python handler, which cannot run before a kernel returns. The default is a thread.
        marker = item.get_closest_marker("timeout")
        method = marker.kwargs.get("method", "thread") if marker else "thread"
        item.add_marker(pytest.mark.timeout(_limit(item), method=method), append=False)
        marker = item.get_closest_marker("o0_skip")
        if marker is not None and not optimised() and not os.environ.get("DLKERNELS_TEST_O0_ALL"):
            reason = marker.args[0] if marker.args else marker.kwargs.get("reason", "")
            item.add_marker(pytest.mark.skip(reason=f"-O0 build: {reason}"))
    # torch's own checks of an operator take the longest and test the least of its values, so they run last.
    items.sort(key=lambda item: "opcheck" in item.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """pytest-timeout's Python thread cannot end a call that holds the interpreter lock; faulthandler's C thread can."""
    limit = _limit(item)
    if limit > 0:
        faulthandler.dump_traceback_later(limit + max(1.0, limit / 10), exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not extension.HAVE_NATIVE:
        return [f"dlkernels: NO NATIVE MODULE, reference path only; torch {torch.__version__}"]
    info = extension.native.build_info()
    return [
        f"dlkernels: ISA {extension.native.isa()} of {', '.join(available_isas())}; torch {torch.__version__}; "
        f"{torch.get_num_threads()} threads",
        "dlkernels build: " + "; ".join(f"{key} {info.get(key)}" for key in ("compiler", "flags", "torch_target")),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test with the fixture `isa` once for each instruction set of this machine."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", available_isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "reference":
        yield request.param
        return
    extension.choose_isa(request.param)
    try:
        assert extension.native.isa() == request.param
        yield request.param
    finally:
        extension.choose_isa(None)


@pytest.fixture
def scalar_machine(native: Any) -> Iterator[None]:
    """Makes the process take the machine for one without vector kernels, as any ARM is today."""
    if os.environ.get("DLKERNELS_CPU_ISA") == "scalar":
        pytest.skip("DLKERNELS_CPU_ISA asks for the scalar kernels")
    native.pretend_scalar_machine(True)
    extension.choose_isa(None)
    try:
        yield
    finally:
        native.pretend_scalar_machine(False)
        extension.choose_isa(None)


@pytest.fixture
def best_isa() -> str:
    return available_isas()[-1]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fills every output and scratch buffer with NaN, so that an element which a kernel does not write is noticed."""
    if not extension.HAVE_NATIVE:
        yield
        return
    extension.native.set_poison(True)
    # Without this, a call on a busy machine would proceed without its workers, and a test of several threads would test
    # only one.
    extension.native.set_least_patience(PATIENCE_US)
    try:
        yield
    finally:
        extension.native.set_poison(False)
        extension.native.set_least_patience(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def serve_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets small attention reach our kernels, which leave it to torch because of the time that the call takes."""
    monkeypatch.setattr(sdpa_operator, "LEAST_SCORES", sdpa_operator.Least(0, 0, 0))
    monkeypatch.setattr(fast_path, "LEAST_SCORES", 0)
    monkeypatch.setattr(fast_path, "LEAST_SCORES_16_BIT", 0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Yields torch.set_num_threads and restores the number of threads afterwards."""
    before = torch.get_num_threads()
    try:
        yield torch.set_num_threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def native() -> Any:
    if not extension.HAVE_NATIVE:
        pytest.skip("needs the compiled module (DLKERNELS_TEST_ALLOW_REFERENCE is set)")
    return extension.native
