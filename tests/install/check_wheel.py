"""Tests the wheel and the sdist that `make wheel sdist` write, as a user meets them.

    python -m tests.install.check_wheel torch==2.13.0

The sdist has every file that the build needs: pip compiles a wheel from it, with the same files as the wheel of the
checkout. That wheel is installed where there are torch and numpy but no compiler, and there the commands of the package
run, then the smoke test and, with the extra `test`, some files of the test suite. All of them see the installed package
and not the checkout. The metadata of wheel and sdist are compared with what they have to be, and twine renders the
description. This compiles everything once, and takes minutes and 2 GB under /tmp.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.install.environments import ROOT, SMOKE, check_that_no_torch_was_fetched, new_environment, run
from tests.support.distributions import check_metadata, check_tag, names

COMPILERS = ("c++", "cc", "clang", "clang++", "g++", "gcc", "nvcc")
COMMANDS = (("info",), ("doctor",), ("bench", "--quick"))
# Files that need neither a compiler nor the sources, and take seconds.
QUICK_SUITE = (
    "attention/test_mistakes.py",
    "attention/test_strides.py",
    "package/test_doctor.py",
    "rnn/test_functional.py",
    "rnn/test_kinds.py",
)


class WithoutCompiler:
    """Runs an environment's Python with nothing on PATH but what the environment has installed."""

    def __init__(self, python: Path) -> None:
        self.python = python
        found = [name for name in COMPILERS if shutil.which(name, path=str(python.parent))]
        if found:
            raise SystemExit(f"there are compilers in {python.parent}: {found}")

    def run(self, name: str, *arguments: str | Path, **environment: str) -> str:
        begin = time.monotonic()
        said = run(self.python, *arguments, unset=("CC", "CXX"), PATH=str(self.python.parent), **environment)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        return said


def built(folder: Path, spec: str) -> tuple[Path, Path]:
    """The wheel and the sdist of the checkout."""
    run("make", "-C", ROOT, "wheel", "sdist", f"DIST={folder}", f"VENV={sys.prefix}", f"TORCH_SPEC={spec}")
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def wheel_of_sdist(python: Path, sdist: Path, folder: Path) -> Path:
    """Builds in isolation, as `pip install` of an sdist does, against the torch of `python`."""
    begin = time.monotonic()
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist)
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name} from {sdist.name}: {time.monotonic() - begin:.0f} s", flush=True)
    return wheel


def check_contents(wheel: Path, from_sdist: Path) -> None:
    for found in (wheel, from_sdist):
        check_tag(found)
        modules = [name for name in names(found) if name.startswith("dlkernels/_C.") and name.endswith(".so")]
        if len(modules) != 1:
            raise SystemExit(f"{found} has the compiled modules {modules}")
        foreign = sorted(name for name in names(found) if not name.startswith(("dlkernels/", "dlkernels-")))
        if foreign:
            raise SystemExit(f"{found} has files outside of the package: {foreign}")
    if names(wheel) != names(from_sdist):
        raise SystemExit(f"only one of both wheels has {sorted(names(wheel) ^ names(from_sdist))}")


def copied_tests(folder: Path) -> Path:
    """The tests without the package, so that they can only import the installed one."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def main() -> int:
    spec = sys.argv[1] if len(sys.argv) > 1 else "torch==2.13.0"
    with tempfile.TemporaryDirectory(prefix="dlkernels-wheel-") as name:
        folder = Path(name)
        wheel, sdist = built(folder / "dist", spec)
        for archive in (wheel, sdist):
            check_metadata(archive)
        twine = new_environment(folder / "twine", "twine")
        print(run(twine, "-m", "twine", "check", "--strict", wheel, sdist), end="", flush=True)

        python = new_environment(folder / "env", spec, "numpy")
        from_sdist = wheel_of_sdist(python, sdist, folder / "from-sdist")
        check_contents(wheel, from_sdist)
        there = WithoutCompiler(python)
        check_that_no_torch_was_fetched("wheel", there.run("pip install", "-m", "pip", "install", "-v", from_sdist))
        place = there.run("import", "-W", "ignore", "-c", "import dlkernels; print(dlkernels.__file__)").strip()
        if not place.startswith(str(folder / "env")):
            raise SystemExit(f"the package is imported from {place}")
        native = {"DLKERNELS_REQUIRE_NATIVE": "1"}
        for command in COMMANDS:
            out = ("--out", folder / "results") if command[0] == "bench" else ()
            words = ("-W", "ignore", "-m", "dlkernels", *command, *out)
            print(there.run(" ".join(command), *words, **native), flush=True)
        print(there.run("smoke test", "-W", "ignore", SMOKE, **native), flush=True)

        there.run("extra test", "-m", "pip", "install", f"{from_sdist}[test]")
        tests = copied_tests(folder / "copy")
        files = [tests / "tests" / file for file in QUICK_SUITE]
        options = ("-q", "-p", "no:cacheprovider", "--rootdir", tests, "-c", tests / "pyproject.toml")
        print(there.run("tests", "-m", "pytest", *options, *files), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
