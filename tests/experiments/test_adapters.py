"""Facts learned by heart through an adapter: what is asked, what counts, and that it can be learned."""

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


def test_only_numbers_are_learned_and_short_rows_are_padded_on_the_left():
    rows = adapters.rows_of(spell, [("Al", "1234"), ("Beatrice", "5678")])
    ids, mask, labels = adapters.batch_of(rows)
    assert mask.sum(1).tolist() == [len(row) for row, _ in rows] and mask[0, 0] == 0
    assert (labels != -100).sum(1).tolist() == [4, 4]
    assert torch.equal(labels[:, -4:], ids[:, -4:])


def test_slots_learn_what_the_model_did_not_know():
    torch.manual_seed(0)
    model = get_peft_model(hybrid("llama", 8), SlotsConfig(task_type="CAUSAL_LM", start="random"))
    rows = [(torch.tensor([1, 2, 3, 4, 5]), 2), (torch.tensor([6, 7, 8, 9]), 1)]
    losses = adapters.train(model, rows, steps=30, rate=0.3)
    assert losses[-1] < 0.5 * losses[0]
    shares = adapters.right(model.eval(), rows)
    assert set(shares) == {"exact", "generated"} and all(0 <= share <= 1 for share in shares.values())
