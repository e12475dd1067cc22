"""Reinforcement learning on a hybrid with TRL: three steps of GRPO that ask for short answers.

python examples/grpo.py [MODEL] [--batched]       (needs: pip install trl datasets)

MODEL is a directory, a Hub id or 'smollm2-hybrid', which is the default. With --batched, answers come from
`generate_batch`; TRL calls that continuous batching.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch

from nha.models.loading import find, load

PROMPTS = ["Name three colours.", "Why is the sky blue?", "What is a harbour?", "Say hello."]


def reward(completions: list[str], **_: Any) -> list[float]:
    """Shorter answers are better."""
    return [-float(len(text)) for text in completions]


def train(name: str, batched: bool, steps: int = 3) -> list[dict[str, float]]:
    """The log of a run of some steps."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    model, tokenizer = load(find(name))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=24,
            learning_rate=1e-5,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            use_transformers_continuous_batching=batched,
        )
        prompts = Dataset.from_dict({"prompt": PROMPTS * 2})
        trainer = GRPOTrainer(model, reward, settings, train_dataset=prompts, processing_class=tokenizer)
        trainer.train()
        return trainer.state.log_history


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    for row in train(names[0] if names else "smollm2-hybrid", "--batched" in sys.argv):
        print({key: round(row[key], 5) for key in ("reward", "loss", "grad_norm", "entropy") if key in row})
