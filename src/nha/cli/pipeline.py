"""What `nha quickstart` does between its arguments and its report: convert, tune, measure, generate."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nha.cli.measure import CONTEXTS, as_teacher, costs
from nha.convert.align import align
from nha.convert.card import model_card, write_card
from nha.convert.hybridize import hybridize
from nha.data.text import blocks, calibration_text, evaluation_documents
from nha.evaluate.measure import bucket_edges
from nha.evaluate.perplexity import Perplexity, perplexity
from nha.evaluate.variants import longer_window
from nha.models import loading
from nha.models.adapter import ablate
from nha.models.cache import cache_nbytes
from nha.report.results import VARIANTS, Check, Form, Results, Sample, Tuning

PAPER_LIMIT = 1_000_000_000  # parameters up to which a second copy of the model is made for the paper's form
DOCUMENT = "the Python language reference"
QUESTION = "Explain in two sentences what a function is in Python."
DEFAULT_PACKAGES = ("nha", "torch", "transformers")


@dataclass
class Settings:
    """A run's settings: `windows` and `full_layers` as `hybridize` takes them; `quick` measures less."""

    windows: int | list[int]
    slots: int
    full_layers: list[int]
    seed: int
    quick: bool = False
    tune: bool = True

    @property
    def documents(self) -> int:
        return 2

    @property
    def length(self) -> int:
        return 1024 if self.quick else 2048

    @property
    def new_tokens(self) -> int:
        return 24 if self.quick else 48


@dataclass
class Clock:
    """Progress bars, and the seconds that each step took."""

    bar: Any
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, description: str) -> Iterator[Callable[[int, int], None]]:
        """A bar that is full when the block ends; the value moves it by (done, total)."""
        task = self.bar.add_task(description, total=None)
        started = time.perf_counter()
        last = 1

        def advance(done: int, total: int) -> None:
            nonlocal last
            last = total
            self.bar.update(task, completed=done, total=total)

        yield advance
        self.bar.update(task, completed=last, total=last)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def run(source: loading.Source, settings: Settings, bar: Any, saved: Path | None) -> Results:
    """Convert `source` and measure it; the hybrid is written to `saved` if given."""
    clock = Clock(bar)
    torch.manual_seed(settings.seed)
    with clock.step("load", f"loading {source.label}"):
        model, tokenizer = loading.load(source)
    parameters = model.num_parameters()
    texts = blocks(tokenizer, evaluation_documents(), settings.documents, settings.length)
    edges = bucket_edges(settings.length)
    forms: dict[str, Perplexity] = {}

    def measure(name: str, description: str) -> None:
        with clock.step("measure", f"perplexity: {description}") as advance:
            forms[name] = perplexity(model, texts, progress=advance)

    measure("teacher", "original")
    options: dict[str, Any] = {
        "num_slots": settings.slots,
        "window_size": settings.windows,
        "full_layers": settings.full_layers,
        "tokenizer": tokenizer,
        "seed": settings.seed,
    }
    if parameters <= PAPER_LIMIT and not settings.quick:
        model, original = hybridize(copy.deepcopy(model), init="paper", **options), model
        measure("paper", "the paper's form")
        model = original
    with clock.step("convert", "converting: sinks, k-means gates") as advance:
        model = hybridize(model, progress=advance, **options)
    with ablate(model, "slots_off"):
        measure("sink_only", "window and sink only")
    tuning = None
    if settings.tune:
        measure("untuned", "hybrid, untrained")
        tuning = tune(model, tokenizer, settings, clock)
        with ablate(model, "slots_off"):
            measure("slots_off", "hybrid, slots off")
    else:
        forms["slots_off"] = forms["sink_only"]
    measure("hybrid", "hybrid")
    with longer_window(model):
        measure("longer_window", "longer window, no slots")
    with ablate(model, "window_off"):
        measure("window_off", "hybrid, window off")
    if tuning is not None:
        tuning.perplexity_before, tuning.perplexity_after = forms["untuned"].value, forms["hybrid"].value
    with clock.step("cost", "memory and time per token") as advance:
        contexts = CONTEXTS[:5] if settings.quick else CONTEXTS
        cost = costs(model, texts[:1], contexts, advance=advance)
    samples = write_samples(model, tokenizer, texts, settings, clock)
    with clock.step("check", "checking"):
        checks = run_checks(model, texts)
    if saved is not None:
        with clock.step("save", "saving the hybrid"):
            model.save_pretrained(saved)
            tokenizer.save_pretrained(saved)
            named = {VARIANTS[name][0]: forms[name] for name in VARIANTS if name in forms}
            write_card(saved, model_card(model.config, source.label, named, DOCUMENT))
    return Results(
        model=source.label,
        layers=len(model.config.window_sizes),
        parameters=parameters,
        added_parameters=model.num_parameters() - parameters,
        window_sizes=list(model.config.window_sizes),
        num_slots=settings.slots,
        num_sinks=model.config.num_sinks,
        document=DOCUMENT,
        documents=settings.documents,
        document_tokens=settings.length,
        bucket_edges=edges,
        forms=[Form(name, p.value, p.error, p.by_position(edges)) for name, p in forms.items()],
        costs=cost,
        samples=samples,
        checks=checks,
        seconds={name: round(value, 2) for name, value in clock.seconds.items()},
        versions=versions(),
        machine=machine(model),
        seed=settings.seed,
        tuning=tuning,
    )


def tune(model: Any, tokenizer: Any, settings: Settings, clock: Clock) -> Tuning:
    """Train gates and sinks for a moment on text that is not measured."""
    rows, length, steps = (4, 512, 8) if settings.quick else (8, 512, 20)
    ids = blocks(tokenizer, [calibration_text()], rows, length)
    with clock.step("tune", "training gates and sinks") as advance:
        align(model, ids, steps=steps, seed=settings.seed, progress=advance)
    return Tuning(
        what="gates and sinks",
        steps=steps,
        tokens=ids.numel(),
        seconds=round(clock.seconds["tune"], 2),
        perplexity_before=0.0,
        perplexity_after=0.0,
    )


def write_samples(model: Any, tokenizer: Any, texts: Tensor, settings: Settings, clock: Clock) -> list[Sample]:
    """What original and hybrid write, greedily, to a short question and after a long text."""
    from nha.cli.generate import encode

    question = encode(tokenizer, QUESTION, raw=False)
    long = texts[:1, :1024]
    prompts = [
        ("A short question", QUESTION, question),
        ("Going on with a long document", "... " + tokenizer.decode(long[0, -60:]).strip(), long),
    ]
    found: list[Sample] = []
    with clock.step("generate", "generating text") as advance:
        for number, (title, shown, ids) in enumerate(prompts):
            hybrid = write(model, tokenizer, ids, settings.new_tokens)
            with as_teacher(model):
                teacher = write(model, tokenizer, ids, settings.new_tokens)
            found.append(Sample(title, shown, ids.shape[1], teacher, hybrid))
            advance(number + 1, len(prompts))
    return found


def write(model: Any, tokenizer: Any, ids: Tensor, count: int) -> str:
    """Greedy text after ids [1, T]."""
    ids = ids.to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def run_checks(model: Any, texts: Tensor) -> list[Check]:
    """What must hold whatever the model: the same predictions inside the window, memory that does not grow."""
    hybrid_windows = [w for w in model.config.window_sizes if w >= 0]
    window = min(hybrid_windows)
    ids = texts[:1].to(model.device)
    checks: list[Check] = []
    if window > 0:
        found = model(ids[:, :window], use_cache=False).logits
        with as_teacher(model):
            wanted = model(ids[:, :window], use_cache=False).logits
        difference = (found - wanted).abs().max().item()
        detail = f"logits of the first {window} tokens differ by at most {difference:g}"
        checks.append(Check("same model inside the window", torch.equal(found, wanted), detail))
    if len(hybrid_windows) == len(model.config.window_sizes):
        first, second = (max(hybrid_windows) + 32, max(hybrid_windows) + 160)
        sizes = []
        for count in (first, second):
            sizes.append(cache_nbytes(model(ids[:, :count], use_cache=True, logits_to_keep=1).past_key_values))
        detail = f"{sizes[0]:,} bytes after {first} tokens, {sizes[1]:,} after {second}"
        checks.append(Check("memory does not grow", sizes[0] == sizes[1], detail))
    return checks


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on."""
    found: dict[str, str | None] = {name: importlib.metadata.version(name) for name in DEFAULT_PACKAGES}
    return found | {"python": platform.python_version()}


def machine(model: Any) -> str:
    """The device in a few words."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
