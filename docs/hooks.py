"""Show the record of `results/` on the site: its pictures, and the page of models trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("results/from_scratch/README.md",)


def on_files(files: Files, config: Any) -> Files:
    """Add pictures and pages of `results/`, which lies beside the pages' folder."""
    pictures = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "results").rglob("*.png"))]
    for name in [*pictures, *PAGES]:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pages name these pictures as a reader of the repository finds them: `../results/...`."""
    return markdown.replace("](../results/", "](results/")
