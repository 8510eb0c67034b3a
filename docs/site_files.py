"""Tells MkDocs which files of the tree make the site (.mkdocs.yml): each has the same place in the site as in the tree,
so that relative links between them, and from pages to pictures, hold in both."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = (
    "*.md", "LICENSE", "docs/*.md", "docs/*.css", "docs/examples/*.png", "examples/*.py", "benchmarks/results/*.md",
    "benchmarks/results/*/*.png",
)  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Keeps what the theme brings and replaces the contents of docs/."""
    ours = [file for file in files if file.abs_src_path and Path(file.abs_src_path).is_relative_to(ROOT / "docs")]
    for file in ours:
        files.remove(file)
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files
