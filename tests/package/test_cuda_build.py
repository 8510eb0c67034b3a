"""Tests on simulated machines when the build compiles the CUDA kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dlkernels
from dlkernels._core import extension
from dlkernels.info import format_info

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc" / "setup"))

import find_torch
import native

CUDA = native.Cuda("nvcc", Path("/cuda/lib64"), ["90a"], "13.0")


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLKERNELS_CUDA", "DLKERNELS_CUDA_ARCHS", "DLKERNELS_CUDA_MISMATCH", "NVCC"):
        monkeypatch.delenv(name, raising=False)


def machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvcc: bool, torch_with_cuda: bool, gpus: list[str],
    torch_cuda: str = "13.2",
) -> None:  # fmt: skip
    (tmp_path / "lib").mkdir()
    if torch_with_cuda:
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(native, "find_cuda", lambda: CUDA if nvcc else None)
    found = find_torch.Torch(tmp_path, "2.11.0", torch_cuda if torch_with_cuda else None)
    monkeypatch.setattr(native, "find_torch", lambda: found)
    monkeypatch.setattr(native, "gpus_here", lambda: gpus)


def tool_that_says(folder: Path, name: str, script: str) -> Path:
    tool = folder / name
    tool.write_text("#!/bin/sh\n" + script)
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    ("nvcc", "torch_with_cuda", "gpus", "why"),
    [
        (True, True, ["90a"], ""),
        (False, True, ["90a"], "it was built without nvcc"),
        (True, False, ["90a"], "it was built for torch 2.11.0, which is without CUDA"),
        (True, True, [], "it was built where there is no GPU"),
    ],
)
def test_only_who_can_use_them_pays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvcc: bool, torch_with_cuda: bool, gpus: list[str], why: str
) -> None:
    machine(monkeypatch, tmp_path, nvcc, torch_with_cuda, gpus)
    assert native.cuda_to_build() == ((None if why else CUDA), why)


@pytest.mark.parametrize("wish", ["DLKERNELS_CUDA", "DLKERNELS_CUDA_ARCHS"])
def test_who_asks_gets_them_or_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wish: str) -> None:
    monkeypatch.setenv(wish, "1" if wish == "DLKERNELS_CUDA" else "80")
    machine(monkeypatch, tmp_path, True, False, [])
    assert native.cuda_to_build() == (CUDA, "")
    monkeypatch.setattr(native, "find_cuda", lambda: None)
    with pytest.raises(SystemExit, match="no nvcc"):
        native.cuda_to_build()


def test_who_declines_is_obeyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, True, True, ["90a"])
    monkeypatch.setenv("DLKERNELS_CUDA", "0")
    assert native.cuda_to_build() == (None, "DLKERNELS_CUDA is 0")
    monkeypatch.setenv("DLKERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="is 0 or 1"):
        native.cuda_to_build()


@pytest.mark.parametrize(
    ("said", "archs"), [("9.0\n", ["90a"]), ("8.6\n9.0\n8.6\n", ["86", "90a"]), ("10.0\n", ["100a"]), ("[N/A]\n", [])]
)
def test_the_gpus_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, archs: list[str]) -> None:
    tool_that_says(tmp_path, "nvidia-smi", "cat <<'END'\n" + said + "END\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert native.gpus_here() == archs


def test_the_release_of_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    said = "Cuda compilation tools, release 12.9, V12.9.86"
    script = f"""[ "$1" = --version ] && echo '{said}' || echo '#$ TOP={tmp_path}' >&2\n"""
    monkeypatch.setenv("NVCC", str(tool_that_says(tmp_path, "nvcc", script)))
    found = native.find_cuda()
    assert found is not None and (found.release, found.lib) == ("12.9", tmp_path / "lib64")
    tool_that_says(tmp_path, "nvcc", f"echo '#$ TOP={tmp_path}' >&2\n")
    with pytest.raises(SystemExit, match="does not name a release"):
        native.find_cuda()


def test_the_cuda_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "site" / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for cuda in ("12.8", None):
        (folder / "version.py").write_text(f"__version__ = '2.11.0'\ncuda = {cuda!r}\n")
        monkeypatch.setenv("PYTHONPATH", str(folder.parent))
        assert find_torch._probe(()) == find_torch.Torch(folder, "2.11.0", cuda)


@pytest.mark.parametrize("torch_cuda", ["12.8", "14.0"])
@pytest.mark.parametrize("wish", ["", "DLKERNELS_CUDA", "DLKERNELS_CUDA_ARCHS"])
def test_another_major_release_than_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wish: str, torch_cuda: str
) -> None:
    machine(monkeypatch, tmp_path, True, True, ["90a"], torch_cuda)
    said = f"nvcc is of CUDA 13.0 and torch 2.11.0 of CUDA {torch_cuda}"
    if wish:
        monkeypatch.setenv(wish, "1" if wish == "DLKERNELS_CUDA" else "80")
        with pytest.raises(SystemExit, match=f"{said}.*DLKERNELS_CUDA_MISMATCH=1"):
            native.cuda_to_build()
    else:
        cuda, why = native.cuda_to_build()
        assert cuda is None and why.startswith(said) and "580 or later" in why
    monkeypatch.setenv("DLKERNELS_CUDA_MISMATCH", "1")
    assert native.cuda_to_build() == (CUDA, "")


@pytest.mark.parametrize(
    ("release", "torch_cuda", "warned"),
    [
        ("13.0", "12.8", True),
        ("12.9", "13.2", True),
        ("13.0", "13.2", False),
        ("13.0", None, False),
        ("", "12.8", False),
    ],
)
def test_info_of_a_module_for_another_cuda(
    monkeypatch: pytest.MonkeyPatch, release: str, torch_cuda: str | None, warned: bool
) -> None:
    """torch may have been exchanged since the module was built: the same module serves every torch."""
    compiled = extension.native
    if compiled is None:
        pytest.skip("needs the compiled module")

    class Built:
        def __getattr__(self, name: str) -> Any:
            return getattr(compiled, name)

        def build_info(self) -> dict[str, Any]:
            return {**compiled.build_info(), "cuda_release": release}

    monkeypatch.setattr(extension, "native", Built())
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    text = format_info(dlkernels.info())
    assert (f"compiled by nvcc {release} and may need a newer GPU driver" in text) == warned
