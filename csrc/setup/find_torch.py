"""Finds the torch that dlkernels will run with, from inside a build that may be isolated from it.

pip isolates a build by pointing PYTHONPATH at an environment for the build, but it runs the interpreter of the
environment that it installs into. That interpreter, started again without PYTHONPATH, sees the torch that dlkernels
will run with. The same holds for editable installs and for a virtual environment on top of one that has torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 11)  # the LibTorch stable ABI that the module is compiled against
REQUIREMENT = "torch>=2.11"

# The probe does not import torch, because that takes seconds.
_PROBE = """
import importlib.util, json, os, runpy, sys
sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd())]
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    folder = os.path.dirname(spec.origin)
    said = runpy.run_path(os.path.join(folder, "version.py"))
    print(json.dumps([folder, said["__version__"], said.get("cuda")]))
"""


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # the release of CUDA that it was built with, if any

    @property
    def include(self) -> list[Path]:
        return [self.folder / "include", self.folder / "include" / "torch" / "csrc" / "api" / "include"]

    @property
    def lib(self) -> Path:
        return self.folder / "lib"


def _probe(dropped: tuple[str, ...]) -> Torch | None:
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    run = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"looking for torch with {sys.executable} failed:\n{run.stderr}")
    if not run.stdout.strip():
        return None
    folder, version, cuda = json.loads(run.stdout)
    major, minor = (int(part) for part in version.split(".")[:2])
    return Torch(Path(folder), version, cuda) if (major, minor) >= MINIMUM else None


def find_torch() -> Torch | None:
    """The torch of the target environment, or if it has none that of the build's environment, or None."""
    return _probe(("PYTHONPATH", "PYTHONNOUSERSITE")) or _probe(())


def torch_requirement() -> list[str]:
    """The requirement on torch of an isolated build that compiles; empty if the target environment has a torch."""
    return [] if _probe(("PYTHONPATH", "PYTHONNOUSERSITE")) else [REQUIREMENT]
