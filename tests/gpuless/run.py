"""Tests GPU code without a GPU: python tests/gpuless/run.py triton==3.6.0 triton==3.9.0 [--all | --quick] [PYTEST ...]

The Triton kernels run under Triton's interpreter with the first of the given releases. They are compiled for each
architecture, each configuration with one of the releases: they take turns, so that each release compiles every tile,
every kind of call and for every architecture. --all compiles everything with each release, also the tiles that are
candidates for a sweep on a GPU, and runs all of tests/cuda/run.py; without it that runs its short form. The usual run
is meant to take at most 12 minutes on two cores. --quick, which .ci/run uses, leaves out the compilation for other
architectures than 9.0, there every second configuration, and the tests of the tests.

The tests of the CUDA kernels, tests/cuda/run.py, run beside the others as one more rung, which is reported last. When
the others have ended, that rung uses all processors.
MAX_JOBS is the number of processes at a time, by default the number of processors. A rung that cannot run prints the
reason and fails, unless DLKERNELS_GPULESS_ALLOW names it (`DLKERNELS_GPULESS_ALLOW=interpreter,sm_100,cuda`).

For each release an environment is made in build/ that holds Triton and a numpy that its interpreter supports, on top of
the environment that runs this script. Where the machine has no nvcc, one more environment holds it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# Triton 3.6's interpreter converts arrays of one element to scalars, which numpy 2.4 refuses.
NUMPY = "numpy<2.4"
ARCHITECTURES = ("sm_90", "sm_100", "sm_80")
# The CUDA compiler, what it needs, and the headers of bfloat16 and float16, which the emulation includes too.
NVCC_SPECS = tuple(f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm", "cuda-cccl"))
SHARDS = 2  # of the interpreter's tests
LIMIT = 1500.0  # the time limit of a rung in seconds
JOBS = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


class Rung(NamedTuple):
    name: str
    spec: str
    file: str
    settings: dict[str, str]


class Result(NamedTuple):
    rung: Rung
    verdict: str
    fine: bool
    seconds: float


def rungs(specs: list[str], everything: bool, quick: bool = False) -> list[Rung]:
    """All rungs but that of the CUDA kernels, the longest first."""
    shares = 1 if everything else len(specs) * (2 if quick else 1)
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Line numbers in the binaries would take a tenth of the compile time.
    compiled = {"TRITON_DISABLE_LINE_INFO": "1", "OMP_NUM_THREADS": "1"}
    return [
        *(
            Rung(f"offline {arch}", spec, "attention_offline.py",
                 compiled | {"DLKERNELS_ARCH": arch, "DLKERNELS_RELEASE": f"{release % shares}/{shares}"})
            for release, spec in reversed(list(enumerate(specs))) for arch in ARCHITECTURES[: 1 if quick else None]
        ),
        *(
            Rung(f"interpreter {shard + 1}/{SHARDS}", specs[0], "attention_interpreted.py",
                 interpreted | {"DLKERNELS_SHARD": f"{shard}/{SHARDS}"})
            for shard in range(SHARDS)
        ),
        *(Rung("registration", spec, "registration.py", {}) for spec in specs),
        *(Rung("launches", spec, "launches.py", {}) for spec in specs),
        *(
            Rung(f"{name} itself", specs[0], f"{name}_itself.py", settings)
            for name, settings in (("interpreter", interpreted), ("offline", compiled)) if not quick
        ),
    ]  # fmt: skip


def environment(spec: str) -> tuple[Path, str]:
    """The Python of an environment with this Triton, and the reason if there is none."""
    if not sys.platform.startswith("linux"):
        return Path(), f"Triton has no wheels for {sys.platform}"
    folder = ROOT / "build" / f"gpuless-{re.sub(r'[^0-9A-Za-z.]+', '-', spec)}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python, ""
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        below = sysconfig.get_path("purelib")
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "below.pth").write_text(below + "\n")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", spec, NUMPY]
        subprocess.run(pip, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or [str(error)]
        return Path(), f"no environment with {spec}: {said[-1]}"
    ready.touch()
    return python, ""


def nvcc() -> tuple[str, str]:
    """The command that runs nvcc, and the reason if there is none."""
    found = shutil.which(os.environ.get("NVCC") or "nvcc")
    if found:
        return found, ""
    folder = ROOT / "build" / "gpuless-nvcc"
    try:
        if not (folder / "ready").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [
                str(folder / "bin" / "python"),
                "-m",
                "pip",
                "--disable-pip-version-check",
                "install",
                "-q",
                "--no-deps",
            ]
            subprocess.run([*pip, *NVCC_SPECS], check=True, capture_output=True, text=True)
            (folder / "ready").touch()
        return str(next(folder.glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc"))), ""
    except (subprocess.CalledProcessError, StopIteration) as error:
        said = (getattr(error, "stderr", "") or "").strip().splitlines() or [repr(error)]
        return "", f"no nvcc, and none to be installed: {said[-1]}"


def climb_cuda(everything: bool, quick: bool, alone: threading.Event) -> Result:
    """Runs tests/cuda/run.py, which prints its own rungs, and gives it all jobs when `alone` is set."""
    begin = time.monotonic()
    rung = Rung("cuda", "tests/cuda/run.py", "", {})
    command, missing = nvcc()
    if missing:
        allowed = "cuda" in os.environ.get("DLKERNELS_GPULESS_ALLOW", "").split(",")
        return Result(rung, f"NOT RUN{' (allowed)' if allowed else ''}: {missing}", allowed, 0.0)
    jobs = max(1, JOBS // 2)
    settings = {**os.environ, "NVCC": command, "MAX_JOBS": str(jobs)}
    form = [] if everything else ["--quick" if quick else "--short"]
    ladder = [sys.executable, str(ROOT / "tests" / "cuda" / "run.py"), "--more-jobs", *form]
    with subprocess.Popen(ladder, cwd=ROOT, env=settings, stdin=subprocess.PIPE) as running:
        while running.poll() is None and not alone.wait(1.0):
            pass
        running.communicate(b"+" * (JOBS - jobs))
        status = running.returncode
    verdict = "passed" if status == 0 else f"FAILED ({status})"
    return Result(rung, verdict, status == 0, time.monotonic() - begin)


def climb(rung: Rung, python: Path, missing: str, arguments: list[str]) -> Result:
    begin = time.monotonic()
    if missing:
        allowed = any(name and name in rung.name for name in os.environ.get("DLKERNELS_GPULESS_ALLOW", "").split(","))
        return Result(rung, f"NOT RUN{' (allowed)' if allowed else ''}: {missing}", allowed, 0.0)
    settings = {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "DLKERNELS_TEST_ALLOW_REFERENCE": "1",
        **rung.settings,
    }  # fmt: skip
    # In every operation Triton 3.6 reads scalars from arrays of one element, and numpy warns each time.
    command = [
        str(python), "-m", "pytest", str(HERE / rung.file), "-q", "-p", "no:cacheprovider", f"--confcutdir={HERE}",
        "-W", "ignore::DeprecationWarning", *arguments,
    ]  # fmt: skip
    log = ROOT / "build" / f"gpuless-{re.sub(r'[^0-9A-Za-z]+', '-', f'{rung.name} {rung.spec}')}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=settings, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    output = log.read_text()
    summary = output.strip().splitlines()[-1] if output.strip() else "no output"
    # A skipped test fails the rung, so that nothing is left untested unnoticed.
    fine = status == 0 and "skipped" not in summary
    if not fine:
        print(output[-20000:], flush=True)
    verdict = f"{'passed' if fine else f'FAILED ({status})'}: {summary.strip('= ')}"
    return Result(rung, verdict, fine, time.monotonic() - begin)


def reported(result: Result) -> Result:
    print(f"== {result.rung.name}, {result.rung.spec}: {result.verdict}, {result.seconds:.0f} s", flush=True)
    return result


def main(arguments: list[str]) -> int:
    specs = [x for x in arguments if x.startswith("triton")]
    everything, quick = "--all" in arguments, "--quick" in arguments
    rest = [x for x in arguments if not x.startswith("triton") and x not in ("--all", "--quick")]
    if not specs:
        print(__doc__)
        return 2
    begin = time.monotonic()
    (ROOT / "build").mkdir(exist_ok=True)
    results = []
    with ThreadPoolExecutor(JOBS) as pool:
        # This rung starts first, since it needs no environment and takes the longest.
        alone = threading.Event()
        cuda = pool.submit(climb_cuda, everything, quick, alone)
        with ThreadPoolExecutor(len(specs)) as installing:
            pythons = dict(zip(specs, installing.map(environment, specs), strict=True))
        print(f"environments: {time.monotonic() - begin:.0f} s", flush=True)
        waiting = [pool.submit(climb, rung, *pythons[rung.spec], rest) for rung in rungs(specs, everything, quick)]
        try:
            for future in waiting:
                results.append(reported(future.result()))
        finally:
            alone.set()
        results.append(reported(cuda.result()))
    failed = sum(not result.fine for result in results)
    print(f"{len(results) - failed} rungs passed, {failed} failed, {time.monotonic() - begin:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
