"""Metrics of generated answers: by hand, and beside lm-evaluation-harness."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from hf_effattn.evaluation import metrics

PREDICTIONS = [
    "The Cat sat.",
    "1234567 and 7654321",
    "nothing",
    "It is in the garden. Not the kitchen.",
    "",
    "a dog, a cat",
]
REFERENCES = [["cat", "dog"], ["1234567"], ["some", "thing"], ["garden"], ["empty", "void"], ["a cat", "dog cat"]]


def test_matches_agree_with_lm_eval() -> None:
    theirs = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    ours = metrics.StringMatchAll().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert ours == {"score": pytest.approx(theirs.string_match_all(PREDICTIONS, REFERENCES))}
    # Of questions with several answers one is enough, in RULER; lm_eval 0.4.13 divides by the number of answers.
    prediction, references = "It was Paris.", ["Paris", "Paris, France"]
    assert metrics.StringMatchPart.one(prediction, references) == 1.0
    assert theirs.string_match_part([prediction], [references]) == 0.5


@pytest.mark.parametrize("name", ["StringMatchAll", "StringMatchPart", "ExactMatch", "TokenF1", "RougeL", "RougeMean"])
def test_metrics_are_means_of_what_they_give_for_one(name: str) -> None:
    metric = getattr(metrics, name)
    ones = [metric.one(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert 0.0 < sum(ones) < len(ones)
    assert metric().compute(predictions=PREDICTIONS, references=REFERENCES) == {"score": sum(ones) / len(ones)}
    batched = metric()
    batched.add_batch(predictions=PREDICTIONS[:4], references=REFERENCES[:4])
    batched.add_batch(predictions=PREDICTIONS[4:], references=REFERENCES[4:])
    assert batched.compute() == {"score": pytest.approx(sum(ones) / len(ones))}


def test_babilong_wants_exactly_one_label_in_the_first_sentence() -> None:
    labels = ["bathroom", "garden", "kitchen"]
    cases = {
        "The Garden": 1.0,
        "In the garden. Not in the kitchen.": 1.0,
        "garden or kitchen": 0.0,
        "kitchen": 0.0,
        "": 0.0,
        "Not in the bathroom but the garden": 1.0,  # the question names the bathroom
    }
    question = "Where was John before the bathroom?"
    for prediction, score in cases.items():
        assert metrics.BabilongMatch.one(prediction, ["garden"], question, labels) == score
    computed = metrics.BabilongMatch().compute(
        predictions=list(cases),
        references=[["garden"]] * len(cases),
        questions=[question] * len(cases),
        labels=[labels] * len(cases),
    )
    assert computed == {"score": pytest.approx(sum(cases.values()) / len(cases))}


def test_words_are_compared_as_in_squad() -> None:
    assert metrics.ExactMatch.one("The  Cat!", ["dog", "a cat"]) == 1.0
    assert metrics.ExactMatch.one("cats", ["cat"]) == 0.0
    assert metrics.TokenF1.one("The cat sat down", ["cat", "a cat sat"]) == pytest.approx(0.8)
    assert metrics.TokenF1.one("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert metrics.TokenF1.one("the", ["a"]) == 1.0
    assert metrics.TokenF1.one("the", ["cat"]) == 0.0


def test_a_short_answer_ends_with_its_line() -> None:
    assert metrics.first_line(" \nParis \nQuestion: Who?\n") == "Paris "
    assert metrics.first_line("\n") == ""


def test_rouge_takes_the_best_reference_and_stems() -> None:
    assert metrics.RougeL.one("running dogs", ["cats", "run dog"]) == 1.0
    assert metrics.RougeL.one("a b c d", ["a x b y"]) == pytest.approx(0.5)
    assert metrics.RougeMean.one("a b c d", ["a b c d", "z"]) == pytest.approx(1.0)
    assert metrics.RougeMean.one("a b", ["b a"]) == 0.0  # no pair of words in common


def test_without_rouge_score_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return real(name, *rest)

    metrics._scorer.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install hf_effattn\[eval\]"):
        metrics.RougeL.one("a", ["a"])
