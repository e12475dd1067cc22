"""Tensors and memories of a GPU go to files and come back as the same bits, in parts and through small buffers."""

from __future__ import annotations

import pytest
import torch

from nha import tensor_file
from nha.io import read_tensors, write_tensors
from nha.memory import MemoryStore
from nha.models.conversation import cache_keyword
from tests.models.families import hybrid, tokens

pytestmark = pytest.mark.gpu


def test_tensors_come_back_through_small_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 4096)
    x = torch.randn(1, 8, 500, 64, device="cuda", dtype=torch.bfloat16)
    tensors = {
        "part": x[:, :, 100:],
        "turned": x.transpose(1, 3),
        "one": torch.tensor(3, device="cuda"),
        "host": x.cpu(),
    }
    write_tensors(tmp_path / "x", tensors, {})
    for device in ("cuda", "cpu"):
        found, _ = read_tensors(tmp_path / "x", device)
        for name, y in tensors.items():
            assert found[name].device.type == device and torch.equal(found[name].cpu(), y.cpu()), name


def test_a_memory_that_is_found_gives_the_bits_of_reading(tmp_path):
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 300).cuda()
    torch.nn.Module.cuda(model)
    cold, warm = (MemoryStore(tmp_path, block_size=32, blocks_per_entry=2).read(model, ids) for _ in range(2))
    assert (cold.num_found, warm.num_found) == (0, 288)
    with torch.no_grad():
        first, second = (
            model(ids[:, 288:], **{cache_keyword(model): m.cache}, use_cache=True).logits for m in (cold, warm)
        )
    assert torch.equal(first, second)
