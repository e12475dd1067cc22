"""The standard evaluation of one model, as plain data: perplexity, far repeats, the slots' share, recall."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.data.recall import RecallSet, pieces_of
from nha.data.text import evaluation_documents
from nha.evaluate.mass import slot_mass
from nha.evaluate.perplexity import far_repeats, perplexity
from nha.evaluate.recall import RecallScore, measure_recall, recall_sets
from nha.evaluate.variants import use_variant

LENGTHS = (2048, 8192)
MASS_TOKENS = 16384  # read to find the slots' share
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Suite:
    """What one evaluation reads: texts by length, ids [N, length] each, and recall sets."""

    texts: dict[int, Tensor]
    recall: list[RecallSet]


def label(length: int) -> str:
    """A length in tokens as names of results have it.

    >>> label(2048), label(8192), label(100)
    ('2k', '8k', '100')
    """
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def bucket_edges(length: int) -> list[int]:
    """Positions that split a text of `length` tokens: 0, 64, 128, 256 and so on.

    >>> bucket_edges(1024)
    [0, 64, 128, 256, 512, 1024]
    """
    edges = [0, 64]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return [*edges, length]


def cut(documents: Sequence[Any], length: int, most: int, start: Sequence[int] = ()) -> Tensor:
    """Up to `most` texts [N, length] of token ids, none over the end of a document: first those of the first parts.

    Every text begins with the tokens `start`. Raises ValueError where no document is long enough.
    """
    size = length - len(start)
    parts = [(at, number) for number, ids in enumerate(documents) for at in range(len(ids) // size)]
    if not parts:
        longest = max((len(ids) for ids in documents), default=0)
        raise ValueError(f"expected a document of at least {size} tokens, got {longest} in the longest")
    rows = [[*start, *documents[number][at * size : (at + 1) * size]] for at, number in sorted(parts)[:most]]
    return torch.tensor(np.array(rows, dtype=np.int64))


def plain_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Any]) -> list[np.ndarray]:
    """Documents of token ids without the tokenizer's special tokens."""
    special = tokenizer.all_special_ids
    given = (np.asarray(ids, dtype=np.int64) for ids in documents)
    return [ids[~np.isin(ids, special)] for ids in given]


def standard_suite(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Any] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    texts: int = 64,
    rows: int = 32,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> Suite:
    """Texts and recall sets for every length, made from held-out documents of token ids (default: the built-in ones).

    At each length up to `texts` texts, and recall at the distances that shorter lengths do not have, `rows` rows of
    each. Special tokens are taken out of the documents; a tokenizer's first token begins every text and row. A function
    of its arguments. Raises ValueError for documents that are too short for the longest texts.
    """
    if documents is None:
        documents = [tokenizer(text, verbose=False).input_ids for text in evaluation_documents()]
    plain, start = plain_ids(tokenizer, documents), pieces_of(tokenizer).start
    filler = np.concatenate(plain)
    found: dict[int, Tensor] = {}
    recall: list[RecallSet] = []
    shorter = 0
    for length in sorted(lengths):
        found[length] = cut(plain, length, texts, start)
        recall += recall_sets(tokenizer, filler, tasks=tasks, beyond=shorter, length=length, rows=rows, seed=seed)
        shorter = length
    return Suite(found, recall)


def measure_texts(
    model: PreTrainedModel, texts: dict[int, Tensor], *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Perplexity on texts by length, with names such as `ppl_2k`.

    For each length: `ppl_<n>` with its 95 % `ppl_<n>_interval` (bootstrap over texts), `loss_<n>` in nats, `far_<n>`
    (the loss on far repeats, see `far_repeats`; nan where there are none), `by_position_<n>` (perplexity between
    `edges_<n>`) and `by_text_<n>` (the loss of every text, for differences between models).
    """
    found: dict[str, Any] = {}
    for length, ids in texts.items():
        name, edges = label(length), bucket_edges(length)
        read = perplexity(model, ids, progress=_part(progress, f"texts of {length:,} tokens"))
        found |= {
            f"ppl_{name}": read.value,
            f"ppl_{name}_interval": list(read.interval(seed)),
            f"loss_{name}": read.loss,
            f"far_{name}": read.where(far_repeats(ids.numpy())),
            f"edges_{name}": edges,
            f"by_position_{name}": read.by_position(edges),
            f"by_text_{name}": read.by_text,
        }
    return found


def by_task(scores: Sequence[RecallScore], seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Recall as plain data, {task: {distance: {digits, exact, generated, ...}}}, distances as text for JSON."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for score in scores:
        found.setdefault(score.task, {})[str(score.distance)] = score.to_dict(seed)
    return found


def measure_form(
    model: PreTrainedModel, suite: Suite, *, generate: bool = True, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """The standard evaluation of a model as it is now, as plain data.

    The data are those of `measure_texts`; for a hybrid `slot_mass` (see `SlotMass`) and its `mean`; `recall` as from
    `by_task`; and the `seconds` that it took. `seed` is that of the bootstrap.
    """
    started = time.perf_counter()
    found = measure_texts(model, suite.texts, seed=seed, progress=progress)
    if suite.texts and hasattr(model.config, "window_sizes"):
        ids = next(iter(suite.texts.values()))
        mass = slot_mass(model, ids[: max(1, MASS_TOKENS // ids.shape[1])])
        found["slot_mass"] = {"mean": mass.mean, **asdict(mass)}
    if suite.recall:
        report = _part(progress, "recall")
        found["recall"] = by_task(measure_recall(model, suite.recall, generate=generate, progress=report), seed)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def measure_all(
    model: PreTrainedModel,
    suite: Suite,
    *,
    forms: Sequence[str] = ("hybrid",),
    generate: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """The standard evaluation of a model in every form asked for (see `VARIANTS`): {form: data of `measure_form`}.

    A model that is not a hybrid has one form, "model", whatever is asked for.
    """
    if not hasattr(model.config, "window_sizes"):
        return {"model": measure_form(model, suite, generate=generate, seed=seed, progress=progress)}
    results = {}
    for form in forms:
        with use_variant(model, form):
            results[form] = measure_form(model, suite, generate=generate, seed=seed, progress=progress)
    return results


def _part(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
