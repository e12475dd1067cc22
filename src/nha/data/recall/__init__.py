"""Recall text: facts, then real text, then questions that only a memory of those facts can answer.

Sequences are joined from pieces that are tokenized once per tokenizer, so that a fact has the same tokens where it is
stated and where it is asked for, and distances are exact. Training and evaluation draw from disjoint names, words and
wordings (`nha.data.recall.words`).
"""

from nha.data.recall.evaluation import EVALUATION_TASKS, EvaluationTask, RecallSet, evaluation_set
from nha.data.recall.facts import Filler, filler_tokens, pieces_of
from nha.data.recall.settings import TASKS, RecallSettings
from nha.data.recall.training import training_sequence

__all__ = [
    "EVALUATION_TASKS",
    "EvaluationTask",
    "Filler",
    "RecallSet",
    "RecallSettings",
    "TASKS",
    "evaluation_set",
    "filler_tokens",
    "pieces_of",
    "training_sequence",
]
