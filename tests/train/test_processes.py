"""Two processes train like one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nha import NHAConfig, NHAForCausalLM
from nha.train.loss import LanguageModel
from nha.train.rows import Sequences
from nha.train.run import gather, seeded, train
from tests.distill.test_sharding import run_twice
from tests.train.material import LENGTH, Copying, settings


def work(run: str) -> None:
    """One of two processes."""
    found = train(Copying(), run, settings(micro_batch_size=1, full_layers=(1,), random_windows=(0, 8)))
    torch.save(found.model.state_dict(), f"{run}-{os.environ['RANK']}.pt")
    if os.environ["RANK"] == "0":
        torch.save([entry["loss"] for entry in found.log if "loss" in entry], f"{run}-losses.pt")


def test_two_processes_with_ddp_train_like_one(tmp_path):
    run_twice(f"from tests.train.test_processes import work; work({str(tmp_path / 'two')!r})")
    first, second = (torch.load(tmp_path / f"two-{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = train(Copying(), tmp_path / "one", settings(full_layers=(1,), random_windows=(0, 8)))
    losses = torch.load(Path(f"{tmp_path / 'two'}-losses.pt"))
    assert losses == pytest.approx([entry["loss"] for entry in one.log if "loss" in entry], rel=1e-4)


def shard(out: str) -> None:
    """One of two processes, each with half of the weights."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model, batch = LanguageModel(seeded(make, 0)), Sequences(Copying(), LENGTH).batch(0, 2)
    for layer in model.causal.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    loss = model(**batch)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    found = gather(model.causal, make, 1)
    torch.save({"loss": loss.detach(), "weights": found.state_dict()}, f"{out}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def make() -> NHAForCausalLM:
    return NHAForCausalLM(NHAConfig.tiny(vocab_size=64, tie_word_embeddings=True))


def test_a_sharded_model_trains_and_is_gathered_like_a_whole_one(tmp_path):
    run_twice(f"from tests.train.test_processes import shard; shard({str(tmp_path / 'out')!r})")
    model, batch = LanguageModel(seeded(make, 0)), Sequences(Copying(), LENGTH).batch(0, 2)
    loss = model(**batch)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for rank in range(2):
        found = torch.load(tmp_path / f"out-{rank}.pt")
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for name, weight in model.causal.state_dict().items():
            assert torch.allclose(found["weights"][name], weight, atol=1e-6), name


def test_sharding_is_refused_without_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="fsdp"):
        train(Copying(), tmp_path / "run", settings(parallel="fsdp"))
    assert not (tmp_path / "run").exists()
