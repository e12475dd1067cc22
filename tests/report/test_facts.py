"""Facts by distance: what is asked, what counts as right, and a cache that no question changes."""

from typing import Any

import numpy as np
import pytest

from nha import NHAConfig, NHAForCausalLM
from nha.models.windows import set_state_dtype
from nha.report.facts import Asked, ask, recall_by_distance, sample_of
from tests.data.tokenizers import small_tokenizer


def test_digits_count_from_the_first_and_an_exact_number_ends():
    written = {"652300": True, " 652300.": True, "6523007": False, "652399": False, "x": False}
    asked = [Asked(64, "652300", "q", text) for text in written] + [Asked(8, "12", "q", " 12")]
    near, far = recall_by_distance(asked)
    assert (near.tokens, near.facts, near.recalled, near.digits, near.of_digits) == (8, 1, 1, 2, 2)
    assert (far.facts, far.recalled, far.continued, far.digits, far.of_digits) == (5, 2, 1, 22, 30)


@pytest.fixture
def tokenizer() -> Any:
    return small_tokenizer("merges")


@pytest.fixture
def model(tokenizer):
    return NHAForCausalLM(NHAConfig.tiny(vocab_size=len(tokenizer), window_sizes=8)).eval()


def test_questions_of_one_text_do_not_see_each_other(model, tokenizer):
    haystack, calls = np.arange(100) % 90, []
    both = ask(model, tokenizer, haystack, (20, 60), seed=3, progress=lambda *x: calls.append(x))
    far = ask(model, tokenizer, haystack, (60,), seed=3)
    assert [one.distance for one in both] == [20, 60] and calls == [(20, 60), (60, 60)]
    assert both[1] == far[0]
    assert len(both[0].answer) == 6 and both[0].answer.isdigit() and both[0].question.endswith("is")
    assert sample_of(far[0]).prompt_tokens == 60 and far[0].answer in sample_of(far[0]).teacher


def test_a_question_is_asked_of_states_in_every_format(model, tokenizer):
    asked = ask(model, tokenizer, np.arange(100) % 90, (20, 60), seed=3, state_dtypes=("float32", "int8"))
    assert [(one.distance, one.state_dtype) for one in asked] == [
        (20, "float32"),
        (20, "int8"),
        (60, "float32"),
        (60, "int8"),
    ]
    assert asked[2].bytes > 2 * asked[3].bytes > 0 and recall_by_distance(asked[2:3])[0].bytes == asked[2].bytes


def test_the_format_of_a_question_is_the_one_it_names_whatever_the_models_own_is(model, tokenizer):
    def asked(own):
        set_state_dtype(model, own)
        return ask(model, tokenizer, np.arange(100) % 90, (20, 60), seed=3, state_dtypes=("int8", "float32"))

    wanted = asked("float32")
    assert wanted[0].bytes < wanted[1].bytes / 2
    assert asked("int8") == wanted and asked("bfloat16") == wanted


def test_a_haystack_that_is_too_short_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"(?s)80.*50"):
        ask(model, tokenizer, np.arange(50), (20, 80))
