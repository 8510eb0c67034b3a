"""Runs the Python blocks of README and docs/. Blocks may use the names in NAMES; the blocks of a page run in order and
share their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.fresh_python import ROOT, run_python

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.o0_skip(reason="the examples of the documentation, not the kernels"),
]

NAMES = """
import torch
from torch import nn
import dlkernels

class Result(tuple):
    loss = property(lambda self: self[0])

class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8)
    def forward(self, batch):
        return Result((self.lstm(batch)[0].square().mean(),))

q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
packed_q, packed_k, packed_v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
cu, sinks = torch.tensor([0, 4, 9], dtype=torch.int32), torch.randn(4)
src, padding, batch = torch.randn(2, 5, 512), torch.zeros(2, 5, dtype=torch.bool), torch.randn(4, 3, 8)
model = {model}
"""
MODELS = {"attention.md": "Trained()", "tools.md": "Trained()"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_examples_run(page: Path) -> None:
    names = NAMES.format(model=MODELS.get(page.name, "None"))
    run_python("\n".join([names, *blocks(page)]), OMP_NUM_THREADS="2")


def test_the_site_lists_every_page() -> None:
    """`make docs` reports the same, but needs MkDocs."""
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / ".mkdocs.yml").read_text(), re.MULTILINE)
    pages = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")}
    assert sorted(listed) == sorted(str(page.relative_to(ROOT)) for page in pages)


# What only one of GitHub and the site renders as it is meant.
ONLY_IN_THE_SITE = re.compile(r"^(?:!!!|\?\?\?|===) |\{: ?[.#]|^--8<--", re.MULTILINE)
ONLY_ON_GITHUB = re.compile(r"^[^-#|>\s`<\d].*\n(?:- |1\. )|\\\|", re.MULTILINE)


def test_pages_are_plain_markdown() -> None:
    """The site begins a list only after an empty line, and prints the backslash of an escaped bar in code."""
    assert ONLY_IN_THE_SITE.search("text\n!!! note\n") and ONLY_IN_THE_SITE.search("# Title {: #name}")
    assert ONLY_ON_GITHUB.search("text:\n- item\n") and ONLY_ON_GITHUB.search("| `a\\|b` |")
    assert not ONLY_ON_GITHUB.search("text:\n\n- item\n- item\n  and more\n- item\n")
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for pattern in (ONLY_IN_THE_SITE, ONLY_ON_GITHUB):
            found = pattern.search(text)
            assert found is None, f"{page.name}: {found[0]}"


def test_links_between_pages() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
