"""The search finds the layers that matter, measures each set once, and its shortcuts change no number."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from nha.convert.search import (
    Evaluator,
    SearchData,
    cache_bytes,
    candidate_layers,
    count_for_bytes,
    greedy_and_exchange,
    heuristics,
    load_search,
    save_search,
    search,
    search_data,
    windows_from_search,
)
from nha.models.cache import cache_nbytes
from nha.models.head import token_losses
from nha.models.windows import attention_layers, set_windows
from tests.data.tokenizers import small_tokenizer
from tests.models.families import FAMILIES, hybrid, sliding, tokens

LAYERS = 6


def data(text_sequences=3, recall_sequences=2, seq_len=40):
    answers = torch.zeros(recall_sequences, seq_len, dtype=torch.bool)
    answers[:, -4:-1] = True
    return SearchData(tokens(text_sequences, seq_len), tokens(recall_sequences, seq_len, seed=1), answers)


def deep(**changes):
    return hybrid("llama", 8, num_hidden_layers=LAYERS, **changes)


def whole(model, windows, read):
    """Recall and text loss from whole forward passes."""
    set_windows(model, windows)
    with torch.no_grad():
        losses = []
        for ids, mask in ((read.recall, read.answers[:, 1:]), (read.text, torch.ones_like(read.text[:, 1:]).bool())):
            hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[:, :-1]
            losses.append(token_losses(model, hidden[mask], ids[:, 1:][mask]).mean().item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_at_a_layer_changes_no_loss(family):
    model, read = hybrid(family, 8), data()
    evaluate = Evaluator(model, read, [8, 8, 8], recall_weight=0.25, max_batch_tokens=80)
    evaluate.set_base((1,))
    for chosen in [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)]:
        found = evaluate(chosen)
        recall, text = whole(model, evaluate.windows_of(chosen), read)
        assert found.recall == pytest.approx(recall, rel=1e-5) and found.text == pytest.approx(text, rel=1e-5)
        assert found.loss == pytest.approx(0.25 * recall + 0.75 * text, rel=1e-5)


def test_resting_on_set_after_set_changes_no_loss():
    model, read = deep(), data()
    evaluate = Evaluator(model, read, [8] * LAYERS, max_batch_tokens=40)
    generator = np.random.default_rng(0)
    for _ in range(12):
        base, chosen = (
            tuple(sorted(generator.choice(LAYERS, int(generator.integers(0, 4)), replace=False).tolist()))
            for _ in range(2)
        )
        evaluate.set_base(base)
        found = evaluate(chosen)
        wanted = whole(model, evaluate.windows_of(chosen), read)
        assert [found.recall, found.text] == pytest.approx(wanted, rel=1e-5)


def test_skipped_layers_do_not_run_and_the_model_is_as_before():
    model, read = deep(), data()
    evaluate = Evaluator(model, read, [8] * LAYERS)
    evaluate.set_base(())
    ran = []
    for index, module in enumerate(attention_layers(model)):
        module.register_forward_hook(lambda *_, index=index: ran.append(index))
    evaluate((4,))
    assert set(ran) == {4, 5}
    layers = model.get_decoder().layers
    assert all("forward" not in layer.__dict__ and not layer._forward_pre_hooks for layer in layers)
    assert model.config.window_sizes == [8] * LAYERS


@pytest.mark.parametrize("seed", range(8))
def test_a_sum_of_layers_own_gains_is_searched_exactly(seed):
    gain = np.random.default_rng(seed).random(9)
    found = greedy_and_exchange(range(9), 3, lambda chosen: -sum(gain[i] for i in chosen))
    assert set(found) == set(np.argsort(gain)[-3:])


def test_exchange_finds_a_pair_that_greedy_misses():
    gain = {(2,): 1.0, (0, 2): 1.1, (1, 2): 1.2, (2, 3): 1.2, (2, 4): 1.2}

    def loss(chosen):
        if set(chosen) >= {1, 4}:
            return -5.0  # two layers that only help together
        return -max([gain.get(chosen, 0.0), *(gain.get((i,), 0.0) for i in chosen)])

    greedy = greedy_and_exchange(range(5), 2, loss, exchange=False)
    assert 2 in greedy and loss(greedy) > -5.0
    assert greedy_and_exchange(range(5), 2, loss) == (1, 4)


@pytest.mark.parametrize("seed", range(20))
def test_no_exchange_improves_what_was_found(seed):
    generator = np.random.default_rng(seed)
    table = {c: generator.random() for n in range(5) for c in itertools.combinations(range(7), n)}
    asked = []

    def loss(chosen):
        assert list(chosen) == sorted(set(chosen))
        asked.append(chosen)
        return table[chosen]

    found = greedy_and_exchange(range(7), 3, loss)
    for leaving in found:
        for entering in set(range(7)) - set(found):
            other = tuple(sorted({*found, entering} - {leaving}))
            assert table[other] >= table[found]


def test_the_layers_that_matter_are_found_in_a_model():
    """Where all layers but two write nothing to the stream, sets differ by those two alone, and the best is found."""
    model, read = deep(), data(seq_len=60)
    with torch.no_grad():
        for index, module in enumerate(attention_layers(model)):
            if index not in (1, 4):
                module.o_proj.weight.zero_()
    evaluate = Evaluator(model, read, [8] * LAYERS)
    by_part = {part: evaluate(part).loss for part in ((), (1,), (4,), (1, 4))}
    for chosen in itertools.combinations(range(LAYERS), 2):
        assert evaluate(chosen).loss == pytest.approx(by_part[tuple(i for i in chosen if i in (1, 4))])
    result = search(evaluate, 2, context=1000, settings={})
    assert result.losses(result.full_layers)["loss"] == pytest.approx(min(by_part.values()))


def test_a_search_reports_placements_and_a_front_without_dominated_sets():
    model, seen = deep(), []
    evaluate = Evaluator(model, data(), [8] * LAYERS)
    result = search(evaluate, 2, context=1000, settings={"seed": 1}, progress=lambda *x: seen.append(x))
    assert set(result.placements) == {"uniform", "first", "last", "none", "all"}
    assert result.windows == [-1 if i in result.full_layers else 8 for i in range(LAYERS)]
    best = result.losses(result.full_layers)["loss"]
    assert all(best <= result.losses(result.placements[name])["loss"] for name in ("uniform", "first", "last"))
    sizes, losses = ([row[key] for row in result.front] for key in ("bytes", "loss"))
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total in seen)


def test_a_stopped_search_is_resumed_without_measuring_again(tmp_path):
    path, model = tmp_path / "search.json", deep()
    settings = {"window": 8, "seed": 0}
    whole = search(Evaluator(model, data(), [8] * LAYERS), 3, context=500, settings=settings)
    count = 0

    def save(result):
        nonlocal count
        save_search(result, path)
        count += 1
        if count == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(Evaluator(model, data(), [8] * LAYERS), 3, context=500, settings=settings, save=save)
    with pytest.raises(ValueError, match="expected a search that has ended at .*, got one of 7 sets"):
        windows_from_search(path)
    half = load_search(path, settings)
    measured = []
    evaluate = Evaluator(model, data(), [8] * LAYERS)
    read = evaluate._read

    def spy(chosen, start, *, store):
        if not store:
            measured.append(chosen)
        return read(chosen, start, store=store)

    evaluate._read = spy
    known = set(half.evaluated)
    result = search(
        evaluate, 3, context=500, settings=settings, known=half, save=lambda found: save_search(found, path)
    )
    assert not known & {",".join(map(str, chosen)) for chosen in measured}
    assert len(known) + len(measured) == len(result.evaluated) == len(whole.evaluated)
    assert result.full_layers == whole.full_layers and result.front == whole.front
    assert windows_from_search(path) == whole.windows
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "got no JSON"),
        ("[]", "expected a file of format 'nha-search-v2' at .*, got 'list'"),
        ('{"format": "other"}', "expected a file of format 'nha-search-v2' at .*, got 'other'"),
        ('{"format": "nha-search-v2", "colour": 1}', "expected a whole result of nha search"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "search.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        windows_from_search(path)
    with pytest.raises(ValueError, match="there is no file at"):
        windows_from_search(tmp_path / "nothing.json")


def test_a_search_with_other_settings_is_not_resumed(tmp_path):
    path = tmp_path / "search.json"
    save_search(search(Evaluator(deep(), data(), [8] * LAYERS), 1, context=9, settings={"window_size": 8}), path)
    with pytest.raises(ValueError, match="expected a search with window_size 16 at .*, got 8"):
        load_search(path, {"window_size": 16})
    assert json.loads(path.read_text())["settings"] == {"window_size": 8}


def test_a_result_of_the_old_format_is_read(tmp_path):
    path = tmp_path / "search.json"
    old = {"format": "nha-search-v1", "settings": {"window": 8, "wide": -1, "weight": 0.5, "slots": 6, "dtype": "x"}}
    path.write_text(json.dumps(old | {"windows": [8, -1], "evaluated": {"": {"loss": 1.0}}}))
    assert windows_from_search(path) == [8, -1]
    new = {"window_size": 8, "wide_window": -1, "recall_weight": 0.5, "num_slots": 6, "dtype": "x"}
    assert load_search(path, new).settings == new


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "phi3"])
def test_bytes_are_those_of_a_real_cache(family):
    model = hybrid(family, 8)
    for windows in ([8, 8, 8], [8, -1, 16], [-1, -1, -1]):
        set_windows(model, windows)
        with torch.no_grad():
            cache = model(tokens(1, 50), use_cache=True).past_key_values
        if family == "smollm3":  # a layer without rotary positions keeps one key where the others store two
            assert cache_nbytes(cache) <= cache_bytes(model, windows, 50)
        else:
            assert cache_nbytes(cache) == cache_bytes(model, windows, 50)


def test_a_budget_in_bytes_is_a_number_of_layers():
    model = deep()
    for count in range(LAYERS + 1):
        size = cache_bytes(model, [-1 if i < count else 8 for i in range(LAYERS)], 4000)
        assert count_for_bytes(model, [8] * LAYERS, -1, size, 4000) == count
        assert count_for_bytes(model, [8] * LAYERS, -1, size + 1, 4000) == count
    with pytest.raises(ValueError, match="expected at least .* bytes for a cache of 4,000 tokens, got 10"):
        count_for_bytes(model, [8] * LAYERS, -1, 10, 4000)


def test_layers_that_slide_over_a_window_of_their_own_are_no_candidates():
    model = hybrid("gemma2", [-1, 8, -1], **sliding(16))
    assert candidate_layers(model.config) == [1]
    result = search(Evaluator(model, data(), [-1, 8, -1]), 1, context=100, settings={})
    assert result.full_layers == [1]
    with pytest.raises(ValueError, match="expected from 0 to 1 layers with full attention, got 2"):
        search(Evaluator(model, data(), [-1, 8, -1]), 2, context=100, settings={})


def test_other_windows_than_full_attention_can_be_searched():
    model = deep()
    result = search(Evaluator(model, data(), [8] * LAYERS, wide_window=16), 2, context=100, settings={})
    assert sorted(result.windows) == [8] * 4 + [16] * 2


@pytest.mark.parametrize("count, layers", [(1, 6), (2, 6), (4, 30), (4, 32), (3, 3)])
def test_placements_by_rule_have_as_many_layers(count, layers):
    for chosen in heuristics(range(layers), count).values():
        assert len(set(chosen)) == count and list(chosen) == sorted(chosen) and set(chosen) <= set(range(layers))


def test_data_are_a_function_of_the_seed_and_have_answers():
    tokenizer = small_tokenizer("digits")
    first, again, other = (
        search_data(tokenizer, text_sequences=2, recall_sequences=3, seq_len=600, seed=seed) for seed in (0, 0, 1)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.text.shape == (2, 600) and first.recall.shape == first.answers.shape == (3, 600)
    assert first.answers.any(1).all()
    with pytest.raises(ValueError, match="expected at least one sequence of text and of recall, got 0 and 3"):
        search_data(tokenizer, text_sequences=0, recall_sequences=3)
    with pytest.raises(ValueError, match="expected recall_weight from 0 to 1, got 2"):
        Evaluator(deep(), data(), [8] * LAYERS, recall_weight=2)
