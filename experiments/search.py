"""Time `nha search` for a model of some shape with random weights: `python experiments/search.py --shape 8b`.

Times one whole pass over the rows and passes that start at evenly spread layers, and adds up what greedy search and a
number of passes of exchanges take.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nha.convert.search import Evaluator, SearchData
from nha.models.adapter import to_hybrid

SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, vocab_size=1024),
    "135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152
    ),
    "8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, vocab_size=128256
    ),
}
KV_HEADS = {"tiny": 2, "135m": 3, "8b": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--full", type=int, default=4, help="layers to find")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--text-sequences", type=int, default=8)
    parser.add_argument("--recall-sequences", type=int, default=16)
    parser.add_argument("--exchanges", type=int, default=2, help="passes of exchanges to count")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        num_key_value_heads=KV_HEADS[args.shape], max_position_embeddings=1 << 16, **SHAPES[args.shape]
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layers = config.num_hidden_layers
    to_hybrid(model, [64] * layers)
    draw = torch.Generator().manual_seed(0)
    text, recall = (
        torch.randint(config.vocab_size, (n, args.seq_len), generator=draw)
        for n in (args.text_sequences, args.recall_sequences)
    )
    answers = torch.zeros(recall.shape, dtype=torch.bool)
    answers[:, -20:] = True
    evaluate = Evaluator(model, SearchData(text, recall, answers), [64] * layers)

    def seconds(function, *arguments) -> float:
        started = time.perf_counter()
        function(*arguments)  # its losses are read as numbers, so it has ended
        return time.perf_counter() - started

    evaluate.set_base(())
    evaluate.base = None
    whole = seconds(evaluate.set_base, ())
    starts = list(range(0, layers, max(1, layers // 8)))
    part = sum(seconds(evaluate, (start,)) for start in starts) / len(starts)
    greedy = sum(layers - i for i in range(args.full))
    exchanged = args.exchanges * args.full * (layers - args.full)
    rests = args.full + args.exchanges * args.full
    total = (greedy + exchanged) * part + rests * whole
    kept = "GPU" if evaluate.storage.type == "cuda" else "CPU"
    print(
        f"{args.shape}, {text.numel() + recall.numel():,} tokens, {dtype} on {device}, activations kept on the {kept}"
    )
    print(f"one whole pass {whole:.2f} s, a pass from the first changed layer {part:.2f} s (mean)")
    print(f"greedy {greedy} sets, exchanges {exchanged} sets: {total:.0f} s in all")


if __name__ == "__main__":
    main()
