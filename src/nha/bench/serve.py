"""Tokens a second in vLLM: a hybrid beside itself with every layer full, which is vLLM's own attention: serve.csv.

Every row runs in a process of its own, so that no engine finds another's memory.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nha.bench.timing import CUDA, Table, stamp
from nha.errors import BadInput, one_line
from nha.models.config import FULL
from nha.serve.checks import check_version
from nha.serve.plugin import vllm_version

LENGTHS = (4096, 32768, 131072)
FIRST_ID = 3  # below are special tokens
MARK = "nha bench serve: "  # begins the line with a result
COLUMNS = (
    "model",
    "attention",
    "length",
    "sequences",
    "new_tokens",
    "prompt_tokens_per_s",
    "new_tokens_per_s",
    "cache_tokens",
    "status",
    "gpu",
    "torch",
    "nha",
    "vllm",
    "date",
)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: directory of a hybrid.
        attention: "hybrid", or "full" for vLLM's own attention in every layer.
        length: tokens of each prompt.
        sequences: prompts at a time; vLLM runs as many of them side by side as its memory holds.
        new_tokens: tokens written after each.
        dtype: of the model, as vLLM names it.
        eager: without compiled code and CUDA graphs.
        memory: fraction of the device's memory that vLLM may take; None for its default.
    """

    model: str
    attention: str
    length: int
    sequences: int
    new_tokens: int
    dtype: str = "auto"
    eager: bool = False
    memory: float | None = None

    def __str__(self) -> str:
        return f"{self.attention} T{self.length} x{self.sequences}"


def cases(model: str, lengths: list[int], sequences: int, new_tokens: int, **options: Any) -> list[Case]:
    """A hybrid and full attention at each length; `options` are other fields of `Case`.

    >>> [str(case) for case in cases("m", [4096], 16, 64)]
    ['hybrid T4096 x16', 'full T4096 x16']
    """
    kinds = ("hybrid", "full")
    return [Case(model, kind, n, sequences, new_tokens, **options) for n in lengths for kind in kinds]


def speeds(case: Case, prompt_s: float, whole_s: float) -> dict[str, float]:
    """Tokens a second of prompts that took `prompt_s` with one new token each, and of all other new tokens.

    >>> speeds(Case("m", "full", 1000, 2, 11), 2.0, 4.0)
    {'prompt_tokens_per_s': 1000.0, 'new_tokens_per_s': 10.0}
    """
    later = case.sequences * (case.new_tokens - 1)
    return {
        "prompt_tokens_per_s": round(case.sequences * case.length / prompt_s, 1),
        "new_tokens_per_s": round(later / max(whole_s - prompt_s, 1e-9), 1),
    }


def measure(case: Case) -> dict[str, Any]:
    """Run a case in this process: once to warm up, then prompts alone, then prompts and answers."""
    from vllm import LLM, SamplingParams

    windows: dict[str, Any] = {}
    memory = {} if case.memory is None else {"gpu_memory_utilization": case.memory}
    if case.attention == "full":
        config = json.loads((Path(case.model) / "config.json").read_text())
        windows = {"window_sizes": [FULL] * config["num_hidden_layers"]}
    llm = LLM(
        case.model,
        dtype=case.dtype,
        max_model_len=case.length + case.new_tokens,
        max_num_seqs=case.sequences,
        hf_overrides=windows,
        enforce_eager=case.eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **memory,
    )
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def seconds(new_tokens: int, turn: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        prompts = [prompt(case.length, vocabulary, turn * case.sequences + row) for row in range(case.sequences)]
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - start

    seconds(2, 0)
    found = speeds(case, seconds(1, 1), seconds(case.new_tokens, 2))
    blocks = llm.llm_engine.vllm_config.cache_config
    return found | {"cache_tokens": (blocks.num_gpu_blocks or 0) * blocks.block_size}


def prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    """Random tokens: how fast a model is does not depend on them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ID, vocabulary, (length,), generator=generator).tolist()


def run_apart(case: Case, timeout_s: float) -> dict[str, Any]:
    """`measure` in a process of its own. Raises RuntimeError with its last line where it gives no result."""
    command = [sys.executable, "-m", "nha.bench.serve", json.dumps(asdict(case))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"expected an answer within {timeout_s:.0f} s, got none") from None
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError(reason(done.stdout + done.stderr) or f"exit code {done.returncode}")


def reason(log: str) -> str:
    """The last error in a log of vLLM that names a cause: the line after it only says that there was one.

    >>> reason("ValueError: no memory\\nRuntimeError: Engine core initialization failed.")
    'ValueError: no memory'
    """
    found = re.findall(r"\b\w*Error: (?!Engine core).+", log)
    return one_line(found[-1]) if found else ""


def run(rows: list[Case], out: Path, budget_s: float, log: Callable[[str], None] = print) -> int:
    """Measure the rows into OUT/serve.csv; returns how many failed, whose reason stands in the table.

    Raises BadInput without a vLLM that the plugin was tested with.
    """
    try:
        check_version(vllm_version())
    except ValueError as error:
        raise BadInput(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    about, failed, start = stamp("torch", "nha") | {"vllm": vllm_version()}, 0, time.monotonic()
    with Table(out / "serve.csv", COLUMNS) as table:
        for case in rows:
            left = budget_s - (time.monotonic() - start)
            if left <= 0:
                log(f"{case}: left out, the time is spent")
                continue
            found: dict[str, Any] = {"status": "ok"}
            try:
                found |= run_apart(case, left)
            except RuntimeError as error:
                failed += 1
                found["status"] = str(error)
            keys = {"model": Path(case.model).name, "attention": case.attention, "length": case.length}
            table.add(keys | {"sequences": case.sequences, "new_tokens": case.new_tokens} | found | about)
            shown = [f"{found[name]:,.0f} {text}" for name, text in SHOWN.items() if name in found]
            log(f"{case}: {', '.join(shown) or found['status']}")
    log(f"{len(table.rows)} rows in {table.path}" + ("" if CUDA else "; on a CPU, which says nothing about a GPU"))
    return failed


SHOWN = {"prompt_tokens_per_s": "prompt tokens/s", "new_tokens_per_s": "new tokens/s"}

if __name__ == "__main__":
    print(MARK + json.dumps(measure(Case(**json.loads(sys.argv[1])))), flush=True)
