"""Time the first and the second question about a long document whose memory is kept in a store.

    python3 -m experiments.memory_speed --output DIR [--shape llama-8b] [--full-layers 4] [--tokens 100000] [--new 16]

A random hybrid reads a document and a question of 32 tokens, and writes an answer, through a `MemoryStore` in DIR; then
another question about the same document, from the store, and that question alone, without any document, in turn. DIR
gets memory_speed.json with the seconds of each part (medians over the rounds that there is time for) and the bytes
stored; the store itself is removed. "parts" are the seconds of one more second question, those of the files summed over
the threads that read them. --profile adds profile-*.txt: in which functions the host spends one more second question
and one more question alone. --store DIR puts the store elsewhere, such as into memory; --again DIR copies it there and
takes the second question again. Without --shape a GPU takes llama-8b with 100,000 tokens and a CPU smollm2-135m with
4,000; --shape tiny tries the script.
"""

from __future__ import annotations

import cProfile
import io
import math
import pstats
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experiments.shapes import build, model_options, synchronize
from nha import tensor_file
from nha.io import write_atomically
from nha.memory import MemoryStore
from nha.memory import store as store_module
from nha.models.conversation import cache_keyword
from nha.report.results import to_json

QUESTION = 32
ENTRY = 8192  # tokens from one entry to the next, as a store has them by default


def ask(model: Any, store: MemoryStore, ids: Tensor, marks: list[int], new: int) -> tuple[dict[str, Any], Tensor]:
    """Seconds until the cache is there, until the first token, and until the last; and the answer."""
    device = model.device.type
    synchronize(device)
    start = time.perf_counter()
    memory = store.read(model, ids, marks)
    synchronize(device)
    read = time.perf_counter()
    times: list[float] = []

    class Clock:
        """A streamer that notes when tokens come; the first call brings the prompt."""

        def put(self, value: Tensor) -> None:
            synchronize(device)
            times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is held back."""

    options: dict[str, Any] = {cache_keyword(model): memory.cache, "max_new_tokens": new, "min_new_tokens": new}
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, streamer=Clock(), **options
    )
    found = {
        "tokens found": memory.num_found,
        "seconds until the cache": round(read - start, 3),
        "seconds until the first token": round(times[1] - start, 3),
        f"seconds until token {new}": round(times[-1] - start, 3),
    }
    return found, output[:, ids.shape[1] :]


def median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number."""
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


class Watch:
    """Seconds spent in functions while its context lasts, by label, summed over threads."""

    def __init__(self, device: str):
        self.device, self.seconds, self.lock = device, {}, Lock()
        self.patches = ExitStack()

    def add(self, owner: Any, name: str, label: str, wait: bool = False) -> None:
        """Time a function of a class or module; with `wait`, until a GPU has done what it asked for."""
        function = getattr(owner, name)
        self.seconds[label] = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if wait:
                    synchronize(self.device)
                with self.lock:
                    self.seconds[label] += time.perf_counter() - start

        self.patches.enter_context(patch.object(owner, name, timed))

    def rounded(self) -> dict[str, float]:
        return {label: round(seconds, 4) for label, seconds in self.seconds.items()}


class TimedDigest:
    """A checksum whose updates a `Watch` can time."""

    def __init__(self, digest: Any):
        self.digest = digest

    def update(self, data: Any) -> None:
        self.digest.update(data)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


def measure_parts(model: Any, device: str, call: Callable[[], Any]) -> dict[str, float]:
    """The seconds of the parts of a call of `ask`."""
    watch, begin = Watch(device), tensor_file.begin_digest
    with watch.patches:
        watch.patches.enter_context(
            patch.object(tensor_file, "begin_digest", lambda metadata: TimedDigest(begin(metadata)))
        )
        watch.add(MemoryStore, "_boundaries", "hash of the text and the model")
        watch.add(MemoryStore, "_open", "open files")
        watch.add(MemoryStore, "_fill", "files into memory")
        watch.add(tensor_file, "_read_all", "of it, summed over files: read")
        watch.add(TimedDigest, "update", "of it, summed over files: checksum")
        watch.add(tensor_file.Staging, "next", "of it, summed over files: wait for copies")
        watch.add(tensor_file.Staging, "copy", "of it, summed over files: begin copies")
        watch.add(tensor_file.Staging, "close", "of it, summed over files: end of copies")
        watch.add(store_module, "cache_from", "cache of tensors")
        watch.add(type(model), "generate", "generate", wait=True)
        watch.add(type(model), "_prefill", "of it, first forward pass", wait=True)
        call()
    return watch.rounded()


def profile(path: Path, call: Callable[[], Any]) -> None:
    """Write the functions that take the host most of a call, by the time in them and below them."""
    text, profiler = io.StringIO(), cProfile.Profile()
    profiler.runcall(call)
    for order in ("cumulative", "tottime"):
        pstats.Stats(profiler, stream=text).sort_stats(order).print_stats(60)
    write_atomically(path, text.getvalue())


def main() -> None:
    parser, device = model_options(__doc__)
    parser.add_argument("--tokens", type=int, default=100_000 if device == "cuda" else 4000)
    parser.add_argument("--block-size", type=int, default=4096 if device == "cuda" else 1024)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="no further round begins after this time")
    options = parser.parse_args()
    end = time.perf_counter() + options.budget_s
    model = build(options.shape, options.full_layers, device)
    generator = torch.Generator().manual_seed(0)
    size = options.tokens + 2 * QUESTION
    words = torch.randint(3, model.config.vocab_size, (1, size), generator=generator).to(model.device)
    document, questions = words[:, : options.tokens], words[:, options.tokens :].split(QUESTION, 1)
    folder = (options.store or options.output) / "store"
    shutil.rmtree(folder, ignore_errors=True)
    apart = max(ENTRY // options.block_size, 1)
    store = MemoryStore(folder, max_bytes=64 << 30, block_size=options.block_size, blocks_per_entry=apart)
    nothing = MemoryStore(options.output / "nothing", block_size=options.block_size)
    found: dict[str, Any] = {
        "shape": options.shape,
        "full_layers": options.full_layers,
        "document tokens": options.tokens,
        "question tokens": QUESTION,
        "block_size": options.block_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    warm = torch.cat([document[:, : options.block_size], questions[0]], 1)
    ask(model, nothing, warm, [], options.new)  # compiles kernels
    texts = [torch.cat([document, question], 1) for question in questions]
    path = options.output / "memory_speed.json"
    found["first question"], _ = ask(model, store, texts[0], [options.tokens], options.new)
    found["bytes stored"] = store.nbytes
    write_atomically(path, to_json(found))
    answers, second, alone = [], [], []
    for number in range(options.rounds):
        if number and time.perf_counter() > end:
            break
        times, answer = ask(model, store, texts[1], [options.tokens], options.new)
        second.append(times)
        answers.append(answer)
        alone.append(ask(model, nothing, questions[1], [], options.new)[0])
        found |= {"second question": median(second), "question alone": median(alone), "rounds": len(second)}
        found["same answer"] = all(torch.equal(answer, answers[0]) for answer in answers)
        write_atomically(path, to_json(found))
    found["parts"] = measure_parts(model, device, lambda: ask(model, store, texts[1], [options.tokens], 1))
    found["parts, question alone"] = measure_parts(model, device, lambda: ask(model, nothing, questions[1], [], 1))
    write_atomically(path, to_json(found))
    print(to_json(found))
    if options.profile:
        profile(options.output / "profile-second.txt", lambda: ask(model, store, texts[1], [options.tokens], 1))
        profile(options.output / "profile-alone.txt", lambda: ask(model, nothing, questions[1], [], 1))
    if options.again:
        copied = replace(store, path=options.again / "store")
        shutil.copytree(store.path, copied.path, dirs_exist_ok=True)
        found["second question, copied store"], _ = ask(model, copied, texts[1], [options.tokens], options.new)
        write_atomically(path, to_json(found))
        print(to_json(found))
        shutil.rmtree(copied.path)
    for folder in (store.path, nothing.path):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
