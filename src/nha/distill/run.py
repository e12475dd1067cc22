"""`distill`: a pretrained model becomes a hybrid trained to match it, in a run that can be stopped and resumed."""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from nha.convert.align import align
from nha.convert.calibrate import SINK_TOKENS
from nha.convert.heads import SPARE, copy_rows
from nha.convert.hybridize import hybridize
from nha.convert.write_scores import fit_write_scores, set_write_scores
from nha.data.corpus import Corpus
from nha.data.recall import RecallSettings
from nha.data.stream import Mixture, Stream
from nha.distill.checkpoint import (
    begin,
    check_directory,
    latest_checkpoint,
    load_into_plain,
    load_trained,
    locked,
    read_log,
    step_of,
    wait_for_begin,
)
from nha.distill.loss import Head
from nha.distill.resumable import fsdp2_options
from nha.distill.settings import TEACHER, DistillSettings, width_scale
from nha.distill.stopping import Stop, handle_signals
from nha.distill.student import Distillation, linear_layers
from nha.distill.timeline import start_compiler
from nha.distill.trainer import DistillTrainer, JsonlLogger, Log, Reports, StopCallback, short_windows
from nha.models.adapter import to_hybrid
from nha.models.config import FULL, check_windows_end, context_length, largest_window, plan_windows, smallest_window
from nha.models.families import check_family
from nha.models.head import check_head
from nha.models.windows import attention_layers, shift_gates
from nha.ops.heads import Window, all_windows

SOFT_ALIGN_LR, SHARP_ALIGN_LR = 6e-4, 1e-2  # of gates, which have logits of deviation 6 and 100
COPY_ROWS, COPY_DOCUMENTS, COPY_TOKENS = 128, 256, 8192
CONTROL_SETTINGS = ("trainable", "lora_rank", "lr", "warmup_fraction", "max_grad_norm", "gradients", "answer_weight")
VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")


@dataclass
class Distilled:
    """The outcome of a run.

    Attributes:
        model: the hybrid, with plain weights.
        finished: whether all steps were made.
        steps: how many were made, those of its teacher among them.
        log: the entries of the log.
        aligned: the error of each layer before and after its alignment.
        stopped_by: "SIGINT", "SIGTERM", "budget", or None.
        teacher_log: the entries of the log of its teacher, if that was trained.
    """

    model: PreTrainedModel
    finished: bool
    steps: int
    log: list[Log]
    aligned: list[tuple[float, float]]
    stopped_by: str | None = None
    teacher_log: list[Log] = field(default_factory=list)


def make_mixture(settings: DistillSettings, world: int = 1, control: bool = False) -> Mixture:
    """The batches of a run on `world` devices.

    A control reads the same batches; the weight of the KL divergence, which would be 0, goes to the cross-entropy.
    Windows do not count, so that one control serves hybrids of all windows: with windows beyond 64 tokens some
    questions are answered by these.
    """
    steps = max(1, round((settings.tokens - settings.long_tokens) / (settings.batch_size * settings.seq_len * world)))
    defaults = RecallSettings()
    mixture = Mixture(
        steps=steps,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        long_seq_len=settings.long_seq_len,
        recall_fraction=settings.recall_fraction,
        recall=RecallSettings(
            facts=(min(defaults.facts[0], settings.max_facts), settings.max_facts),
            long_range_fraction=settings.long_range_fraction,
        ),
        fact_warmup=settings.fact_warmup,
        kl_weight=0.0 if control else settings.kl_weight,
        cross_entropy_weight=settings.ce_weight + (settings.kl_weight if control else 0.0),
        answer_weight=settings.answer_weight,
        separate_recall=settings.gradients != "together",
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
    )
    long_steps = round(settings.long_tokens / (mixture.long_batch_size * settings.long_seq_len * world))
    return dataclasses.replace(mixture, steps=steps + long_steps, long_steps=long_steps)


def teacher_steps(settings: DistillSettings, world: int = 1) -> int:
    """The first steps of a run on `world` devices, which train its teacher.

    Raises ValueError where the hybrid would have no step.

    >>> teacher_steps(DistillSettings(tokens=10 * 32768, teacher_tokens=4 * 32768))
    4
    """
    if not settings.teacher_tokens:
        return 0
    steps = max(1, round(settings.teacher_tokens / (settings.batch_size * settings.seq_len * world)))
    total = make_mixture(settings, world).steps
    if steps >= total:
        raise ValueError(f"expected teacher_tokens of fewer than all steps, {total}, got {steps} of them")
    return steps


def teacher_mixture(settings: DistillSettings, world: int = 1) -> Mixture:
    """The batches of a run that train its teacher: the first of those that its control reads."""
    whole, steps = make_mixture(settings, world, control=True), teacher_steps(settings, world)
    fact_warmup = min(1.0, settings.fact_warmup * whole.steps / steps)  # as many steps as in the whole run
    return dataclasses.replace(whole, steps=steps, long_steps=0, fact_warmup=fact_warmup)


def teacher_identity(model: PreTrainedModel) -> str:
    """A digest of a model's configuration and of every byte of its weights."""
    config = {name: x for name, x in model.config.to_diff_dict().items() if name not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        if isinstance(weight, Tensor):
            data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(f"{name} {list(weight.shape)} {weight.dtype} {zlib.crc32(data)}".encode())
    return digest.hexdigest()[:32]


def identity(model: PreTrainedModel, corpus: Corpus, settings: DistillSettings, world: int) -> dict[str, Any]:
    """All that must be equal for a run to be resumed."""
    return inputs_identity(model, corpus, world) | settings.identity()


def inputs_identity(model: PreTrainedModel, corpus: Corpus, world: int) -> dict[str, Any]:
    """The inputs of every run besides its settings: teacher, corpus, number of devices, dtype."""
    return {
        "teacher": teacher_identity(model),
        "corpus": corpus.identity,
        "devices": world,
        "dtype": str(model.dtype),
    }


def control_identity(
    model: PreTrainedModel, corpus: Corpus, settings: DistillSettings, world: int = 1
) -> dict[str, Any]:
    """All that a control depends on: hybrids that differ in windows, slots or gates alone share one."""
    mixture = make_mixture(settings, world, control=True)
    return {"control": True} | inputs_identity(model, corpus, world) | _trained_on(settings, mixture)


def _trained_on(settings: DistillSettings, mixture: Mixture) -> dict[str, Any]:
    """How the original is trained, and the batches."""
    rest = {name: value for name, value in settings.identity().items() if name in CONTROL_SETTINGS}
    return rest | {"batches": dataclasses.asdict(mixture)}


def check_corpus(model: PreTrainedModel, corpus: Corpus, windows: Sequence[Window]) -> None:
    """Raise ValueError for a corpus that cannot train a model with these windows."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
    tokens = corpus.meta["tokenizer"]["vocabulary"]
    if tokens > vocabulary:
        raise ValueError(f"expected a corpus of at most {vocabulary} different tokens, the model's, got {tokens}")
    smallest = max(smallest_window(windows), 0)
    longest = int(corpus.lengths[corpus.train_indices].max(initial=0))
    if longest <= smallest:
        raise ValueError(
            f"expected documents longer than the window, {smallest} tokens, the longest of {corpus.path} has {longest}"
        )


def align_ids(corpus: Corpus, settings: DistillSettings, windows: Sequence[Window]) -> Tensor:
    """Sequences [N, T] to calibrate and align gates and sinks on: single documents, longer than the windows."""
    count = max(settings.align_sequences, -(-SINK_TOKENS // settings.seq_len))
    shorter = [window for window in all_windows(windows) if window < settings.seq_len]  # longer ones do not end there
    least = max(largest_window(shorter) + 1, 2)
    return torch.from_numpy(corpus.sample(count, settings.seq_len, settings.seed, least))


def fsdp_options(student: Distillation) -> dict[str, Any]:
    """Options of TrainingArguments that shard a model over the GPUs of a `torchrun` (FSDP2); none on one device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.cuda.is_available():
        return {}
    return fsdp2_options(student)


def make_trainer(
    student: Distillation,
    stream: Stream,
    run: Path,
    settings: DistillSettings,
    start: int = 0,
    reports: Reports | None = None,
    stop: Stop | None = None,
) -> DistillTrainer:
    """The Trainer of a run, with its log, and TensorBoard where that is installed."""
    reports, stop = reports or Reports(), stop or Stop()
    callbacks: list[Any] = [JsonlLogger(run, start, reports.log), StopCallback(stop, reports.progress)]
    if find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)))
    cuda, sharding = next(student.parameters()).is_cuda, fsdp_options(student)
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
        **sharding,
    )
    graphs = cuda and not settings.gradient_checkpointing and not sharding
    trainer = DistillTrainer(student, stream, arguments, settings, callbacks=callbacks, cuda_graphs=graphs, start=start)
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def compiles(model: torch.nn.Module, what: str = "auto") -> bool:
    """Whether layers are compiled: for "layers", not for "nothing", and for "auto" on a single GPU."""
    single_gpu = next(model.parameters()).is_cuda and int(os.environ.get("WORLD_SIZE", "1")) == 1
    return what == "layers" or (what == "auto" and single_gpu)


def with_timeline(reports: Reports, run: Path, start: int) -> Reports:
    """Reports that also take down the first steps after `start`, on the first of several devices."""
    first = os.environ.get("RANK", "0") == "0"

    def progress(stage: str, done: int, total: int) -> None:
        known = len(reports.timeline.stages)
        reports.timeline.mark_step(done, start)
        if first and len(reports.timeline.stages) > known:
            reports.timeline.write(run)
        if reports.progress is not None:
            reports.progress(stage, done, total)

    return dataclasses.replace(reports, progress=progress)


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    run: Path | str,
    settings: DistillSettings | None = None,
    *,
    control: bool = False,
    teacher_run: Path | str | None = None,
    reports: Reports | None = None,
    stop: Stop | None = None,
) -> Distilled:
    """Turn a pretrained model into a hybrid, in place, and train it to match what it was.

    Stage 0, with `teacher_tokens`, trains the original with full attention, and what follows starts from the result:
    see `train_teacher`. Stage 1 aligns each layer's attention output with the original one on the original inputs:
    only gates and sinks move. Stage 2 trains from end to end, on the KL divergence from the original model's
    predictions, the cross-entropy of text and that of the answers in recall text. Stage 3, with `long_tokens`, goes on
    in longer sequences. At the end `gate_shift` makes slots forget more slowly; checkpoints hold the gates as trained.

    The directory `run` holds settings, checkpoints and log (JSON lines and TensorBoard). Called again with the same
    arguments, a run that was stopped in any way resumes with the same batches, optimizer and randomness, hence with
    the same bits on a CPU. SIGINT and SIGTERM stop it with a checkpoint, a second one at once.

    Args:
        model: a model that `AutoModelForCausalLM` loaded, of a supported family, on the device and in the dtype to
            compute in (what is trained is float32).
        tokenizer: the model's.
        corpus: from `nha.data.prepare.prepare` or `nha.data.corpus.open_corpus`.
        run: the directory of the run.
        settings: default `DistillSettings()`.
        control: train the model itself, with full attention in every layer, on the same batches with the same recipe:
            the fair control for the hybrid of these settings. Gates and sinks are not used,
            and it learns the next token with the weight of the KL divergence added to that of the cross-entropy.
            `teacher_tokens` means nothing to it: it reads all batches in one stage.
        teacher_run: the directory of stage 0; default: the folder `teacher` of `run`. Runs of the same first batches
            can share one.
        reports: functions to call on the way.
        stop: asks the run to stop; default: by signals and `settings.budget`. With a `stop` of its own the caller
            handles signals.

    Returns:
        The hybrid with plain weights in the model's dtype (also when the run is not finished), and the log. A run that
        stopped in stage 0 returns the model as it was.

    Raises:
        ValueError: settings, a corpus, a model or a directory that do not fit; nothing is written then.
        OSError: the disk is full; the last checkpoint is still there.
    """
    settings, reports, run = settings or DistillSettings(), reports or Reports(), Path(run)
    rank, world = _place()
    windows, stream = check_run(model, tokenizer, corpus, settings, control)
    first = stream.first
    if compiles(model, settings.compile):
        start_compiler()
    wanted = (control_identity if control else identity)(model, corpus, settings, world)
    if rank == 0:  # the others may look while it is being written
        check_directory(run, wanted)
    with ExitStack() as stack:
        if stop is None:
            stop = Stop(settings.budget)
            stack.enter_context(handle_signals(stop))
        reports.timeline.mark("inputs checked")
        teacher_log: list[Log] = []
        if first:
            place = run / TEACHER if teacher_run is None else Path(teacher_run)
            found = train_teacher(model, tokenizer, corpus, place, settings, reports=reports, stop=stop)
            if not found.finished or found.stopped_by:  # between the stages, too
                return dataclasses.replace(found, finished=False, log=[], teacher_log=found.log)
            teacher_log = found.log
        used = [FULL] * len(windows) if control else windows
        found = _train(model, stream, run, settings, used, wanted, control, reports, stop)
    if found.finished and settings.gate_shift and not control:
        shift_gates(found.model, settings.gate_shift)
    return dataclasses.replace(found, steps=first + found.steps, teacher_log=teacher_log)


def train_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    run: Path | str,
    settings: DistillSettings,
    *,
    reports: Reports | None = None,
    stop: Stop | None = None,
) -> Distilled:
    """Stage 0: train a model with full attention on the first `teacher_tokens` of a run, as a control is trained.

    The learning rate goes through its whole schedule. The weights are put into `model`, which stays what it was
    otherwise; while a copy of it is trained it waits on the CPU. A stage that was stopped leaves `model` as it was. The
    directory `run` is resumed as in `distill`; hybrids that differ in windows, slots or gates alone can share it.

    Raises ValueError as `distill` does.
    """
    reports, run = reports or Reports(), Path(run)
    rank, world = _place()
    windows = check_inputs(model, corpus, settings, control=True)
    mixture = teacher_mixture(settings, world)
    stream = Stream(corpus, tokenizer, mixture, rank, world)
    stream[0]  # raises for sequences too short for recall text
    wanted = {"stage": TEACHER} | inputs_identity(model, corpus, world) | _trained_on(settings, mixture)
    if rank == 0:
        check_directory(run, wanted)
    with ExitStack() as stack:
        if stop is None:
            stop = Stop(settings.budget)
            stack.enter_context(handle_signals(stop))
        checkpoint = latest_checkpoint(run)
        if checkpoint is None or step_of(checkpoint) < len(stream):
            device, full = model.device, [FULL] * len(windows)
            twin = copy.deepcopy(model.to("cpu")).to(device)  # type: ignore[arg-type]
            try:
                found = _train(twin, stream, run, settings, full, wanted, True, _of_teacher(reports), stop)
            finally:
                _free(twin)
                model.to(device)  # type: ignore[arg-type]
            if not found.finished:
                return dataclasses.replace(found, model=model)
            checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        raise ValueError(f"expected a checkpoint of the trained teacher in {run}, got none")
    load_into_plain(model, checkpoint)
    reports.timeline.mark("teacher trained")
    return Distilled(model, True, len(stream), read_log(run), [], stop.reason)


def _place() -> tuple[int, int]:
    """This process among those of a `torchrun`, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _of_teacher(reports: Reports) -> Reports:
    """Reports of stage 0, which has a log and a name of its own."""

    def progress(stage: str, done: int, total: int) -> None:
        if reports.progress is not None:
            reports.progress(TEACHER, done, total)

    return dataclasses.replace(reports, log=reports.teacher_log, progress=progress)


def _free(model: PreTrainedModel) -> None:
    """Give the memory of a trained copy back; a Trainer refers to itself, so it waits for the garbage collector."""
    model.to("meta")  # type: ignore[arg-type]
    torch._dynamo.reset()  # what was compiled for it counts towards the limit of recompilations, and keeps it alive
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    settings: DistillSettings,
    control: bool = False,
) -> tuple[list[Window], Stream]:
    """The window of every layer, and the batches of a run on this device.

    Raises ValueError for a model, settings or a corpus that do not fit. A model on the device meta will do: the values
    of its weights are not checked then.
    """
    rank, world = _place()
    windows = check_inputs(model, corpus, settings, control)
    first = 0 if control else teacher_steps(settings, world)
    context = None if control else context_length(model.config)
    stream = Stream(corpus, tokenizer, make_mixture(settings, world, control), rank, world, first, context)
    stream[0]  # raises for sequences too short for recall text
    align_ids(corpus, settings, [FULL] * len(windows) if control else windows)  # and for documents within a window
    return windows, stream


def check_inputs(model: PreTrainedModel, corpus: Corpus, settings: DistillSettings, control: bool) -> list[Window]:
    """The window of every layer. Raises ValueError for a model or a corpus that these settings do not fit."""
    check_family(model.config)
    windows = plan_windows(model.config, _as_list(settings.window_size), settings.full_layers)
    if not control:
        check_windows_end(windows, settings.seq_len)
    check_corpus(model, corpus, windows)
    if model.device.type != "meta":
        check_head(model, torch.arange(1, 9)[None] % model.config.get_text_config().vocab_size)
    Head.of(model)
    if not linear_layers(model, settings.trainable) and control:
        raise ValueError(f"expected trainable weights for a control, got trainable {settings.trainable!r}")
    return list(windows)


def _train(
    model: PreTrainedModel,
    stream: Stream,
    run: Path,
    settings: DistillSettings,
    windows: Sequence[Window],
    wanted: dict[str, Any],
    control: bool,
    reports: Reports,
    stop: Stop,
) -> Distilled:
    """Convert a model in place and train it on a stream, in a directory that holds a run of this identity, or none."""
    cached = model.config.use_cache
    converting = reports.progress if reports.progress is not None and not control else lambda *_: None
    converting("convert", 0, 1)
    student, ids = make_student(model, stream.corpus, settings, windows, control)
    converting("convert", 1, 1)
    reports.timeline.mark("converted")
    stop.check()
    with ExitStack() as stack:
        if _place()[0] == 0:
            stack.enter_context(locked(run))
            begin(run, wanted)
            reports.timeline.write(run)
        else:
            wait_for_begin(run)
        checkpoint = latest_checkpoint(run)
        start = 0 if checkpoint is None else step_of(checkpoint)
        aligned = [] if checkpoint else align_student(student, ids, stream, settings, reports, stop)
        reports.timeline.mark("aligned")
        if _place()[0] == 0:
            reports.timeline.write(run)
        if start < len(stream):
            student.train()
            if compiles(student, settings.compile):
                short = [short_windows(student.windows)] if settings.window_dropout else []
                student.compile_kernels(settings.seq_len, student.windows, *short)
                reports.timeline.mark("kernels compiled")
                student.compile_layers()
            trainer = make_trainer(student, stream, run, settings, start, with_timeline(reports, run, start), stop)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.accelerator.wait_for_everyone()  # what the first process wrote is there for all
            start = trainer.state.global_step
        elif checkpoint is not None:
            load_trained(student, checkpoint)
        released = student.release().eval()
        released.config.use_cache = cached
    return Distilled(released, start >= len(stream), start, read_log(run), aligned, stop.reason)


def make_student(
    model: PreTrainedModel, corpus: Corpus, settings: DistillSettings, windows: Sequence[Window], control: bool = False
) -> tuple[Distillation, Tensor]:
    """Convert a model in place and make a student of it; also the ids [N, T] that it was calibrated on.

    A control has no teacher.
    """
    torch.manual_seed(settings.seed)
    ids = align_ids(corpus, settings, windows)
    if any(window != FULL for window in windows):
        hybridize(
            model,
            settings.num_slots,
            windows,
            init=settings.init,  # type: ignore[arg-type]
            calibration=ids,
            slot_distance=settings.slot_distance,
            num_sinks=settings.num_sinks,
            slot_write=settings.slot_write,
            seed=settings.seed,
        )
    else:
        to_hybrid(model, windows, num_slots=settings.num_slots, num_sinks=settings.num_sinks)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = Distillation(
        model,
        trainable=settings.trainable,
        lora_rank=settings.lora_rank,
        has_teacher=settings.kl_weight > 0 and not control,
    )
    for module in attention_layers(student.causal):
        module.ablation = "slots_off" if settings.slots_off and not control else None
    return student, ids


def copy_texts(stream: Stream, settings: DistillSettings, windows: Sequence[Window]) -> list[Tensor]:
    """Texts [1, T] that repeat a sentence from beyond the windows, for scores of exact slots.

    Documents to train on that have no such sentences give none.
    """
    corpus, least = stream.corpus, max(smallest_window(windows), 0) + SPARE
    drawn = np.random.default_rng([settings.seed, 17]).permutation(corpus.train_indices)[:COPY_DOCUMENTS]
    texts = [str(stream.tokenizer.decode(corpus.document(int(index))[:COPY_TOKENS])) for index in drawn]
    spans = {"min_distance": least, "max_distance": max(settings.write_reach, 2 * least)}
    try:
        rows = copy_rows(stream.tokenizer, texts, COPY_ROWS, **spans, seed=settings.seed, fewer=True)
    except ValueError:
        return []
    return [row.ids[None] for row in rows]


def align_student(
    student: Distillation, ids: Tensor, stream: Stream, settings: DistillSettings, reports: Reports, stop: Stop
) -> list[tuple[float, float]]:
    """Stage 1: the error of each layer before and after; an empty list if there is nothing to align.

    Scores of exact slots are first learned from the teacher's attention to texts that repeat their sentences and to
    `ids`.
    """
    if settings.slots_off or all(window == FULL for window in student.windows):
        return []
    if settings.slot_write == "exact":
        texts = [*copy_texts(stream, settings, student.windows), ids]
        set_write_scores(student.causal, fit_write_scores(student.causal, texts), settings.write_reach)
    if not settings.align_steps:
        return []

    def progress(done: int, total: int) -> None:
        stop.check()
        if reports.progress is not None:
            reports.progress("align", done, total)

    progress(0, len(student.windows))
    gate_lr = SHARP_ALIGN_LR if settings.init == "kmeans" else SOFT_ALIGN_LR
    return align(
        student.causal,
        ids,
        steps=settings.align_steps,
        batch_size=max(1, len(ids) // 4),
        gate_lr=gate_lr * width_scale(student.config.get_text_config().hidden_size),
        seed=settings.seed,
        progress=progress,
    )


def _as_list(windows: int | Sequence[Window]) -> int | list[Window]:
    return windows if isinstance(windows, int) else list(windows)
