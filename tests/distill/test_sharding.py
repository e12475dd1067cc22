"""Spread over two processes with FSDP2, training computes what one process computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    code = f"from tests.distill.test_sharding import work; work({str(out)!r})"
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment | {"RANK": str(rank)}, cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
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


def free_port() -> str:
    """A port that nothing listens on."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])
