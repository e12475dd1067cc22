"""Show the record of `results/` and the pictures of the repository on the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures of `results/`, which lies beside the pages' folder."""
    for picture in sorted((ROOT / "results").rglob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pages name these pictures as a reader of the repository finds them: `../results/...`."""
    return markdown.replace("](../results/", "](results/")
