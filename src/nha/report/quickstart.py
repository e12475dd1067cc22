"""A quickstart run: convert a model, train its gates for a moment, measure it, and let it write."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from nha import __version__
from nha.convert.align import align
from nha.convert.card import CardFacts, save_hybrid
from nha.convert.hybridize import hybridize
from nha.convert.settings import searched_layers
from nha.data.text import blocks, calibration_text, evaluation_documents
from nha.evaluate.measure import bucket_edges, plain_ids, tokenized
from nha.evaluate.perplexity import Perplexity, perplexity
from nha.evaluate.variants import longer_window
from nha.models import loading
from nha.models.cache import cache_nbytes, nha_layers
from nha.models.config import FULL, LayerWindow, plan_windows, sliding_layers, smallest_window
from nha.models.conversation import encode
from nha.models.delta import apply_delta, delta_quality
from nha.models.observe import ablate
from nha.models.smollm2 import DELTA
from nha.models.windows import set_windows, temporary_windows
from nha.ops.heads import all_windows
from nha.report.costs import CONTEXTS, as_teacher, costs, filled_cache, repeated, tokens_to_fill
from nha.report.facts import ask, recall_by_distance, sample_of
from nha.report.results import VARIANTS, Check, Cost, Distilled, Results, Sample, Tuning, Variant

# Layers that keep full attention, found by `nha search --full 4`, by the model's label.
DOCUMENT = "the Python language reference"
QUESTION = "Explain in two sentences what a function is in Python."
DOCUMENTS = 2
TRAINING_LENGTH = min(CONTEXTS)  # tokens of a text to train on; caches are filled from as many
FACTS, FACT_DISTANCES = 2, (256, 1024, 2048, 4096, 8192)
FACT_STATES = ("float32", "int8")  # questions of both cost as much as those of one and 5 seconds: texts are read once
MAX_SLOTS = 4096  # half of the tokens that gates are calibrated on
Report = Callable[[str, int, int], None]  # (step, done, total)

# Every step, in order, with about the seconds that it takes the embedded model on one idle core.
STEPS = {
    "loading the model": 19.0,
    "writing as the original": 7.0,
    "measuring the original": 12.0,
    "calibrating sinks and gates": 27.0,
    "measuring before training": 14.0,
    "training gates and sinks": 58.0,
    "measuring with no full layers": 15.0,
    "measuring the untrained hybrid": 15.0,
    "measuring the hybrid": 15.0,
    "measuring with slots off": 14.0,
    "measuring a longer window": 15.0,
    "measuring with the window off": 15.0,
    "measuring memory and time": 24.0,
    "writing samples": 13.0,
    "recalling facts": 55.0,
    "checking": 1.0,
    "saving the hybrid": 2.0,
    "drawing and writing the report": 8.0,
}


@dataclass
class Settings:
    """A run's settings: `windows` and `full_layers` as `hybridize` takes them; `quick` measures less.

    `distilled` measures the embedded model's distilled hybrid instead of one whose gates are trained for a moment.
    """

    windows: int | Sequence[LayerWindow]
    slots: int
    full_layers: list[int]
    seed: int
    quick: bool = False
    tune: bool = True
    distilled: bool = False

    def check(self) -> None:
        """Raise ValueError for sizes that the texts of a quickstart are too short for."""
        largest = self.windows if isinstance(self.windows, int) else max(all_windows(self.windows))
        if largest >= TRAINING_LENGTH and not self.distilled:
            raise ValueError(f"expected windows below {TRAINING_LENGTH} tokens in a quickstart, got {largest}")
        if self.slots > MAX_SLOTS:
            raise ValueError(f"expected at most {MAX_SLOTS} slots in a quickstart, got {self.slots}")

    @property
    def length(self) -> int:
        """Tokens of every document measured."""
        return 1024 if self.quick else 2048

    @property
    def new_tokens(self) -> int:
        """Tokens of every sample."""
        return 24 if self.quick else 48


@dataclass
class Clock:
    """Reports every step's progress and keeps the seconds that it took."""

    report: Report
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A step that is done when the block ends without an error; the value moves it by (done, total)."""
        started, last = time.perf_counter(), 1
        self.report(name, 0, 0)

        def advance(done: int, total: int) -> None:
            nonlocal last
            last = total
            self.report(name, done, total)

        try:
            yield advance
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 2)
        self.report(name, last, last)


def planned_steps(settings: Settings) -> dict[str, float]:
    """The steps of a run, in order, with their expected seconds (their proportions are what counts)."""
    left_out = {"measuring before training", "training gates and sinks"}
    if settings.tune and not settings.distilled:
        left_out = set()
    if not settings.full_layers or settings.distilled:
        left_out.add("measuring with no full layers")
    if not settings.distilled:
        left_out |= {"writing as the original", "measuring the untrained hybrid", "recalling facts"}
    return {name: seconds for name, seconds in STEPS.items() if name not in left_out}


def default_full_layers(source: loading.Source) -> list[int]:
    """The layers that a search found for this model; none for a model that was not searched."""
    found = list(searched_layers(source.base))
    layers = math.inf if source.config is None else loading.layers_of(source.config)
    return found if all(layer < layers for layer in found) else []


def run(source: loading.Source, settings: Settings, report: Report, saved: Path | None) -> Results:
    """Convert `source` and measure it; the hybrid is written to the directory `saved` if one is given.

    An error after perplexity has been measured does not lose the numbers: it becomes a failed check of the results.
    """
    clock = Clock(report)
    torch.manual_seed(settings.seed)
    with clock.step("loading the model"):
        model, tokenizer = loading.load(source)
    parameters = model.num_parameters()
    texts = blocks(tokenizer, evaluation_documents(), DOCUMENTS, settings.length)
    checks: list[Check] = []
    cost: list[Cost] = []
    samples: list[Sample] = []
    original: list[str] | None = None
    if settings.distilled:
        with clock.step("writing as the original") as advance:
            original = original_texts(model, tokenizer, texts, settings, advance)
    measured, tuning, every = convert_and_measure(model, tokenizer, texts, settings, clock)
    hybrid: Any = model
    with clock.step("measuring memory and time") as advance, kept(checks, "measuring memory and time"):
        cost += costs(hybrid, texts[:1], CONTEXTS[:5] if settings.quick else CONTEXTS, advance=advance)
    with clock.step("writing samples") as advance, kept(checks, "writing samples"):
        write_samples(hybrid, tokenizer, texts, settings, samples, advance, original)
    distilled = None
    if settings.distilled:
        distilled = Distilled(DELTA.stat().st_size, delta_quality(DELTA))
        with clock.step("recalling facts") as advance, kept(checks, "recalling facts"):
            recall_facts(hybrid, tokenizer, settings, distilled, samples, advance)
    with clock.step("checking"), kept(checks, "checking"):
        checks += run_checks(hybrid, texts)
    if saved is not None:
        with clock.step("saving the hybrid"), kept(checks, "saving the hybrid"):
            named = {VARIANTS[name][0]: measured[name].value for name in VARIANTS if name in measured}
            text = f"{DOCUMENTS} texts of {settings.length:,} tokens of {DOCUMENT}"
            save_hybrid(hybrid, tokenizer, saved, CardFacts(source.base, named, text, settings.seed))
    edges = bucket_edges(settings.length)
    variants = [Variant(name, p.value, p.error, p.by_position(edges)) for name, p in measured.items()]
    with kept(checks, "measuring memory of the variants"):
        add_bytes(variants, hybrid, texts, cost, every)
    return Results(
        model=source.label,
        source=source.name,
        layers=len(hybrid.config.window_sizes),
        parameters=parameters,
        added_parameters=hybrid.num_parameters() - parameters,
        window_sizes=[smallest_window([window]) for window in hybrid.config.window_sizes],
        notes=head_notes(hybrid.config.window_sizes),
        num_slots=settings.slots,
        num_sinks=hybrid.config.num_sinks,
        document=DOCUMENT,
        documents=DOCUMENTS,
        document_tokens=settings.length,
        bucket_edges=edges,
        variants=variants,
        costs=cost,
        samples=samples,
        checks=checks,
        seconds=clock.seconds,
        versions=versions(),
        machine=machine(hybrid),
        seed=settings.seed,
        sliding_layers=kept_sliding(hybrid.config),
        tuning=tuning,
        distilled=distilled,
    )


def convert_and_measure(
    model: Any, tokenizer: Any, texts: Tensor, settings: Settings, clock: Clock
) -> tuple[dict[str, Perplexity], Tuning | None, list[LayerWindow] | None]:
    """Convert `model` in place and measure every variant.

    Returns perplexity by variant, the training, and the windows with the full layers converted as well (None if no
    layer is full). All convertible layers are calibrated and trained, each on what it sees in the original, so that
    the layers which then keep full attention can be converted by their windows alone.
    """
    measured: dict[str, Perplexity] = {}

    def measure(name: str, step: str) -> None:
        with clock.step(step) as advance:
            measured[name] = perplexity(model, texts, progress=advance)

    measure("teacher", "measuring the original")
    windows = plan_windows(model.config, settings.windows, settings.full_layers)
    every = plan_windows(model.config, settings.windows)
    with clock.step("calibrating sinks and gates") as advance:
        hybridize(
            model,
            num_slots=settings.slots,
            window_size=every,
            tokenizer=tokenizer,
            seed=settings.seed,
            progress=advance,
        )
    tuning = None
    if settings.distilled:
        measure("untrained", "measuring the untrained hybrid")
        apply_delta(model, DELTA)
    elif settings.tune:
        with temporary_windows(model, windows):
            measure("untuned", "measuring before training")
        tuning = tune(model, tokenizer, settings, clock)
    if windows != every:
        measure("all_hybrid", "measuring with no full layers")
    set_windows(model, windows)
    measure("hybrid", "measuring the hybrid")
    with ablate(model, "slots_off"):
        measure("slots_off", "measuring with slots off")
    with longer_window(model):
        measure("longer_window", "measuring a longer window")
    with ablate(model, "window_off"):
        measure("window_off", "measuring with the window off")
    if tuning is not None:
        tuning.perplexity_before, tuning.perplexity_after = measured["untuned"].value, measured["hybrid"].value
    return measured, tuning, every if windows != every else None


@contextmanager
def kept(checks: list[Check], name: str) -> Iterator[None]:
    """Turn an error of the block into a failed check, so that what is measured already is kept."""
    try:
        yield
    except Exception as error:
        checks.append(Check(name, False, f"{type(error).__name__}: {error}"))


def kept_sliding(config: Any) -> int:
    """The number of layers that keep the sliding window that they were trained with."""
    return sum(w == FULL and slides for w, slides in zip(config.window_sizes, sliding_layers(config), strict=True))


def tune(model: Any, tokenizer: Any, settings: Settings, clock: Clock) -> Tuning:
    """Train gates and sinks for a moment on text that is not measured."""
    rows, steps = (4, 8) if settings.quick else (8, 20)
    ids = blocks(tokenizer, [calibration_text()], rows, TRAINING_LENGTH)
    with clock.step("training gates and sinks") as advance:
        align(model, ids, steps=steps, seed=settings.seed, progress=advance)
    return Tuning(
        what="gates and sinks",
        steps=steps,
        tokens=ids.numel(),
        seconds=clock.seconds["training gates and sinks"],
        perplexity_before=0.0,
        perplexity_after=0.0,
    )


def add_bytes(
    variants: list[Variant], model: Any, texts: Tensor, cost: list[Cost], every: list[LayerWindow] | None
) -> None:
    """Give original, hybrid and the hybrid without full layers the bytes of their caches at the longest context."""
    if not cost:
        return
    last = cost[-1]
    found = {"teacher": last.teacher_bytes, "hybrid": last.hybrid_bytes}
    if every is not None:
        with temporary_windows(model, every):
            ids = repeated(texts[:1], tokens_to_fill(model, CONTEXTS))
            found["all_hybrid"] = cache_nbytes(filled_cache(model, ids, last.context))
    for variant in variants:
        variant.bytes = found.get(variant.name)


def head_notes(windows: Sequence[LayerWindow]) -> list[str]:
    """A sentence on KV heads whose windows are longer than their layer's smallest, which the page shows; or none.

    >>> head_notes([25, (25, 256), (256, 25)])
    ['2 KV heads have longer windows than the others of their layer: 256 tokens.']
    """
    longer = [w for layer in windows if not isinstance(layer, int) for w in layer if w != smallest_window([layer])]
    if not longer:
        return []
    shown = " and ".join(f"{w:,} tokens" if w != FULL else "all tokens" for w in sorted(set(longer)))
    return [f"{len(longer)} KV heads have longer windows than the others of their layer: {shown}."]


def prompts_of(tokenizer: Any, texts: Tensor) -> list[tuple[str, str, Tensor]]:
    """(title, what is shown, ids [1, T]) of the prompts that both models continue."""
    long = texts[:1, :1024]
    return [
        ("A short question", QUESTION, encode(tokenizer, QUESTION, raw=False)),
        ("Going on with a long document", "... " + tokenizer.decode(long[0, -60:]).strip(), long),
    ]


def original_texts(
    model: Any, tokenizer: Any, texts: Tensor, settings: Settings, advance: Callable[[int, int], None]
) -> list[str]:
    """Continuations of the prompts by the model before its weights change."""
    prompts, found = prompts_of(tokenizer, texts), []
    for number, (_, _, ids) in enumerate(prompts):
        found.append(write(model, tokenizer, ids, settings.new_tokens))
        advance(number + 1, len(prompts))
    return found


def write_samples(
    model: Any,
    tokenizer: Any,
    texts: Tensor,
    settings: Settings,
    found: list[Sample],
    advance: Callable[[int, int], None],
    original: list[str] | None = None,
) -> None:
    """Add to `found` what original and hybrid write, greedily, to a short question and after a long text.

    `original` are the original's texts, where the hybrid no longer has its weights.
    """
    prompts = prompts_of(tokenizer, texts)
    for number, (title, shown, ids) in enumerate(prompts):
        hybrid = write(model, tokenizer, ids, settings.new_tokens)
        if original is not None:
            teacher = original[number]
        else:
            with as_teacher(model):
                teacher = write(model, tokenizer, ids, settings.new_tokens)
        found.append(Sample(title, shown, ids.shape[1], teacher, hybrid))
        advance(number + 1, len(prompts))


def recall_facts(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    distilled: Distilled,
    samples: list[Sample],
    advance: Callable[[int, int], None],
) -> None:
    """Ask for numbers at growing distances, of states as they are and in 8 bits.

    Counts go to `distilled`, the furthest answer of the first text to `samples`.
    """
    count, distances = (1, FACT_DISTANCES[:3]) if settings.quick else (FACTS, FACT_DISTANCES)
    haystack = np.concatenate(plain_ids(tokenizer, tokenized(tokenizer)))
    asked = []
    for number in range(count):
        done = number * distances[-1]
        asked += ask(
            model,
            tokenizer,
            haystack,
            distances,
            seed=settings.seed + number,
            state_dtypes=FACT_STATES,
            progress=lambda part, _, done=done: advance(done + part, count * distances[-1]),
        )
        distilled.recall, distilled.recall_int8 = (
            recall_by_distance([one for one in asked if one.state_dtype == state_dtype]) for state_dtype in FACT_STATES
        )
    first = next(one for one in asked if one.distance == distances[-1] and one.state_dtype == FACT_STATES[0])
    samples.append(sample_of(first))


def write(model: Any, tokenizer: Any, ids: Tensor, count: int) -> str:
    """Greedy text of up to `count` tokens after ids [1, T]."""
    ids = ids.to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def run_checks(model: Any, texts: Tensor) -> list[Check]:
    """Properties of every model: the same predictions inside the window, and hybrid layers that do not grow."""
    windows = [w for w in all_windows(model.config.window_sizes) if w >= 0]
    ids = texts[:1].to(model.device)
    checks: list[Check] = []
    if min(windows) > 0:
        found = model(ids[:, : min(windows)], use_cache=False).logits
        with as_teacher(model):
            wanted = model(ids[:, : min(windows)], use_cache=False).logits
        difference = (found - wanted).abs().max().item()
        detail = f"logits of the first {min(windows)} tokens differ by at most {difference:g}"
        checks.append(Check("same model inside the window", torch.equal(found, wanted), detail))
    ids, counts = repeated(ids, max(windows) + 160), [max(windows) + more for more in (32, 160)]
    cache, sizes = None, []
    for count in counts:
        cache = filled_cache(model, ids, count, cache)
        sizes.append(sum(layer.nbytes for layer in nha_layers(cache)))
    detail = f"{sizes[0]:,} bytes after {counts[0]} tokens, {sizes[1]:,} after {counts[1]}"
    checks.append(Check("hybrid layers do not grow", sizes[0] == sizes[1], detail))
    return checks


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on."""
    return {
        "nha": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(model: Any) -> str:
    """The device in a few words."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
