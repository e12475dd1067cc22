"""Train a tiny hybrid on a copying task for a few steps, then look at what its slots do.

python examples/train_from_scratch.py
"""

from __future__ import annotations

import torch

from nha import NHAConfig, NHAForCausalLM
from nha.models.observe import ablate


def batch(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Sequences [rows, 33] of 16 random tokens, a separator and the same 16 tokens again."""
    half = torch.randint(2, 128, (rows, 16), generator=generator)
    return torch.cat([half, torch.ones(rows, 1, dtype=torch.long), half], 1)


def main(steps: int = 60) -> None:
    """Train with a window of 8, too short to copy from, so that only slots can help."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = NHAForCausalLM(NHAConfig.tiny(window_sizes=8, num_slots=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        ids = batch(32, generator)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    with torch.no_grad(), ablate(model, "slots_off"):
        ids = batch(32, generator)
        print(f"slots off  loss {model(ids, labels=ids).loss.item():.3f}")


if __name__ == "__main__":
    main()
