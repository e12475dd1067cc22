"""Train a tiny hybrid from scratch on associative recall, and beside it the same model without slots.

python examples/recall_from_scratch.py

An example begins with four pairs of a key and its value and ends with the same keys in another order: which value did
each have? In short examples the window of 16 tokens still sees the pairs. In long ones not even two layers of windows
reach back to them, and only the slots can have kept them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nha import NHAConfig, NHAForCausalLM
from nha.models.observe import ablate

VOCABULARY, PAIRS, WINDOW = 32, 4, 16
KEYS, SHORT, LONG = VOCABULARY // 2, 16, 48


def examples(count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [count, length] and, where a key is asked for, the answers; -100 elsewhere."""

    def draw(choices: int, size: int) -> torch.Tensor:
        return torch.rand(count, choices, generator=generator).topk(size).indices

    keys, values = 1 + draw(KEYS - 1, PAIRS), KEYS + draw(KEYS, PAIRS)
    places = length - 2 * PAIRS + 2 * draw(PAIRS, PAIRS)
    ids = torch.zeros(count, length, dtype=torch.long)
    ids[:, : 2 * PAIRS : 2], ids[:, 1 : 2 * PAIRS : 2] = keys, values
    return ids.scatter(1, places, keys), torch.full_like(ids, -100).scatter(1, places, values)


def train(slots: bool, steps: int, seed: int = 0) -> float:
    """Train a model; returns the fraction of right answers in new long examples."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = NHAForCausalLM(
        NHAConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            window_sizes=WINDOW,
            num_slots=64,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    with ablate(model, None if slots else "slots_off"):
        for step in range(steps):
            ids, answers = examples(64, (SHORT, LONG)[step % 2], generator)
            loss = F.cross_entropy(model(ids).logits.flatten(0, 1), answers.flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 100 == 99:
                print(f"step {step + 1:4d}  loss {loss.item():.3f}", flush=True)
        with torch.no_grad():
            ids, answers = examples(500, LONG, torch.Generator().manual_seed(seed + 1))
            asked = answers != -100
            return (model.eval()(ids).logits.argmax(-1)[asked] == answers[asked]).float().mean().item()


def main(steps: int = 500) -> None:
    """Print what both recall; a guess among all values is right in one of 16 cases."""
    for slots in (True, False):
        print(f"{'slots and' if slots else 'without slots, the'} window of {WINDOW}")
        print(f"right answers at {LONG} tokens: {100 * train(slots, steps):.1f} %")


if __name__ == "__main__":
    main()
