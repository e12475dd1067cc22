"""Facts are memorised through an adapter: the answers alone are trained on and counted."""

from types import SimpleNamespace

import torch
from peft import get_peft_model

from experiments import adapters
from nha.models.peft_slots import SlotsConfig
from tests.models.families import hybrid


def spell(text):
    return SimpleNamespace(input_ids=[ord(c) % 60 for c in text])


def test_names_differ_and_numbers_have_four_digits():
    book = adapters.phone_book(40, 1)
    assert len({name for name, _ in book}) == 40 and all(len(number) == 4 for _, number in book)
    assert book == adapters.phone_book(40, 1) != adapters.phone_book(40, 2)


def test_only_answers_are_trained_on_and_short_sentences_are_padded_on_the_left():
    rows = adapters.tokenize(spell, [("Al", "1234"), ("Beatrice", "5678")])
    ids, mask, labels = adapters.collate(rows)
    assert mask.sum(1).tolist() == [len(row) for row, _ in rows] and mask[0, 0] == 0
    assert (labels != -100).sum(1).tolist() == [4, 4]
    assert torch.equal(labels[:, -4:], ids[:, -4:])


def test_slots_memorise_facts():
    torch.manual_seed(0)
    model = get_peft_model(hybrid("llama", 8), SlotsConfig(task_type="CAUSAL_LM", start="random"))
    rows = [(torch.tensor([1, 2, 3, 4, 5]), 2), (torch.tensor([6, 7, 8, 9]), 1)]
    losses = adapters.train(model, rows, steps=30, lr=0.3)
    assert losses[-1] < 0.5 * losses[0]
    fractions = adapters.accuracy(model.eval(), rows)
    assert set(fractions) == {"exact", "generated"} and all(0 <= x <= 1 for x in fractions.values())
