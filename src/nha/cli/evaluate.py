"""`nha eval perplexity`, `recall` and `all`: a model beside its variants and other models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nha.cli import common
from nha.cli import evaluate_options as options
from nha.cli import evaluate_tables as tables
from nha.cli.common import BadInput, command, err, out, print_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nha.evaluate.measure import Progress

DEFAULTS = options.ModelOptions()


@command
@options.with_groups
def perplexity(
    model: Annotated[str, options.MODEL],
    text: Annotated[list[Path] | None, options.TEXT] = None,
    length: Annotated[int, typer.Option(help="Tokens of each document.")] = 1024,
    count: Annotated[int, typer.Option(help="Documents to read.")] = 4,
    models: options.ModelOptions = DEFAULTS,
    output: Annotated[Path | None, options.OUTPUT] = None,
    as_json: Annotated[bool, options.AS_JSON] = False,
) -> None:
    """Perplexity, by position in the text, and the slots' attention mass."""
    common.check_at_least("--length", length, 2)
    common.check_at_least("--count", count, 1)
    options.check_output(output)
    texts = options.read_texts(text)
    plan = options.checked_plan(model, models)
    tokenizer = options.load_tokenizer(plan)

    from nha.data.text import blocks, evaluation_documents
    from nha.evaluate.compare import measure_each
    from nha.evaluate.measure import bucket_edges, perplexity_row

    ids = blocks(tokenizer, evaluation_documents() if texts is None else texts, count, length)
    loaded, _ = options.load(plan, tokenizer)

    def measure(model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
        return perplexity_row(model, ids, seed=models.seed, progress=progress)

    with options.named_progress() as progress:
        rows = measure_each(plan, loaded, tokenizer, measure, progress)
    edges = bucket_edges(length)
    shape = {"documents": len(ids), "length": length, "bucket_edges": edges, "seed": models.seed}
    results = {"model": plan.source.name, **shape, "results": rows}
    if output is not None:
        tables.save(output, "perplexity.json", results, "exact")
    if as_json:
        print_json(results)
        return
    for table in tables.perplexity_tables(rows, edges):
        out.print(table)
    err.print(
        f"[dim]{len(ids)} documents of {length:,} tokens, 95 % bootstrap intervals over documents, seed {models.seed}; "
        "repeats: loss on pairs of tokens last seen over 192 tokens back; slots: their attention mass; "
        "below: perplexity by position[/]"
    )


@command
@options.with_groups
def recall(
    model: Annotated[str, options.MODEL],
    tasks: Annotated[str | None, options.TASKS] = None,
    distances: Annotated[
        str | None, typer.Option(help="Tokens from a fact to its answer.", show_default="128, 256, ... up to --length")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 2048,
    questions: Annotated[int, options.QUESTIONS] = 32,
    text: Annotated[list[Path] | None, options.TEXT] = None,
    generate: Annotated[bool, typer.Option(help="Also let the model write the answers.")] = True,
    metric: Annotated[str, typer.Option(help="The metric to print: digits, exact or generated.")] = "exact",
    models: options.ModelOptions = DEFAULTS,
    output: Annotated[Path | None, options.OUTPUT] = None,
    as_json: Annotated[bool, options.AS_JSON] = False,
) -> None:
    """How often a model recalls facts, by task and distance, with names and questions that training never uses."""
    wanted = options.parse_tasks(tasks)
    chosen = None if distances is None else common.parse_ints(distances, "--distances")
    common.check_at_least("--questions", questions, 1)
    options.check_metric(metric, generate)
    options.check_output(output)
    texts = options.read_texts(text)
    plan = options.checked_plan(model, models)
    tokenizer = options.load_tokenizer(plan)

    import numpy as np

    from nha.evaluate.compare import measure_each
    from nha.evaluate.measure import plain_ids, recall_row, tokenized
    from nha.evaluate.partial import text_digest
    from nha.evaluate.recall import recall_sets

    filler = np.concatenate(plain_ids(tokenizer, tokenized(tokenizer, texts)))
    sets = recall_sets(
        tokenizer, filler, tasks=wanted, distances=chosen, seq_len=length, count=questions, seed=models.seed
    )
    loaded, _ = options.load(plan, tokenizer)
    asked = {"tasks": wanted, "distances": chosen, "length": length, "questions": questions, "generate": generate}
    identity = {"command": "recall", **plan.identity, **asked, "texts": text_digest(texts), "seed": models.seed}

    def measure(model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
        return recall_row(model, sets, generate=generate, seed=models.seed, progress=progress)

    partial = options.partial_results(output, identity)
    with options.named_progress() as progress:
        found = measure_each(plan, loaded, tokenizer, measure, progress, partial)
    results = {
        "model": plan.source.name,
        "length": length,
        "questions": questions,
        "seed": models.seed,
        "results": found,
    }
    if output is not None:
        tables.save(output, "recall.json", results, metric)
        partial.remove()
    if as_json:
        print_json(results)
        return
    for table in tables.recall_tables({name: row["recall"] for name, row in found.items()}, metric):
        out.print(table)
    err.print(tables.recall_note(metric, questions, models.seed))


@command
@options.with_groups
def everything(
    model: Annotated[str, options.MODEL],
    output: Annotated[Path, typer.Argument(help="A new directory for results and picture.")],
    lengths: Annotated[str, typer.Option(help="Tokens of a document, separated by commas.")] = "2048,8192",
    documents: Annotated[int, typer.Option(help="Maximum number of documents of each length.")] = 64,
    questions: Annotated[int, options.QUESTIONS] = 32,
    tasks: Annotated[str | None, options.TASKS] = None,
    text: Annotated[list[Path] | None, options.TEXT] = None,
    generate: Annotated[bool, typer.Option(help="Also let the model write the answers.")] = True,
    models: options.ModelOptions = DEFAULTS,
    as_json: Annotated[bool, options.AS_JSON] = False,
) -> None:
    """The standard evaluation: perplexity and recall at several lengths, saved with a picture.

    Run an interrupted command again to resume.
    """
    wanted = options.parse_tasks(tasks)
    sizes = common.parse_ints(lengths, "--lengths")
    if not sizes:
        raise BadInput(f"expected --lengths to name at least one length, got {lengths!r}")
    common.check_at_least("--lengths", min(sizes), 256)
    common.check_at_least("--documents", documents, 1)
    common.check_at_least("--questions", questions, 1)
    options.check_output(output)
    texts = options.read_texts(text)
    plan = options.checked_plan(model, models)
    tokenizer = options.load_tokenizer(plan)

    from nha.evaluate.compare import measure_each
    from nha.evaluate.measure import label, measure_model, standard_suite, tokenized
    from nha.evaluate.partial import text_digest

    suite = standard_suite(
        tokenizer,
        tokenized(tokenizer, texts),
        lengths=sizes,
        max_documents=documents,
        num_questions=questions,
        tasks=wanted,
        seed=models.seed,
    )
    loaded, _ = options.load(plan, tokenizer)
    asked = {"lengths": sizes, "documents": documents, "questions": questions, "tasks": wanted, "generate": generate}
    identity = {"command": "all", **plan.identity, **asked, "texts": text_digest(texts), "seed": models.seed}

    def measure(model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
        return measure_model(model, suite, generate=generate, seed=models.seed, progress=progress)

    partial = options.partial_results(output, identity)
    with options.named_progress() as progress:
        found = measure_each(plan, loaded, tokenizer, measure, progress, partial)
    counts = {label(n): len(ids) for n, ids in suite.texts.items()}
    shape = {"documents": counts, "questions": questions, "seed": models.seed}
    results = {"model": plan.source.name, **shape, "results": found}
    tables.save(output, "evaluation.json", results, "exact")
    partial.remove()
    if as_json:
        print_json(results)
        return
    out.print(tables.summary_table(found, list(counts)))
    for table in tables.recall_tables({name: row["recall"] for name, row in found.items()}, "exact"):
        out.print(table)
    err.print(tables.recall_note("exact", questions, models.seed))
