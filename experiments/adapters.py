"""Memorise facts through learned initial slots, and through LoRA of equal size.

    PYTHONPATH=src python3 experiments/adapters.py --output DIR     (a quarter of an hour on two cores)

A hybrid of SmolLM2-135M-Instruct as `hybridize` makes it, untrained and frozen, memorises a phone book of made-up
names: once through the initial slots of a few layers, once through low-rank adapters of attention. Both go through
peft: they are trained, saved, loaded into a new hybrid, and measured there. DIR gets adapters.json: for each adapter
its parameters, bytes on disk, the loss by step, the accuracy of whole answers (teacher-forced and by greedy
generation), and the perplexity of other text with and without the adapter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from nha import hybridize
from nha.data.text import blocks, evaluation_documents
from nha.evaluate.perplexity import perplexity
from nha.io import write_atomically
from nha.models.peft_slots import SlotsConfig
from nha.models.smollm2 import load_smollm2
from nha.report.results import to_json

FIRST = ("Ada", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo")
LAST = ("Quill", "Marsh", "Okoro", "Tanaka", "Vega", "Lindholm", "Moreau", "Abebe")
SLOTTED = [4, 10, 16, 22, 28]
KINDS: dict[
    str, tuple[PeftConfig, float]
] = {  # with the learning rate, of two tried the one that changes the perplexity of other text less
    "slots": (SlotsConfig(task_type="CAUSAL_LM", layers_to_transform=SLOTTED, start="random"), 3e-2),
    "lora": (LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), 3e-3),
}


def phone_book(count: int, seed: int) -> list[tuple[str, str]]:
    """Distinct names, each with a number of four digits.

    >>> phone_book(2, 0)
    [('Farid Quill', '3428'), ('Greta Lindholm', '3770')]
    """
    generator = np.random.default_rng(seed)
    names = [f"{a} {b}" for a in FIRST for b in LAST]
    picked = sorted(generator.choice(len(names), count, replace=False))
    return [(names[i], str(generator.integers(1000, 10000))) for i in picked]


def tokenize(tokenizer: Any, book: list[tuple[str, str]]) -> list[tuple[Tensor, int]]:
    """Token ids of every sentence, and the number of tokens of the answer at its end."""
    found = []
    for name, number in book:
        prompt = tokenizer(f"The phone number of {name} is ").input_ids
        answer = tokenizer(number).input_ids
        found.append((torch.tensor([*prompt, *answer]), len(answer)))
    return found


def collate(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded ids [B, T], their mask, and labels of the answers alone."""
    max_len = max(len(ids) for ids, _ in rows)
    ids, mask = torch.zeros(len(rows), max_len, dtype=torch.long), torch.zeros(len(rows), max_len, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for at, (row, count) in enumerate(rows):
        ids[at, -len(row) :], mask[at, -len(row) :], labels[at, -count:] = row, 1, row[-count:]
    return ids, mask, labels


@torch.no_grad()
def accuracy(model: Any, rows: list[tuple[Tensor, int]]) -> dict[str, float]:
    """Fractions of answers that are correct: teacher-forced (every token is the argmax), and by greedy generation."""
    exact = generated = 0
    for ids, count in rows:
        prompt, answer = ids[None, :-count], ids[-count:]
        exact += bool((model(input_ids=ids[None, :-1]).logits[0, -count:].argmax(-1) == answer).all())
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        generated_ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[
            0, prompt.shape[1] :
        ]
        generated += generated_ids.tolist() == answer.tolist()
    return {"exact": exact / len(rows), "generated": generated / len(rows)}


def new_hybrid() -> tuple[Any, Any]:
    """The untrained hybrid and its tokenizer."""
    model, tokenizer = load_smollm2()
    hybridize(model, num_slots=64, window_size=64, tokenizer=tokenizer)
    return model, tokenizer


def train(model: Any, rows: list[tuple[Tensor, int]], steps: int, lr: float) -> list[float]:
    """The loss of every step."""
    ids, mask, labels = collate(rows)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        if step % 10 == 9:
            print(f"  step {step + 1}: loss {losses[-1]}", flush=True)
    return losses


def measure(kind: str, lr: float, rows: list[tuple[Tensor, int]], text: Tensor, steps: int) -> dict[str, Any]:
    """Train an adapter, save it, load it into a new hybrid, and measure that hybrid."""
    torch.manual_seed(0)
    started = time.perf_counter()
    model: Any = get_peft_model(new_hybrid()[0], KINDS[kind][0])
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = train(model, rows, steps, lr)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        loaded = PeftModel.from_pretrained(new_hybrid()[0], folder).eval()
    return {
        "adapter": kind,
        "lr": lr,
        "parameters": count,
        "bytes": size,
        "steps": steps,
        "facts": len(rows),
        **accuracy(loaded, rows),
        "perplexity": perplexity(loaded, text).value,
        "seconds": round(seconds, 1),
        "losses": losses,
    }


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--kinds", type=lambda s: s.split(","), default=list(KINDS))
    parser.add_argument("--lr", type=float, help="instead of the default of the adapter")
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(given)
    unknown = sorted(set(options.kinds) - KINDS.keys())
    if unknown or not 1 <= options.facts <= len(FIRST) * len(LAST):
        parser.error(f"expected kinds out of {', '.join(KINDS)} and 1 to {len(FIRST) * len(LAST)} facts, got {unknown}")
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = new_hybrid()
    rows = tokenize(tokenizer, phone_book(options.facts, 0))
    text = blocks(tokenizer, evaluation_documents(), 4, 512)
    found = [
        {"adapter": "none", "facts": len(rows), **accuracy(model, rows), "perplexity": perplexity(model, text).value}
    ]
    for kind in options.kinds:
        print(kind, flush=True)
        found.append(measure(kind, options.lr or KINDS[kind][1], rows, text, options.steps))
        print({name: value for name, value in found[-1].items() if name != "losses"}, flush=True)
    write_atomically(options.output / "adapters.json", to_json(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
