"""`train`: a model from scratch, in a run that can be stopped and resumed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from nha.data.corpus import Corpus
from nha.distill.checkpoint import (
    begin,
    check_directory,
    latest_checkpoint,
    load_trained,
    locked,
    read_log,
    step_of,
    wait_for_begin,
)
from nha.distill.gradients import whole
from nha.distill.resumable import fsdp2_options
from nha.distill.stopping import Stop, handle_signals
from nha.distill.trainer import JsonlLogger, Log, Reports, StopCallback
from nha.models.config import check_windows_end, smallest_window
from nha.models.nha import NHAForCausalLM
from nha.train.estimate import Estimate, check_memory, estimate, peak_operations
from nha.train.loss import LanguageModel
from nha.train.presets import model_config
from nha.train.rows import Batch, MicroBatches, Rows, Sequences, held_out
from nha.train.settings import TrainSettings
from nha.train.trainer import Evaluate, MeasureCallback, Measures, PretrainTrainer, TrainingDiverged, peak_bytes

VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
MakeModel = Callable[[], PreTrainedModel]


@dataclass
class TrainResult:
    """The outcome of a run.

    Attributes:
        model: the model, in evaluation mode, with float32 weights in plain modules.
        finished: whether all steps were made.
        steps: how many were made.
        log: the entries of the log.
        summary: parameters, steps, tokens, loss, seconds, tokens_per_s, mfu, peak_memory_bytes, and the last measures.
        stopped_by: "SIGINT", "SIGTERM", "budget", or None.
    """

    model: PreTrainedModel
    finished: bool
    steps: int
    log: list[Log]
    summary: dict[str, Any] = field(default_factory=dict)
    stopped_by: str | None = None


def vocabulary(data: Corpus | Rows) -> int:
    """Tokens of the data are below this."""
    return data.meta["tokenizer"]["vocabulary"] if isinstance(data, Corpus) else data.vocab_size


def check_data(data: Corpus | Rows | None, config: Any, settings: TrainSettings) -> None:
    """Raise ValueError for data that cannot train a model of this configuration.

    Without data yet, only for sequences that would write nothing to the slots.
    """
    windows = getattr(config, "window_sizes", None)
    check_windows_end(settings.random_windows or windows or (), settings.seq_len)
    if data is None:
        return
    tokens = vocabulary(data)
    if tokens > config.vocab_size:
        raise ValueError(f"expected at most {config.vocab_size} different tokens, the model's, got {tokens}")
    if not isinstance(data, Corpus):
        return
    if settings.packing == "documents" and windows is None:
        name = config.model_type
        raise ValueError(f"expected packing joined for {name}, which may read across documents, got documents")
    found = int(data.train_ends[-1]) if len(data.train_ends) else 0
    if found <= settings.seq_len:
        raise ValueError(
            f"expected more than {settings.seq_len} tokens to train on, a sequence of seq_len, {data.path} has {found}"
        )
    smallest = max(0, smallest_window(windows or ()))
    longest = int(data.lengths[data.train_indices].max(initial=0))
    if settings.packing == "documents" and longest <= smallest:
        raise ValueError(
            f"expected documents longer than the window, {smallest} tokens, the longest of {data.path} has {longest}; "
            "lower the window, or join documents"
        )


def check_fit(settings: TrainSettings, vocab_size: int, world: int = 1) -> None:
    """Raise ValueError for a preset's run that would write no slot, or not fit into memory, before it has weights."""
    with torch.device("meta"):
        model = NHAForCausalLM(model_config(settings, vocab_size))
    check_data(None, model.config, settings)
    check_memory(estimate(model, settings, world=world))


def identity(config: Any, data: Corpus | Rows, settings: TrainSettings, world: int, dtype: torch.dtype) -> dict:
    """All that must be equal for a run to be resumed."""
    about = {name: x for name, x in config.to_dict().items() if name not in VOLATILE}
    found = {"kind": "train", "model": about, "data": data.identity, "devices": world}
    return found | settings.identity() | {"dtype": str(dtype)}


def resolve_dtype(settings: TrainSettings) -> torch.dtype:
    """The dtype to compute in."""
    if settings.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, settings.dtype)


def sharding_options(model: LanguageModel, settings: TrainSettings, world: int) -> dict[str, Any]:
    """Options of TrainingArguments that shard a model over the GPUs of a `torchrun` (FSDP2).

    Raises ValueError where that was asked for and there are no GPUs: accelerate would train with DDP there.
    """
    if settings.parallel != "fsdp" or world == 1:
        return {}
    if not torch.cuda.is_available():
        raise ValueError("expected GPUs for parallel fsdp, got none: use ddp")
    return fsdp2_options(model)


def make_trainer(
    model: LanguageModel,
    batches: MicroBatches,
    run: Path,
    settings: TrainSettings,
    *,
    sharding: dict[str, Any],
    start: int,
    expected: Estimate,
    reports: Reports,
    stop: Stop,
) -> PretrainTrainer:
    """The Trainer of a run, with its log, and TensorBoard where that is installed."""
    callbacks: list[Any] = [JsonlLogger(run, start, reports.log), StopCallback(stop, reports.progress)]
    if find_spec("tensorboard") is not None and os.environ.get("RANK", "0") == "0":
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)))
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=batches.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=batches.per_step,
        max_grad_norm=settings.max_grad_norm,
        bf16=resolve_dtype(settings) == torch.bfloat16,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every or batches.steps,
        save_strategy="steps" if settings.save_every else "no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        seed=settings.seed,
        **sharding,
    )
    peak = peak_operations()
    trainer = PretrainTrainer(
        model,
        batches,
        arguments,
        settings,
        callbacks=callbacks,
        start=start,
        losses=[entry["loss"] for entry in read_log(run, until=start) if "loss" in entry],
        operations=expected.operations_per_token,
        peak=None if peak is None else peak * arguments.world_size,
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def mean_loss(model: LanguageModel, batches: list[Batch], dtype: torch.dtype) -> float:
    """The mean of the losses of batches, in nats per token."""
    device = next(model.parameters()).device
    losses = []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in batches:
            moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
            losses.append(model(**moved))
    return float(torch.stack(losses).mean())


def held_out_batches(data: Corpus | Rows, settings: TrainSettings, size: int) -> list[Batch]:
    """Batches of `size` held-out sequences of a corpus; none of a task, or where nothing is held out."""
    rest = held_out(data) if isinstance(data, Corpus) else None
    if rest is None or int(rest.train_ends[-1]) <= settings.seq_len:
        return []
    sequences = Sequences(rest, settings.seq_len, settings.packing)
    assert sequences.packed is not None
    found = min(settings.eval_sequences, sequences.packed.per_epoch)
    return [sequences.batch(first, min(size, found - first)) for first in range(0, found, size)]


class Measure:
    """Measures of a model: the held-out loss, and those of the caller's own function."""

    def __init__(self, model: LanguageModel, batches: list[Batch], evaluate: Evaluate | None, dtype: torch.dtype):
        self.model, self.batches, self.evaluate, self.dtype = model, batches, evaluate, dtype

    def __call__(self) -> Measures:
        """Measure in evaluation mode, without compiled layers: other shapes would compile them anew."""
        was, compiled = self.model.training, self._compiled(None)
        self.model.eval()
        try:
            found: Measures = {}
            if self.batches:
                found["eval_loss"] = mean_loss(self.model, self.batches, self.dtype)
            if self.evaluate is not None:
                device = next(self.model.parameters()).device.type
                with torch.no_grad(), torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
                    found |= self.evaluate(self.model.causal)
            return found
        finally:
            self.model.train(was)
            self._compiled(compiled)

    def _compiled(self, calls: list[Any] | None) -> list[Any]:
        layers = self.model.causal.get_decoder().layers
        before = [layer._compiled_call_impl for layer in layers]
        for layer, call in zip(layers, calls or [None] * len(before), strict=True):
            layer._compiled_call_impl = call
        return before


def seeded(make: MakeModel, seed: int) -> PreTrainedModel:
    """A model whose weights are a function of the seed."""
    torch.manual_seed(seed)
    return make()


def gather(sharded: PreTrainedModel, make: MakeModel, seed: int) -> PreTrainedModel:
    """A model that nothing shards, with the weights of a sharded one, on its device and in evaluation mode."""
    weights = {name: whole(p.detach()) for name, p in sharded.named_parameters() if p.numel()}
    device = next(iter(weights.values())).device
    model = seeded(make, seed).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return model.eval()


def train(
    data: Corpus | Rows,
    run: Path | str,
    settings: TrainSettings | None = None,
    *,
    make_model: MakeModel | None = None,
    evaluate: Evaluate | None = None,
    reports: Reports | None = None,
    stop: Stop | None = None,
) -> TrainResult:
    """Train a causal language model from scratch.

    The directory `run` holds settings, checkpoints and log (JSON lines and TensorBoard). Called again with the same
    arguments, a run that was stopped in any way resumes with the same batches, optimizer and randomness, hence with
    the same bits on a CPU. SIGINT and SIGTERM stop it with a checkpoint, a second one at once.

    Args:
        data: a corpus, or sequences of a task (`nha.train.rows.Rows`).
        run: the directory of the run. Without checkpoints (`save_every=0`) a finished run is trained again.
        settings: default `TrainSettings()`.
        make_model: makes the model, after everything random was seeded; default: the preset of the settings. Any causal
            language model of transformers' interface, with a head without a bias.
        evaluate: measures the model every `eval_every` steps and at the end, in evaluation mode without gradients; the
            measures go to the log.
        reports: functions to call on the way.
        stop: asks the run to stop; default: by signals and `settings.budget`.

    Raises:
        ValueError: settings, data or a directory that do not fit, or a run that cannot fit into memory; nothing is
            written then.
        TrainingDiverged: the loss is not finite or has spiked; the last whole checkpoint is kept.
        OSError: the disk is full; the last checkpoint is still there.

    >>> import tempfile
    >>> import numpy as np
    >>> class Count:
    ...     identity, vocab_size, seq_len = "count", 16, 32
    ...
    ...     def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    ...         ids = (index + np.arange(33)) % 16
    ...         return ids[:-1], ids[1:]
    >>> settings = TrainSettings(preset="tiny", tokens=128, batch_size=2, save_every=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = train(Count(), folder, settings)
    >>> found.finished, found.steps
    (True, 2)
    """
    settings, reports, run = settings or TrainSettings(), reports or Reports(), Path(run)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    batches, dtype = MicroBatches(data, settings, rank, world), resolve_dtype(settings)
    if make_model is None:
        check_fit(settings, vocabulary(data), world)
    make = make_model or (lambda: NHAForCausalLM(model_config(settings, vocabulary(data))))
    causal = seeded(make, settings.seed)
    check_data(data, causal.config, settings)
    expected = estimate(causal, settings, seq_len=batches.seq_len, world=world)
    check_memory(expected)
    wanted = identity(causal.config, data, settings, world, dtype)
    if rank == 0:  # the others may look while it is being written
        check_directory(run, wanted)
    model = LanguageModel(causal, dtype)
    sharding = sharding_options(model, settings, world)
    if settings.gradient_checkpointing:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
    measure = Measure(model, held_out_batches(data, settings, batches.size), evaluate, dtype)
    begun = time.perf_counter()
    with ExitStack() as stack:
        if stop is None:
            stop = Stop(settings.budget)
            stack.enter_context(handle_signals(stop))
        stop.check()
        if rank == 0:
            stack.enter_context(locked(run))
            begin(run, wanted)
        else:
            wait_for_begin(run)
        speeds, steps = _train(model, batches, run, settings, measure, expected, sharding, reports, stop)
    model.release().eval()
    if sharding:
        causal = measure.model.causal = gather(causal, make, settings.seed)
    log, finished = read_log(run), steps >= batches.steps
    measures = measure() if finished else {}
    summary = {"parameters": expected.parameters, "steps": steps, "seconds": time.perf_counter() - begun}
    summary |= {"tokens": steps * settings.batch_size * batches.seq_len, "peak_memory_bytes": peak_bytes()}
    summary |= {"loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None)}
    if speeds:
        speed, peak = statistics.median(speeds), peak_operations()
        summary |= {"tokens_per_s": speed}
        summary |= {} if peak is None else {"mfu": speed * expected.operations_per_token / (peak * world)}
    return TrainResult(causal, finished, steps, log, summary | measures, None if finished else stop.reason)


def _train(
    model: LanguageModel,
    batches: MicroBatches,
    run: Path,
    settings: TrainSettings,
    measure: Measure,
    expected: Estimate,
    sharding: dict[str, Any],
    reports: Reports,
    stop: Stop,
) -> tuple[list[float], int]:
    """Train from the newest checkpoint on. Returns tokens per second between entries of the log, and steps made."""
    checkpoint = latest_checkpoint(run)
    start = 0 if checkpoint is None else step_of(checkpoint)
    if start >= batches.steps:
        assert checkpoint is not None
        load_trained(model, checkpoint)
        return [], start
    if settings.compile == "layers" or (settings.compile == "auto" and torch.cuda.is_available()):
        model.compile_layers()
    trainer = make_trainer(
        model, batches, run, settings, sharding=sharding, start=start, expected=expected, reports=reports, stop=stop
    )

    def record() -> None:
        begun = time.perf_counter()
        trainer.record(measure(), time.perf_counter() - begun)

    # Where the model is sharded, a part of it cannot be called by itself.
    trainer.add_callback(MeasureCallback(0 if sharding else settings.eval_every, record))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except TrainingDiverged as error:
        kept = latest_checkpoint(run)
        where = "no checkpoint was written before" if kept is None else f"{kept} is kept"
        raise TrainingDiverged(f"{error}: stopped, {where}; lower lr or raise warmup_fraction") from None
    return trainer.throughput[1:] or trainer.throughput, trainer.state.global_step
