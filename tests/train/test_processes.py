"""Two processes train like one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from nha import NHAConfig, NHAForCausalLM
from nha.distill.resumable import ResumableTrainer
from nha.train.loss import LanguageModel
from nha.train.rows import Sequences
from nha.train.run import gather, seeded, train
from tests.distill.test_sharding import run_twice
from tests.train.material import LENGTH, Copying, settings

CHANGES: dict[str, Any] = {"full_layers": (1,), "random_windows": (0, 8)}


def work(out: str) -> None:
    """One of two processes: a run with DDP, then a step of a model of which each holds a half."""
    from torch.distributed.fsdp import fully_shard

    rank = os.environ["RANK"]
    found = train(Copying(), f"{out}/run", settings(micro_batch_size=1, **CHANGES))
    torch.save(found.model.state_dict(), f"{out}/weights-{rank}.pt")
    torch.save([entry["loss"] for entry in found.log if "loss" in entry], f"{out}/losses-{rank}.pt")
    model = LanguageModel(seeded(make, 0))
    for layer in model.causal.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    loss = step(model)
    gathered = gather(model.causal, make, 1)
    torch.save({"loss": loss, "weights": gathered.state_dict()}, f"{out}/sharded-{rank}.pt")
    model, options = LanguageModel(seeded(make, 0), torch.bfloat16), {"mp_policy": plugin().mixed_precision_policy}
    for layer in model.causal.get_decoder().layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    torch.save(step(model), f"{out}/bfloat16-{rank}.pt")
    torch.distributed.destroy_process_group()


def plugin() -> Any:
    """accelerate's, of a run in bfloat16, as a trainer has it."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    found = FullyShardedDataParallelPlugin(fsdp_version=2)
    found.set_mixed_precision("bf16")
    trainer = object.__new__(ResumableTrainer)

    def create(self: Any) -> None:
        self.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=found))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "create_accelerator_and_postprocess", create)
        trainer.create_accelerator_and_postprocess()
    return found


def step(model: LanguageModel) -> torch.Tensor:
    """The loss of a batch, and a step on its gradients."""
    loss = model(**Sequences(Copying(), LENGTH).batch(0, 2))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss.detach()


def make() -> NHAForCausalLM:
    return NHAForCausalLM(NHAConfig.tiny(vocab_size=64, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The directory that two processes have written to."""
    path = tmp_path_factory.mktemp("two")
    run_twice(f"from tests.train.test_processes import work; work({str(path)!r})")
    return path


def test_two_processes_with_ddp_train_like_one(out, tmp_path):
    first, second = (torch.load(out / f"weights-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = train(Copying(), tmp_path / "one", settings(**CHANGES))
    losses = torch.load(out / "losses-0.pt")
    assert losses == pytest.approx([entry["loss"] for entry in one.log if "loss" in entry], rel=1e-4)


def test_a_sharded_model_trains_and_is_gathered_like_a_whole_one(out):
    model = LanguageModel(seeded(make, 0))
    loss = step(model)
    for rank in range(2):
        found = torch.load(out / f"sharded-{rank}.pt")
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for name, weight in model.causal.state_dict().items():
            assert torch.allclose(found["weights"][name], weight, atol=1e-6), name


def test_the_loss_of_a_model_that_is_sharded_in_bfloat16_is_not_rounded_to_bfloat16(out):
    whole = step(LanguageModel(seeded(make, 0)))
    for rank in range(2):
        loss = torch.load(out / f"bfloat16-{rank}.pt")
        assert loss.dtype == torch.float32 and loss != loss.bfloat16()
        assert loss.item() == pytest.approx(whole.item(), rel=torch.finfo(torch.bfloat16).eps)
    policy = plugin().mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16 and policy.output_dtype is None


def test_sharding_is_refused_without_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fsdp"):
        train(Copying(), tmp_path / "run", settings(parallel="fsdp"))
    assert not (tmp_path / "run").exists()
