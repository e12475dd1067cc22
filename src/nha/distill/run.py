"""`distill`: a pretrained model becomes a hybrid trained to be like it, in a run that can be stopped anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from nha.convert.align import align
from nha.convert.calibrate import SINK_TOKENS
from nha.convert.card import CardFacts, save_hybrid
from nha.convert.hybridize import INITS, hybridize
from nha.data.corpus import Corpus
from nha.data.recall import RecallSettings
from nha.data.stream import Mixture, Stream
from nha.distill.student import TRAINED, Distillation
from nha.distill.trainer import GRADIENTS, DistillTrainer, JsonlLogger, latest_checkpoint, load_trained
from nha.io import write_atomically
from nha.models.adapter import to_hybrid
from nha.models.cache_file import fingerprint
from nha.models.config import FULL, plan_windows
from nha.models.families import check_family
from nha.models.windows import attention_layers

RUN = "run.json"
COMPILED = ("layers", "nothing")
RATE, GATE_RATE, TUNED_WIDTH = 2e-3, 8e-3, 576
SOFT_ALIGN_RATE, SHARP_ALIGN_RATE = 6e-4, 1e-2  # of gates, which have logits of deviation 6 and 100


@dataclass(frozen=True)
class DistillSettings:
    """Everything that a run depends on besides the model and the corpus; a run only goes on with the same.

    Attributes:
        window_size, num_slots, full_layers, init, num_sinks, slot_distance: as `hybridize` takes them; a window of
            -1 in every layer trains the model itself, for comparison.
        tokens: to train on in all, over all devices; `long_tokens` of them, at the end, in rows of `long_length`.
        rows, length: rows of a step (on each device) and tokens of a row.
        align_steps: steps of stage 1, in which each layer's gates and sinks learn its old output (0 leaves it out).
        align_rows: texts of `length` tokens that stage 1 reads.
        rate, gate_lr, sink_lr: learning rates of weights, gates and sinks; None as `rates` says.
        warmup: share of the steps in which rates rise.
        trained: "attention" (its linear layers), "layers" (those of the feed-forward part too), "lora" (adapters of
            rank `rank` in attention) or "slots" (gates and sinks alone).
        divergence, cross_entropy: weights of the divergence from the teacher and of the cross-entropy, per token.
        recall_share: of rows that are recall text; `recall` says what it is made of, `grow` after which share of the
            steps it has the most facts.
        answers: weight of the cross-entropy of its answers (with gradients "normalise": the norm of recall's
            gradient as a share of text's).
        gradients: "clip" or "normalise" treats those of text and recall text apart, "together" clips their sum.
        clip: the largest norm of a gradient.
        window_dropout: share of steps with a quarter of the windows.
        slots_off: train the window and the sinks alone (for comparison).
        micro_batch_size: rows that go through the model at a time (0: all); `checkpointing` recomputes activations.
        save_every, log_every: steps between checkpoints and between entries of the log.
        seed: of everything random.
    """

    window_size: int | tuple[int, ...] = 64
    num_slots: int = 64
    full_layers: tuple[int, ...] = ()
    init: str = "spread"
    num_sinks: int = 1
    slot_distance: int = 128
    tokens: float = 20e6
    long_tokens: float = 0.0
    rows: int = 16
    length: int = 2048
    long_length: int = 8192
    align_steps: int = 40
    align_rows: int = 32
    rate: float | None = None
    gate_lr: float | None = None
    sink_lr: float = 1e-3
    warmup: float = 0.05
    trained: str = "attention"
    rank: int = 16
    divergence: float = 1.0
    cross_entropy: float = 0.5
    recall_share: float = 0.125
    recall: RecallSettings = field(default_factory=RecallSettings)
    grow: float = 0.0
    answers: float = 0.5
    gradients: str = "normalise"
    clip: float = 1.0
    window_dropout: float = 0.0
    slots_off: bool = False
    micro_batch_size: int = 0
    checkpointing: bool = False
    save_every: int = 200
    log_every: int = 10
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError, in one line, for a setting outside what it can be."""
        least = {
            "num_slots": 1,
            "num_sinks": 0,
            "slot_distance": 0,
            "rows": 1,
            "length": 2,
            "long_length": 2,
            "align_steps": 0,
            "align_rows": 1,
            "rank": 1,
            "micro_batch_size": 0,
            "save_every": 1,
            "log_every": 1,
            "tokens": 1,
            "long_tokens": 0,
            "rate": 0,
            "gate_lr": 0,
            "sink_lr": 0,
            "divergence": 0,
            "cross_entropy": 0,
            "answers": 0,
            "seed": 0,
        }
        for name, low in least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= low:
                raise ValueError(f"expected {name} of at least {low}, got {getattr(self, name)}")
        for name in ("warmup", "recall_share", "grow", "window_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"expected clip above 0, got {self.clip}")
        for name, known in (("trained", TRAINED), ("gradients", GRADIENTS), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {known}, got {getattr(self, name)!r}")
        if self.divergence == self.cross_entropy == 0 and not self.recall_share * self.answers:
            raise ValueError("expected a loss, got divergence, cross_entropy and answers of weight 0")
        if self.long_tokens > self.tokens:
            raise ValueError(f"expected long_tokens of at most tokens, {self.tokens:g}, got {self.long_tokens:g}")

    def rates(self, hidden_size: int) -> tuple[float, float, float]:
        """Learning rates of weights, gates and sinks for a model of this width.

        The default, 2e-3 and 8e-3, is what was best at a width of 576. Wider models get less in proportion, as Adam's
        steps want it (arXiv 2203.03466); that has not been measured here.

        >>> DistillSettings().rates(576), DistillSettings(rate=1e-4).rates(4608)
        ((0.002, 0.008, 0.001), (0.0001, 0.001, 0.001))
        """
        share = min(1.0, TUNED_WIDTH / hidden_size)
        rate = RATE * share if self.rate is None else self.rate
        return rate, GATE_RATE * share if self.gate_lr is None else self.gate_lr, self.sink_lr

    def mixture(self, world: int = 1) -> Mixture:
        """The batches of the run on `world` devices."""
        step = self.rows * self.length * world
        steps = max(1, round((self.tokens - self.long_tokens) / step))
        long_rows = max(1, self.rows * self.length // self.long_length)
        long_steps = round(self.long_tokens / (long_rows * self.long_length * world))
        window = self.window_size if isinstance(self.window_size, int) else max(self.window_size)
        distances = (max(self.recall.distances[0], window + 8), self.recall.distances[1])
        recall = dataclasses.replace(self.recall, distances=distances)
        return Mixture(
            steps=steps + long_steps,
            batch_size=self.rows,
            seq_len=self.length,
            long_steps=long_steps,
            long_seq_len=self.long_length,
            recall_fraction=self.recall_share,
            recall=recall,
            fact_warmup=self.grow,
            kl_weight=self.divergence,
            cross_entropy_weight=self.cross_entropy,
            answer_weight=self.answers,
            separate_recall=self.gradients != "together",
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
        )


@dataclass
class Distilled:
    """The outcome: the hybrid with plain weights, whether all steps were made, and what was logged."""

    model: PreTrainedModel
    finished: bool
    steps: int
    log: list[dict[str, float]]
    aligned: list[tuple[float, float]]


def describe(model: PreTrainedModel, corpus: Corpus, settings: DistillSettings, world: int) -> dict[str, Any]:
    """What has to be equal for a run to go on, as JSON has it. How often to save and log may change."""
    found = {"teacher": fingerprint(model), "corpus": corpus.identity, "devices": world, "dtype": str(model.dtype)}
    found |= dataclasses.asdict(settings)
    for name in ("save_every", "log_every"):
        del found[name]
    return json.loads(json.dumps(found))


def check_run(run: Path, wanted: dict[str, Any]) -> None:
    """Begin a run in a directory, or raise ValueError if it holds something that this run cannot go on from."""
    file = run / RUN
    if run.exists() and not run.is_dir():
        raise ValueError(f"expected {run} to be a directory, it is a file")
    if not file.is_file():
        if run.exists() and any(run.iterdir()):
            raise ValueError(f"expected {run} to be new, empty or a run to go on with, it holds other files")
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(wanted, indent=1) + "\n")
        return
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"expected the settings of a run in {file}, got something else") from None
    differing = sorted(k for k in wanted.keys() | begun.keys() if wanted.get(k) != begun.get(k))
    if differing:
        pairs = "; ".join(f"{k} = {begun.get(k)!r}, got {wanted.get(k)!r}" for k in differing)
        raise ValueError(f"expected to go on with the run in {run} as it began, with {pairs}: name a new directory")


def check_corpus(model: PreTrainedModel, corpus: Corpus, windows: list[int]) -> None:
    """Raise ValueError for a corpus that cannot train a model with these windows."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    read = corpus.meta["tokenizer"]["vocabulary"]
    if read > vocabulary:
        raise ValueError(f"expected a corpus of at most {vocabulary} different tokens, the model's, got one of {read}")
    shortest = min((w for w in windows if w != FULL), default=0)
    longest = int(corpus.lengths[corpus.train_indices].max(initial=0))
    if longest <= shortest:
        raise ValueError(
            f"expected documents longer than the window, {shortest} tokens, the longest of {corpus.path} has {longest}"
        )


def stage_one_ids(corpus: Corpus, settings: DistillSettings, windows: list[int]) -> Tensor:
    """Texts [N, T] that gates, sinks and stage 1 learn from: single documents, longer than the windows."""
    rows = max(settings.align_rows, -(-SINK_TOKENS // settings.length))
    return torch.from_numpy(corpus.sample(rows, settings.length, settings.seed, max(max(windows) + 1, 2)))


def trainer_of(
    student: Distillation,
    stream: Stream,
    run: Path,
    settings: DistillSettings,
    start: int,
    report: Callable[[dict[str, float]], None] | None,
    budget: float | None,
) -> DistillTrainer:
    """The Trainer of a run, with its journal and TensorBoard, where that is installed."""
    callbacks: list[Any] = [JsonlLogger(run, start, report, budget)]
    if find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)))
    cuda = next(student.parameters()).is_cuda
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=len(stream),
        per_device_train_batch_size=1,
        max_grad_norm=0.0,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=True,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        seed=settings.seed,
        **sharding(student),
    )
    trainer = DistillTrainer(
        student,
        stream,
        arguments,
        rates=settings.rates(student.config.get_text_config().hidden_size),
        warmup=settings.warmup,
        treatment=settings.gradients,
        clip=settings.clip,
        window_dropout=settings.window_dropout,
        callbacks=callbacks,
        recorded=cuda and not settings.checkpointing and not sharding(student),
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.start = start
    return trainer


def sharding(student: Distillation) -> dict[str, Any]:
    """Options of TrainingArguments that spread a model over the GPUs of a `torchrun` (FSDP2), none on one device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.cuda.is_available():
        return {}
    kinds = sorted(student._no_split_modules or [])
    config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": kinds, "reshard_after_forward": True}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def compile_student(student: Distillation, compiled: str | None = None) -> None:
    """Compile what `compiled` names, one of COMPILED; None stands for what is fastest where the student is."""
    spread = bool(sharding(student))
    on_cpu = not next(student.parameters()).is_cuda
    if (compiled or ("nothing" if on_cpu or spread else "layers")) == "layers":
        if not spread:  # weights spread over devices are no views of a joint one
            student.join_layers()
        student.compile_layers()


def distill(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    run: Path | str,
    settings: DistillSettings | None = None,
    *,
    compiled: str | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    budget: float | None = None,
) -> Distilled:
    """Turn a pretrained model into a hybrid, in place, and train it to be like what it was.

    Stage 1 aligns each layer's attention output with the old one on the old inputs: only gates and sinks move. Stage 2
    minimises the divergence from the old model's predictions, from end to end, and the cross-entropy of the answers in
    recall text; attention (and gates and sinks) moves. Stage 3, if `long_tokens` are asked for, goes on in longer rows.

    Everything that happens is in the directory `run`: settings, a checkpoint of what is trained, a log (JSON lines and
    TensorBoard). Called again with the same arguments, a run that was stopped, in whatever way, goes on as if it had
    not been: the same batches, optimizer and randomness, hence on a CPU the same bits.

    Args:
        model: a model that `AutoModelForCausalLM` loaded, of one of the supported families, on the device and in the
            dtype to compute in (what is trained is kept in float32).
        tokenizer: the model's.
        corpus: from `nha.data.prepare.prepare` or `open_corpus`.
        run: the directory of the run.
        settings: default `DistillSettings()`.
        compiled: "layers" compiles decoder layers, "nothing" nothing. Default: "layers" on one GPU, else "nothing".
        report: called with every entry of the log.
        progress: called with (layers done, layers in all) of stage 1.
        budget: seconds after which to stop, with a checkpoint.

    Returns:
        The hybrid with plain weights in the model's dtype (also when the run is not finished), and the log.

    Raises:
        ValueError: settings, a corpus or a directory that do not fit, an unsupported family; before anything is
            written.
        OSError: the disk is full; the last checkpoint is still there.
    """
    settings = settings or DistillSettings()
    run = Path(run)
    settings.check()
    if compiled is not None and compiled not in COMPILED:
        raise ValueError(f"expected what is compiled to be one of {COMPILED}, got {compiled!r}")
    check_family(model.config)
    windows = plan_windows(model.config, _plain(settings.window_size), settings.full_layers)
    check_corpus(model, corpus, windows)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    stream = Stream(corpus, tokenizer, settings.mixture(world), rank, world)
    stream[0]  # raises for rows too short for recall text
    if rank == 0:
        check_run(run, describe(model, corpus, settings, world))
    cached = model.config.use_cache
    aligned: list[tuple[float, float]] = []
    torch.manual_seed(settings.seed)
    ids = stage_one_ids(corpus, settings, windows)
    hybrid = any(w != FULL for w in windows)
    if hybrid:
        hybridize(
            model,
            settings.num_slots,
            windows,
            init=settings.init,
            calibration=ids,  # type: ignore[arg-type]
            slot_distance=settings.slot_distance,
            num_sinks=settings.num_sinks,
            seed=settings.seed,
        )
    else:
        to_hybrid(model, windows, num_slots=settings.num_slots, num_sinks=settings.num_sinks)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = Distillation(model, trained=settings.trained, rank=settings.rank, taught=settings.divergence > 0)
    for module in attention_layers(student.causal):
        module.ablation = "slots_off" if settings.slots_off else None
    checkpoint = latest_checkpoint(run)
    start = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    if hybrid and settings.align_steps and checkpoint is None and not settings.slots_off:
        rates = {"gate_lr": SHARP_ALIGN_RATE if settings.init == "kmeans" else SOFT_ALIGN_RATE}
        aligned = align(
            student.causal,
            ids,
            steps=settings.align_steps,
            rows=max(1, len(ids) // 4),
            seed=settings.seed,
            progress=progress,
            **rates,
        )
    if start < len(stream):
        model.train()
        compile_student(student, compiled)
        trainer = trainer_of(student, stream, run, settings, start, report, budget)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        start = trainer.state.global_step
    elif checkpoint is not None:
        load_trained(student, checkpoint)
    released = student.release().eval()
    released.config.use_cache = cached
    journal = run / "log.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    return Distilled(released, start >= len(stream), start, [json.loads(line) for line in lines], aligned)


def saved_hybrid(
    found: Distilled, tokenizer: Any, folder: Path, base: str, corpus: Corpus, settings: DistillSettings
) -> None:
    """Write the hybrid, its tokenizer, what it was trained with and a model card into a folder."""
    told = {"settings": dataclasses.asdict(settings), "tokens": corpus.meta["tokens"], "log": found.log[-1:]}
    (folder / "distillation.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    notes = f"Trained on {settings.tokens:,.0f} tokens with seed {settings.seed}; see distillation.json."
    save_hybrid(found.model, tokenizer, folder, CardFacts(base, seed=settings.seed, notes=notes))


def _plain(windows: int | tuple[int, ...]) -> int | list[int]:
    return windows if isinstance(windows, int) else list(windows)
