"""What a wheel or an sdist says about itself, and what is wrong with that."""

from __future__ import annotations

import email
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

from tests.support.fresh_python import ROOT

EXTRAS = {"bench", "dev", "docs", "examples", "peers", "test", "transformers"}


def names(archive: Path) -> set[str]:
    """The files of a wheel or of an sdist, of the latter without the folder that holds them all."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar if member.isfile()}


def metadata(archive: Path) -> Message:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(wheel.read(name))
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert file is not None
        return email.message_from_bytes(file.read())


def check_metadata(archive: Path) -> None:
    """Compares the metadata of a wheel or sdist of this tree with what they have to be."""
    version: dict[str, str] = {}
    exec((ROOT / "dlkernels" / "_version.py").read_text(), version)
    said = metadata(archive)
    found = {field: said[field] for field in ("Name", "Version", "Requires-Python", "License-Expression")}
    assert found == {
        "Name": "dlkernels",
        "Version": version["__version__"],
        "Requires-Python": ">=3.10",
        "License-Expression": "MIT",
    }
    assert said.get_all("License-File") == ["LICENSE"]
    assert set(said.get_all("Provides-Extra") or ()) == EXTRAS
    always = [line for line in said.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert always == ["torch>=2.11"]
    assert said["Description-Content-Type"] == "text/markdown"
    description = said.get_payload(decode=True)
    assert isinstance(description, bytes)
    assert description.decode().strip() == (ROOT / "README.md").read_text().strip()


def check_tag(wheel: Path) -> None:
    """A compiled wheel is for one release of CPython, because the module uses pybind11."""
    python, abi, platform = wheel.name.removesuffix(".whl").split("-")[-3:]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert (python, abi) == (tag, tag) and platform.startswith("linux_"), wheel.name
