"""Runs all checks that need an NVIDIA GPU in one call of under nine minutes: `make gpu-check`.

    python tests/gpu/check.py [--rehearse] [OUT.json]

The parts are a build for the GPU of this machine, the GPU tests, compute-sanitizer, benchmarks of attention against
every SDPA backend and of the recurrent layers against cuDNN's, and ncu. A part that fails does not keep the others from
running. The report names what did not run, which on a machine without a GPU is nearly everything. The exit status is 0
if all parts ran and passed. --rehearse runs the same parts on the CPU at small sizes, which tests this file and the
tests that it runs, but no GPU code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BEGIN = time.time()
TOTAL = 520.0  # seconds, which leaves a margin to nine minutes
# The time by which a part must end, in seconds since the start. A part may use the time that earlier parts left over.
UNTIL = {
    "build": 110.0, "tests": 270.0, "memcheck": 310.0, "racecheck": 340.0, "attention": 420.0, "recurrent": 495.0,
    "ncu": 512.0,
}  # fmt: skip
TAIL = 6000
REHEARSE = "--rehearse" in sys.argv[1:]
if REHEARSE:  # the machine may be slow or busy
    UNTIL = {name: 5 * seconds for name, seconds in UNTIL.items()}


def environment() -> dict[str, Any]:
    """Versions and the device, found by a separate process, so that a torch that cannot be imported is reported too."""
    script = """
import json, platform, sys
found = {"python": sys.version.split()[0], "platform": platform.platform()}
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {"device": p.name, "capability": [p.major, p.minor], "multiprocessors": p.multi_processor_count,
                  "memory": p.total_memory, "cudnn": torch.backends.cudnn.version()}
except Exception as error:
    found["torch_error"] = repr(error)
try:
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["triton_error"] = repr(error)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=settings())
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-TAIL:]}
    for name, command in (
        ("nvidia_smi", ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv"]),
        ("commit", ["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
    ):
        try:
            found[name] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found[name] = f"not run: {error}"
    return found


def settings(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    device = {"DLKERNELS_DEVICE": "cpu"} if REHEARSE else {}
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **device, **more}


def finish(process: subprocess.Popen[str], until: float) -> int:
    """Waits for a process and returns its status. It is killed with its children `until` seconds after the start."""
    try:
        return process.wait(timeout=max(5.0, BEGIN + until - time.time()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def run(command: list[str], until: float, tail: int = TAIL, **more: str) -> dict[str, Any]:
    """Runs a part in a separate process with `more` added to its environment."""
    begin = time.time()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=settings(**more), stdout=log, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )  # fmt: skip
            status = finish(process, until)
        except OSError as error:
            status = 127
            log.write(str(error))
        log.seek(0)
        output = log.read()
    return {"status": status, "seconds": round(time.time() - begin, 1), "output": output[-tail:]}


def build(gpu: bool) -> dict[str, Any]:
    """Builds for the GPU of this machine only; without a GPU, only the CPU kernels."""
    result = run([sys.executable, "csrc/setup/native.py"], UNTIL["build"], DLKERNELS_CUDA=str(int(gpu)))
    built = re.findall("^dlkernels: .*", result["output"], re.MULTILINE)
    return result | {"built": built[0] if built else ""}


def pytest_process(name: str, file: str, shard: str, deadline: float) -> tuple[subprocess.Popen[str], Any]:
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "--tb=short", "-rs", "-p", "no:cacheprovider"]
    log = (ROOT / "build" / f"gpu-tests-{name}.log").open("w+")
    more = {"DLKERNELS_SHARD": shard, "DLKERNELS_DEADLINE": str(deadline), "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [*command, f"--confcutdir={HERE}"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True,
        env=settings(DLKERNELS_TEST_ALLOW_REFERENCE="1", **more),
        start_new_session=True,
    )  # fmt: skip
    return process, log


def tests() -> dict[str, Any]:
    """Runs the tests in several processes, since most of their time is spent compiling and on float64 on the CPU."""
    cores = os.cpu_count() or 2
    shards = {"attention": 1, "recurrent": 1, "recurrent_torch": 1, "recurrent_dropin": 1} if REHEARSE else {
        "attention": max(1, min(10, cores - 7)), "recurrent": max(1, min(3, cores - 4)), "recurrent_torch": 1,
        "recurrent_dropin": 1,
    }  # fmt: skip
    deadline = BEGIN + UNTIL["tests"] - 15
    waiting = [
        (name, *pytest_process(f"{name}-{shard}", f"{name}_cuda.py", f"{shard}/{count}", deadline))
        for name, count in shards.items() for shard in range(count)
    ]  # fmt: skip
    counts: dict[str, dict[str, int]] = {name: {} for name in shards}
    failures, statuses = [], []
    for name, process, log in waiting:
        statuses.append(finish(process, UNTIL["tests"]))
        log.seek(0)
        output = log.read()
        log.close()
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output[-400:]):
            counts[name][what] = counts[name].get(what, 0) + int(number)
        if statuses[-1] != 0:
            failures.append(output[-TAIL:])
    return {"status": max(statuses, key=abs), "counts": counts, "failures": failures}


def tool(name: str) -> str | None:
    """Finds a tool of the CUDA toolkit on the PATH or beside nvcc."""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    folders = [Path(nvcc).resolve().parent, Path("/usr/local/cuda/bin")] if nvcc else [Path("/usr/local/cuda/bin")]
    return shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).is_file()), None)


def watched(name: str, program: str, options: list[str], calls: str) -> dict[str, Any]:
    """Runs calls.py under a tool; a rehearsal runs it without the tool."""
    found = None if REHEARSE else tool(program)
    if found is None and not REHEARSE:
        return {"not_run": f"there is no {program}", "status": 0}
    command = [sys.executable, str(HERE / "calls.py"), calls]
    # Without torch's caching allocator each tensor is a separate allocation, so that memcheck sees accesses beyond it.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if program == "compute-sanitizer" else {}
    result = run(
        [found, *options, *command] if found else command, UNTIL[name], tail=4 * TAIL,
        DLKERNELS_DEADLINE=str(BEGIN + UNTIL[name] - 10), **more,
    )  # fmt: skip
    if "ERR_NVGPUCTRPERM" in result["output"]:
        result |= {"status": 0, "not_run": "this machine does not let users read the GPU's counters"}
    elif "NOT RUN" in result["output"] and result["status"] == 1:  # calls.py ran out of time; 9 is the status of errors
        result |= {"status": 0}
    return result


def memcheck() -> dict[str, Any]:
    return watched("memcheck", "compute-sanitizer", ["--tool", "memcheck", "--error-exitcode", "9"], "small")


def racecheck() -> dict[str, Any]:
    return watched("racecheck", "compute-sanitizer", ["--tool", "racecheck", "--error-exitcode", "9"], "small")


METRICS = (
    "gpu__time_duration.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread", "launch__shared_mem_per_block_dynamic",
)  # fmt: skip


def ncu() -> dict[str, Any]:
    options = ["--csv", "--kernel-name", "regex:sequence_|cell_", "--launch-count", "6", "--metrics", ",".join(METRICS)]
    result = watched("ncu", "ncu", options, "main")
    return result | {"lines": [line for line in result.get("output", "").splitlines() if line.startswith('"')]}


def benchmark(name: str, out: Path) -> dict[str, Any]:
    table = out.with_suffix(f".{name}.json")
    table.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"bench_{name}.py"), str(table)]
    result = run(command, UNTIL[name], DLKERNELS_DEADLINE=str(BEGIN + UNTIL[name] - 15))
    if table.is_file():
        result["rows"] = json.loads(table.read_text())
        table.unlink()
    return result


def missing(found: dict[str, Any]) -> str:
    """The reason why nothing can run on a GPU here, or an empty string."""
    if "error" in found or "torch_error" in found:
        return f"torch: {found.get('torch_error') or found['error']}"
    if REHEARSE:
        return ""
    if not found.get("available"):
        return "torch finds no CUDA device"
    return f"Triton: {found['triton_error']}" if "triton_error" in found else ""


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The times of the recurrent layers as text lines."""
    head = f"{'layer':22} {'B x T x I x H':20} {'form':7} {'plan':9} {'forward ms':>20} {'training ms':>20}"
    lines = [f"{head}  speed-up of ours / torch.nn"]
    for row in rows:
        if "B" not in row:
            lines.append(str(row)[:120])
            continue
        times = []
        for what in ("forward", "training"):
            pair = [row[name].get(f"{what}_ms") for name in ("dlkernels", "torch.nn")]
            times.append(" / ".join("-" if value is None else f"{value:.3f}" for value in pair))
        speeds = [row[f"{what}_speedup"] for what in ("forward", "training")]
        said = ", ".join("-" if value is None else f"{value:.2f}" for value in speeds)
        sizes = "x".join(str(row[name]) for name in ("B", "T", "I", "H"))
        plan = row["forward"].get("kind", row["path"])
        name = f"{row['what']} {row['dtype']}"
        lines.append(f"{name:22} {sizes:20} {row['form']:7} {plan:9} {times[0]:>20} {times[1]:>20}  {said}")
    return lines


def main() -> int:
    names = [x for x in sys.argv[1:] if not x.startswith("--")]
    out = Path(names[0]) if names else ROOT / "build" / "gpu-check.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    report: dict[str, Any] = {"rehearsal": REHEARSE, "environment": environment(), "parts": {}}
    parts: dict[str, Any] = report["parts"]

    def note(name: str, result: dict[str, Any]) -> None:
        parts[name] = result
        out.write_text(json.dumps(report, indent=1))
        said = result.get("not_run") or f"status {result.get('status')} {result.get('counts', '')}"
        print(f"{time.time() - BEGIN:6.0f} s  {name}: {said}", flush=True)
        if result.get("status"):
            print(result.get("output") or "\n".join(result.get("failures", [])), flush=True)

    print(json.dumps(report["environment"], indent=1))
    on_gpu = report["environment"].get("available", False) and not REHEARSE
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "build": lambda: build(on_gpu), "tests": tests, "memcheck": memcheck, "racecheck": racecheck,
        "attention": lambda: benchmark("attention", out), "recurrent": lambda: benchmark("recurrent", out), "ncu": ncu,
    }  # fmt: skip
    reason = missing(report["environment"])
    for name in UNTIL:
        if reason and name != "build":
            note(name, {"not_run": reason})
            continue
        try:
            note(name, work[name]())
        except Exception as error:  # an error of this file must not keep the other parts from running
            note(name, {"status": 1, "output": repr(error)})
    print("\n".join(table(parts["recurrent"].get("rows", []))))
    if reason or REHEARSE:
        print(f"NOTHING RAN ON A GPU: {reason or 'this was a rehearsal'}")
    report["seconds"] = round(time.time() - BEGIN, 1)
    out.write_text(json.dumps(report, indent=1))
    print(f"{out}: {report['seconds']} s")
    assert REHEARSE or report["seconds"] < TOTAL + 20
    return int(any(part.get("status") != 0 for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
