"""Small tokenizers of the kinds that models have, trained here, so that no network is needed."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nha.data.text import calibration_text

KINDS = ("bytes", "merges", "blanks", "digits")
SPECIAL = ["<pad>", "<s>", "</s>"]


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind.

    "bytes" never merges; "merges" is a byte-level BPE that merges digits too (GPT-2); "blanks" puts a blank before a
    text's first word (Llama 2); "digits" splits numbers into digits and adds a first token (SmolLM2, Llama 3).
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bytes":
        vocab = {c: i for i, c in enumerate([*SPECIAL, *sorted(alphabet)])}
        core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        return wrap(core)
    core = Tokenizer(models.BPE())
    text = (calibration_text()[:60_000] + " 12 123 1234 2024 55 99").split("\n\n")
    if kind == "blanks":
        alphabet = ["\n", *map(chr, range(33, 127))]
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        core.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        split = [pre_tokenizers.Digits(individual_digits=True)] if kind == "digits" else []
        core.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text, trainer)
    if kind == "digits":
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return wrap(core)


def wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
