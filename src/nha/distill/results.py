"""The outcome of a run on disk: a model, what it was trained on, and its numbers relative to the fair control's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.convert.card import CardFacts, save_hybrid
from nha.data.corpus import Corpus
from nha.data.recall import RecallSet, pieces_of
from nha.distill.run import Distilled
from nha.distill.settings import DistillSettings
from nha.evaluate.bootstrap import LEVEL, RESAMPLES
from nha.evaluate.measure import Suite, cut, measure_model, plain_ids
from nha.evaluate.recall import recall_sets
from nha.io import write_atomically

FILE = "distillation.json"
MODEL = "model"  # the folder of a control's run that holds the control
DOCUMENTS, QUESTIONS = 32, 16
RECALL_TOKENS = 1024  # shorter sequences have no room for questions at several distances
TASKS = ("one_fact", "four_facts")


def held_out_suite(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: DistillSettings) -> Suite:
    """The held-out documents of a corpus at the lengths of training, and recall text made with them.

    Lengths that no document has are left out; without any there is one, that of the longest document. Raises
    ValueError for a corpus without held-out documents.
    """
    documents = plain_ids(tokenizer, [corpus.document(int(index)) for index in corpus.held_out_indices])
    if not documents:
        raise ValueError(f"expected held-out documents in {corpus.path} to measure on, got none: prepare it with some")
    longest, start = max(map(len, documents)), pieces_of(tokenizer).start
    wanted = {settings.seq_len} | ({settings.long_seq_len} if settings.long_tokens else set())
    lengths = sorted(length for length in wanted if length - len(start) <= longest) or [longest]
    texts = {length: cut(documents, length, DOCUMENTS, start) for length in lengths}
    recall: list[RecallSet] = []
    if lengths[-1] >= RECALL_TOKENS:
        filler = np.concatenate(documents)
        recall = recall_sets(tokenizer, filler, tasks=TASKS, seq_len=lengths[-1], count=QUESTIONS, seed=0)
    return Suite(texts, recall)


def measure_run(
    model: PreTrainedModel, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: DistillSettings
) -> dict[str, Any]:
    """Perplexity on held-out documents and exact answers in recall text, as plain data; see `relative_to_control`.

    {"perplexity": {tokens: loss of every document}, "recall": {task: {tokens between: [right, questions]}}}.
    """
    suite = held_out_suite(corpus, tokenizer, settings)
    found = measure_model(model, suite, generate=False)
    losses = [value for name, value in found.items() if name.startswith("by_text_")]
    recall = {
        task: {distance: [score["exact"], score["count"]] for distance, score in scores.items()}
        for task, scores in found.get("recall", {}).items()
    }
    return {"perplexity": {str(n): loss for n, loss in zip(suite.texts, losses, strict=True)}, "recall": recall}


def relative_to_control(measured: Mapping[str, Any], control: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows {name, value, control, ratio, interval} of a model's numbers beside those of its control.

    Perplexities have a 95 % interval of the ratio, by paired bootstrap over documents. Recall is the fraction of
    questions of a task that are answered whole, over all distances.

    >>> one, other = ({"perplexity": {"64": [loss, loss]}, "recall": {}} for loss in (1.0, 0.5))
    >>> row = relative_to_control(one, other)[0]
    >>> row["name"], round(row["ratio"], 3)
    ('perplexity, 64 tokens', 1.649)
    """
    rows: list[dict[str, Any]] = []
    for length, losses in measured["perplexity"].items():
        other = control["perplexity"].get(length)
        if other is None or len(other) != len(losses):
            continue
        apart = np.subtract(losses, other)
        drawn = np.random.default_rng(0).integers(0, len(apart), (RESAMPLES, len(apart)))
        low, high = np.quantile(apart[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        value, control_value = (math.exp(sum(one) / len(one)) for one in (losses, other))
        interval = [math.exp(low), math.exp(high)]
        rows.append(_row(f"perplexity, {int(length):,} tokens", value, control_value, interval))
    for task, scores in measured["recall"].items():
        other = control["recall"].get(task)
        if other is not None:
            rows.append(_row(f"recall, {task.replace('_', ' ')}", _fraction(scores), _fraction(other), None))
    return rows


def _row(name: str, value: float, control: float, interval: list[float] | None) -> dict[str, Any]:
    ratio = value / control if control else None
    return {"name": name, "value": value, "control": control, "ratio": ratio, "interval": interval}


def _fraction(scores: Mapping[str, Any]) -> float:
    counts = [count for _, count in scores.values()]
    return sum(fraction * count for fraction, count in scores.values()) / sum(counts)


def save_distilled(
    found: Distilled,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base: str,
    corpus: Corpus,
    settings: DistillSettings,
    *,
    extra: Mapping[str, Any] | None = None,
    relative: list[dict[str, Any]] | None = None,
) -> None:
    """Write model, tokenizer, settings, last log entry and model card into a folder.

    `extra` goes into `FILE`; rows of `relative_to_control` also onto the card.
    """
    about: dict[str, Any] = {"settings": dataclasses.asdict(settings), "tokens": corpus.meta["tokens"]}
    about |= {"log": found.log[-1:], "relative_to_control": relative, **(extra or {})}
    notes = f"Trained on {settings.tokens:,.0f} tokens with seed {settings.seed}; see {FILE}."
    if found.teacher_log:
        about["teacher_log"] = found.teacher_log[-1:]
        first = f"{settings.teacher_tokens:,.0f}"
        notes += f" The first {first} of them trained the original with full attention, which the hybrid was made of."
    write_atomically(folder / FILE, json.dumps(about, indent=1) + "\n")
    if relative:
        notes += "\n\n" + relative_table(relative)
    save_hybrid(found.model, tokenizer, folder, CardFacts(base, seed=settings.seed, notes=notes))


def relative_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `relative_to_control` as Markdown.

    >>> print(relative_table([{"name": "recall", "value": 0.5, "control": 1.0, "ratio": 0.5, "interval": None}]))
    Relative to the control, the original model trained on the same tokens with full attention:
    <BLANKLINE>
    | held-out documents | hybrid | control | hybrid relative to control |
    |---|---|---|---|
    | recall | 0.500 | 1.000 | 0.500 |
    """
    lines = ["Relative to the control, the original model trained on the same tokens with full attention:", ""]
    lines += ["| held-out documents | hybrid | control | hybrid relative to control |", "|---|---|---|---|"]
    for row in rows:
        interval = "" if row["interval"] is None else " ({:.3f} to {:.3f})".format(*row["interval"])
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}{interval}"
        lines.append(f"| {row['name']} | {row['value']:.3f} | {row['control']:.3f} | {ratio} |")
    return "\n".join(lines)


def read_control(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The measured numbers of a control in a folder, as `measure_run` gives them.

    `folder` is that of its model, or of its run. Raises ValueError if it is no control, or one that was trained on
    other batches or in another way than `control_identity` says.
    """
    place = folder if (folder / FILE).is_file() else folder / MODEL
    try:
        about = json.loads((place / FILE).read_text(encoding="utf-8"))
        begun, measured = about["control"], about["measured"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"expected a control that nha distill --control trained in {folder}, got none") from None
    wanted = json.loads(json.dumps(identity))
    differing = sorted(name for name in wanted.keys() | begun.keys() if wanted.get(name) != begun.get(name))
    if differing:
        pairs = "; ".join(f"{k} = {begun.get(k)!r}, not {wanted.get(k)!r}" for k in differing)
        raise ValueError(f"expected a control of the same batches and recipe in {folder}, got one with {pairs}")
    return measured
