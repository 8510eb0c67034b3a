"""Tests installation as far as possible in seconds and without a network; tests/install tests the rest."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import dlkernels
from dlkernels._core import extension
from tests.support.distributions import check_metadata, check_tag, names

pytestmark = pytest.mark.o0_skip(reason="packaging does not depend on the optimiser")

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "csrc" / "setup"
PACKAGE = Path(dlkernels.__file__).parent
FOUND = "import find_torch as f; t = f.find_torch(); print(t and t.folder); print(f.torch_requirement())"

has_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def python(
    *arguments: str | Path, cwd: Path | str = "/", unset: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DLKERNELS_")}
    inherited["PYTHONPATH"] = str(PACKAGE.parent)
    variables = {name: value for name, value in {**inherited, **environment}.items() if name not in unset}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def fake_torch(folder: Path, version: str) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('the finder imported torch')\n")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")
    return folder


@has_source
def test_finder_sees_the_torch_of_the_environment() -> None:
    run = python("-c", FOUND, cwd=SETUP, unset=("PYTHONPATH",))
    assert run.stdout.splitlines() == [str(Path(torch.__file__).parent), "[]"], run.stderr


@has_source
@pytest.mark.parametrize(("assembler", "flags"), [("true", "[]"), ("! grep -q tilerelease", "['-DDLK_OLD_ASSEMBLER']")])
def test_an_old_assembler_is_spared(tmp_path: Path, assembler: str, flags: str) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n{assembler}\n")
    compiler.chmod(0o755)
    run = python("-c", f"import native; print(native.assembler_flags(['{compiler}'], native.ROOT))", cwd=SETUP)
    assert run.stdout.split("\n")[0] == flags, run.stderr


@has_source
def test_finder_is_not_led_astray_by_the_build_environment(tmp_path: Path) -> None:
    overlay = fake_torch(tmp_path, "9.9.0")
    run = python("-c", FOUND, cwd=SETUP, PYTHONPATH=str(overlay), PYTHONNOUSERSITE="1")
    assert run.stdout.splitlines() == [str(Path(torch.__file__).parent), "[]"], run.stderr


@has_source
@pytest.mark.parametrize(("version", "usable"), [("2.11.0+cu130", True), ("3.0.0a0+git1", True), ("2.10.1", False)])
def test_finder_without_a_torch_in_the_environment(tmp_path: Path, version: str, usable: bool) -> None:
    # -m venv --without-pip makes an environment without torch in a tenth of a second.
    empty = tmp_path / "empty"
    assert python("-m", "venv", "--without-pip", empty).returncode == 0
    overlay = fake_torch(tmp_path / "overlay", version)
    environment = {**os.environ, "PYTHONPATH": f"{SETUP}{os.pathsep}{overlay}"}
    command = [str(empty / "bin" / "python"), "-c", FOUND]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines() == [str(overlay / "torch") if usable else "None", "['torch>=2.11']"], run.stderr


@has_source
def test_backend_asks_for_build_tools_only_where_it_compiles(tmp_path: Path) -> None:
    hooks = "import backend; print(backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable())"
    tree = source_tree(tmp_path)
    compiling = python("-c", hooks, cwd=tree, PYTHONPATH=str(SETUP), CXX=sys.executable)
    assert "'ninja', 'pybind11" in compiling.stdout and "torch" not in compiling.stdout, compiling.stderr
    plain = python("-c", hooks, cwd=tree, PYTHONPATH=str(SETUP), CXX="no-such-compiler")
    assert "ninja" not in plain.stdout and plain.returncode == 0, plain.stderr


def source_tree(folder: Path) -> Path:
    """Copies the project to another folder, without the C++ sources."""
    tree = folder / "tree"
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.cuh", "*.h", "results")
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=leave_out)
    for name in ("dlkernels", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def build_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = "import backend; print('wheel', backend.build_wheel('dist'))"
    return python("-c", script, cwd=tree, PYTHONPATH=str(tree / "csrc" / "setup"), **environment)


@has_source
def test_install_without_a_compiler_works_and_says_so_once(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    built = build_wheel(tree, CXX="no-such-compiler")
    assert built.returncode == 0, built.stderr
    assert "installing without the compiled module: there is no C++ compiler" in built.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    assert not [name for name in names(wheel) if name.endswith((".so", ".cpp"))]
    assert {"dlkernels/py.typed", "dlkernels/bench/cli.py"} <= set(names(wheel))
    check_metadata(wheel)
    use = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dlkernels
    torch.manual_seed(0)
    layer, x = dlkernels.nn.LSTM(4, 5), torch.randn(3, 2, 4)
    for _ in range(2):
        y, (h, c) = layer(x)
        y.sum().backward()
    dlkernels.nn.GRU(4, 5)(x)
plain = torch.nn.LSTM(4, 5)
plain.load_state_dict(layer.state_dict())
torch.testing.assert_close(y, plain(x)[0])
print(dlkernels.__file__)
print([str(w.message) for w in caught if "dlkernels" in str(w.message)])
"""
    used = python("-c", use, PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    file, messages = used.stdout.splitlines()
    assert file.startswith(str(target))
    assert messages.count("reference path") == 1 and "without a C++ compiler" in messages, messages


@has_source
def test_a_compile_error_fails_the_install(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    (tree / "csrc" / "broken.cpp").write_text("int broken( { return 1; }\n")
    built = build_wheel(tree)
    assert built.returncode != 0 and not list((tree / "dist").glob("*.whl"))
    assert "broken.cpp" in built.stdout and "the native module does not compile" in built.stderr


@has_source
def test_what_was_compiled_is_in_the_wheel(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    (tree / "csrc" / "stub.cpp").write_text('extern "C" int stub() { return 1; }\n')
    built = build_wheel(tree, DLKERNELS_OPT="0")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    found = names(wheel)
    assert [name for name in found if name.startswith("dlkernels/_C.") and name.endswith(".so")]
    assert not [name for name in found if name.startswith(("csrc", "tests", "benchmarks"))]
    check_tag(wheel)


@has_source
def test_opt_level_is_checked(tmp_path: Path) -> None:
    built = build_wheel(source_tree(tmp_path), DLKERNELS_OPT="fast")
    assert built.returncode != 0 and "0 to 3, not 'fast'" in built.stderr


@has_source
def test_sdist_is_the_whole_tree(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("only git knows which files belong to the tree, and this is no checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    tree = tmp_path / "tree"
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    script = "import backend; print(backend.build_sdist('dist'))"
    built = python("-c", script, cwd=tree, PYTHONPATH=str(tree / "csrc" / "setup"), CXX="no-such-compiler")
    assert built.returncode == 0, built.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    check_metadata(sdist)
    made = {name for name in names(sdist) if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names(sdist) - made == files - {".ci/run", ".gitignore"}


def test_import_is_quick_and_brings_no_triton() -> None:
    # The script records attempts to import Triton, because a failed import may be silent where Triton is not installed.
    script = """
import sys, time
begin = time.process_time()
import torch
of_torch = time.process_time() - begin
asked_for = []
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        asked_for.append(name)
sys.meta_path.insert(0, Finder)
begin = time.process_time()
import dlkernels
print((time.process_time() - begin) / of_torch)
print([name for name in asked_for if name.partition(".")[0] == "triton"])
"""
    ratios = []
    for _ in range(3):
        run = python("-c", script)
        assert run.returncode == 0, run.stderr
        ratio, triton = run.stdout.splitlines()
        assert triton == "[]"
        ratios.append(float(ratio))
    assert min(ratios) < 0.3, ratios  # to the time that importing torch takes, which a busy machine lengthens alike


def test_a_torch_without_onednn() -> None:
    """Such a torch lacks the operators that report what oneDNN supports."""
    script = """
import torch
torch._C._has_mkldnn = False
torch.ops.mkldnn = None
import dlkernels
with torch.autocast("cpu", torch.bfloat16):
    y, (h, c) = dlkernels.nn.LSTM(3, 4)(torch.zeros(2, 1, 3))
assert y.dtype == c.dtype == torch.float32
"""
    run = python("-c", script)
    assert run.returncode == 0, run.stderr


def test_a_second_copy_is_refused_by_name(tmp_path: Path) -> None:
    first = extension.native.__file__
    shutil.copytree(PACKAGE, tmp_path / "dlkernels", ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    second = tmp_path / "dlkernels" / f"_C{EXTENSION_SUFFIXES[0]}"
    shutil.copy(first, second)
    script = """
import os, sys
import dlkernels
for name in [name for name in sys.modules if name.partition(".")[0] == "dlkernels"]:
    del sys.modules[name]
del os.environ["DLKERNELS_NATIVE"]
sys.path.insert(0, sys.argv[1])
import dlkernels
"""
    run = python("-c", script, tmp_path, DLKERNELS_NATIVE=first)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and last.startswith("ImportError: two copies"), run.stderr
    assert first in last and str(second) in last


def test_a_second_import_of_the_same_copy_says_what_to_do() -> None:
    script = """
import importlib, sys
import dlkernels
from dlkernels._core import extension
importlib.reload(extension)
importlib.reload(dlkernels)
for name in [name for name in sys.modules if name.partition(".")[0] == "dlkernels"]:
    del sys.modules[name]
import dlkernels
"""
    run = python("-c", script, DLKERNELS_NATIVE=extension.native.__file__)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and last.startswith("ImportError: dlkernels was imported before"), run.stderr
    assert "restart Python" in last


def test_a_checkout_that_was_not_compiled(tmp_path: Path) -> None:
    """After `pip install .` Python imports the checkout as long as it is started there."""
    checkout, installed = tmp_path / "checkout", tmp_path / "installed"
    shutil.copytree(PACKAGE, checkout / "dlkernels", ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    (checkout / "csrc").mkdir()
    (installed / "dlkernels").mkdir(parents=True)
    shutil.copy(extension.native.__file__, installed / "dlkernels" / f"_C{EXTENSION_SUFFIXES[0]}")
    show = "from dlkernels._core import extension as e; print(e.why_not); print(e.remedy)"
    alone = python("-c", show, PYTHONPATH=str(checkout))
    assert alone.stdout.splitlines() == [
        f"{checkout / 'dlkernels'} is a checkout that was not compiled", f"`pip install -e .` in {checkout}",
    ], alone.stderr  # fmt: skip
    both = python("-c", show, cwd=checkout, PYTHONPATH=str(installed))
    reason, remedy = both.stdout.splitlines()
    assert reason.endswith(f"hides the installed {installed / 'dlkernels'}"), both.stderr
    assert remedy == f"start Python in another directory than {checkout}"
    said = python("-m", "dlkernels", "doctor", cwd=checkout, PYTHONPATH=str(installed))
    assert said.returncode == 1 and f"{reason}\n   -> {remedy}" in said.stdout, said.stderr


def test_a_module_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    run = python("-c", "import dlkernels", DLKERNELS_NATIVE=str(broken))
    assert run.returncode != 0
    assert f"ImportError: {broken} does not load under torch {torch.__version__}" in run.stderr


def test_absence_is_an_error_where_the_module_is_required(tmp_path: Path) -> None:
    run = python("-c", "import dlkernels", DLKERNELS_NO_NATIVE="1", DLKERNELS_REQUIRE_NATIVE="1")
    assert "ImportError: DLKERNELS_REQUIRE_NATIVE is set" in run.stderr and run.returncode != 0
    run = python("-c", "import dlkernels", DLKERNELS_NATIVE=str(tmp_path / "nothing.so"))
    assert "there is no such file" in run.stderr and run.returncode != 0


def test_module_needs_no_more_than_the_stable_abi() -> None:
    """The module needs neither C++ symbols of libtorch nor libc10, only the C shims of libtorch."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    file = extension.native.__file__
    needed = subprocess.run([readelf, "-d", file], capture_output=True, text=True, check=True).stdout
    assert "libtorch.so" in needed and "libc10" not in needed and "libtorch_python" not in needed
    symbols = subprocess.run([readelf, "--dyn-syms", "-W", file], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1] for line in symbols.splitlines() if " UND " in line]
    assert not [
        name for name in undefined if name.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch"))
    ]


def _imports(folder: str) -> set[str]:
    """Returns the parts of the package that the modules of a folder import."""
    found = set()
    for file in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name and name.startswith("dlkernels.")}
    return found


def test_the_families_do_not_know_each_other() -> None:
    ground = {"_core", "_version"}
    assert _imports("_core") <= ground
    assert _imports("rnn") <= {*ground, "rnn"}
    assert _imports("attention") <= {*ground, "attention"}
    assert _imports("distributed") <= {*ground, "attention", "distributed"}
