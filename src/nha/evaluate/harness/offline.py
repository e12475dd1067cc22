"""Documents of the offline tasks, from public-domain prose (`passages.jsonl`) and from the words of recall text.

lm-evaluation-harness imports this file by its path and calls the functions with the settings in the YAML files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from nha.data.recall.words import EVALUATION

Split = dict[str, Any]
SENTENCE = re.compile(r"(?<=[a-z])\. (?=[A-Z‘“])")


def passages() -> list[str]:
    """Passages of public-domain books; `passages.jsonl` names the source and licence of each."""
    lines = (Path(__file__).parent / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _split(rows: list[dict[str, Any]]) -> Split:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def cloze_rows(min_characters: int = 120) -> list[dict[str, str]]:
    """Beginnings of passages of at least `min_characters` characters up to the last word of a sentence, and that word.

    >>> row = cloze_rows()[0]
    >>> row["word"].isalpha(), row["text"].endswith(" ")
    (True, False)
    """
    rows = []
    for passage in passages():
        ends = [match.start() for match in SENTENCE.finditer(passage)] + [len(passage) - 1]
        for end in ends:
            text, _, word = passage[:end].rpartition(" ")
            if len(text) >= min_characters and re.fullmatch(r"[a-z]{3,}", word):
                rows.append({"text": text, "word": word})
    return rows


def recall_rows(count: int = 40, facts: int = 4, words: int = 500, seed: int = 0) -> list[dict[str, Any]]:
    """Facts, about `words` words of prose, and a question; `choices` are the values of all facts.

    >>> row = recall_rows(count=1)[0]
    >>> row["answer"] in row["prompt"] and row["answer"] == row["choices"][row["right"]]
    True
    """
    texts, found = passages(), []
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        first = generator.choice(len(EVALUATION.first), facts, replace=False)
        names = [
            f"{EVALUATION.first[i]} {EVALUATION.last[int(generator.integers(len(EVALUATION.last)))]}" for i in first
        ]
        values = [str(value) for value in generator.choice(9000, facts, replace=False) + 1000]
        asked = int(generator.integers(facts))
        prose: list[str] = []
        for index in generator.permutation(len(texts)):
            if sum(len(text.split()) for text in prose) < words:
                prose.append(texts[index])
        stated = [f"The locker combination of {n} is {v}." for n, v in zip(names, values, strict=True)]
        question = f"The locker combination of {names[asked]} is"
        prompt = "\n\n".join(["\n".join(stated), *prose, question])
        found.append({"prompt": prompt, "answer": values[asked], "choices": values, "right": asked})
    return found


def cloze(**_: Any) -> Split:
    """Last words of sentences."""
    return _split(cloze_rows())


def recall(count: int = 40, facts: int = 4, words: int = 500, seed: int = 0, **_: Any) -> Split:
    """Facts to recall over prose."""
    return _split(recall_rows(count, facts, words, seed))
