"""The text of a training command: read into a corpus, or checked alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from nha.cli import common
from nha.cli.common import out, print_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nha.data.corpus import Corpus


@dataclass(frozen=True)
class Text:
    """Where a command's text comes from and where its tokens are kept.

    Attributes:
        sources: as --text names them, None without.
        corpus: as --corpus names it, None without.
        output: the directory of the run.
        field, held_out: as `nha.data.prepare.prepare` takes them.
    """

    sources: list[str] | None
    corpus: Path | None
    output: Path
    field: str = "text"
    held_out: float = 0.02

    @property
    def cache(self) -> Path:
        """Where the tokens are kept."""
        return self.corpus or self.output.with_name(self.output.name + ".corpus")

    def check(self, load: Callable[[], PreTrainedTokenizerBase]) -> Corpus | None:
        """Raise what `read` raises for what is named before it reads any text; `load` loads the tokenizer.

        Returns the corpus, if there is one already.
        """
        from nha.data.corpus import open_corpus
        from nha.data.prepare import check_preparation, existing_corpus
        from nha.data.sources import check_sources

        if self.sources is not None:
            check_sources(self.sources)
            options: dict[str, Any] = {"field": self.field, "held_out_fraction": self.held_out}
            tokenizer = load()
            check_preparation(self.sources, self.cache, tokenizer, **options)
            return existing_corpus(self.cache, tokenizer)
        return None if self.corpus is None else open_corpus(self.corpus, load())

    def read(self, load: Callable[[], PreTrainedTokenizerBase]) -> tuple[PreTrainedTokenizerBase, Corpus]:
        """The tokenizer and the corpus, which is made from the sources if some are named and it is not there yet."""
        from nha.data.corpus import open_corpus
        from nha.data.sources import check_sources

        if self.sources is not None:
            check_sources(self.sources)
        with common.status("loading the tokenizer"):
            tokenizer = load()
        if self.sources is None:
            return tokenizer, open_corpus(self.cache, tokenizer)
        return tokenizer, self._prepare(self.sources, tokenizer)

    def _prepare(self, sources: list[str], tokenizer: PreTrainedTokenizerBase) -> Corpus:
        """The corpus, made from the sources if it is not there yet, with progress on stderr."""
        from nha.data.prepare import prepare

        with common.progress_bar() as bar:
            task = bar.add_task("reading text", total=None)

            def progress(documents: int, tokens: int) -> None:
                bar.update(task, completed=documents, description=f"reading text: {tokens / 1e6:.1f} M tokens")

            options: dict[str, Any] = {"field": self.field, "held_out_fraction": self.held_out}
            found = prepare(sources, self.cache, tokenizer, **options, progress=progress)
            bar.update(task, total=len(found.held), completed=len(found.held))
        return found


def report_corpus(corpus: Corpus, as_json: bool) -> None:
    """Print the contents of a corpus."""
    held = corpus.meta["held_out"]
    found: dict[str, Any] = {
        "corpus": str(corpus.path),
        "tokens": corpus.meta["tokens"],
        "documents": corpus.meta["documents"],
        "held_out": held,
        "bytes": sum(file.stat().st_size for file in corpus.path.iterdir()),
    }
    if as_json:
        print_json(found)
        return
    out.print(
        f"[green]✓[/] {found['tokens']:,} tokens of {found['documents']:,} documents in "
        f"[bold]{escape(str(corpus.path))}[/] ({common.human_bytes(found['bytes'])}), "
        f"{held['tokens']:,} tokens of them held out",
        soft_wrap=True,
    )
