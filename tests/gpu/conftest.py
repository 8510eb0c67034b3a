"""Puts tests/gpuless and the repository's root on the path and keeps the journal of a shard of `make gpu-check`: a test
that ended before this process was started is left out, and a failure is printed when it happens, not at the end of a
session that may be killed before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "gpuless"), str(ROOT)]

from journal import RESTART, Story, of_this_process  # noqa: E402
from timing import context_broken  # noqa: E402

_journal = of_this_process()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _journal is None:
        return
    ended = Story(_journal.path).ended
    _journal.plan([item.nodeid for item in items])
    left_out = [item for item in items if item.nodeid in ended]
    items[:] = [item for item in items if item.nodeid not in ended]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if _journal is not None:
        _journal.begin(item.nodeid)
        item.stash[_REPORTS] = []
    result = yield
    if _journal is not None:
        reports = item.stash[_REPORTS]
        failures = [report for report in reports if report.failed]
        skipped = next((report for report in reports if report.skipped), None)
        outcome = {"seconds": round(sum(report.duration for report in reports), 2)}
        if failures:
            lines = failures[0].longreprtext.strip().splitlines()
            outcome |= {"failed": next((line for line in lines if line.startswith("E ")), lines[-1])[:300]}
        elif skipped is not None:
            reason = skipped.longrepr[2] if isinstance(skipped.longrepr, tuple) else str(skipped.longrepr)
            outcome |= {"skipped": reason}
        _journal.end(item.nodeid, outcome)
        if failures and context_broken():
            pytest.exit("an error has made the CUDA context unusable", returncode=RESTART)
    return result


_REPORTS = pytest.StashKey[list[pytest.TestReport]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if _journal is not None:
        item.stash[_REPORTS].append(report)
        if report.failed:
            terminal = item.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}")
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The journal says which tests failed, so that their status is not that of a worker that ended too early."""
    nothing_left = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    if _journal is not None and session.exitstatus in nothing_left:
        session.exitstatus = 0
