"""Runs programs of other projects with `dlkernels.enable()` on, unpatched:

    python -m tests.thirdparty.run [USER ...] [--fresh] [--write PAGE]

For each user an environment is made in build/thirdparty on top of the one that runs this script, so that its torch is
used. The packages come from pip, the newest that fit; those that would bring another torch, torchvision or torchaudio
are installed without their requirements. --fresh installs them again. The models are small and random, so nothing else
is downloaded.

Each case runs forward and backward with the switch off and on, from the same seed, in float32 and float64. Outputs and
gradients must agree (judgement.py), and our kernels must have served the operators that the case names. Then both are
timed in alternating blocks, with one thread. A user that cannot be installed or imported fails. --write puts the table
between the markers of a page. Exit status: 0 if everything agrees, else 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlkernels.bench.machine import describe, headline, versions
from dlkernels.bench.report import milliseconds

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "thirdparty"
BEGIN, END = "<!-- thirdparty:begin -->", "<!-- thirdparty:end -->"
LIMIT = 600.0  # seconds for the cases of a user


class User(NamedTuple):
    """packages: what is installed. with_requirements: whether pip installs what they require too; if not, `also` is
    what the cases need of it. stand_ins: packages that they import and that may not import beside this torch."""

    packages: tuple[str, ...]
    with_requirements: bool = True
    also: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()


USERS = {
    # Its 60 requirements include an old numpy and torch extensions, and the models need none of them.
    "espnet": User(("espnet",), False, ("typeguard",)),
    "torchrl": User(("torchrl",)),
    "sb3_contrib": User(("sb3-contrib",)),
    "transformers": User(("transformers",)),
    "speechbrain": User(
        ("speechbrain",), False,
        ("hyperpyyaml", "joblib", "scipy", "sentencepiece", "soundfile", "tqdm", "huggingface_hub", "requests"),
        ("torchaudio",),
    ),
    "stanza": User(("stanza",)),
    "torch_geometric": User(("torch-geometric",)),
    "timm": User(("timm",), False, ("pyyaml", "huggingface_hub", "safetensors"), ("torchvision",)),
    "open_clip": User(
        ("open-clip-torch", "timm"), False, ("pyyaml", "huggingface_hub", "safetensors", "ftfy", "regex", "tqdm"),
        ("torchvision",),
    ),
    "diffusers": User(("diffusers",)),
}  # fmt: skip


HEAD = ("user", "case", "served", "left to torch", "gradients", "float32", "float64", "off, ms", "on, ms", "speed-up")


class Failed(Exception):
    """A user that cannot be installed or run."""


class Found(NamedTuple):
    user: str
    version: str
    stand_ins: list[str]
    cases: list[dict[str, Any]]
    problem: str


def command(words: Sequence[str | Path], limit: float | None = None) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Nothing is to be fetched at run time, and nobody is there to look at a picture.
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "DLKERNELS_REQUIRE_NATIVE": "1"}
    try:
        done = subprocess.run(
            [str(word) for word in words], cwd=ROOT, env={**inherited, **settings}, capture_output=True, text=True,
            timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {limit:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        print(done.stdout + done.stderr, file=sys.stderr)
        raise Failed(f"exit status {done.returncode}: {last[-1]}")
    return done.stdout


def environment(name: str, user: User, fresh: bool) -> Path:
    """The Python of an environment that has the user's packages, on top of the environment of this script."""
    folder = BUILD / name
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = repr((user, torch.__version__))
    if not fresh and ready.exists() and ready.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    command([sys.executable, "-m", "venv", "--without-pip", folder])
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", constraints]
    command([*pip, *([] if user.with_requirements else ["--no-deps"]), *user.packages])
    if user.also:
        command([*pip, *user.also])
    installed = {path.name.lower() for path in own.iterdir()}
    if extra := installed & {"torch", "torchvision", "torchaudio"}:
        raise Failed(f"pip has installed {', '.join(sorted(extra))}")
    ready.write_text(wanted)
    return python


def examine(name: str, user: User, fresh: bool) -> Found:
    """Installs a user and runs its cases."""
    try:
        python = environment(name, user, fresh)
        ask = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
        version = command([python, "-c", ask, user.packages[0]]).strip()
    except Failed as failure:
        return Found(name, "", [], [], f"not installed: {failure}")
    try:
        output = command([python, "-W", "ignore", "-m", "tests.thirdparty.child", name, *user.stand_ins], LIMIT)
    except Failed as failure:
        return Found(name, version, [], [], f"not run: {failure}")
    lines = [line.partition(" ") for line in output.splitlines()]
    cases = [json.loads(rest) for kind, _, rest in lines if kind == "CASE"]
    return Found(name, version, [rest for kind, _, rest in lines if kind == "STAND-IN"], cases,
                 "" if cases else "it has run no case")  # fmt: skip


def share(case: dict[str, Any], dtype: str) -> str:
    """The error of the tensor nearest to its limit, as a part of the limit."""
    found = case["agreements"].get(dtype)
    if found is None:
        return "-"
    return f"{found['ours'] / found['limit']:.2f}" if found["limit"] else "0.00"


def row(user: str, case: dict[str, Any]) -> list[str]:
    if case["problems"]:
        return [user, case["case"], "FAILED: " + case["problems"][0].strip().splitlines()[-1], *[""] * 7]
    served = ", ".join(f"{operator} {calls}" for operator, _, calls in case["served"]) or "none"
    left = ", ".join(f"{operator} {calls} ({why})" for operator, why, calls in case["left"]) or "none"
    times = [milliseconds(case[side] / 1e3) for side in ("off_ms", "on_ms")]
    grads = str(case["gradients"] or "-")
    return [user, case["case"], served, left, grads, share(case, "float32"), share(case, "float64"), *times,
            f"{case['speedup']:.2f}"]  # fmt: skip


def markdown(rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A table whose last columns, `numbers` of them, are aligned to the right."""
    head, *body = rows
    rule = ["---"] * (len(head) - numbers) + ["--:"] * numbers
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


def report(found: Sequence[Found]) -> str:
    rows = [list(HEAD)]
    notes = []
    for one in found:
        title = f"{one.user} {one.version}".strip()
        if one.problem:
            rows.append([title, "", f"FAILED: {one.problem}", *[""] * 7])
        rows += [row(title if i == 0 else "", case) for i, case in enumerate(one.cases)]
        notes += [f"{one.user} has a stand-in for {text}" for text in one.stand_ins]
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    parts = [f"{headline(describe(), versions())}; one thread ({today}).", markdown(rows, 6)]
    if notes:
        parts.append("\n".join(f"- {note}." for note in notes))
    cases = [case for one in found for case in one.cases]
    failed = sum(bool(case["problems"]) for case in cases) + sum(bool(one.problem) for one in found)
    parts.append(f"{len(cases)} cases of {len(found)} users, {failed} failed.")
    return "\n\n".join(parts)


def rewrite(text: str, block: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def is_wrong(found: Sequence[Found]) -> bool:
    return any(one.problem or any(case["problems"] for case in one.cases) for one in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("users", nargs="*", metavar="USER", help=f"of {', '.join(USERS)}; all by default")
    parser.add_argument("--fresh", action="store_true", help="install the packages again")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    if unknown := [name for name in options.users if name not in USERS]:
        parser.error(f"no such user: {', '.join(unknown)}")
    found = []
    for name in options.users or USERS:
        begin = time.monotonic()
        one = examine(name, USERS[name], options.fresh)
        found.append(one)
        bad = [case for case in one.cases if case["problems"]]
        verdict = one.problem or f"{len(one.cases) - len(bad)} of {len(one.cases)} cases agree"
        print(f"{name} {one.version}: {verdict}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        for case in bad:
            print(f"{name}, {case['case']}:\n" + "\n".join(case["problems"]), file=sys.stderr, flush=True)
    block = report(found)
    print(block)
    if options.write:
        options.write.write_text(rewrite(options.write.read_text(), block))
    return int(is_wrong(found))


if __name__ == "__main__":
    sys.exit(main())
