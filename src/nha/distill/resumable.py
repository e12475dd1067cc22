"""transformers' Trainer with durable checkpoints: what is trained and all that is needed to resume, whole or absent."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import Trainer

from nha.distill.checkpoint import LOG, PREFIX, WEIGHTS, load_trained, partial_path, publish
from nha.distill.gradients import whole
from nha.io import place_in_errors, sync_file


def fsdp2_options(model: Any) -> dict[str, Any]:
    """Options of TrainingArguments that shard a model by its decoder layers over the GPUs of a `torchrun` (FSDP2)."""
    kinds = sorted(model._no_split_modules or [])
    config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": kinds, "reshard_after_forward": True}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def keep_output_dtypes(plugin: Any) -> None:
    """Let sharded modules return what they compute; `plugin` is accelerate's, None where nothing is sharded.

    In bf16 accelerate would cast what each returns, and so the loss, to bfloat16: 10.5625 for all from 10.53 to 10.59.
    """
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold what is trained in float32 and appear only when they are whole."""

    model: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers does; losses of a sharded model stay float32."""
        super().create_accelerator_and_postprocess()
        keep_output_dtypes(getattr(self.accelerator.state, "fsdp_plugin", None))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under a hidden name, make it durable, then give it its name and remove older ones."""
        run, name = Path(str(self.args.output_dir)), f"{PREFIX}{self.state.global_step}"
        work, main = partial_path(run, name), self.args.should_save
        if main:
            shutil.rmtree(work, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(work)
        try:
            with place_in_errors(run):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                if (run / LOG).is_file():  # what is logged up to here should not be younger than the checkpoint
                    sync_file(run / LOG)
                publish(work / name, run / name)
        except RuntimeError as error:  # how torch.save reports a full disk
            if not any(words in str(error) for words in ("writing", "unexpected pos")):
                raise
            raise OSError(errno.ENOSPC, f"expected room for a checkpoint in {run}, writing failed") from error
        finally:
            self.args.output_dir = str(run)
            if main:
                shutil.rmtree(work, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, in float32."""
        trained = {n: whole(p.detach()) for n, p in self.model.named_parameters() if p.requires_grad and p.numel()}
        if self.args.should_save and output_dir is not None:
            os.makedirs(output_dir, exist_ok=True)
            save_file({name: x.cpu().contiguous() for name, x in trained.items()}, os.path.join(output_dir, WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read what is trained."""
        load_trained(self.model if model is None else model, Path(resume_from_checkpoint))
