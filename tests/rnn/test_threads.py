"""Tests numbers of threads, calls from several Python threads, calls in a parallel region, OpenMP's limits and fork."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dlkernels.nn
from tests.support.fresh_python import run_python
from tests.support.layer_cases import MODES, assert_bit_equal, check_case, make_data, run_layer
from tests.support.threaded_cases import cases_of

ROW_RESULTS = ("y", "h_n", "c_n", "dx", "dh0", "dc0")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_threads(mode: str, count: int, isa: str, threads: Callable[[int], None]) -> None:
    threads(count)
    for case in cases_of(mode):
        check_case(case)


@pytest.mark.parametrize("mode", MODES)
def test_no_more_members_than_threads(mode: str, native, threads: Callable[[int], None]) -> None:
    for count in (1, 2, 3):
        threads(count)
        for case in cases_of(mode):
            run_layer(case, make_data(case), case.dtype, dlkernels.nn)
            run = native.last_run()
            assert 1 <= run["members"] <= count, run
            assert run["threads"] <= count, run


def test_several_python_threads(isa: str, deterministic: None) -> None:
    """Different layers and shapes run at once, together with torch's own matrix product."""
    work = [(case, make_data(case)) for mode in MODES for case in cases_of(mode)]
    expected = [run_layer(case, data, case.dtype, dlkernels.nn) for case, data in work]
    left, right = torch.randn(192, 192), torch.randn(192, 192)
    product = left @ right

    def run(index: int) -> None:
        if index % 5 == 4:
            torch.testing.assert_close(left @ right, product)
            return
        case, data = work[index % len(work)]
        actual = run_layer(case, data, case.dtype, dlkernels.nn)
        for name in ROW_RESULTS:
            if name in actual:
                assert_bit_equal(f"{name} of {case}", actual[name], expected[index % len(work)][name])
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[index % len(work)][name], rtol=1e-4, atol=1e-4, msg=name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(6 * len(work))))


def test_one_layer_from_several_threads(isa: str, deterministic: None) -> None:
    layer = dlkernels.nn.LSTM(16, 48, bidirectional=True)
    inputs = [torch.randn(9, b, 16) for b in (1, 2, 5, 8, 16, 20)]
    with torch.no_grad():
        expected = [layer(x)[0] for x in inputs]

        def run(index: int) -> None:
            # Grad mode is thread-local and is on in the threads of the pool.
            with torch.no_grad():
                assert_bit_equal("y", layer(inputs[index % 6])[0], expected[index % 6])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(120)))


PRELUDE = """
import numpy
import torch
from dlkernels._core import extension
import dlkernels.nn
from tests.support.layer_cases import *
from tests.support.regions_and_forks import in_forked_child, in_parallel_region
from tests.support.threaded_cases import cases_of
if extension.HAVE_NATIVE:
    extension.native.set_poison(True)
last_run = extension.native.last_run if extension.HAVE_NATIVE else lambda: None
"""


def run_with_prelude(source: str, **env: str) -> str:
    import inspect

    return run_python(inspect.cleandoc(PRELUDE) + "\n" + inspect.cleandoc(source), **env)


def test_inside_another_parallel_region() -> None:
    """Each thread of a busy OpenMP team runs layers, with backward, inside the parallel region."""
    output = run_with_prelude(
        """
        torch.mm(torch.ones(300, 300), torch.ones(300, 300))

        def body():
            for mode in MODES:
                for case in cases_of(mode):
                    check_case(case)

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
        for mode in MODES:
            for dtype in (torch.float32, torch.bfloat16):
                for case in cases_of(mode, dtype):
                    check_case(case)
        torch.set_num_threads(3)
        for mode in MODES:
            for case in cases_of(mode):
                check_case(case)
        print("passed", torch.get_num_threads())
        """,
        **variables,
    )
    assert "passed" in output


def test_after_fork() -> None:
    """torch's thread pool does not survive a fork. A child whose parent used the pool must neither hang nor compute
    wrong results. torch's own operators hang in such a child if they are large enough for threads, so the parent makes
    the layers and data, and the child compares with numpy."""
    output = run_with_prelude(
        """
        torch.set_num_threads(2)
        work = []
        for mode in MODES:
            for case in cases_of(mode):
                data = make_data(case)
                work.append((case, data, new_layer(case, data, case.dtype)))
        expected = [run_layer(case, data, case.dtype, dlkernels.nn, layer=layer) for case, data, layer in work]
        torch.mm(torch.randn(400, 400), torch.randn(400, 400))

        def body():
            for (case, data, layer), results in zip(work, expected):
                for grad in (True, False):
                    actual = run_layer(case, data, case.dtype, dlkernels.nn, grad, layer)
                    for name, value in actual.items():
                        wanted = results[name].numpy()
                        numpy.testing.assert_allclose(value.numpy(), wanted, 1e-4, 1e-4, err_msg=name)
                    run = last_run()
                    assert run is None or run["members"] == 1, run

        in_forked_child(body)
        # The parent's pool is as it was.
        for (case, data, layer), results in zip(work, expected):
            for name, value in run_layer(case, data, case.dtype, dlkernels.nn, layer=layer).items():
                assert torch.equal(value, results[name]), name
        print("child and parent passed")
        """
    )
    assert "child and parent passed" in output


def test_data_loader_workers() -> None:
    output = run_with_prelude(
        """
        class Encoded(torch.utils.data.Dataset):
            def __init__(self):
                torch.manual_seed(0)
                self.layer = dlkernels.nn.GRU(16, 64, bidirectional=True)
                self.inputs = torch.randn(12, 10, 4, 16)

            def __len__(self):
                return len(self.inputs)

            def __getitem__(self, index):
                with torch.no_grad():
                    return self.layer(self.inputs[index])[0]

        data = Encoded()
        expected = torch.stack([data[i] for i in range(len(data))])
        torch.mm(torch.randn(400, 400), torch.randn(400, 400))
        loader = torch.utils.data.DataLoader(
            data, batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        torch.testing.assert_close(torch.cat(list(loader)), expected)
        print("workers passed")
        """
    )
    assert "workers passed" in output
