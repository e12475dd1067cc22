"""Training and measuring one language model of a table: perplexity by position, verbatim clozes, public sets."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.data.cloze import RANGES
from nha.data.corpus import Corpus
from nha.distill.trainer import Reports
from nha.errors import OutOfTime
from nha.evaluate.public.run import NEEDLE, PERPLEXITY, PublicData, PublicSettings, measure_public, read_public
from nha.models.config import FULL, NHAConfig
from nha.train.knob import turn_knob
from nha.train.presets import preset_config
from nha.train.run import TrainResult, train
from nha.train.settings import TrainSettings

# Attention may read across documents: not every model has boundaries within a row.
SHARED_SETTINGS = {"packing": "joined"}
WINDOW = "window"  # the task of measures at one window of several, whose size is the window
BY_LENGTH = (PERPLEXITY, NEEDLE)  # tasks of several lengths
OF_ROWS = ("preset", "window_size", "full_layers", "lr", "seed", "budget")  # settings that `train` cannot hold
WRITTEN = (*RANGES, NEEDLE)  # parts whose answers a model writes
QUARTERS = 4


@dataclass(frozen=True)
class LanguagePlan:
    """How language models are trained, and what they are measured on.

    Attributes:
        preset: shape of all models, a preset of `nha train`.
        train: settings of `TrainSettings`, besides windows, learning rate and seed.
        shape: settings of `NHAConfig` that change the preset for all models.
        lengths: tokens of the documents for perplexity.
        documents: of each length, at most.
        sets: parts of `nha eval public`.
        limit: items of a set, at most.
        clozes: near, and far clozes.
        needle_lengths, needles: tokens of a prompt that hides a needle, and needles of each length and depth; none by
            default.
        knob: windows that every trained model is measured at, in tokens; -1 is full attention.
    """

    preset: str = "20m"
    train: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (2048, 8192)
    documents: int = 32
    sets: tuple[str, ...] = ("lambada_openai", "piqa", "cloze_near", "cloze_far")
    limit: int | None = None
    clozes: int = 200
    needle_lengths: tuple[int, ...] = ()
    needles: int = 4
    knob: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.settings(lr=1e-3, seed=0)
        if min(self.knob, default=0) < FULL:
            raise ValueError(f"expected windows of the knob of at least -1, got {min(self.knob)}")
        assert self.public.parts

    def settings(
        self, lr: float, seed: int, budget: float | None = None, own: Mapping[str, Any] | None = None
    ) -> TrainSettings:
        """The settings of one run, `own` those of its model. Raises ValueError for what cannot be."""
        values: dict[str, Any] = SHARED_SETTINGS | {"preset": self.preset, "lr": lr, "seed": seed, "budget": budget}
        given = {**self.train, **(own or {})}
        wrong = [name for name in OF_ROWS if name in given]
        if wrong:
            raise ValueError(f"expected {wrong[0]} as the plan, the models and the rows have it, got it under train")
        values |= given
        try:
            return TrainSettings(**values)
        except TypeError as error:
            raise ValueError(f"expected settings of nha train, got {error}") from None

    @property
    def public(self) -> PublicSettings:
        """The parts to measure, and their sizes."""
        return PublicSettings(
            parts=(*self.sets, *([NEEDLE] if self.needle_lengths else []), PERPLEXITY),
            limit=self.limit,
            clozes=self.clozes,
            needle_lengths=self.needle_lengths or PublicSettings.needle_lengths,
            needles=self.needles,
            lengths=self.lengths,
            documents=self.documents,
        )

    def config(self, vocab_size: int) -> NHAConfig:
        """The configuration that all models share."""
        return preset_config(self.preset, vocab_size, **self.shape)


@dataclass(frozen=True)
class Sources:
    """Text to train on, its tokenizer, and what to measure on."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    public: PublicData


@dataclass(frozen=True)
class LanguageOutcome:
    """One trained and measured model: data of `measure_public`, rows of `turn_knob`, and the summary of `nha.train`."""

    measures: dict[str, Any]
    knob: list[dict[str, Any]]
    summary: dict[str, Any]


def open_sources(plan: LanguagePlan, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, data: Path) -> Sources:
    """All that a language table reads. Raises ValueError for a set that is missing."""
    return Sources(corpus, tokenizer, read_public(data, plan.public))


def train_language(
    make_model: Callable[[], PreTrainedModel],
    plan: LanguagePlan,
    sources: Sources,
    run: Path,
    *,
    lr: float,
    seed: int,
    own: Mapping[str, Any] | None = None,
    windows: Sequence[int] = (),
    has_cache: bool = True,
    time_left: float = math.inf,
    reserve: float = 0.0,
    log: Callable[[str], None] = lambda line: None,
) -> LanguageOutcome:
    """Train a model in the directory `run`, which is resumed if it holds a part of that, and measure it.

    `own` are settings of this model alone; `windows` are those that it is measured at besides its own. Models without a
    cache write nothing: they get neither clozes nor needles. `log` gets a line at each quarter of the training and at
    the end of each part that is measured, so that a failure's stage is known.

    Raises:
        OutOfTime: training was stopped `reserve` seconds before `time_left` were over; its checkpoint is kept.
    """
    budget = None if math.isinf(time_left) else max(0.0, time_left - reserve)
    settings = plan.settings(lr, seed, budget, own)
    started, steps = time.monotonic(), settings.steps()
    quarters = {max(1, round(part * steps / QUARTERS)) for part in range(1, QUARTERS)}

    def report(entry: dict[str, Any]) -> None:
        reached = {step for step in quarters if "loss" in entry and step <= entry["step"]}
        if reached:
            quarters.difference_update(reached)
            seconds = time.monotonic() - started
            log(f"step {entry['step']:,} of {steps:,}, loss {entry['loss']:.3f}, {seconds:.0f} s")

    trained: TrainResult = train(sources.corpus, run, settings, make_model=make_model, reports=Reports(log=report))
    if not trained.finished:
        rate = trained.summary.get("tokens_per_s") or math.inf
        raise OutOfTime((settings.steps() - trained.steps) * settings.batch_size * settings.seq_len / rate)
    log(f"trained in {time.monotonic() - started:.0f} s")
    model = trained.model.eval()
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)  # type: ignore[arg-type]
    parts = tuple(part for part in sources.public.settings.parts if has_cache or part not in WRITTEN)
    measured = with_parts(sources.public, parts)
    measures = measure_public(model, sources.tokenizer, measured, ended=lambda part, s: log(f"{part}: {s:.1f} s"))
    rows: list[dict[str, Any]] = []
    if windows:
        held_out = torch.from_numpy(sources.corpus.held_out_sequences(plan.documents, settings.seq_len))
        rows = turn_knob(model, held_out, windows)
        log(f"windows {', '.join(map(str, windows))}: measured")
    return LanguageOutcome(measures, rows, trained.summary)


def with_parts(data: PublicData, parts: tuple[str, ...]) -> PublicData:
    """The same data, of which only some parts are measured."""
    return PublicData(dataclasses.replace(data.settings, parts=parts), data.items, data.held_out, data.files)
