"""Distil hybrids and their fair controls on real text, and measure each on public sets; one GPU or several.

    PYTHONPATH=src python -m experiments.quality --data DATA --output OUT --work WORK --shard 0/4 &  # and 1/4, 2/4, 3/4

    --data         text/train.jsonl.xz, text/heldout.jsonl.xz and eval/*.jsonl.xz
    --model        a model directory, a .gguf file, or smollm2 (default: the variable NHA_QUALITY_MODEL, else smollm2)
    --output       runs/*.json (a run's row, answers and log), summary.json, logs.jsonl, table.md, pictures, ship/
    --work         checkpoints, tokens, the model; shared by all shards; the same command resumes from there
    --runs         out of those that --plan lists; their controls come along (--no-controls: without, --only-controls:
                   these alone)
    --tokens       such as 4full=25e6,constant=40e6: tokens by recipe or budget
    --set K=V      change a setting of every run (see DistillSettings); repeatable
    --seeds        0,1,2 for instance
    --budget-s     stop in time, with a checkpoint; exit status 3 if something is left
    --long-needles measure needles beyond the training length as well, to 128K tokens
    --file FILE    the small file that the recipe `shipped` is measured with (default: the one in this package)
    --files        write the small file of each trained hybrid to `ship` as soon as it is trained
    --plan         print runs, shards, estimated seconds and the control that each recipe is compared with, and stop
    --report DIR   make table and pictures of DIR anew, and stop

A run's row is written anew with every part of its evaluation that ends, and names those that are "missing": the same
command measures them, whether time was up or the run was killed. Runs that are in --output or in --known (default:
results/quality) are not made again; one that lacks parts is not either where --work no longer has what was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from experiments.quality_rows import cache_bytes, command_of, has_row, read_run, row_of, source_of, write_run
from experiments.quality_runs import DEFAULT_RECIPES, RECIPES, Run, control_of, deal, make_runs

# What decides most comes first: where time is up, a run is kept without the rest.
LONG_NEEDLE = "long needle"
ORDER = ("perplexity", "needle", "cloze_near", "cloze_far", "squad_qa", "lambada_openai", "piqa", "arc_easy")
ORDER += ("arc_challenge", "boolq", "hellaswag", LONG_NEEDLE, "copa")
KNOWN = Path("results/quality")
TOKENIZE_S = 20.0  # that an evaluation waits for sets which another process tokenizes, at most
TIMES = ("tokens_per_s", "loss", "kl", "cross_entropy", "answer_accuracy")


def parse_pairs(text: str) -> dict[str, float]:
    """Numbers by name.

    >>> parse_pairs("4full=25e6,constant=4e7")
    {'4full': 25000000.0, 'constant': 40000000.0}
    """
    pairs = (part.partition("=") for part in text.split(",") if part)
    return {name: float(value) for name, _, value in pairs}


def parse_ints(text: str) -> tuple[int, ...]:
    """Integers separated by commas."""
    return tuple(int(part) for part in text.split(",") if part)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default=os.environ.get("NHA_QUALITY_MODEL", "smollm2"))
    parser.add_argument("--output", type=Path, default=Path("results/quality"))
    parser.add_argument("--known", type=Path, default=KNOWN)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nha-quality")
    parser.add_argument("--runs", type=lambda s: s.split(","), default=list(DEFAULT_RECIPES))
    parser.add_argument("--seeds", type=parse_ints, default=(0,))
    parser.add_argument("--tokens", type=parse_pairs, default={})
    parser.add_argument("--set", action="append", default=[], dest="pairs")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--budget-s", type=float, default=1e9)
    parser.add_argument("--layers", type=int, default=30, help="of the model, for the recipes")
    parser.add_argument("--limit", type=int, help="items of a set")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--clozes", type=int, default=500)
    parser.add_argument("--needles", type=int, default=20, help="of each length and depth (5 depths)")
    parser.add_argument("--needle-lengths", type=parse_ints, default=(2048, 4096, 8192))
    parser.add_argument("--long-needle-count", type=int, default=10, help="of each depth")
    parser.add_argument("--lengths", type=parse_ints, default=(2048, 8192))
    parser.add_argument("--parts", type=lambda s: tuple(s.split(",")), help="out of those of nha eval public")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--report", type=Path)
    for flag in ("long-needles", "files", "plan"):
        parser.add_argument(f"--{flag}", action="store_true")
    controls = parser.add_mutually_exclusive_group()
    controls.add_argument("--no-controls", action="store_true")
    controls.add_argument("--only-controls", action="store_true")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.runs if name not in RECIPES]
    if unknown:
        parser.error(f"expected --runs out of {', '.join(RECIPES)}, got {', '.join(unknown)}")
    shard, _, shards = options.shard.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        parser.error(f"expected --shard as I/N with I below N, got {options.shard}")
    options.shard, options.shards = int(shard), int(shards)
    if options.data is None and not options.plan and options.report is None:
        parser.error("expected --data")
    return options


@contextmanager
def alone(work: Path, name: str) -> Iterator[None]:
    """One process at a time within the block."""
    import fcntl

    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_model(given: str, work: Path) -> Any:
    """The source of the base model; one in a .gguf file is written once as a directory that loads fast."""
    from nha.models import loading

    if not given.endswith(".gguf"):
        return loading.find(given)
    place = work / "base"
    with alone(work, "model"):
        if not (place / "config.json").is_file():
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from nha.io import atomic_directory
            from nha.models.smollm2 import forget_gguf

            path = Path(given)
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
            forget_gguf(model)
            with atomic_directory(place) as folder:
                model.save_pretrained(folder)
                AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return loading.find(str(place))


def join_chapters(source: Path, target: Path) -> None:
    """Write documents as JSON lines, consecutive ones of one chapter joined: these are long enough for 8K tokens."""
    from nha.data.sources import json_rows, text_in
    from nha.io import atomic_write

    with atomic_write(target) as work, work.open("w", encoding="utf-8") as file:
        texts: list[str] = []
        before: Any = None
        for number, row in json_rows(source):
            place = (row.get("source"), row.get("book"), row.get("chapter"))
            chapter = place[1:] if all(place[1:]) else place
            if texts and chapter != before:
                file.write(json.dumps({"text": "\n\n".join(texts)}) + "\n")
                texts = []
            texts.append(text_in(row, "text", f"line {number} of {source}"))
            before = chapter
        file.write(json.dumps({"text": "\n\n".join(texts)}) + "\n")


def prepare_corpus(data: Path, work: Path, tokenizer: Any) -> Any:
    """The tokens of the training text, made once for all shards."""
    from nha.data.corpus import open_corpus
    from nha.data.prepare import prepare
    from nha.evaluate.public.sets import find_set

    with alone(work, "corpus"):
        if not (work / "corpus").is_dir():
            join_chapters(find_set(data, "train"), work / "train.jsonl")
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            prepare([str(work / "train.jsonl")], work / "corpus", tokenizer, held_out_fraction=0.0)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return open_corpus(work / "corpus", tokenizer)


class TimeIsUp(Exception):
    """Ends a part of an evaluation."""


class Trained(NamedTuple):
    """A model and the logs of its training."""

    model: Any
    log: list[dict[str, float]]
    teacher_log: list[dict[str, float]]


class Shard:
    """The runs of one GPU, one after another, until the time is up."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.started = options, time.monotonic()
        self.folder = options.output / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.timelines: dict[str, Any] = {}

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.options.budget_s - (time.monotonic() - self.started)

    def print(self, *words: Any) -> None:
        """Print a line with shard and time."""
        print(f"[{self.options.shard} {time.monotonic() - self.started:5.0f}]", *words, flush=True)

    def prepare(self) -> None:
        """Load what all runs share."""
        from nha.evaluate.public.run import PARTS, PublicSettings, read_public
        from nha.models import loading

        options = self.options
        self.source = prepare_model(options.model, options.work)
        self.print("model ready")
        self.tokenizer = loading.load_tokenizer(self.source)
        short = PublicSettings(
            parts=options.parts or PARTS,
            limit=options.limit,
            questions=options.questions,
            clozes=options.clozes,
            needle_lengths=options.needle_lengths,
            needles=options.needles,
            lengths=options.lengths,
        )
        self.public = read_public(options.data, short)
        self.tokenize_aside()
        self.corpus = prepare_corpus(options.data, options.work, self.tokenizer)
        self.print(f"{self.corpus.meta['tokens']:,} tokens of {self.corpus.meta['documents']:,} documents ready")

    def load(self) -> Any:
        """The base model anew: a run converts it in place."""
        import torch

        from nha.models import loading

        return loading.load(self.source, dtype="bfloat16" if torch.cuda.is_available() else "float32")[0]

    def tokenize(self) -> None:
        """Tokenize all sets, and make the clozes, which takes half a minute."""
        from nha.data.cloze import RANGES
        from nha.evaluate.public.sets import FORMATS

        context = getattr(self.source.config, "max_position_embeddings", None)
        for part in self.public.settings.parts:
            if part in RANGES:
                self.public.clozes(self.tokenizer, part)
            elif part in self.public.items and FORMATS[part].kind != "question":
                self.public.requests(self.tokenizer, part, context)

    def tokenize_aside(self) -> None:
        """Begin to tokenize in a process of its own, so that a GPU need not wait for it later."""
        fork = multiprocessing.get_context("fork")  # a new interpreter would read the sets again
        self.tokenized, end = fork.Pipe(duplex=False)

        def work() -> None:
            self.tokenize()
            end.send(self.public)

        fork.Process(target=work, daemon=True).start()
        end.close()

    def take_tokenized(self) -> None:
        """The sets as the other process tokenized them, if it has: it began before the training did."""
        if self.tokenized is None:
            return
        try:
            if self.tokenized.poll(TOKENIZE_S):
                self.public = self.tokenized.recv()
            else:
                self.print("sets are still being tokenized aside: not waited for")
        except EOFError:
            self.print("sets were not tokenized aside")
        self.tokenized.close()
        self.tokenized = None

    def train(self, run: Run, settings: Any = None) -> Any:
        """The trained model of a run, or None if the time was up."""
        from nha.distill.run import distill, train_teacher
        from nha.distill.timeline import Timeline
        from nha.distill.trainer import Reports

        def log(entry: dict[str, float], name: str = run.name) -> None:
            if entry["step"] % (10 * settings.log_every) == 0 or entry["step"] <= settings.log_every:
                shown = " ".join(f"{key} {value:.3f}" for key, value in entry.items() if key in TIMES)
                self.print(f"  {name} step {entry['step']:.0f}: {shown}")

        def in_time() -> Any:
            return dataclasses.replace(run.settings, budget=max(1.0, min(1e9, self.left - 15)))

        settings, runs = in_time(), self.options.work / "runs"
        reports = Reports(log=log, teacher_log=lambda entry: log(entry, run.teacher))
        self.timelines = {"teacher": reports.timeline}
        if settings.teacher_tokens and run.recipe:
            with alone(self.options.work, run.teacher):  # the first shard trains it, the others wait
                self.print(f"  {run.teacher} begins or is there")
                given = (self.tokenizer, self.corpus, runs / run.teacher, in_time())
                if not train_teacher(self.load(), *given, reports=reports).finished:
                    return None
            settings = in_time()
        reports = dataclasses.replace(reports, timeline=Timeline(time.time()))
        self.timelines["hybrid"] = reports.timeline
        found = distill(
            self.load(),
            self.tokenizer,
            self.corpus,
            runs / run.name,
            settings,
            control=run.recipe is None,
            teacher_run=runs / run.teacher,
            reports=reports,
        )
        for name, timeline in self.timelines.items():
            self.print(f"  {name} {timeline}")
        return found if found.finished else None

    def read_shipped(self, source: Run) -> Trained:
        """The hybrid of the small file, with the logs of the known run that it was made of."""
        from nha.models.delta import apply_delta
        from nha.models.smollm2 import DELTA

        known = json.loads((KNOWN / "runs" / f"{source.name}.json").read_text(encoding="utf-8"))
        model = self.load()
        apply_delta(model, self.options.file or DELTA)
        return Trained(model.eval(), known["log"], known.get("teacher_log", []))

    def write_file(self, run: Run, found: Any) -> Path:
        """Write the small file of a run to `ship`: what LoRA trained, the best changes of a rank, or all in 2 bits."""
        from experiments.ship import make_delta

        path = self.options.output / "ship" / f"{run.name}.safetensors"
        lora = self.options.work / "runs" / run.name if run.settings.trainable == "lora" else None
        base = None if lora else self.load()
        rank = run.settings.lora_rank if run.recipe and run.recipe.shipped == "svd" else None
        make_delta(path, base, found.model, {"command": command_of(run)}, lora, rank)
        self.print(f"  {path}: {path.stat().st_size / 1e6:.2f} MB")
        return path

    def shipped(self, run: Run, found: Any) -> Any:
        """The base model with the small file of a run."""
        from nha.models.delta import apply_delta

        path = self.write_file(run, found)
        model = self.load()
        apply_delta(model, path)
        return model.eval()

    def measure(self, run: Run, model: Any, keep: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The evaluation of a run's model part by part; "missing" names those that there was no time for.

        `keep` is called with the evaluation so far after every part that ends.
        """
        from nha.evaluate.partial import open_partial
        from nha.evaluate.public.run import PARTS, PublicData, measure_public

        self.take_tokenized()
        partial = open_partial(self.options.work / "partial" / f"{run.name}.jsonl", self.public.identity)
        started, whole = time.monotonic(), self.public.settings
        found: dict[str, Any] = {"sets": {}, "needle": {}, "perplexity": {}, "notes": [], "seconds": {}}
        lengths = run.recipe.long_needles if run.recipe and self.options.long_needles else ()
        parts = sorted((*whole.parts, LONG_NEEDLE) if lengths else whole.parts, key=ORDER.index)

        def so_far() -> dict[str, Any]:
            missing = [part for part in parts if part not in found["seconds"]]
            sets = {part: found["sets"][part] for part in PARTS if part in found["sets"]}
            return found | {"sets": sets} | ({"missing": missing} if missing else {})

        def progress(part: str, done: int, total: int) -> None:
            if self.left < 0:
                raise TimeIsUp
            if done == total:
                self.print(f"  {run.name} {part}: {time.monotonic() - started:.0f} s")

        def add(part: str, data: PublicData, name: str) -> None:
            """Measure a part, where time is left, and keep what was found."""
            begun = time.monotonic()
            try:
                new = measure_public(model, self.tokenizer, data, name=name, partial=partial, progress=progress)
            except TimeIsUp:
                return
            for kind in ("sets", "needle", "perplexity"):
                found[kind] |= new[kind]
            found["notes"] += new["notes"]
            found["seconds"][part] = round(time.monotonic() - begun, 2)
            try:
                keep(so_far())
            except Exception:  # the other parts are measured all the same; who calls keeps them once more
                traceback.print_exc()

        for part in parts:
            if part == LONG_NEEDLE:
                count = self.options.long_needle_count
                settings = dataclasses.replace(whole, parts=("needle",), needles=count, needle_lengths=lengths)
                add(part, PublicData(settings, {}, self.public.held_out, self.public.files), "long")
                continue
            self.public.settings = dataclasses.replace(whole, parts=(part,))
            add(part, self.public, "model")
        self.public.settings = whole
        return so_far()

    def make(self, run: Run) -> bool:
        """Train and measure a run, and write it with every part that is measured; False if the time was up."""
        import torch

        from nha.models.windows import set_kv_cache_dtype, set_state_dtype

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        begun = time.monotonic()
        trained = source_of(run)
        from_file = run.recipe is not None and run.recipe.shipped == "file"
        found = self.read_shipped(trained) if from_file else self.train(trained)
        if found is None:
            return False
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        seconds = time.monotonic() - begun
        self.print(f"{run.name} trained in {seconds:.0f} s")
        model = self.shipped(run, found) if run.recipe and run.recipe.shipped and not from_file else found.model
        if run.recipe:
            set_state_dtype(model, run.recipe.state_dtype)
            set_kv_cache_dtype(model, run.recipe.kv_cache_dtype)
        if self.options.files and run.recipe and not run.recipe.source and not run.recipe.shipped:
            self.write_file(run, found)
        begun, before, held = time.monotonic(), read_run(self.folder, run), cache_bytes(model, 16384)

        def keep(measured: dict[str, Any]) -> dict[str, Any]:
            times = {"train_seconds": round(seconds, 1), "eval_seconds": round(time.monotonic() - begun, 1)}
            return self.write_row(run, model.config, held, found, measured, times | {"memory_gib": peak}, before)

        measured = self.measure(run, model, keep)
        row = keep(measured)
        self.print(run.name, json.dumps({k: v for k, v in row.items() if k not in ("windows", "versions")}))
        return "missing" not in measured

    def write_row(
        self,
        run: Run,
        config: Any,
        held: int,
        trained: Any,
        measured: dict[str, Any],
        times: dict[str, Any],
        before: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Write the row of what is measured so far, see `row_of`, and return it.

        `before` is the run's file of an earlier call.
        """
        from nha.io import write_atomically

        about: dict[str, Any] = {"settings": dataclasses.asdict(run.settings), "log": trained.log, "eval": measured}
        about |= {"teacher_log": trained.teacher_log} if trained.teacher_log else {}
        about["timelines"] = {name: timeline.stages for name, timeline in self.timelines.items()}
        kept = self.options.output / "measured" / f"{run.name}.json"  # there, should anything below fail
        kept.parent.mkdir(exist_ok=True)
        write_atomically(kept, json.dumps(times | about) + "\n")
        row = row_of(run, config, held, measured, trained.log) | times
        row |= {"missing": measured["missing"]} if "missing" in measured else {}
        row = write_run(self.folder, run, {"row": row} | about, before)
        kept.unlink()
        return row

    def is_known(self, run: Run) -> bool:
        """Whether a run was made before. One that was measured in part is, unless what was trained is still there."""
        return any(has_row(folder, run, self.options.work) for folder in (self.options.known / "runs", self.folder))

    def run_all(self, runs: list[Run]) -> int:
        """Make all runs that are not there. Returns the exit status: 0, 1 if one failed, 3 if time was up."""
        import torch

        from experiments.quality_report import write_report

        failed, late = [], []
        for run in runs:
            if self.is_known(run):
                self.print(run.name, "is there already")
                continue
            if self.left < 30:
                late.append(run.name)
                continue
            self.print(f"{run.name} starts, about {run.seconds:.0f} s")
            try:
                if not self.make(run):
                    late.append(run.name)
            except Exception:
                traceback.print_exc()
                failed.append(run.name)
            gc.collect()  # a Trainer refers to itself
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        with alone(self.options.work, "report"):
            write_report(self.options.output)
        self.print(f"done; failed: {failed}; no time for: {late}")
        return 1 if failed else 3 if late else 0


def print_plan(shards: list[list[Run]], known: list[Run]) -> None:
    """Print the runs of every shard: seconds, the teacher that is trained first, the control it is compared with."""
    names = {run.name for run in known}
    for index, some in enumerate(shards):
        print(f"shard {index}: {sum(run.seconds for run in some):.0f} s")
        for run in some:
            beside = control_of(run).name if run.recipe else ""
            words = [f"{run.seconds:.0f} s"]
            words += [f"teacher {run.teacher}"] if run.recipe and run.settings.teacher_tokens else []
            words += [f"beside {beside}{', known' if beside in names else ''}"] if beside else []
            print(f"  {run.name}: {'; '.join(words)}")
    print("known:", ", ".join(sorted(names)) or "none")


def main(arguments: list[str] | None = None) -> int:
    """Make the runs of a shard."""
    options = parse_options(arguments)
    if options.report is not None:
        from experiments.quality_report import write_report

        print(write_report(options.report))
        return 0
    given = {}
    if options.pairs:
        from experiments.distill import parse_settings

        given = parse_settings(options.pairs)
    runs = make_runs(options.runs, options.seeds, options.tokens, options.layers, given, not options.no_controls)
    if options.only_controls:
        runs = [run for run in runs if run.recipe is None]
    known = [run for run in runs if has_row(options.known / "runs", run, options.work)]
    shards = deal([run for run in runs if run not in known], options.shards)
    if options.plan:
        print_plan(shards, known)
        return 0
    if options.shards > 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", str(options.shard))
    shard = Shard(options)
    shard.prepare()
    return shard.run_all(shards[options.shard])


if __name__ == "__main__":
    sys.exit(main())
