"""One evaluation on public sets: all parts of one model, each kept as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.data.cloze import RANGES, Cloze, make_clozes
from nha.evaluate.bootstrap import LEVEL, RESAMPLES, wilson
from nha.evaluate.measure import Progress, cut, label, measure_texts, plain_ids, tokenized
from nha.evaluate.partial import PartialResults
from nha.evaluate.public.needle import DEPTHS, make_needles
from nha.evaluate.public.scoring import ContinuationScorer, Request, choice_requests, is_correct
from nha.evaluate.public.sets import (
    FORMATS,
    HELD_OUT,
    Item,
    file_digest,
    files_of_set,
    find_set,
    read_documents,
    read_passages,
    read_set,
    spaced,
)
from nha.evaluate.public.written import begins_with, has_answer, write
from nha.models.config import context_length

FORMAT = "nha-public-v1"
NEEDLE, PERPLEXITY = "needle", "perplexity"
PARTS = (*FORMATS, *RANGES, NEEDLE, PERPLEXITY)
EDGES = {"cloze_near": (72, 128, 192, 256), "cloze_far": (500, 1000, 2000, 4000)}  # of distances shown apart
CHUNK = 1024  # items that are kept together
ANSWER_TOKENS = 32
MIN_LENGTH = 128  # of prompts with a needle, and of documents
PASSAGES = "squad_qa"  # the set whose passages are documents where no others are given
KNOWLEDGE = ("lambada_openai", "piqa", "arc_easy", "arc_challenge", "hellaswag", "boolq")  # of the summary's average


@dataclass(frozen=True)
class PublicSettings:
    """Sizes and choices of an evaluation on public sets.

    Attributes:
        parts: out of `PARTS`.
        limit: maximum number of items of a multiple-choice or last-word set, evenly spaced (None: all).
        questions: maximum number of questions with written answers.
        clozes: maximum number of clozes of each range of distances.
        needle_lengths, needles: tokens of a prompt, and needles of each length and depth.
        lengths, documents: tokens of the documents for perplexity, and how many of each length at most.
        seed: of clozes, needles and bootstrap.
    """

    parts: tuple[str, ...] = PARTS
    limit: int | None = None
    questions: int = 1000
    clozes: int = 500
    needle_lengths: tuple[int, ...] = (2048, 4096, 8192)
    needles: int = 20
    lengths: tuple[int, ...] = (2048, 8192)
    documents: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"expected sets out of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
        counts = {"limit": 1 if self.limit is None else self.limit, "questions": self.questions}
        counts |= {"clozes": self.clozes, "needles": self.needles, "documents": self.documents}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        for name in ("needle_lengths", "lengths"):
            if min(getattr(self, name), default=0) < MIN_LENGTH:
                raise ValueError(f"expected {name} of at least {MIN_LENGTH} tokens, got {getattr(self, name)}")


@dataclass
class PublicData:
    """The items of all parts, read once and checked before a model is loaded; made from held-out text on demand.

    Attributes:
        ids: token ids of the documents of `held_out`, if they are known already.
    """

    settings: PublicSettings
    items: dict[str, list[Item]]
    held_out: list[str]
    files: dict[str, str]
    ids: list[np.ndarray] | None = None

    def held_out_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
        """Token ids of the documents, the same for all models with this tokenizer."""
        if self.ids is None:
            self.ids = plain_ids(tokenizer, tokenized(tokenizer, self.held_out))
        return self.ids

    def clozes(self, tokenizer: PreTrainedTokenizerBase, part: str) -> list[Cloze]:
        """The clozes of a part, the same for all models with this tokenizer."""
        known = self._clozes
        if part not in known:
            settings = self.settings
            known[part] = make_clozes(tokenizer, self.held_out, settings.clozes, RANGES[part], settings.seed)
        return known[part]

    def requests(
        self, tokenizer: PreTrainedTokenizerBase, part: str, context: int | None
    ) -> tuple[list[list[Request]], int]:
        """The requests of a part's items and how many were truncated, the same for all models with this tokenizer."""
        key = (part, context)
        if key not in self._requests:
            self._requests[key] = choice_requests(tokenizer, self.items[part], context)
        return self._requests[key]

    @cached_property
    def _requests(self) -> dict[tuple[str, int | None], tuple[list[list[Request]], int]]:
        return {}

    @cached_property
    def _clozes(self) -> dict[str, list[Cloze]]:
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that differ for every other evaluation: settings and digests of all files."""
        return {"format": FORMAT, **asdict(self.settings), "files": self.files}


def read_public(data: Path, settings: PublicSettings, documents: Path | None = None) -> PublicData:
    """Read all sets of the settings from a directory; held-out documents from `documents`, or from the directory.

    Without a file of held-out documents the passages of `PASSAGES` are the documents. Raises ValueError, with file and
    line, for a set, file or field that is missing.
    """
    items: dict[str, list[Item]] = {}
    files: dict[str, str] = {}
    for name in settings.parts:
        if name in FORMATS:
            path = find_set(data, name)
            layout = FORMATS[name]
            items[name] = spaced(
                read_set(path, layout), settings.questions if layout.kind == "question" else settings.limit
            )
            files[name] = file_digest(path)
    held_out: list[str] = []
    if any(name not in FORMATS for name in settings.parts):
        if documents is None and not files_of_set(data, HELD_OUT) and files_of_set(data, PASSAGES):
            path = find_set(data, PASSAGES)
            held_out = read_passages(path)
        else:
            path = find_set(data, HELD_OUT) if documents is None else documents
            if not path.is_file():
                raise ValueError(f"expected a file of held-out documents, there is none at {path}")
            held_out = read_documents(path)
        files[HELD_OUT] = f"{path.name} {file_digest(path)}"
    return PublicData(settings, items, held_out, files)


@dataclass(frozen=True)
class Context:
    """The tokens a model was made for, and whether it cannot read more (learned positions)."""

    tokens: int | None
    fixed: bool

    def note(self, *lengths: int) -> str:
        """The note about lengths in tokens that are longer than the context.

        >>> Context(4096, fixed=False).note(8192, 16384)
        "8,192, 16,384 tokens, the model's context is 4,096: measured beyond it"
        """
        shown = ", ".join(f"{length:,}" for length in lengths)
        what = "left out" if self.fixed else "measured beyond it"
        return f"{shown} tokens, the model's context is {self.tokens:,}: {what}"


def context_of(model: PreTrainedModel) -> Context:
    """The context of a model, as its configuration has it."""
    config = model.config.get_text_config()
    tokens = context_length(config)
    rotary = any(getattr(config, name, None) is not None for name in ("rope_parameters", "rope_theta", "rotary_dim"))
    return Context(tokens, tokens is not None and not rotary)


def lengths_beyond(context: Context, settings: PublicSettings) -> list[int]:
    """The lengths in tokens of needles and texts to be measured that are longer than a model's context, sorted.

    >>> lengths_beyond(Context(4096, fixed=False), PublicSettings(parts=("needle",), needle_lengths=(2048, 8192)))
    [8192]
    """
    asked = {NEEDLE: settings.needle_lengths, PERPLEXITY: settings.lengths}
    lengths = {length for part, each in asked.items() if part in settings.parts for length in each}
    return sorted(length for length in lengths if context.tokens is not None and length > context.tokens)


def measure_public(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PublicData,
    *,
    name: str = "model",
    partial: PartialResults | None = None,
    progress: Progress | None = None,
    max_batch_tokens: int | None = None,
    ended: Callable[[str, float], None] = lambda part, seconds: None,
) -> dict[str, Any]:
    """All parts of a model as plain data: {"sets", "needle", "perplexity", "notes", "seconds"}.

    `sets` maps a part to {accuracy, interval (95 %, Wilson), count, correct (one digit an item)}, clozes with
    `by_distance`, BoolQ with `balanced` (see `balanced`); `needle` does so by length, with `by_depth`, and with
    `contained` by the rule of RULER: the number is somewhere in what is written, and other digits may follow it.
    `perplexity` is the data of `measure_texts`; `notes` say what did not fit the model's context. Each part is kept in
    `partial` under `name` as soon as it is known, and `ended` is called with its name and seconds then. Raises
    ValueError before the first part if no held-out document is long enough for one that is asked for.
    """
    session = _Session(model, tokenizer, data, name, partial or PartialResults(), progress, max_batch_tokens)
    found: dict[str, Any] = {"sets": {}, NEEDLE: {}, PERPLEXITY: {}, "notes": session.notes, "seconds": {}}
    started = time.perf_counter()
    session.check_documents()
    found["seconds"][HELD_OUT] = round(time.perf_counter() - started, 2)
    for part in data.settings.parts:
        started = time.perf_counter()
        if part == NEEDLE:
            found[NEEDLE] = session.needles()
        elif part == PERPLEXITY:
            found[PERPLEXITY] = session.perplexity()
        elif (correct := session.correct(part)) is not None:
            found["sets"][part] = counted(correct) | session.by_distance(part, correct) | balanced(data, part, correct)
        found["seconds"][part] = round(time.perf_counter() - started, 2)
        ended(part, found["seconds"][part])
    return found


def counted(correct: Sequence[int]) -> dict[str, Any]:
    """Accuracy with its 95 % interval and count.

    >>> counted([1, 1, 0, 1])["accuracy"], counted([1, 1, 0, 1])["correct"]
    (0.75, '1101')
    """
    total = len(correct)
    return {
        "accuracy": sum(correct) / total,
        "interval": list(wilson(sum(correct), total, level=LEVEL)),
        "count": total,
        "correct": "".join(str(int(c)) for c in correct),
    }


def balanced(data: PublicData, part: str, correct: Sequence[int]) -> dict[str, Any]:
    """{"balanced": accuracy, "by_answer": {choice: [accuracy, count]}} of a set whose items share their choices.

    `balanced` is the mean over the correct choices, so that who always gives one answer gets chance. Of any other set,
    and where a choice is never correct: nothing.
    """
    items = data.items.get(part, [])
    choices = {item.choices for item in items}
    if len(choices) != 1 or len(items[0].choices) < 2:
        return {}
    found: dict[str, list[float]] = {}
    for index, choice in enumerate(items[0].choices):
        own = [c for item, c in zip(items, correct, strict=True) if item.gold == index]
        if not own:
            return {}
        found[choice.strip()] = [sum(own) / len(own), len(own)]
    return {"balanced": sum(value for value, _ in found.values()) / len(found), "by_answer": found}


class _Session:
    """One model on the data of one evaluation."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        data: PublicData,
        name: str,
        partial: PartialResults,
        progress: Progress | None,
        max_batch_tokens: int | None,
    ):
        self.model, self.tokenizer, self.data, self.name = model, tokenizer, data, name
        self.partial, self.progress, self.max_batch_tokens = partial, progress, max_batch_tokens
        self.context = context_of(model)
        self.notes: list[str] = []

    @cached_property
    def scorer(self) -> ContinuationScorer:
        return ContinuationScorer(self.model, self.max_batch_tokens)

    @property
    def held_out_ids(self) -> list[np.ndarray]:
        return self.data.held_out_ids(self.tokenizer)

    def check_documents(self) -> None:
        """Make what needs held-out documents. Raises ValueError, with their file, if they are too short."""
        settings = self.data.settings
        try:
            for length in settings.lengths if PERPLEXITY in settings.parts else ():
                if self._can_read(length):
                    cut(self.held_out_ids, length, 1)
            for length in settings.needle_lengths if NEEDLE in settings.parts else ():
                if self._can_read(length):
                    make_needles(self.tokenizer, np.concatenate(self.held_out_ids), length, 1, seed=settings.seed)
            for part in set(RANGES).intersection(settings.parts):
                self.data.clozes(self.tokenizer, part)
        except ValueError as error:
            raise ValueError(f"{error} of {self.data.files.get(HELD_OUT, HELD_OUT).split()[0]}") from None

    def correct(self, part: str) -> list[int] | None:
        """1 for every correct item of a part, None if the model cannot read it."""
        if part in RANGES:
            clozes = self.data.clozes(self.tokenizer, part)
            new = 2 + max(len(self.tokenizer(" " + cloze.answer, verbose=False).input_ids) for cloze in clozes)
            prompts = [self._ids(cloze.prompt) for cloze in clozes]
            return self._written(part, prompts, new, lambda i, text: begins_with(text, clozes[i].answer))
        items = self.data.items[part]
        if FORMATS[part].kind == "question":
            prompts = [self._ids(item.prompt) for item in items]
            return self._written(part, prompts, ANSWER_TOKENS, lambda i, text: has_answer(text, items[i].answers))
        return self._choices(part, items)

    def by_distance(self, part: str, correct: Sequence[int]) -> dict[str, Any]:
        """{"by_distance": {"72 to 128": [accuracy, count]}} of clozes, by tokens from the source; else nothing."""
        if part not in RANGES:
            return {}
        distances = np.array([cloze.distance for cloze in self.data.clozes(self.tokenizer, part)])
        found: dict[str, list[float]] = {}
        for low, high in pairwise(EDGES[part]):
            inside = (distances >= low) & ((distances < high) | (high == EDGES[part][-1]))
            if inside.any():
                found[f"{low:,} to {high:,}"] = [float(np.array(correct)[inside].mean()), int(inside.sum())]
        return {"by_distance": found}

    def _ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt, verbose=False).input_ids)

    def _choices(self, part: str, items: Sequence[Item]) -> list[int]:
        requests, truncated = self.data.requests(self.tokenizer, part, self.context.tokens)
        if truncated:
            self.notes.append(f"{part}: {truncated} items are cut to the context of {self.context.tokens:,} tokens")
        order = sorted(range(len(items)), key=lambda i: -len(requests[i][0].inputs))

        def measure(chunk: Sequence[int], done: int) -> list[int]:
            flat = [request for i in chunk for request in requests[i]]
            scores = iter(self.scorer.score(flat, self._within(part, done, len(chunk), len(items))))
            taken = [[next(scores) for _ in requests[i]] for i in chunk]
            per_byte = FORMATS[part].per_byte
            return [int(is_correct(items[i], s, per_byte)) for i, s in zip(chunk, taken, strict=True)]

        return self._in_chunks(part, order, measure)

    def _written(
        self,
        part: str,
        prompts: Sequence[Sequence[int]],
        new: int,
        judge: Callable[[int, str], int],
        key: str | None = None,
    ) -> list[int] | None:
        longest = max(map(len, prompts)) + new
        if not self._fits(part, longest):
            return None
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

        def measure(chunk: Sequence[int], done: int) -> list[int]:
            texts = write(
                self.model,
                self.tokenizer,
                [prompts[i] for i in chunk],
                new,
                max_batch_tokens=self.max_batch_tokens,
                progress=self._within(part, done, len(chunk), len(prompts)),
            )
            return [int(judge(i, text)) for i, text in zip(chunk, texts, strict=True)]

        return self._in_chunks(key or part, order, measure)

    def _fits(self, part: str, longest: int) -> bool:
        """Whether the model can read this many tokens; notes it if they are more than its context."""
        context, readable = self.context, self._can_read(longest)
        if context.tokens is not None and longest > context.tokens:
            self.notes.append(f"{part}: {context.note(longest)}")
        return readable

    def _can_read(self, longest: int) -> bool:
        return self.context.tokens is None or longest <= self.context.tokens or not self.context.fixed

    def _in_chunks(
        self, part: str, order: Sequence[int], measure: Callable[[Sequence[int], int], list[int]]
    ) -> list[int]:
        """Measure chunk after chunk of the items in `order`, each kept as it is known; results in the items' order."""
        results = [0] * len(order)
        for start in range(0, len(order), CHUNK):
            chunk, key = order[start : start + CHUNK], f"{self.name}/{part}/{start}"
            if key not in self.partial.parts:
                self.partial.add(key, measure(chunk, start))
            for i, value in zip(chunk, self.partial.parts[key], strict=True):
                results[i] = value
        return results

    def _within(self, part: str, done: int, size: int, total: int) -> Callable[[int, int], None]:
        def report(inner: int, all_inner: int) -> None:
            if self.progress is not None:
                self.progress(part, done + round(size * inner / all_inner), total)

        return report

    def needles(self) -> dict[str, Any]:
        """Needles by length, with the fraction found by depth."""
        settings, found = self.data.settings, {}
        haystack = np.concatenate(self.held_out_ids)
        for length in settings.needle_lengths:
            needles = make_needles(self.tokenizer, haystack, length, settings.needles, seed=settings.seed)
            new = 2 + max(len(needle.answer) for needle in needles)
            answers = [needle.answer for needle in needles]
            prompts = [needle.prompt for needle in needles]

            def judge(i: int, text: str, answers: Sequence[str] = answers) -> int:
                return 2 if begins_with(text, answers[i]) else int(answers[i] in text)

            judged = self._written(f"{NEEDLE} {length:,}", prompts, new, judge, key=f"{NEEDLE} or contained {length}")
            if judged is None:
                continue
            correct = [int(value == 2) for value in judged]
            depth = {d: [c for c, needle in zip(correct, needles, strict=True) if needle.depth == d] for d in DEPTHS}
            by_depth = {f"{d:.2f}": sum(values) / len(values) for d, values in depth.items()}
            contained = counted([int(value > 0) for value in judged])
            found[str(length)] = counted(correct) | {"by_depth": by_depth, "contained": contained}
        return found

    def perplexity(self) -> dict[str, Any]:
        """Perplexity on held-out documents by length and position."""
        settings, found = self.data.settings, {}
        for length in settings.lengths:
            if not self._fits(f"{PERPLEXITY} {length:,}", length):
                continue
            key = f"{self.name}/{PERPLEXITY}/{length}"
            if key not in self.partial.parts:
                ids = cut(self.held_out_ids, length, settings.documents)
                texts = {length: torch.as_tensor(ids)}
                measured = measure_texts(self.model, texts, seed=settings.seed, progress=self.progress)
                self.partial.add(key, measured | {"count": len(ids)})
            measured = dict(self.partial.parts[key])
            found[str(length)] = {"count": measured.pop("count")} | {
                name.rsplit("_", 1)[0] if not name.endswith("_interval") else "interval": value
                for name, value in measured.items()
            }
        return found


def values_of(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data with accuracy, interval, count, correct) of all counted parts of a model."""
    yield from row["sets"].items()
    for length, found in row[NEEDLE].items():
        yield f"{NEEDLE} {int(length):,}", found


def relative(row: dict[str, Any], control: dict[str, Any], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Accuracy relative to a control model's on the same items: {name: {ratio, interval}}, perplexity likewise.

    The interval is a paired bootstrap over items (over documents for perplexity).
    """
    found: dict[str, dict[str, Any]] = {}
    others = dict(values_of(control))
    for name, data in values_of(row):
        if name in others:
            pair = [np.array([int(c) for c in one["correct"]], float) for one in (data, others[name])]
            found[name] = _ratio(*pair, seed=seed)
    for length, data in row[PERPLEXITY].items():
        if length in control[PERPLEXITY]:
            losses = np.subtract(data["by_text"], control[PERPLEXITY][length]["by_text"])
            drawn = np.random.default_rng(seed).integers(0, len(losses), (RESAMPLES, len(losses)))
            low, high = np.quantile(losses[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            interval = [float(np.exp(low)), float(np.exp(high))]
            found[f"{PERPLEXITY} {int(length):,}"] = {"ratio": float(np.exp(losses.mean())), "interval": interval}
    return found


def _ratio(first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, Any]:
    if not second.any():
        return {"ratio": None, "interval": None}
    drawn = np.random.default_rng(seed).integers(0, len(first), (RESAMPLES, len(first)))
    # A resample in which the control has nothing right has no ratio.
    above, below = first[drawn].mean(1), second[drawn].mean(1)
    ratios = above[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"ratio": float(first.mean() / second.mean()), "interval": [float(low), float(high)]}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a model as [value, count]: sets and their average, squad, clozes, needle by length, perplexity."""
    found: dict[str, Any] = {f"ppl_{label(int(n))}": [d["ppl"], d["count"]] for n, d in row[PERPLEXITY].items()}
    values = {name: [data["accuracy"], data["count"]] for name, data in row["sets"].items()}
    likelihood = [name for name, layout in FORMATS.items() if layout.kind != "question"]
    found["sets"] = {name: values[name] for name in likelihood if name in values}
    if all(name in values for name in KNOWLEDGE):
        found["average"] = sum(values[name][0] for name in KNOWLEDGE) / len(KNOWLEDGE)
    found |= {"squad": values["squad_qa"]} if "squad_qa" in values else {}
    found |= {name: values[name] for name in RANGES if name in values}
    found[NEEDLE] = {length: [data["accuracy"], data["count"]] for length, data in row[NEEDLE].items()}
    return found
