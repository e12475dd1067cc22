"""Public sets are read, scored as lm-evaluation-harness scores them, and resumed; what does not fit is said."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nha.data.cloze import RANGES, cut_sentences, make_clozes
from nha.data.text import calibration_text, evaluation_documents
from nha.evaluate.partial import PartialResults
from nha.evaluate.public.needle import DEPTHS, make_needles
from nha.evaluate.public.run import (
    PublicData,
    PublicSettings,
    balanced,
    counted,
    measure_public,
    read_public,
    relative,
    summary,
)
from nha.evaluate.public.scoring import ContinuationScorer, choice_requests, encode, is_correct
from nha.evaluate.public.sets import FORMATS, Item, find_set, read_documents, read_set, spaced
from nha.evaluate.public.written import begins_with, has_answer, write
from tests.data.tokenizers import small_tokenizer
from tests.models.families import hybrid, teacher

PARAGRAPH = (
    "In {year} the keeper of the old lighthouse wrote a letter to Alan Brook. His letters of {year} came by the ship "
    "of Captain Rowe and took weeks to arrive. Nobody on the coast in {year} minded the delay very much. The winters "
    "of {year} were long and the summers in the harbour of Bergen were short."
)
PROSE = [
    {"text": "\n\n".join(PARAGRAPH.format(year=year) for year in range(first, first + 90)), "book": f"book {first}"}
    for first in (1500, 1700)
]


def lines(rows) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A directory of small sets of every kind, one of them compressed, one in a folder below."""
    root = tmp_path_factory.mktemp("sets")
    words = calibration_text().split()
    query = [{"query": " ".join(words[20 * i : 20 * i + 12 + i % 5]), "gold": i % 3} for i in range(24)]
    choices = [
        {**q, "choices": [" ".join(words[9 * i + j : 9 * i + 2 * j + 2]) for j in range(3)]}
        for i, q in enumerate(query)
    ]
    for name in ("piqa", "arc_easy", "arc_challenge", "hellaswag", "boolq"):
        (root / f"{name}.jsonl").write_text(lines(choices))
    (root / "copa.jsonl.xz").write_bytes(lzma.compress(lines(choices[:5]).encode()))
    pairs = [{"context": q["query"], "continuation": "the"} for q in query]
    (root / "lambada_openai.jsonl").write_text(lines(pairs))
    questions = [{"passage": q["query"], "question": "who?", "answers": ["the", "a"]} for q in query[:6]]
    (root / "squad_qa.jsonl").write_text(lines(questions))
    (root / "text").mkdir()
    (root / "text" / "heldout.jsonl").write_text(lines(PROSE))
    return root


SMALL = {"questions": 4, "clozes": 6, "needle_lengths": (512, 1024), "needles": 1, "lengths": (256,), "documents": 3}


def harness_scores(model, tokenizer, name, items):
    """Accuracies of every item by lm-evaluation-harness's own scorer and metrics."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = []
    for item in items:
        stem = item.prompt.rstrip()
        arguments = [(stem, item.prompt[len(stem) :] + choice) for choice in item.choices]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(arguments)]
        scores = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        sizes = [len(choice.encode()) if FORMATS[name].per_byte else 1 for choice in item.choices]
        found.append((scores, int(np.argmax(np.array(scores) / sizes)) == item.gold))
    return found


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "hellaswag"])
@pytest.mark.parametrize("kind", ["merges", "digits", "blanks"])
def test_scores_are_those_of_the_harness(name, kind, data):
    torch.manual_seed(0)
    model, tokenizer = teacher(vocab_size=900), small_tokenizer(kind)
    items = read_set(find_set(data, name), FORMATS[name])
    requests, truncated = choice_requests(tokenizer, items)
    scorer = ContinuationScorer(model, max_batch_tokens=100)
    assert scorer.separate_head and not truncated
    scores = iter(scorer.score([request for some in requests for request in some]))
    for item, some, (expected, correct) in zip(
        items, requests, harness_scores(model, tokenizer, name, items), strict=True
    ):
        found = [next(scores) for _ in some]
        assert [score for score, _ in found] == pytest.approx(expected, abs=2e-3)
        assert is_correct(item, found, FORMATS[name].per_byte) == correct


@pytest.mark.parametrize("separate", [True, False])
def test_scores_do_not_depend_on_what_is_scored_together(separate, data):
    model, tokenizer = hybrid("llama", [8, -1, 4], vocab_size=900), small_tokenizer("digits")
    items = read_set(find_set(data, "boolq"), FORMATS["boolq"])
    requests = encode(tokenizer, [(item.prompt, choice) for item in items for choice in item.choices])
    alone = []
    with torch.no_grad():
        for request in requests:
            logits = model(torch.tensor([request.inputs]), use_cache=False).logits[0, -len(request.targets) :].double()
            target = torch.tensor(request.targets)
            score = logits.log_softmax(1).gather(1, target[:, None]).sum().item()
            alone.append((score, bool((logits.argmax(1) == target).all())))
    scorer, seen = ContinuationScorer(model, max_batch_tokens=300), []
    scorer.separate_head = separate
    found = scorer.score(requests, lambda *given: seen.append(given))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
    assert seen[-1][0] == seen[-1][1] == len({request.inputs for request in requests})


def test_an_empty_prompt_is_the_first_token():
    tokenizer = small_tokenizer("merges")
    (request,) = encode(tokenizer, [("", "the end")])
    assert request.inputs[0] == tokenizer.bos_token_id and tokenizer.decode(request.targets) == "the end"


def test_a_head_that_is_not_apart_is_noticed():
    model = teacher(vocab_size=900)
    scaled = model.forward

    def forward(*args, **options):
        output = scaled(*args, **options)
        output.logits = 3 * output.logits
        return output

    model.forward = forward
    assert not ContinuationScorer(model).separate_head


@pytest.mark.parametrize("model", [teacher(vocab_size=900), hybrid("llama", [8, -1, 4], vocab_size=900)])
def test_written_answers_do_not_depend_on_what_is_written_together(model):
    tokenizer = small_tokenizer("digits")
    prompts = [tokenizer(calibration_text()[50 * i : 50 * i + 40 + 30 * i]).input_ids for i in range(6)]
    together = write(model, tokenizer, prompts, 5, first_line=False)
    assert together == [write(model, tokenizer, [prompt], 5, first_line=False)[0] for prompt in prompts]
    ids = torch.tensor([prompts[0]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, len(prompts[0]) :]
    assert together[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_answers_are_looked_for_in_the_first_line():
    assert has_answer("\n  In FRANCE, of course\nno", ["Spain", "france"])
    assert not has_answer("no\nFrance", ["France"])
    assert begins_with(" 1912, and", "1912") and not begins_with("19125", "1912")


@pytest.mark.parametrize("part", RANGES)
def test_clozes_are_copies_at_their_distance(part):
    documents, tokenizer, (low, high) = read_rows(), small_tokenizer("merges"), RANGES[part]
    found = make_clozes(tokenizer, documents, 12, (low, high), seed=1)
    assert found == make_clozes(tokenizer, documents, 12, (low, high), seed=1) and len(found) == 12
    for cloze in found:
        passage, _, cut = cloze.prompt.rpartition("\n\n")
        assert passage.count(cut) == 1 and len(cut) >= 25
        assert passage[passage.index(cut) + len(cut) :].lstrip().startswith(cloze.answer)
        source = cloze.prompt[: cloze.prompt.index(cut) + len(cut)]
        distance = len(tokenizer(cloze.prompt).input_ids) - len(tokenizer(source).input_ids)
        assert low - 3 <= distance <= high + 3  # tokens that join where texts meet
    assert make_clozes(tokenizer, documents, 12, (low, high), seed=2) != found


def read_rows() -> list[str]:
    return [row["text"] for row in PROSE]


def test_documents_without_room_for_a_cloze_are_refused():
    with pytest.raises(ValueError, match="expected documents with room for 500 tokens"):
        make_clozes(small_tokenizer("merges"), ["The man who came was Alan Brook."], 3, RANGES["cloze_far"])


def test_sentences_are_cut_before_names_and_numbers():
    for document in evaluation_documents():
        for start, cut, end, answer in cut_sentences(document):
            assert document[cut : cut + len(answer)] == answer and start + 30 <= cut < end
            assert answer[0].isupper() or answer[0].isdigit()


def test_needles_lie_at_their_depth_in_prompts_of_their_length():
    tokenizer = small_tokenizer("digits")
    haystack = np.full(5000, 20)
    found = make_needles(tokenizer, haystack, 700, 3, seed=4)
    assert len(found) == 15 and {needle.depth for needle in found} == set(DEPTHS)
    for needle in found:
        assert len(needle.prompt) == 700 and len(needle.answer) == 6
        text = np.flatnonzero(np.array(needle.prompt[1:]) != 20)
        assert text[0] / 700 <= needle.depth <= text[0] / 700 + 0.25
    assert [n.answer for n in make_needles(tokenizer, haystack, 900, 3, seed=4)] == [n.answer for n in found]
    with pytest.raises(ValueError, match="expected needles in at least"):
        make_needles(tokenizer, haystack, 20, 1)


@pytest.mark.parametrize("model", ["teacher", "hybrid"])
def test_every_part_is_measured_and_an_interrupted_run_resumes(model, data):
    made = teacher(vocab_size=900) if model == "teacher" else hybrid("llama", [16, -1, 8], vocab_size=900)
    tokenizer, settings = small_tokenizer("merges"), PublicSettings(**SMALL)
    read = read_public(data, settings)
    whole = PartialResults()
    found = measure_public(made, tokenizer, read, partial=whole)
    assert set(found["sets"]) == {*FORMATS, *RANGES}
    for name, row in found["sets"].items():
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high and row["count"] == len(row["correct"])
        assert row["count"] == {"copa": 5, "squad_qa": 4, "cloze_near": 6, "cloze_far": 6}.get(name, 24)
    assert set(found["needle"]) == {"512", "1024"} and found["needle"]["512"]["count"] == 5
    for needle in found["needle"].values():
        exact, contained = (list(map(int, each["correct"])) for each in (needle, needle["contained"]))
        assert len(exact) == len(contained) and all(a <= b for a, b in zip(exact, contained, strict=True))
    assert set(found["perplexity"]["256"]) >= {"ppl", "interval", "by_position", "edges", "by_text", "count"}
    json.dumps(found)
    names = list(whole.parts)
    resumed = PartialResults(parts={name: whole.parts[name] for name in names[:4]})
    again = measure_public(made, tokenizer, read, partial=resumed)
    assert list(resumed.parts) == names
    for part in ("sets", "needle", "perplexity"):
        assert json.dumps(again[part]) == json.dumps(found[part])
    numbers = summary(found)
    assert set(numbers["sets"]) == {name for name in FORMATS if name != "squad_qa"}
    assert numbers["squad"][1] == 4 and numbers["ppl_256"][1] == 3 and 0 <= numbers["average"] <= 1


def test_numbers_relative_to_a_control_are_paired(data):
    made, tokenizer = teacher(vocab_size=900), small_tokenizer("merges")
    read = read_public(data, PublicSettings(parts=("piqa", "perplexity"), **SMALL))
    row = measure_public(made, tokenizer, read)
    same = relative(row, row)
    assert same["piqa"] == {"ratio": 1.0, "interval": [1.0, 1.0]}
    assert same["perplexity 256"]["ratio"] == pytest.approx(1.0)
    row["sets"]["piqa"] = counted([1, 0, 1, 1] * 6)
    less = {**row, "sets": {"piqa": counted([1, 0, 0, 0] * 6)}}
    found = relative(row, less)["piqa"]
    assert found["ratio"] == pytest.approx(3.0) and found["interval"][0] < 3 < found["interval"][1]
    nothing = {**row, "sets": {"piqa": counted([0] * 24)}}
    assert relative(row, nothing)["piqa"]["ratio"] is None


def test_a_context_that_is_too_short_is_said(data):
    tokenizer = small_tokenizer("merges")
    config = GPT2Config(vocab_size=900, n_positions=600, n_embd=32, n_layer=2, n_head=2)
    made = GPT2LMHeadModel(config).eval()
    read = read_public(data, PublicSettings(parts=("piqa", "needle", "perplexity"), **SMALL))
    found = measure_public(made, tokenizer, read)
    assert set(found["needle"]) == {"512"} and found["sets"]["piqa"]["count"] == 24
    assert found["notes"] == ["needle 1,024: 1,032 tokens, the model's context is 600: left out"]
    rotary = teacher(vocab_size=900, max_position_embeddings=40)
    found = measure_public(rotary, tokenizer, read)
    assert set(found["needle"]) == {"512", "1024"}
    assert any(note.startswith("piqa: ") and "cut to the context of 40 tokens" in note for note in found["notes"])
    assert sum("measured beyond it" in note for note in found["notes"]) == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("piqa", [{"choices": ["a", "b"], "gold": 0}], "field 'query' in line 1 of {path}, got the fields"),
        ("piqa", [{"query": "q", "choices": ["a", "b"]}], "expected gold as an index below 2 in line 1 of {path}"),
        ("piqa", [{"query": "q", "choices": ["a"], "gold": 0}], "expected two or more choices in line 1 of {path}"),
        ("piqa", [{"query": "q", "choices": ["a", ""], "gold": 0}], "no empty text in field 'choices' in line 1 of"),
        (
            "piqa",
            [{"query": "q", "choices": "ab", "gold": 0}],
            "a list of texts in field 'choices' in line 1 of {path}",
        ),
        ("lambada_openai", [{"context": "a", "continuation": 3}], "field 'continuation' in line 1 of {path}, got int"),
        ("lambada_openai", [], "expected at least one item in {path}, got none"),
        ("squad_qa", [{"passage": "a", "question": "b"}], "a list of texts in field 'answers' in line 1 of {path}"),
    ],
)
def test_a_missing_field_is_named_with_file_and_line(name, content, message, tmp_path):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(lines(content) if content else "")
    with pytest.raises(ValueError) as caught:
        read_public(tmp_path, PublicSettings(parts=(name,)))
    assert message.format(path=path) in str(caught.value)


def test_missing_sets_and_files_are_named(tmp_path):
    for place, parts, message in (
        (tmp_path / "none", ("piqa",), "expected a directory of test sets, there is none at"),
        (tmp_path, ("piqa",), "expected the set piqa in"),
        (tmp_path, ("needle",), "expected the set heldout in"),
    ):
        with pytest.raises(ValueError, match=message):
            read_public(place, PublicSettings(parts=parts))
    (tmp_path / "boolq.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"expected the set boolq in .*, there is no boolq\.jsonl"):
        find_set(tmp_path, "boolq")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "piqa.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="expected the set piqa once in"):
        find_set(tmp_path, "piqa")
    with pytest.raises(ValueError, match="expected a file of held-out documents"):
        read_public(tmp_path, PublicSettings(parts=("needle",)), tmp_path / "nothing.jsonl")


def test_passages_are_the_documents_where_there_are_no_others(tmp_path):
    rows = [{"passage": f"p{i // 2}", "title": f"t{i // 4}", "question": "q", "answers": ["a"]} for i in range(8)]
    (tmp_path / "squad_qa.jsonl").write_text(lines(rows))
    read = read_public(tmp_path, PublicSettings(parts=("needle",)))
    assert read.held_out == ["p0\n\np1", "p2\n\np3"] and read.files["heldout"].startswith("squad_qa.jsonl ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parts": ("riddle",)}, "expected sets out of .*, got riddle"),
        ({"parts": ()}, "got none"),
        ({"limit": 0}, "expected limit of at least 1, got 0"),
        ({"needles": 0}, "expected needles of at least 1"),
        ({"needle_lengths": (64,)}, "expected needle_lengths of at least 128 tokens"),
        ({"lengths": ()}, "expected lengths of at least 128"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PublicSettings(**changes)


def test_books_are_joined_and_subsets_are_spread(tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text(lines([{"text": "a", "book": "x"}, {"text": "b", "book": "x"}, {"text": "c"}, {"text": "d"}]))
    assert read_documents(path) == ["a\n\nb", "c", "d"]
    assert spaced(range(7), 3) == [0, 2, 4] and spaced(range(3), None) == [0, 1, 2]


def test_an_item_is_as_the_set_says(data):
    first = read_set(find_set(data, "arc_easy"), FORMATS["arc_easy"])[0]
    assert first.prompt.endswith("\nAnswer: ") and len(first.choices) == 3
    other = read_set(find_set(data, "hellaswag"), FORMATS["hellaswag"])[0]
    assert other.prompt == first.prompt.removesuffix("\nAnswer: ") + " "
    (word,) = read_set(find_set(data, "lambada_openai"), FORMATS["lambada_openai"])[0].choices
    assert word == "the" and isinstance(first, Item)


def test_who_always_gives_one_answer_gets_chance_in_the_mean_over_answers():
    items = [Item(f"question {i}", ("no", "yes"), gold=int(i < 6)) for i in range(8)]
    data = PublicData(PublicSettings(parts=("boolq",)), {"boolq": items}, [], {})
    always_yes = [int(i < 6) for i in range(8)]
    found = balanced(data, "boolq", always_yes)
    assert found == {"balanced": 0.5, "by_answer": {"no": [0.0, 2], "yes": [1.0, 6]}}
    other = [Item("2 + 2 =", ("four", "5"), gold=0), Item("2 + 3 =", ("four", "5 "), gold=1)]
    assert balanced(PublicData(data.settings, {"piqa": other}, [], {}), "piqa", [1, 1]) == {}
    assert balanced(data, "cloze_near", [1]) == {}
