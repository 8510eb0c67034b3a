"""Tests wrong values of every argument. Ours raises torch.nn's type of exception if torch raises one. For arguments
that torch lacks, the message names the argument. No call crashes."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.support.fresh_python import ROOT, environment
from tests.support.layer_mistakes import GROUPS, mistakes_for

pytestmark = pytest.mark.o0_skip(reason="the checks are the same code at -O0")

Outcome = dict[str, Any]


@functools.cache
def outcomes(package: str) -> dict[tuple[str, str], Outcome]:
    """Returns the outcome of each wrong call with the classes of `package`. The calls run in a child process, because
    they may crash."""
    command = [sys.executable, "-m", "tests.support.layer_mistakes", package]
    env = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"group"')]
    found = {(line["group"], line["name"]): line for line in lines}
    assert list(found) == [(group, mistake.name) for group, mistake in mistakes_for(package)]
    return found


# torch.nn accepts these although its documentation forbids them; it computes some result or reads past a buffer. Ours
# may reject them with a clean error or compute what torch computes.
TORCH_IS_LENIENT = re.compile(
    r"sparse|meta"
    r"|hx c: torch\.|packed, hx c: size of dim|packed, hx (three|a stack)|hx three|hx a stack"
    r"|(weight|bias)_\w+ (rows \+ 1|columns \+ 1|rank [+-] 1|scalar|bfloat16)"
    r"|hidden_size=True"
)
CLEAN = {"TypeError", "ValueError", "RuntimeError", "IndexError", "AttributeError"}


def verdict(key: tuple[str, str], ours: Outcome, theirs: Outcome) -> str:
    """Returns an empty string if our outcome is acceptable, else the reason why not."""
    if "crash" in ours:
        return f"crashes with status {ours['crash']}"
    raised = ours.get("bases")
    if "bases" not in theirs:
        if "crash" not in theirs and not TORCH_IS_LENIENT.search(key[1]):
            return f"raises {raised[0]}: {ours['message']}, torch accepts it" if raised else ""
        if raised is None:
            return "is accepted, torch crashes" if "crash" in theirs else ""
        return "" if CLEAN & set(raised) else f"raises {raised[0]}: {ours['message']}"
    if raised is None:
        return f"is accepted, torch raises {theirs['bases'][0]}: {theirs['message']}"
    if theirs["bases"][0] not in raised:
        return f"raises {raised[0]} ({ours['message']}), torch {theirs['bases'][0]} ({theirs['message']})"
    return "" if ours["message"].strip() else "has no message"


@pytest.mark.parametrize("package", ["dlkernels.nn", "enabled"])
@pytest.mark.parametrize("group", GROUPS)
def test_as_torch(group: str, package: str) -> None:
    theirs, ours = outcomes("torch.nn"), outcomes(package)
    keys = [key for key in theirs if key[0] == group]
    assert len(keys) > 10
    # With `enable` a mistake goes to torch's own operator, which crashes on some.
    kept = {key for key in keys if package == "enabled" and "crash" in ours[key] and "crash" in theirs[key]}
    wrong = [f"{key[1]}: {text}" for key in keys if key not in kept and (text := verdict(key, ours[key], theirs[key]))]
    assert not wrong, f"{len(wrong)} of {len(keys)}\n" + "\n".join(wrong)


def own_groups() -> list[str]:
    return list(dict.fromkeys(group for group, _ in mistakes_for("own")))


@pytest.mark.parametrize("group", own_groups())
def test_what_torch_has_not(group: str) -> None:
    """A group is called "argument of function". Ours must raise a TypeError, ValueError or RuntimeError whose message
    names the argument. If the argument is "*", the message does not matter; if it is "!", the call may also succeed."""
    argument = group.split()[0]
    wrong = []
    for key, ours in outcomes("own").items():
        if key[0] != group:
            continue
        if argument == "!" and "crash" not in ours and "bases" not in ours:
            continue
        if "bases" not in ours:
            wrong.append(f"{key[1]}: {'crashes' if 'crash' in ours else 'is accepted'}")
        elif not {"TypeError", "ValueError", "RuntimeError"} & set(ours["bases"]):
            wrong.append(f"{key[1]}: raises {ours['bases'][0]}: {ours['message']}")
        elif argument not in ("*", "!") and argument not in ours["message"]:
            wrong.append(f"{key[1]}: the message does not name {argument}: {ours['message']}")
    assert not wrong, "\n".join(wrong)
