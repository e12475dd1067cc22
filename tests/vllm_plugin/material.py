"""Tiny models, what transformers writes with them, and engines of vLLM in this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from nha import NHAConfig, NHAForCausalLM, hybridize
from tests.data.tokenizers import SPECIAL, wrap

VOCAB, MAX_LEN, KV_BYTES = 320, 4096, 96 << 20
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=MAX_LEN,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}>"


def sharpen(model: Any, factor: float) -> Any:
    """Scale the weights up, so that greedy tokens vary and no two are nearly as likely."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "sink" in name:
                x.normal_()
            elif x.dim() > 1:
                x.mul_(factor)
    return model.eval()


def make_model(path: Path, family: str, windows: list[int], *, factor: float = 3.0, **changes: Any) -> Path:
    """Save a tiny hybrid of a family, or with "nha" a model trained from scratch, with a tokenizer."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": len(windows)} | changes
    if family == "nha":
        model = sharpen(NHAForCausalLM(NHAConfig(**sizes, window_sizes=windows, num_slots=8, num_sinks=1)), factor)
    else:
        whole = sharpen(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="eager"), factor
        )
        text = torch.randint(3, VOCAB, (4, 256))
        model = hybridize(whole, num_slots=8, window_size=windows, calibration=text)
    model.save_pretrained(path)
    ascii_tokenizer().save_pretrained(path)
    return path


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are printable characters and pairs of letters: any tokens are text."""
    characters = ["Ġ", *map(chr, range(33, 127))]
    letters = [chr(i) for i in range(97, 123)]
    pairs = [(one, two) for one in letters for two in letters][: VOCAB - len(SPECIAL) - len(characters)]
    vocab = [*SPECIAL, *characters, *("".join(pair) for pair in pairs)]
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(vocab)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = wrap(core)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy(path: Path, prompts: list[list[int]], new: int, state_dtype: str = "float32") -> list[list[int]]:
    """The tokens that transformers writes after each prompt, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, state_dtype=state_dtype).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


@contextmanager
def engine(path: Path, *, apart: bool = False, **options: Any) -> Iterator[Any]:
    """vLLM with a model, in this process (or `apart`, in one of its own) and eager unless told otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(apart))
    from vllm import LLM  # pyright: ignore[reportMissingImports]
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import registry  # pyright: ignore[reportMissingImports]

    # vLLM looks at each new class in another process, for the sake of CUDA: ten seconds a family. The servers still do.
    registry._run_in_subprocess = lambda function: function()
    defaults: dict[str, Any] = dict(
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=16,
        kv_cache_memory_bytes=KV_BYTES,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        disable_log_stats=False,
    )
    made = None
    try:
        made = LLM(str(path), **(defaults | options))
        yield made
    finally:
        if made is not None:
            made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def add(llm: Any, prompts: list[list[int]]) -> None:
    """Ask for answers to all prompts, without waiting for any."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)


def write(llm: Any, prompts: list[list[int]], new: int) -> list[Any]:
    """vLLM's greedy answers to all prompts at once."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def tokens(answers: list[Any]) -> list[list[int]]:
    return [list(answer.outputs[0].token_ids) for answer in answers]


def metric(llm: Any, name: str) -> int:
    """A counter of vLLM's."""
    return sum(found.value for found in llm.get_metrics() if found.name == name)


def drafting_prompts() -> list[list[int]]:
    """Prompts after which some drafts stand and some do not."""
    return [prompt * 6 for prompt in make_prompts([9, 17])] + make_prompts([3, 40, 200])


def draft_counts(llm: Any) -> tuple[int, int]:
    """How many tokens were drafted, and how many stood."""
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    return metric(llm, names[0]), metric(llm, names[1])
