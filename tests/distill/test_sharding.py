"""Two processes, with FSDP2 or DDP, train like one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def steps(student, batches, parameters, average):
    """Two optimizer steps on batches [(name, batch)] of one rank, or of all ranks one after the other."""
    from nha.distill.gradients import combine_gradients

    optimizer = torch.optim.AdamW(student.parameter_groups(1e-2, 1e-2, 1e-2), betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for _ in range(2):
        parts = {}
        for name, several in batches:
            for batch in several:
                (student(**batch)[0] / average).backward()
            parts[name] = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
        norms.append(
            {
                name: float(norm)
                for name, norm in combine_gradients(
                    parts, parameters, how="clip", max_norm=1.0, recall_norm=0.5
                ).items()
            }
        )
        optimizer.step()
    return norms


def work(out: str) -> None:
    """One of two processes; the first writes what it has in the end."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from nha.distill.checkpoint import load_trained
    from nha.distill.gradients import whole
    from tests.distill.test_student import batch, student_of

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    student = student_of()
    for layer in student.causal.get_decoder().layers:
        fully_shard(layer)
    fully_shard(student)
    parameters = [p for p in student.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in student.parameters())
    assert any(p.to_local().numel() < p.numel() for p in parameters)
    batches = [("text", [batch(seed=rank)]), ("recall", [batch(seed=10 + rank)])]
    norms = steps(student, batches, parameters, average=1)
    found = {name: whole(p.detach()).clone() for name, p in student.named_parameters() if p.requires_grad}
    if rank == 0:
        from safetensors.torch import save_file

        Path(out).mkdir()
        save_file({name: x.contiguous() for name, x in found.items()}, Path(out) / "trained.safetensors")
        torch.save(norms, Path(out) / "norms.pt")
    dist.barrier()
    with torch.no_grad():
        for p in parameters:
            p.zero_()
    load_trained(student, Path(out))  # what a checkpoint holds goes back into the shards
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert torch.equal(whole(p.detach()), found[name]), name
    with torch.no_grad():
        wanted = student(**batch(seed=5))[0]
    model = student.release()
    if rank == 0:
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        torch.save({"loss": wanted, "model": model.state_dict()}, Path(out) / "released.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_like_one(tmp_path):
    from nha.distill.checkpoint import load_trained
    from tests.distill.test_student import batch, student_of

    out = tmp_path / "out"
    run_twice(f"from tests.distill.test_sharding import work; work({str(out)!r})")
    alone, found = student_of(), student_of()
    parameters = [p for p in alone.parameters() if p.requires_grad]
    batches = [("text", [batch(seed=rank) for rank in range(2)]), ("recall", [batch(seed=10 + r) for r in range(2)])]
    norms = steps(alone, batches, parameters, average=2)
    for ours, theirs in zip(norms, torch.load(out / "norms.pt"), strict=True):
        for name in ours:
            assert abs(ours[name] - theirs[name]) <= 1e-4 * ours[name]
    load_trained(found, out)
    for (name, a), b in zip(found.named_parameters(), alone.parameters(), strict=True):
        # Adam's first steps are signs times the rate: where a gradient is rounding, so is the step
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3), name
    released = torch.load(out / "released.pt", weights_only=True)
    with torch.no_grad():
        assert torch.allclose(found(**batch(seed=5))[0], released["loss"], rtol=1e-4)
    model = student_of().release()
    model.load_state_dict(released["model"])


def run_run(place: str, run: str, changes: dict) -> None:
    """A whole run in one of two processes."""
    from transformers import AutoTokenizer

    from nha.data.corpus import open_corpus
    from nha.distill.run import distill
    from tests.distill.material import settings, tiny

    corpus = open_corpus(Path(place) / "corpus")
    found = distill(tiny(), AutoTokenizer.from_pretrained(place), corpus, run, settings(tokens=2 * 4 * 320, **changes))
    torch.save(found.model.state_dict(), f"{run}-{os.environ['RANK']}-{found.steps}.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"full_layers": (1,), "gradient_checkpointing": True},
        {"window_size": 300, "seq_len": 310, "recall_fraction": 0.0},  # hardly a document is longer than the window
    ],
    ids=str,
)
def test_two_processes_with_ddp_stop_and_resume(changes, tmp_path):
    from tests.distill.material import material

    material(tmp_path)
    for budget in (0.0, None):
        options = f"{str(tmp_path)!r}, {str(tmp_path / 'run')!r}, {changes | {'budget': budget}!r}"
        run_twice(f"from tests.distill.test_sharding import run_run; run_run({options})")
    for steps in (1, 2):
        first, second = (torch.load(tmp_path / f"run-{rank}-{steps}.pt") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_processes_wait_for_the_first_to_begin(tmp_path):
    from nha.distill.checkpoint import RUN, wait_for_begin

    with pytest.raises(TimeoutError, match=RUN):
        wait_for_begin(tmp_path, seconds=0.0)
    (tmp_path / RUN).touch()
    wait_for_begin(tmp_path, seconds=0.0)


def run_twice(code: str) -> None:
    """Run code in two processes that find each other, as `torchrun` starts them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment | rank, cwd=ROOT) for rank in ranks]
    try:
        until = time.monotonic() + 300
        while None in (codes := [process.poll() for process in running]):
            assert time.monotonic() < until and not any(codes), codes  # one that fails leaves the other waiting
            time.sleep(0.1)
        assert codes == [0, 0]
    finally:
        for process in running:
            process.kill()


def free_port() -> str:
    """A port that nothing listens on."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])
