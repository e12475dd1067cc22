"""Measure verbatim recall with exact slots, soft slots and none, nothing trained: how much a head's places are worth.

    python3 -m experiments.write_score --data DIR --output DIR [--model FILE.gguf] [--clozes 100] [--budget-s 240]

The score that says which tokens are kept is fitted to training documents; clozes come from held-out books. Every row
of write_score.json is one way to fill the slots of SmolLM2-135M, measured by written clozes. Run the same command again
to resume: rows in the file are not measured anew. --fit-rows and --fit-blocks say how much text the score is fitted to.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nha.convert.calibrate import calibrate_gates, calibrate_sinks
from nha.convert.heads import copy_rows, load_plan, plan_heads, sample
from nha.convert.write_scores import WriteScores, fit_write_scores, set_write_scores
from nha.data.cloze import RANGES, Cloze, make_clozes
from nha.data.sources import documents
from nha.data.text import blocks
from nha.evaluate.public.sets import HELD_OUT, find_set, read_documents
from nha.evaluate.public.written import begins_with, write
from nha.evaluate.variants import use_variant
from nha.io import write_atomically
from nha.models import slots
from nha.models.adapter import to_hybrid
from nha.models.smollm2 import forget_gguf, gguf_path
from nha.models.windows import attention_layers, set_windows
from nha.ops.exact import WriteOrder, exact_log_gate
from nha.ops.heads import Window
from nha.report.results import to_json

WINDOW = 64
PLAN = Path("results/plans/smollm2-heads15.json")


def load(path: Path, device: str) -> tuple[Any, Any]:
    """The model, bfloat16 on a GPU and else float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    forget_gguf(model)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval(), tokenizer


def accuracy(model: Any, tokenizer: Any, clozes: list[Cloze]) -> list[int]:
    """[right, all] of written clozes."""
    prompts = [tokenizer(cloze.prompt, verbose=False).input_ids for cloze in clozes]
    new = 2 + max(len(tokenizer(" " + cloze.answer, verbose=False).input_ids) for cloze in clozes)
    texts = write(model, tokenizer, prompts, new)
    return [sum(begins_with(text, cloze.answer) for text, cloze in zip(texts, clozes, strict=True)), len(clozes)]


def random_scores(found: WriteScores) -> WriteScores:
    """Scores of directions drawn at random, with as many tokens above their thresholds."""
    generator = torch.Generator().manual_seed(0)
    weights, scores = [], []
    for weight, own in zip(found.weights, found.scores, strict=True):
        drawn = None if weight is None else torch.randn(weight.shape, generator=generator).to(weight.device)
        weights.append(drawn)
        scores.append(torch.randn(own.shape, generator=generator).sort(1).values if weight is not None else own)
    return WriteScores(weights, scores)


def keep_all(model: Any) -> None:
    """Let every head keep every token: its slots hold the last tokens before the window."""
    for module in attention_layers(model):
        module.nha.g_proj.weight.data.zero_()
        module.nha.g_proj.bias.data.fill_(10.0)


@contextmanager
def best_of_prompt() -> Iterator[None]:
    """Within the context, heads keep the M highest scores of a prompt and no later token: a bound, which is not causal.

    It shows what a rule that overwrites the lowest score could gain over one that overwrites the oldest token.
    """

    def gates(score: Tensor, num_slots: int, order: WriteOrder, *, fill: bool = True) -> tuple[Tensor, Tensor]:
        length = score.shape[1]
        chosen = torch.full_like(score, -1.0)
        if length > WINDOW + num_slots:
            ranked = score.masked_fill(order.token[..., None] < 0, float("-inf"))[:, : length - WINDOW]
            chosen.scatter_(1, ranked.topk(num_slots, 1).indices, 1.0)
        return exact_log_gate(chosen, num_slots, order, fill=fill and length <= WINDOW + num_slots)

    with mock.patch.object(slots, "exact_log_gate", gates):
        yield


class Probe:
    """The model with exact slots, the same with soft slots, and the text that both see."""

    def __init__(self, options: argparse.Namespace, device: str):
        path = gguf_path() if options.model is None else options.model
        self.options, self.path, self.device = options, path, device
        self.model, self.tokenizer = load(path, device)
        texts = sample(list(islice(documents([str(find_set(options.data, "train"))]), options.documents)), 0)
        spans = {"min_distance": WINDOW + 8, "max_distance": 256}
        rows = copy_rows(self.tokenizer, texts, options.fit_rows, **spans)
        self.text = blocks(self.tokenizer, texts, options.fit_blocks, 512)
        to_hybrid(self.model, [WINDOW] * len(attention_layers(self.model)), slot_write="exact")
        calibrate_sinks(self.model, self.text)
        self.scores = fit_write_scores(self.model, [*(row.ids[None] for row in rows), self.text])

    def soft(self) -> Any:
        """The hybrid with gates by k-means."""
        model, _ = load(self.path, self.device)
        to_hybrid(model, [WINDOW] * len(attention_layers(model)))
        calibrate_sinks(model, self.text)
        calibrate_gates(model, self.text)
        return model

    def rows(self) -> dict[str, Callable[[ExitStack], Any]]:
        """The rows by name: each enters contexts and gives the model to measure."""
        model = self.model

        def variant(name: str) -> Callable[[ExitStack], Any]:
            return lambda stack: (stack.enter_context(use_variant(model, name)), model)[1]

        def exact(prepare: Callable[[], None], windows: Sequence[Window] | None = None) -> Callable[[ExitStack], Any]:
            def use(stack: ExitStack) -> Any:
                prepare()
                before = list(model.config.window_sizes)
                set_windows(model, before if windows is None else windows)
                stack.callback(set_windows, model, before)
                return model

            return use

        plan = load_plan(PLAN).weights if PLAN.exists() else None
        heads = None if plan is None else plan_heads(plan, heads=15, wide_window=256)
        found: dict[str, Callable[[ExitStack], Any]] = {
            "original": variant("full_attention"),
            "window alone": variant("slots_off"),
            "soft slots (k-means)": lambda _: self.soft(),
            "exact slots, every token kept": exact(lambda: keep_all(model)),
            "exact slots, random score": exact(lambda: set_write_scores(model, random_scores(self.scores), 256)),
        }
        for reach in self.options.reach:
            found[f"exact slots, learned score, reach {reach}"] = exact(
                lambda reach=reach: set_write_scores(model, self.scores, reach)
            )
        best = exact(lambda: set_write_scores(model, self.scores))
        found["exact slots, highest scores of the prompt"] = lambda stack: (
            stack.enter_context(best_of_prompt()),
            best(stack),
        )[1]
        if heads is not None:
            found["windows per head alone"] = lambda stack: (
                exact(lambda: None, heads)(stack),
                stack.enter_context(use_variant(model, "slots_off")),
            )[0]
            found["windows per head and exact slots, reach 512"] = exact(
                lambda: set_write_scores(model, self.scores, 512), heads
            )
        return found


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clozes", type=int, default=500 if device == "cuda" else 50)
    parser.add_argument("--ranges", default="cloze_near,cloze_far" if device == "cuda" else "cloze_near")
    parser.add_argument("--documents", type=int, default=2000, help="training documents to draw from")
    parser.add_argument("--fit-rows", type=int, default=384 if device == "cuda" else 64)
    parser.add_argument("--fit-blocks", type=int, default=128 if device == "cuda" else 16)
    parser.add_argument("--reach", type=lambda x: [int(i) for i in x.split(",")], default=[256, 512, 1024, 2048])
    parser.add_argument("--budget-s", type=float, default=math.inf)
    options = parser.parse_args()
    end = time.perf_counter() + options.budget_s
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "write_score.json"
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    probe = Probe(options, device)
    correlations = [[round(float(x), 3) for x in row] for row in probe.scores.correlations]
    table["correlation of score and target"] = correlations
    held_out = read_documents(find_set(options.data, HELD_OUT))
    for part in options.ranges.split(","):
        clozes = make_clozes(probe.tokenizer, held_out, options.clozes, RANGES[part])
        for name, use in probe.rows().items():
            if part in table.setdefault(name, {}):
                continue
            if time.perf_counter() > end:
                return
            with ExitStack() as stack:
                table[name][part] = accuracy(use(stack), probe.tokenizer, clozes)
            write_atomically(path, to_json(table))
            print(f"{name}: {part} {table[name][part]}, {end - time.perf_counter():.0f} s left", flush=True)


if __name__ == "__main__":
    main()
