"""The standard evaluation of one model as plain data: perplexity, long-range repeats, attention mass, recall."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.data.recall import RecallSet, pieces_of
from nha.data.text import evaluation_documents
from nha.evaluate.mass import slot_mass
from nha.evaluate.perplexity import Perplexity, long_range_repeats, perplexity
from nha.evaluate.recall import RecallScore, measure_recall, recall_sets
from nha.evaluate.variants import use_variant

LENGTHS = (2048, 8192)
MASS_TOKENS = 16384  # read for the attention mass
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Suite:
    """The data of one evaluation: documents by length, ids [N, length] each, and recall sets."""

    texts: dict[int, Tensor]
    recall: list[RecallSet]


def label(length: int) -> str:
    """A length in tokens as it stands in the names of results.

    >>> label(2048), label(8192), label(100)
    ('2k', '8k', '100')
    """
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def bucket_edges(length: int) -> list[int]:
    """Positions that split a document of `length` tokens: 0, 64, 128, 256 and so on.

    >>> bucket_edges(1024)
    [0, 64, 128, 256, 512, 1024]
    """
    edges = [0, 64]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return [*edges, length]


def cut(documents: Sequence[Any], length: int, max_count: int, start: Sequence[int] = ()) -> Tensor:
    """Up to `max_count` pieces [N, length] of token ids, none over the end of a document: first the first pieces.

    Every piece begins with the tokens `start`. Raises ValueError if no document is long enough.
    """
    size = length - len(start)
    parts = [(at, number) for number, ids in enumerate(documents) for at in range(len(ids) // size)]
    if not parts:
        longest = max((len(ids) for ids in documents), default=0)
        raise ValueError(f"expected a document of at least {size} tokens, got {longest} in the longest")
    pieces = [[*start, *documents[number][at * size : (at + 1) * size]] for at, number in sorted(parts)[:max_count]]
    return torch.tensor(np.array(pieces, dtype=np.int64))


def plain_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[ArrayLike]) -> list[np.ndarray]:
    """Documents of token ids without the tokenizer's special tokens."""
    special = tokenizer.all_special_ids
    given = (np.asarray(ids, dtype=np.int64) for ids in documents)
    return [ids[~np.isin(ids, special)] for ids in given]


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None) -> list[list[int]]:
    """Token ids of every text (default: the built-in documents)."""
    given = evaluation_documents() if texts is None else texts
    return [tokenizer(text, verbose=False).input_ids for text in given]


def standard_suite(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Any] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    max_documents: int = 64,
    num_questions: int = 32,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> Suite:
    """Documents and recall sets for every length, from held-out documents of token ids (default: the built-in ones).

    At each length there are up to `max_documents` documents, and `num_questions` questions at each distance that
    shorter lengths do not have. The tokenizer's special tokens are removed from the documents; its BOS token, if it
    adds one, begins each. A function of its arguments. Raises ValueError if no document has the longest length.
    """
    documents = tokenized(tokenizer) if documents is None else documents
    plain, start = plain_ids(tokenizer, documents), pieces_of(tokenizer).start
    filler = np.concatenate(plain)
    found: dict[int, Tensor] = {}
    recall: list[RecallSet] = []
    shorter = 0
    for length in sorted(lengths):
        found[length] = cut(plain, length, max_documents, start)
        recall += recall_sets(
            tokenizer, filler, tasks=tasks, min_distance=shorter, seq_len=length, count=num_questions, seed=seed
        )
        shorter = length
    return Suite(found, recall)


def mass_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """The attention mass of a hybrid on the first `MASS_TOKENS` tokens of ids [N, T] (see `SlotMass`), and its mean.

    Empty for a model that is not a hybrid.
    """
    if not hasattr(model.config, "window_sizes"):
        return {}
    mass = slot_mass(model, ids[: max(1, MASS_TOKENS // ids.shape[1])])
    return {"slot_mass": {"mean": mass.mean, **asdict(mass)}}


def measure_texts(
    model: PreTrainedModel, texts: dict[int, Tensor], *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Perplexity on documents by length, with names such as `ppl_2k`.

    For each length: `ppl_<n>` with its 95 % `ppl_<n>_interval` (bootstrap over documents), `loss_<n>` in nats,
    `repeats_<n>` (the loss on long-range repeats, nan if there are none), `by_position_<n>` (perplexity between
    `edges_<n>`) and `by_text_<n>` (the loss of every document, for paired differences between models).
    """
    found: dict[str, Any] = {}
    for length, ids in texts.items():
        name, edges = label(length), bucket_edges(length)
        read = perplexity(model, ids, progress=_part(progress, f"documents of {length:,} tokens"))
        found |= {
            f"ppl_{name}": read.value,
            f"ppl_{name}_interval": list(read.interval(seed)),
            f"loss_{name}": read.loss,
            f"repeats_{name}": read.where(long_range_repeats(ids.numpy())),
            f"edges_{name}": edges,
            f"by_position_{name}": read.by_position(edges),
            f"by_text_{name}": read.by_text,
        }
    return found


def perplexity_row(
    model: PreTrainedModel, ids: Tensor, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Perplexity on ids [N, T] as plain data, and the attention mass of a hybrid."""
    read: Perplexity = perplexity(model, ids, progress=_part(progress, "perplexity"))
    return {
        "perplexity": read.value,
        "interval": list(read.interval(seed)),
        "loss": read.loss,
        "standard_error": read.error,
        "long_range_repeats": read.where(long_range_repeats(ids.numpy())),
        "by_position": read.by_position(bucket_edges(ids.shape[1])),
        "by_text": read.by_text,
        **mass_of(model, ids),
    }


def by_task(scores: Sequence[RecallScore], seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Recall as plain data, {task: {distance: {digits, exact, generated, ...}}}, distances as text for JSON."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for score in scores:
        found.setdefault(score.task, {})[str(score.distance)] = score.to_dict(seed)
    return found


def recall_row(
    model: PreTrainedModel,
    sets: Sequence[RecallSet],
    *,
    generate: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Recall as plain data, {"recall": the result of `by_task`}."""
    scores = measure_recall(model, sets, generate=generate, progress=_part(progress, "recall"))
    return {"recall": by_task(scores, seed)}


def measure_model(
    model: PreTrainedModel, suite: Suite, *, generate: bool = True, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """The standard evaluation of a model as it is now, as plain data.

    The data of `measure_texts`, `mass_of` and `recall_row`, and the `seconds` spent. `seed` is that of the bootstrap.
    """
    started = time.perf_counter()
    found = measure_texts(model, suite.texts, seed=seed, progress=progress)
    if suite.texts:
        found |= mass_of(model, next(iter(suite.texts.values())))
    if suite.recall:
        found |= recall_row(model, suite.recall, generate=generate, seed=seed, progress=progress)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def measure_all(
    model: PreTrainedModel,
    suite: Suite,
    *,
    variants: Sequence[str] = ("hybrid",),
    generate: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """The standard evaluation of a hybrid in every variant (see `VARIANTS`): {variant: data of `measure_model`}.

    A model that is not a hybrid has one entry, "model".
    """
    if not hasattr(model.config, "window_sizes"):
        return {"model": measure_model(model, suite, generate=generate, seed=seed, progress=progress)}
    results = {}
    for name in variants:
        with use_variant(model, name):
            results[name] = measure_model(model, suite, generate=generate, seed=seed, progress=progress)
    return results


def _part(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
