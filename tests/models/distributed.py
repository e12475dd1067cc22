"""Run by two processes: tensor parallelism and data parallelism of tiny hybrids, with what differs as JSON."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from nha import NHAConfig, NHAForCausalLM
from nha.models.parallel import SUPPORTED
from tests.models.families import hybrid, tokens

LENGTHS = (8, 30)  # within the window of 8, and beyond


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    scratch = NHAForCausalLM(NHAConfig.tiny(window_sizes=[8, -1], num_sinks=1, vocab_size=97))
    with torch.no_grad():
        for name, weight in scratch.named_parameters():
            if "sink" in name or "g_proj" in name:
                weight.copy_(torch.randn(weight.shape))
    return {
        "sink": hybrid("llama", [8, 8, -1]),
        "no sink": hybrid("qwen2", 8, sinks=0),
        "scratch": scratch.eval(),
    }


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in grads.items()}


def tensor_parallel(folder: Path) -> dict[str, float]:
    """Differences of logits, of written tokens and of gradients from one process to two, relative."""
    found = {}
    for name, model in models().items() if SUPPORTED else ():
        path = folder / name.replace(" ", "-")
        if dist.get_rank() == 0:
            model.save_pretrained(path)
        dist.barrier()
        whole = AutoModelForCausalLM.from_pretrained(path).eval()
        split = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto").eval()
        for length in LENGTHS:
            ids = tokens(2, length)
            with torch.no_grad():
                ours, theirs = split(ids).logits, whole(ids).logits
            found[f"{name}, {length} tokens"] = float((ours - theirs).abs().max() / theirs.abs().max())
            ours, theirs = gradients(split, ids), gradients(whole, ids)
            assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
            scale = max(float(x.abs().max()) for x in theirs.values())
            worst = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
            found[f"{name}, {length} tokens, gradients"] = worst / scale
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        written = [model.generate(tokens(2, 20), **options) for model in (split, whole)]
        found[f"{name}, tokens written"] = float((written[0] != written[1]).float().mean())
    return found


def data_parallel() -> dict[str, float]:
    """Differences of gradients from one process to two, relative, with and without gradient checkpointing."""
    found = {}
    for checkpointing in (False, True):
        for name, model in models().items():
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            parallel = DistributedDataParallel(model)
            for length in LENGTHS:
                ids = tokens(2, length)
                for _ in range(2):  # the second pass fails where the first left a gradient out
                    ours = gradients(parallel, ids[dist.get_rank()][None])
                theirs = gradients(model, ids)
                scale = max(float(x.abs().max()) for x in theirs.values())
                worst = max(float((ours[f"module.{key}"] - theirs[key]).abs().max()) for key in theirs)
                found[f"{name}, {length} tokens, checkpointing {checkpointing}"] = worst / scale
    return found


def fully_sharded() -> dict[str, float]:
    """Differences of gradients from one process to two that share weights (FSDP2), relative."""
    found = {}
    for name, model in models().items():
        model.train()
        sharded = copy.deepcopy(model)
        for layer in sharded.get_decoder().layers:
            fully_shard(layer)
        fully_shard(sharded)
        assert any(isinstance(x, DTensor) for x in sharded.parameters())
        for length in LENGTHS:
            ids = tokens(2, length)
            ours = gradients(sharded, ids[dist.get_rank()][None])
            theirs = gradients(model, ids)
            scale = max(float(x.abs().max()) for x in theirs.values())
            worst = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
            found[f"{name}, {length} tokens"] = worst / scale
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {"tensor": tensor_parallel(folder), "data": data_parallel(), "sharded": fully_sharded()}
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
