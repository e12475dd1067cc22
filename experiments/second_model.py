"""Train models from scratch, convert them with the recipes of `nha distill`, and measure them beside fair controls.

    PYTHONPATH=src python -m experiments.second_model --data DATA --output OUT --models llama-20m,nha-20m --budget-s 190

The recipes were tuned on SmolLM2-135M. Here the originals are a Llama with grouped heads and an `NHAForCausalLM` with
normalized queries and keys, both trained with full attention by `nha train`'s loop on real text; in a fraction of the
rows spans are read again, so that models this small learn to copy. Each is then converted with every recipe, beside the
control of the same batches. OUT/runs/*.json holds a model of each kind, written as soon as it is measured and not made
again (also where it is in --known); OUT/summary.json and table.md are made of them. The same command resumes from
--work. Exit status: 0, 1 for a failure, 3 where time was up.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from experiments.distill import versions
from experiments.quality import prepare_corpus
from experiments.quality_rows import cache_bytes
from experiments.quality_runs import batches_digest
from experiments.second_model_report import write_report
from nha.data.corpus import Corpus, open_corpus
from nha.data.packing import PackedSequences
from nha.distill.recipes import recipe_settings
from nha.distill.run import distill
from nha.distill.settings import COMPILED, DistillSettings
from nha.distill.stopping import Stop
from nha.distill.trainer import Reports
from nha.evaluate.measure import cut
from nha.evaluate.public.run import PublicData, PublicSettings, measure_public, read_public
from nha.io import atomic_directory, write_atomically
from nha.models import loading
from nha.models.head import head_logits, hidden_states
from nha.models.nha import NHAForCausalLM
from nha.models.plain import plain_config
from nha.settings import count, fraction, option_name, setting
from nha.train.presets import preset_config
from nha.train.rows import next_tokens
from nha.train.run import train
from nha.train.settings import TrainSettings

MODELS = ("llama-20m", "nha-20m", "llama-60m", "nha-60m", "llama-tiny", "nha-tiny")
# Of every recipe, so that they differ in full layers alone and share a control.
TEACHER_FRACTION = 0.4
MIXTURE = {"recall_fraction": 0.25, "long_range_fraction": 0.5, "answer_weight": DistillSettings.answer_weight}
RESERVE_S = 12.0  # left for saving and the report


@dataclass(frozen=True)
class Plan:
    """Sizes of the whole sweep. A run is known by its name, so change --output together with these."""

    train_tokens: float = setting(40e6, "Tokens that the originals are trained on.", at_least=1)
    train_lr: float = setting(2e-3, "Their learning rate.", above=0)
    train_batch: int = count(16, "Their sequences of a step.")
    seq_len: int = count(2048, "Tokens of a sequence, and the context of the models.")
    repeat_fraction: float = fraction(0.25, "Fraction of the rows in which spans are read again.")
    distill_tokens: float = setting(4e6, "Tokens of every recipe and control.", at_least=1)
    batch_size: int = count(16, "Sequences of a step of these.")
    documents: int = count(32, "Held-out documents for perplexity and for texts that are read twice.")
    clozes: int = count(500, "Near clozes.")
    items: int = count(1000, "Items of LAMBADA and PIQA.")
    vocabulary: int = count(
        0, "Tokens of a tokenizer that is trained on a part of the text, for a CPU; 0: the one given.", at_least=0
    )
    text_documents: int = count(400, "Documents of the text that are read then.")
    seed: int = count(0, "Seed of everything.", at_least=0)


class RepeatingText:
    """Rows of a corpus; in some of them spans of 16 to 128 tokens stand again up to half a row later.

    The target of every token counts. Row i is a function of (corpus, plan, i) alone.
    """

    def __init__(self, corpus: Corpus, plan: Plan):
        self.corpus, self.plan = corpus, plan
        self.seq_len, self.vocab_size = plan.seq_len, int(corpus.meta["tokenizer"]["vocabulary"])
        self.identity = f"{corpus.identity} repeats {plan.repeat_fraction} {plan.seq_len} {plan.seed}"
        self.packed = PackedSequences(corpus, plan.seq_len + 1, plan.seed)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T] and targets [T] of row `index`."""
        ids = self.packed.sequence(index)[0].copy()
        generator = np.random.default_rng([self.plan.seed, 23, index])
        if generator.random() < self.plan.repeat_fraction:
            repeat_spans(ids, generator)
        return next_tokens(ids)


def repeat_spans(ids: np.ndarray, generator: np.random.Generator) -> None:
    """Write spans of ids [T] again later, in place, until the end: lengths and distances are log-uniform."""
    at, total = 0, len(ids)
    while True:
        length = int(np.exp(generator.uniform(np.log(16), np.log(max(17, min(128, total // 8))))))
        distance = int(np.exp(generator.uniform(np.log(length + 1), np.log(max(length + 2, total // 2)))))
        if at + distance + length > total:
            return
        ids[at + distance : at + distance + length] = ids[at : at + length]
        at += distance + length


def make_config(name: str, vocab_size: int, seq_len: int) -> Any:
    """The configuration of an original: "llama-PRESET" has half as many KV heads, "nha-PRESET" q/k norm."""
    kind, _, preset = name.partition("-")
    shared: dict[str, Any] = {"window_sizes": -1, "max_position_embeddings": seq_len, "tie_word_embeddings": True}
    if kind == "nha":
        return preset_config(preset, vocab_size, qk_norm=True, **shared)
    heads = preset_config(preset, vocab_size).num_attention_heads
    return plain_config(preset_config(preset, vocab_size, num_key_value_heads=heads // 2, **shared))


def make_original(name: str, vocab_size: int, seq_len: int) -> PreTrainedModel:
    """An original with random weights."""
    config = make_config(name, vocab_size, seq_len)
    return NHAForCausalLM(config) if name.startswith("nha-") else LlamaForCausalLM(config)


def second_reading(model: PreTrainedModel, ids: Tensor) -> tuple[list[float], list[float]]:
    """Fraction of tokens predicted right in texts [N, T], for each text read for the first and for the second time."""
    first, second = [], []
    for row in ids.to(model.device):
        twice = torch.cat([row, row])[None]
        with torch.no_grad():
            right = (head_logits(model, hidden_states(model, twice)[0, :-1]).argmax(-1) == twice[0, 1:]).float()
        first.append(float(right[: len(row) - 1].mean()))
        second.append(float(right[len(row) :].mean()))
    return first, second


class Sweep:
    """All models of one process, until the time is up."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.plan, self.started = options, options.plan, time.monotonic()
        self.stop = Stop(max(1.0, options.budget_s - RESERVE_S))
        (options.output / "runs").mkdir(parents=True, exist_ok=True)

    def print(self, *words: Any) -> None:
        print(f"[{time.monotonic() - self.started:5.0f}]", *words, flush=True)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.options.budget_s - RESERVE_S - (time.monotonic() - self.started)

    def prepare(self) -> None:
        """Tokenizer, corpus and what is measured on."""
        options, plan = self.options, self.plan
        if plan.vocabulary:
            self.tokenizer, self.corpus = small_corpus(options.data, options.work, plan)
        else:
            self.tokenizer = load_tokenizer(options.tokenizer)
            self.corpus = find_corpus(options.corpus, options.data, options.work, self.tokenizer)
        self.print(f"{self.corpus.meta['tokens']:,} tokens ready")
        settings = PublicSettings(
            parts=options.parts,
            limit=plan.items,
            clozes=plan.clozes,
            lengths=(plan.seq_len,),
            documents=plan.documents,
        )
        self.public: PublicData = read_public(options.data, settings)

    def original(self, name: str) -> Path | None:
        """The folder of a trained original, or None where the time was up."""
        place, plan = self.options.work / f"{name}-{plan_digest(self.plan)}", self.plan
        if (place / "model" / "config.json").is_file():
            return place / "model"
        self.print(f"{name}: training on {plan.train_tokens / 1e6:g} M tokens")
        settings = TrainSettings(
            preset=name.partition("-")[2],
            window_size=-1,
            tokens=plan.train_tokens,
            batch_size=plan.train_batch,
            seq_len=plan.seq_len,
            packing="joined",
            lr=plan.train_lr,
            compile=self.options.compile,
            save_every=0,
            log_every=20,
            seed=plan.seed,
        )
        data = RepeatingText(self.corpus, plan)

        def log(entry: dict[str, float]) -> None:
            if "loss" in entry and entry["step"] % 200 <= settings.log_every:
                self.print(
                    f"  {name} step {entry['step']:.0f}: loss {entry['loss']:.3f}, {entry['tokens_per_s']:,.0f}/s"
                )

        found = train(
            data,
            place / "run",
            settings,
            make_model=lambda: make_original(name, data.vocab_size, plan.seq_len),
            reports=Reports(log=log),
            stop=self.stop,
        )
        if not found.finished:
            return None
        with atomic_directory(place / "model") as folder:
            found.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            (folder / "training.json").write_text(json.dumps(found.summary | {"log": found.log}) + "\n")
        return place / "model"

    def make(self, name: str, recipe: str | None, control: bool) -> bool:
        """Train and measure a model; False where the time was up. Without a recipe: the original as it is."""
        run = self.run_name(name, recipe, control)
        if any((folder / "runs" / f"{run}.json").is_file() for folder in (self.options.output, self.options.known)):
            self.print(run, "is there already")
            return True
        place = self.original(name)
        if place is None or self.left < 8:
            return False
        cuda, begun = torch.cuda.is_available(), time.monotonic()
        source = loading.find_to_convert(str(place))
        model, _ = loading.load(source, dtype="bfloat16" if cuda else "float32")
        row: dict[str, Any] = {"model": name, "recipe": recipe, "kind": kind_of(recipe, control)}
        log: list[dict[str, float]] = []
        if recipe is not None:
            settings = self.recipe(recipe, model.config)
            folder = self.options.work / "runs" / run
            found = distill(model, self.tokenizer, self.corpus, folder, settings, control=control, stop=self.stop)
            if not found.finished:
                return False
            model, log = found.model.eval(), found.log
            row |= {
                "tokens": int(log[-1]["tokens"]),
                "learning_rates": settings.learning_rates(model.config.hidden_size)[:2],
            }
            row |= {"control": self.batches(recipe, model.config)}
            row |= {"teacher_tokens": 0.0 if control else settings.teacher_tokens}
            row |= {"seconds": round(time.monotonic() - begun, 1), "full_layers": list(settings.full_layers)}
        self.print(f"{run} trained")
        measured = self.measure(model)
        about = json.loads((place / "training.json").read_text())
        row |= {
            "windows": list(getattr(model.config, "window_sizes", [-1] * model.config.num_hidden_layers)),
            "bytes_16k": cache_bytes(model, 16384) if recipe else None,
            "parameters": about["parameters"],
            "train_tokens": about["tokens"],
            "seed": self.plan.seed,
            "gpu": torch.cuda.get_device_name(0) if cuda else None,
            "versions": versions(),
            "date": str(date.today()),
            "command": f"python -m experiments.second_model --data DATA --models {name}{changed_options(self.plan)}",
        }
        data = {"row": row, "plan": dataclasses.asdict(self.plan), "log": log, "eval": measured}
        if recipe is None:
            data["log"] = about["log"]
        write_atomically(self.options.output / "runs" / f"{run}.json", json.dumps(data) + "\n")
        self.print(run, "measured")
        return True

    def recipe(self, name: str, config: Any) -> DistillSettings:
        """The settings of a recipe for a model: windows, slots and rates. "constant:2" doubles learning rates."""
        plan = self.plan
        given = {"tokens": plan.distill_tokens, "seed": plan.seed, "batch_size": plan.batch_size}
        given |= {"teacher_tokens": TEACHER_FRACTION * plan.distill_tokens, **MIXTURE}
        given |= {"compile": "nothing", "save_every": 10**9, **self.options.changes}
        name, _, factor = name.partition(":")
        context = config.max_position_embeddings
        plain = recipe_settings(name, config.num_hidden_layers, given=given, context=context)
        if not factor:
            return plain
        lr, gate_lr, sink_lr = (float(factor) * rate for rate in plain.learning_rates(config.hidden_size))
        return dataclasses.replace(plain, lr=lr, gate_lr=gate_lr, sink_lr=sink_lr)

    def batches(self, recipe: str, config: Any) -> str:
        """A digest of the batches of a recipe: recipes with the same one share a control, whatever its rates."""
        return batches_digest(self.recipe(recipe.partition(":")[0], config))

    def run_name(self, name: str, recipe: str | None, control: bool) -> str:
        """A name for the file of a run."""
        name, kind = f"{name}-{self.plan.train_tokens / 1e6:g}M", name
        end = f"{self.plan.distill_tokens / 1e6:g}M-{self.plan.seed}"
        if recipe is None:
            return f"{name}-original-{self.plan.seed}"
        plain, _, factor = recipe.partition(":")
        rate = f"x{factor}" if factor else ""
        if control:
            return f"{name}-control-{self.batches(plain, make_config(kind, 64, self.plan.seq_len))}{rate}-{end}"
        return f"{name}-{plain}{rate}-{end}"

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """Public parts, and texts that are read twice: of 128 tokens, and of half the context."""
        found = measure_public(model, self.tokenizer, self.public)
        found["repeats"] = {}
        for ids in self.repeats:
            first, second = second_reading(model, ids)
            found["repeats"][str(ids.shape[1])] = {"first": first, "second": second}
        return found

    @cached_property
    def repeats(self) -> list[Tensor]:
        """Held-out texts [N, T] that are read twice, of 128 tokens and of half the context."""
        half = self.plan.seq_len // 2
        documents = [np.asarray(self.tokenizer(text, verbose=False).input_ids) for text in self.public.held_out]
        return [cut(documents, length, self.plan.documents) for length in sorted({min(128, half), half})]

    def run(self) -> int:
        """Make everything that is not there. Returns the exit status."""
        late, failed = [], []
        for name in self.options.models:
            for recipe, control in order(self.options.recipes):
                try:
                    if not self.make(name, recipe, control):
                        late.append(self.run_name(name, recipe, control))
                except Exception:
                    traceback.print_exc()
                    failed.append(self.run_name(name, recipe, control))
                gc.collect()  # a Trainer refers to itself
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        write_report(self.options.output)
        self.print(f"failed: {failed}; no time for: {late}")
        return 1 if failed else 3 if late else 0


def order(recipes: list[str]) -> list[tuple[str | None, bool]]:
    """(recipe, is a control) of the runs of a model, the most important first; the original has no recipe.

    A recipe with a factor of the learning rates has a control of its own, with its rates.

    >>> order(["constant", "constant:2"])[1:]
    [('constant', True), ('constant', False), ('constant:2', True), ('constant:2', False)]
    """
    pairs: list[tuple[str | None, bool]] = [(None, False)]
    return pairs + [(recipe, control) for recipe in recipes for control in (True, False)]


def kind_of(recipe: str | None, control: bool) -> str:
    """ "original", "control" or "hybrid"."""
    return "original" if recipe is None else "control" if control else "hybrid"


def plan_digest(plan: Plan) -> str:
    """A name for what an original depends on."""
    return f"{plan.train_tokens / 1e6:g}M-{plan.seq_len}-{plan.repeat_fraction:g}-{plan.train_lr:g}-{plan.seed}"


def changed_options(plan: Plan) -> str:
    """The options of a plan that are not the default.

    >>> changed_options(Plan(seq_len=512))
    ' --seq-len 512'
    """
    found = [(entry, getattr(plan, entry.name)) for entry in dataclasses.fields(Plan)]
    return "".join(f" {option_name(entry)} {value:g}" for entry, value in found if value != entry.default)


def find_corpus(given: Path | None, data: Path, work: Path, tokenizer: Any) -> Corpus:
    """The corpus in a folder if there is one; else that of the training text, made in `work`."""
    if given is not None and (given / "meta.json").is_file():
        return open_corpus(given, tokenizer)
    return prepare_corpus(data, work, tokenizer)


def small_corpus(data: Path, work: Path, plan: Plan) -> tuple[Any, Corpus]:
    """A byte tokenizer with a small vocabulary and the corpus that it reads, of documents spread over the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from nha.data.prepare import prepare
    from nha.data.sources import json_rows
    from nha.evaluate.public.sets import find_set, spaced

    place = work / f"small-{plan.vocabulary}-{plan.text_documents}"
    if not (place / "corpus" / "meta.json").is_file():
        rows = spaced([row["text"] for _, row in json_rows(find_set(data, "train"))], plan.text_documents)
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(rows, vocab_size=plan.vocabulary, show_progress=False)
        place.mkdir(parents=True, exist_ok=True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
        tokenizer.save_pretrained(place / "tokenizer")
        (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        prepare([str(place / "text.jsonl")], place / "corpus", tokenizer, held_out_fraction=0.0)
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    return tokenizer, open_corpus(place / "corpus", tokenizer)


def load_tokenizer(given: str) -> Any:
    """A tokenizer: of a .gguf file, or by name."""
    if given.endswith(".gguf"):
        from transformers import AutoTokenizer

        path = Path(given)
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return loading.load_tokenizer(loading.find(given))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options; those of `Plan` come from its fields."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text/train, text/heldout and eval/*, as JSON lines")
    parser.add_argument("--output", type=Path, default=Path("results/generality"))
    parser.add_argument("--known", type=Path, default=Path("results/generality"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nha-second")
    parser.add_argument("--corpus", type=Path, help="a corpus of this tokenizer, if it is there")
    parser.add_argument("--tokenizer", default=os.environ.get("NHA_QUALITY_MODEL", "smollm2"))
    parser.add_argument("--models", type=lambda s: s.split(","), default=["llama-20m", "nha-20m"])
    parser.add_argument("--recipes", type=lambda s: s.split(","), default=["constant", "balanced"])
    parser.add_argument(
        "--compile", default="nothing", choices=COMPILED, help="of originals; layers cost half a minute"
    )
    parser.add_argument("--set", action="append", default=[], help="K=V, a setting of every recipe; repeatable")
    parts = ("perplexity", "cloze_near", "lambada_openai", "piqa")
    parser.add_argument("--parts", type=lambda s: tuple(s.split(",")), default=parts)
    parser.add_argument("--budget-s", type=float, default=1e9)
    parser.add_argument("--report", type=Path, help="make table and summary of this folder anew, and stop")
    for entry in dataclasses.fields(Plan):
        own = float if "float" in str(entry.type) else int
        parser.add_argument(option_name(entry), type=own, default=entry.default, help=entry.metadata["help"])
    options = parser.parse_args(arguments)
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"expected models out of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if options.data is None and options.report is None:
        parser.error("expected --data")
    from experiments.distill import parse_settings

    options.changes = parse_settings(options.set) if options.set else {}
    options.plan = Plan(**{entry.name: getattr(options, entry.name) for entry in dataclasses.fields(Plan)})
    return options


def main(arguments: list[str] | None = None) -> int:
    """Make all runs, or the report."""
    options = parse_options(arguments)
    if options.report is not None:
        print(write_report(options.report))
        return 0
    sweep = Sweep(options)
    sweep.prepare()
    return sweep.run()


if __name__ == "__main__":
    sys.exit(main())
