"""Everything to be learnt from a machine with an NVIDIA GPU, in one call of under nine minutes: `make gpu-check`.

    python tests/gpu/check.py [--rehearse] [OUT.json]

Build, GPU tests, benchmarks of attention against every SDPA backend and of the recurrent layers against cuDNN's. A part
that fails does not keep the others from running. What did not run, on a machine without a GPU nearly everything, is
said. The exit status is 0 if all parts ran and passed. --rehearse runs the same parts on the CPU, at small sizes: that
this file and its tests work, not more.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BEGIN = time.time()
TOTAL = 520.0  # seconds, of nine minutes
# Seconds since the beginning; a part may take what those before it left.
UNTIL = {"build": 110.0, "tests": 320.0, "attention": 440.0, "recurrent": 505.0}
TAIL = 6000
REHEARSE = "--rehearse" in sys.argv[1:]


def environment() -> dict[str, Any]:
    """Versions and the device, by a process of its own: a torch that does not import is a result too."""
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


def run(command: list[str], until: float, **more: str) -> dict[str, Any]:
    """A part in a process of its own, ended `until` seconds after the beginning."""
    limit = max(5.0, BEGIN + until - time.time())
    begin = time.time()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=settings(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=limit,
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status = 124
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    except OSError as error:
        status, output = 127, str(error)
    return {"status": status, "seconds": round(time.time() - begin, 1), "output": output[-TAIL:]}


def tests() -> dict[str, Any]:
    """In several processes: most of the time goes into compiling, on the CPU."""
    shards = 1 if REHEARSE else max(1, min(12, (os.cpu_count() or 2) - 2))
    deadline = BEGIN + UNTIL["tests"] - 15
    waiting = []
    for shard in range(shards):
        command = [sys.executable, "-m", "pytest", str(HERE / "attention_cuda.py"), "-q", "--tb=short", "-rs"]
        command += ["-p", "no:cacheprovider", f"--confcutdir={HERE}"]
        more = {"DLKERNELS_SHARD": f"{shard}/{shards}", "DLKERNELS_DEADLINE": str(deadline)}
        log = (ROOT / "build" / f"gpu-tests-{shard}.log").open("w+")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True,
            env=settings(DLKERNELS_TEST_ALLOW_REFERENCE="1", **more),
        )  # fmt: skip
        waiting.append((process, log))
    counts: dict[str, int] = {}
    failures, statuses = [], []
    for process, log in waiting:
        try:
            process.wait(timeout=max(5.0, BEGIN + UNTIL["tests"] - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read()
        log.close()
        statuses.append(process.returncode)
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output[-400:]):
            counts[what] = counts.get(what, 0) + int(number)
        if process.returncode != 0:
            failures.append(output[-TAIL:])
    return {"status": max(statuses, key=abs), "counts": counts, "failures": failures}


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
    """Why nothing can run on a GPU here, or ""."""
    if "error" in found or "torch_error" in found:
        return f"torch: {found.get('torch_error') or found['error']}"
    if REHEARSE:
        return ""
    if not found.get("available"):
        return "torch finds no CUDA device"
    return f"Triton: {found['triton_error']}" if "triton_error" in found else ""


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
    note("build", run([sys.executable, "csrc/setup/native.py"], UNTIL["build"]))
    reason = missing(report["environment"])
    for name in ("tests", "attention", "recurrent"):
        note(name, {"not_run": reason} if reason else tests() if name == "tests" else benchmark(name, out))
    report["seconds"] = round(time.time() - BEGIN, 1)
    out.write_text(json.dumps(report, indent=1))
    print(f"{out}: {report['seconds']} s")
    assert report["seconds"] < TOTAL + 20
    return int(any(part.get("status") != 0 for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
