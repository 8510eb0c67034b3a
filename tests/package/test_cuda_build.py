"""Tests on simulated machines when the build compiles the CUDA kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc" / "setup"))

import find_torch
import native

CUDA = native.Cuda("nvcc", Path("/cuda/lib64"), ["90a"])


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLKERNELS_CUDA", "DLKERNELS_CUDA_ARCHS", "NVCC"):
        monkeypatch.delenv(name, raising=False)


def machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvcc: bool, torch_with_cuda: bool, gpus: list[str]
) -> None:  # fmt: skip
    (tmp_path / "lib").mkdir()
    if torch_with_cuda:
        (tmp_path / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(native, "find_cuda", lambda: CUDA if nvcc else None)
    monkeypatch.setattr(native, "find_torch", lambda: find_torch.Torch(tmp_path, "2.11.0"))
    monkeypatch.setattr(native, "gpus_here", lambda: gpus)


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
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncat <<'END'\n" + said + "END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert native.gpus_here() == archs
