"""VQA's answers against cases of the official evaluation, and against its procedure written out slowly."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmo_ray.data.answers import AnswerList, accuracy, answer_list, label, normalised, soft_score

GOLDEN = {
    "New York, NY": "new york ny",
    "red/white": "red white",
    "a-b - c": "ab c",
    "x,y": "x y",
    "1,000": "1000",
    "3.5": "3.5",
    "3.": "3",
    "e.g. 5.": "eg 5",
    "10:30": "10:30",
    "the man's dog": "man's dog",
    "none": "0",
    "Ten": "10",
    "Im": "im",
    "dont": "don't",
    "couldn'tve": "couldn't've",
    "y'alld've": "y'all'd've",
    "somebody'd": "somebodyd",
    "lets": "lets",
    " yes\n": "yes",
    "." * 40: "." * 8,
    "?": "",
}


@pytest.mark.parametrize("answer", GOLDEN)
def test_normalised(answer):
    assert normalised(answer) == GOLDEN[answer]


def slow_accuracy(prediction: str, given: list[str]) -> float:
    """The official procedure: for each of the people, the equal answers of the others."""
    prediction, given = prediction.strip(), [answer.strip() for answer in given]
    if len(set(given)) > 1:
        prediction, given = normalised(prediction), [normalised(answer) for answer in given]
    scores = []
    for i in range(len(given)):
        others = given[:i] + given[i + 1 :]
        scores.append(min(1.0, sum(other == prediction for other in others) / 3))
    return sum(scores) / len(scores)


LIST = ("yes", "no", "2", "red white", "Red", "new york", "")


@given(
    st.lists(
        st.sampled_from(["yes", "Yes", "two", "2", "red/white", "Red", "red", "a new york", "?"]),
        min_size=10,
        max_size=10,
    )
)
def test_accuracies_are_the_official_ones(given):
    wanted = [slow_accuracy(answer, given) for answer in LIST]
    np.testing.assert_allclose(AnswerList(LIST).accuracies(given), wanted, rtol=1e-6)


def test_accuracy_and_target_of_every_count():
    wanted = [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]
    assert [accuracy(count) for count in range(11)] == pytest.approx(wanted)
    assert [soft_score(count) for count in range(11)] == pytest.approx(wanted)


def test_ten_equal_answers_are_compared_as_they_stand():
    assert AnswerList(("Red", "red")).accuracies(["Red"] * 10).tolist() == [1, 0]
    assert AnswerList(("Red", "red")).accuracies(["Red"] * 9 + ["blue"]).tolist() == [1, 1]


def test_the_list_is_in_the_order_of_first_occurrence():
    answers = ["no", "Yes", "yes.", "the net", "no", "net", "yes", "once"]
    assert answer_list(answers, at_least=2) == ("no", "yes", "net")
    assert answer_list(answers, at_least=3) == ("yes",)
    assert label("1,000 a") == "1000" and label("12,") == "12"


def test_targets_are_the_stored_scores():
    found = AnswerList(LIST).targets([{"answer": "no", "score": 0.3}, {"answer": "2", "score": 1.0}])
    np.testing.assert_allclose(found, [0, 0.3, 1, 0, 0, 0, 0], rtol=1e-6)


def test_no_mark_survives_but_apostrophe_colon_and_period():
    for mark, place in itertools.product(';/[]"{}()=+\\_-><@`,?!', ("a{}b", "a {}b", "{}ab")):
        assert re.fullmatch(r"[ab ]+", normalised(place.format(mark))), (mark, place)
