"""`nha eval public`: public test sets from a directory, held-out text, needles; beside a control model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nha.cli import common
from nha.cli import evaluate_options as options
from nha.cli import evaluate_tables as tables
from nha.cli.common import command, err, out, print_json

if TYPE_CHECKING:
    from nha.evaluate.public.run import PublicSettings


@dataclass(frozen=True)
class PublicOptions:
    """Options for what is measured, and how much of it."""

    sets: Annotated[
        str | None,
        typer.Option(
            help="Out of lambada_openai, piqa, arc_easy, arc_challenge, hellaswag, boolq, copa, squad_qa, cloze_near, "
            "cloze_far, needle, perplexity, separated by commas.",
            show_default="all",
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(help="Maximum number of items of a multiple-choice set.", show_default="all")
    ] = None
    questions: Annotated[int, typer.Option(help="Maximum number of questions answered in writing.")] = 1000
    clozes: Annotated[int, typer.Option(help="Maximum number of near, and of far clozes.")] = 500
    needle_lengths: Annotated[str, typer.Option(help="Tokens of a prompt with a needle.")] = "2048,4096,8192"
    needles: Annotated[int, typer.Option(help="Needles of each length and depth (5 depths).")] = 20
    lengths: Annotated[str, typer.Option(help="Tokens of a document for perplexity.")] = "2048,8192"
    count: Annotated[int, typer.Option(help="Maximum number of documents of each length.")] = 64

    def settings(self, seed: int) -> PublicSettings:
        """The evaluation's settings. Raises ValueError for what cannot be."""
        from nha.evaluate.public.run import MIN_LENGTH, PARTS, PublicSettings

        names = None if self.sets is None else [name.strip() for name in self.sets.split(",")]
        needle_lengths = tuple(common.parse_ints(self.needle_lengths, "--needle-lengths"))
        lengths = tuple(common.parse_ints(self.lengths, "--lengths"))
        counts = {"--questions": self.questions, "--clozes": self.clozes, "--needles": self.needles}
        counts |= {"--count": self.count} if self.limit is None else {"--count": self.count, "--limit": self.limit}
        for option, value in counts.items():
            common.check_at_least(option, value, 1)
        for option, sizes in {"--needle-lengths": needle_lengths, "--lengths": lengths}.items():
            common.check_at_least(option, min(sizes, default=0), MIN_LENGTH)
        return PublicSettings(
            parts=PARTS if names is None else tuple(filter(None, names)),
            limit=self.limit,
            questions=self.questions,
            clozes=self.clozes,
            needle_lengths=needle_lengths,
            needles=self.needles,
            lengths=lengths,
            documents=self.count,
            seed=seed,
        )


DEFAULT_PARTS = PublicOptions()
DEFAULTS = options.ModelOptions()


@command
@options.with_groups
def public(
    model: Annotated[str, options.MODEL],
    data: Annotated[
        Path,
        typer.Option(help="The directory of the sets, NAME.jsonl (also .xz, .gz), with heldout.jsonl in it or below."),
    ],
    output: Annotated[Path | None, options.OUTPUT] = None,
    documents: Annotated[
        Path | None,
        typer.Option(help="Held-out documents (.jsonl), for clozes, needles and perplexity.", show_default=False),
    ] = None,
    parts: PublicOptions = DEFAULT_PARTS,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a forward pass, with padding.", show_default="half of the GPU's free memory"),
    ] = None,
    models: options.ModelOptions = DEFAULTS,
    as_json: Annotated[bool, options.AS_JSON] = False,
) -> None:
    """Measure on public test sets: likelihoods, written answers, verbatim recall, needles, perplexity by position.

    Name the fair control `--compare control=DIR`, the original trained on the same tokens: columns then show every
    number relative to it. Run an interrupted command again to resume.
    """
    if batch_tokens is not None:
        common.check_at_least("--batch-tokens", batch_tokens, 1)
    options.check_output(output)
    import torch

    from nha.evaluate.public.compare import compare_public
    from nha.evaluate.public.run import context_of, lengths_beyond, read_public

    settings = parts.settings(models.seed)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    plan = options.checked_plan(model, models, auto=dtype)
    with common.status(f"reading {data}"):
        read = read_public(data, settings, documents)
    identity = {"command": "public", **plan.identity, **read.identity, "cuda": torch.cuda.is_available()}
    partial = options.partial_results(output, identity)
    loaded, tokenizer = options.load(plan)
    context = context_of(loaded)
    if beyond := lengths_beyond(context, settings):
        err.print(f"note: {context.note(*beyond)}", soft_wrap=True)
    with options.named_progress() as progress:
        found = compare_public(plan, loaded, tokenizer, read, partial, progress, batch_tokens)
    results: dict[str, Any] = {
        "model": plan.source.name,
        "data": str(data),
        **read.identity,
        "dtype": plan.dtype,
        **found,
    }
    if output is not None:
        tables.save_public(output, results)
        partial.remove()
    if as_json:
        print_json(results)
        return
    for table in tables.public_tables(found["results"], found["relative"]):
        out.print(table)
    for line in found["notes"]:
        err.print(f"note: {line}", markup=False, soft_wrap=True)
    legend = "accuracy in % with 95 % intervals (Wilson)"
    if found["relative"]:
        legend += "; of control: relative to the control model on the same items, with paired bootstrap intervals"
        legend += f", seed {models.seed}"
    err.print(f"[dim]{legend}[/]")
