"""Loads the compiled module `_C` once, or records why there is none.

`native` is the module or None, `HAVE_NATIVE` tells whether it was loaded. If it was not, `why_not` is the reason and
`remedy` says what to do about it.
`HAVE_CUDA_KERNELS` and `why_no_cuda` tell the same about its CUDA kernels. `announce_reference()` warns the user at the
first call that runs on the reference path for lack of a compiled module, `announce_torch()` at the first that torch
serves for lack of vector kernels, `announce_forward_mode()` at the first that computes forward-mode derivatives,
`announce_no_kernel()` at the first that has no kernel for another reason.

Environment variables: `DLKERNELS_NATIVE=FILE` loads another build of `_C`, `DLKERNELS_NO_NATIVE=1` loads none, and
`DLKERNELS_REQUIRE_NATIVE=1` turns its absence into an ImportError.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

from dlkernels._core.private_torch import operator_names

_MODULE = "dlkernels._C"
_PACKAGE = Path(__file__).resolve().parents[1]
_NAMESPACE = "dlkernels"
_REINSTALL = "reinstall dlkernels where there is a C++ compiler (g++ or clang++)"
# The loaded file's name is stored as this attribute of torch.ops.dlkernels, which stays when the package is removed
# from sys.modules. A second copy of the package reads it to name the first in its error.
_FILE_ATTRIBUTE = "native_file"


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def _file_in(folder: Path) -> Path | None:
    files = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _locate() -> tuple[Path | None, str, str]:
    """The file to load, or None, the reason and what to do about it."""
    if flag("DLKERNELS_NO_NATIVE"):
        return None, "DLKERNELS_NO_NATIVE is set", "unset DLKERNELS_NO_NATIVE"
    override = os.environ.get("DLKERNELS_NATIVE")
    if override:
        file = Path(override).resolve()
        if not file.is_file():
            raise ImportError(f"DLKERNELS_NATIVE={override}: there is no such file")
        return file, "", ""
    found = _file_in(_PACKAGE)
    if found is not None:
        return found, "", ""
    # In a checkout Python imports the sources that lie there, also where the package has been installed.
    is_checkout = (_PACKAGE.parent / "csrc").is_dir()
    places = (Path(entry or ".").resolve() / _PACKAGE.name for entry in sys.path)
    installed = next((place for place in places if is_checkout and place != _PACKAGE and _file_in(place)), None)
    if installed is not None:
        reason = f"{_PACKAGE} is a checkout that was not compiled, and hides the installed {installed}"
        return None, reason, f"start Python in another directory than {_PACKAGE.parent}"
    others = ", ".join(sorted(file.name for file in _PACKAGE.glob("_C.*.so")))
    if others:
        reason = f"{_PACKAGE} holds only {others}, built for another Python than {sys.version.split()[0]}"
        return None, reason, "reinstall dlkernels with this Python"
    if is_checkout:
        return None, f"{_PACKAGE} is a checkout that was not compiled", f"`pip install -e .` in {_PACKAGE.parent}"
    return None, f"{_PACKAGE} holds no compiled module: dlkernels was installed without a C++ compiler", _REINSTALL


def _registered() -> bool:
    prefix = f"{_NAMESPACE}::"
    return any(name.startswith(prefix) for name in operator_names())


def _refuse_second_copy(file: Path | None) -> None:
    """Two copies of the library in one process register the same operators twice, which ends in a segfault."""
    if not _registered():
        return
    first = getattr(torch.ops.dlkernels, _FILE_ATTRIBUTE, None)
    if first is not None and file is not None and os.path.samefile(first, file):
        if "native" in globals():  # importlib.reload
            return
        raise ImportError(
            "dlkernels was imported before in this process and then removed from sys.modules, but its operators can be "
            "registered only once: restart Python (in a notebook, the kernel)"
        )
    raise ImportError(
        f"two copies of dlkernels in one process: its operators are already registered by "
        f"{first or 'a library loaded earlier, of unknown path'}, and this import would use "
        f"{file or _PACKAGE}; keep one of them"
    )


def _load() -> tuple[ModuleType | None, str, str]:
    file, reason, remedy = _locate()
    _refuse_second_copy(file)
    if file is None:
        if flag("DLKERNELS_REQUIRE_NATIVE"):
            raise ImportError(
                f"DLKERNELS_REQUIRE_NATIVE is set and dlkernels has no compiled module: {reason}. To mend it: {remedy}"
            )
        return None, reason, remedy
    loader = importlib.machinery.ExtensionFileLoader(_MODULE, str(file))
    spec = importlib.util.spec_from_file_location(_MODULE, str(file), loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise ImportError(
            f"{file} does not load under torch {torch.__version__}: {error}. It needs torch >= 2.11 and the Python "
            f"that built it; reinstall dlkernels in this environment, or set DLKERNELS_NO_NATIVE=1 to do without",
            path=str(file),
        ) from error
    sys.modules[_MODULE] = module
    setattr(torch.ops.dlkernels, _FILE_ATTRIBUTE, str(file))
    if os.environ.get("DLKERNELS_CPU_ISA"):
        module.isa()  # raises ValueError if the variable names no instruction set
    return module, "", ""


def _runs_as_command() -> bool:
    """Whether Python imports the package in order to run `python -m dlkernels` or a module in it. During that import
    sys.argv[0] is "-m", because Python does not know the program's file yet."""
    if sys.argv[:1] != ["-m"]:
        return False
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.partition(".")[0] == "dlkernels"


def _load_or_exit() -> tuple[ModuleType | None, str, str]:
    try:
        return _load()
    except (ImportError, ValueError) as error:
        if not _runs_as_command():
            raise
        print(f"dlkernels: {error}", file=sys.stderr)
        raise SystemExit(2) from None


native, why_not, remedy = _load_or_exit()
HAVE_NATIVE: bool = native is not None
HAVE_CUDA_KERNELS: bool = native is not None and bool(native.build_info()["with_cuda"])
why_no_cuda: str = str(native.build_info()["why_no_cuda"]) if native is not None else why_not
_announced = False
_forward_mode_announced = False
_reasons_announced: set[str] = set()


# Whether calls on the CPU that torch's operators can serve are left to them: only scalar kernels exist for this
# processor, and neither DLKERNELS_CPU_ISA nor `choose_isa` asked for those. A variable, because every call reads it;
# `routing.is_for_torch` decides about a call.
prefers_torch: bool = native is not None and native.prefers_torch()


def choose_isa(name: str | None) -> None:
    """Makes the kernels use an instruction set; None: the best that this machine and DLKERNELS_CPU_ISA allow."""
    global prefers_torch
    assert native is not None
    native.set_isa(name)
    prefers_torch = native.prefers_torch()


def plan_constant(name: str) -> int:
    """A number of csrc/core/plan_constants.def, for the instruction set in force; 0 without the compiled module."""
    return 0 if native is None else int(native.plan_constants()[name])


def announce_reference() -> None:
    """Warns, once per process, that calls run on plain PyTorch because there is no compiled module."""
    if not HAVE_NATIVE:
        _announce(f"dlkernels runs on its PyTorch reference path, which is slow: {why_not}. To mend it: {remedy}.")


def announce_forward_mode() -> None:
    """Warns, once per process, that forward-mode derivatives are computed on plain PyTorch."""
    global _forward_mode_announced
    if not _forward_mode_announced:
        _forward_mode_announced = True
        warnings.warn(
            "dlkernels computes forward-mode derivatives (jvp, jacfwd) on its PyTorch reference path, which is slow: "
            "its kernels have no formula for them.", RuntimeWarning, stacklevel=4,
        )  # fmt: skip


def announce_no_kernel(reason: str) -> None:
    """Warns, once per process and reason, that calls for which there is no kernel run on plain PyTorch."""
    if reason not in _reasons_announced:
        _reasons_announced.add(reason)
        warnings.warn(
            f"dlkernels runs a call on its PyTorch reference path, which is slow: {reason}.", RuntimeWarning,
            stacklevel=4,
        )  # fmt: skip


def announce_torch() -> None:
    """Warns, once per process, that calls run on torch's operators because there are only scalar kernels."""
    _announce(
        "dlkernels leaves layers and attention to torch's operators: only scalar kernels exist for this processor, and "
        "they are slower. DLKERNELS_CPU_ISA=scalar runs them nevertheless."
    )


def _announce(text: str) -> None:
    global _announced
    if not _announced:
        _announced = True
        warnings.warn(text, RuntimeWarning, stacklevel=4)
