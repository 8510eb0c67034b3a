"""Tests attention called from several Python threads, in a parallel region, under OpenMP's limits and after a fork."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.support.attention_calls import run
from tests.support.attention_oracle import make_data
from tests.support.fresh_python import run_python
from tests.support.threaded_cases import ATTENTION_CASES as CASES

pytestmark = pytest.mark.usefixtures("native")


def test_several_python_threads(threads: Any) -> None:
    """Different calls run at once, together with torch's own matrix product."""
    from dlkernels._core import extension

    threads(2)
    work = [(case, make_data(case)) for case in CASES if not case.dropout]  # run() sets the seed of dropout globally
    expected = [run(*one) for one in work]
    left, right = torch.randn(192, 192), torch.randn(192, 192)
    product = left @ right

    def body(index: int) -> None:
        if index % 5 == 4:
            torch.testing.assert_close(left @ right, product)
            return
        at = index % len(work)
        for name, value in run(*work[at]).items():
            assert torch.equal(value, expected[at][name]), (name, work[at][0])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(body, range(60)))
        assert pool.submit(extension.native.attention_last_run).result() is not None
    fresh = ThreadPoolExecutor(1)
    assert fresh.submit(extension.native.attention_last_run).result() is None  # each thread has its own last run
    fresh.shutdown()


PRELUDE = """
import numpy
import torch
import dlkernels
from dlkernels._core import extension
from tests.support.attention_calls import check, prepare, run
from tests.support.attention_oracle import make_data
from tests.support.regions_and_forks import in_forked_child, in_parallel_region
from tests.support.threaded_cases import ATTENTION_CASES as CASES
extension.native.set_poison(True)
last_run = extension.native.attention_last_run
"""


def run_with_prelude(source: str, **env: str) -> str:
    return run_python(inspect.cleandoc(PRELUDE) + "\n" + inspect.cleandoc(source), **env)


def test_inside_another_parallel_region() -> None:
    """Each thread of a busy OpenMP team calls attention, with backward, inside the parallel region."""
    output = run_with_prelude(
        """
        torch.mm(torch.ones(300, 300), torch.ones(300, 300))
        work = [(case, make_data(case)) for case in CASES if not case.dropout]
        expected = [run(*one) for one in work]

        def body():
            for one, results in zip(work, expected):
                for name, value in run(*one).items():
                    assert torch.equal(value, results[name]), (name, one[0])

        print("both members passed" if in_parallel_region(body) else "no libgomp in this torch")
        """
    )
    if "no libgomp" in output:
        pytest.skip("this torch does not ship libgomp")
    assert "both members passed" in output


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "4"},
        {"OMP_DYNAMIC": "true", "OMP_NUM_THREADS": "3"},
    ],
    ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()),
)
def test_openmp_limits(variables: dict[str, str]) -> None:
    output = run_with_prelude(
        """
        for case in CASES:
            check(case)
        torch.set_num_threads(3)
        for case in CASES:
            check(case)
        print("passed", torch.get_num_threads())
        """,
        **variables,
    )
    assert "passed" in output


def test_after_fork() -> None:
    """torch's thread pool does not survive a fork. A child whose parent used the pool must neither hang nor compute
    wrong results. torch's own operators hang in such a child if they are large enough for threads, so the parent makes
    all tensors."""
    output = run_with_prelude(
        """
        torch.set_num_threads(2)
        work = [prepare(case, make_data(case)) for case in CASES]
        expected = [call() for call in work]
        torch.mm(torch.randn(400, 400), torch.randn(400, 400))

        def body():
            for call, results in zip(work, expected):
                for name, value in call().items():
                    a, b = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in (value, results[name]))
                    numpy.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)
                assert last_run()["members"] == 1, last_run()

        in_forked_child(body)
        for call, results in zip(work, expected):
            for name, value in call().items():
                assert torch.equal(value, results[name]), name
        print("child and parent passed")
        """
    )
    assert "child and parent passed" in output
