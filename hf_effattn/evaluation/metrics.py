"""Metrics of the tasks: `evaluate.Metric`s that need no hub, made and used directly (`TokenF1().compute(...)`)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, ClassVar

import datasets
import evaluate

TEXT = datasets.Value("string")
TEXTS = datasets.Sequence(TEXT)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class MeanMetric(evaluate.Metric):
    """The mean over examples of what `one` gives for each, as `{"score": mean}`.

    `one` takes a prediction and its references, and further inputs where the metric names some.
    """

    one: ClassVar[Callable[..., float]]
    inputs: ClassVar[dict[str, Any]] = {"predictions": TEXT, "references": TEXTS}  # in the order that `one` takes them

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=f"{', '.join(self.inputs)}; references are a list for each prediction.",
            features=datasets.Features(self.inputs),
        )

    def _compute(self, **columns: Any) -> dict[str, float]:
        rows = list(zip(*(columns[name] for name in self.inputs), strict=True))
        return {"score": sum(self.one(*row) for row in rows) / len(rows)}


class StringMatchAll(MeanMetric):
    """The share of references that stand somewhere in the prediction, in any case of letters (RULER, Hsieh 2024, arXiv
    2404.06654, for all but questions about documents)."""

    @staticmethod
    def one(prediction: str, references: Sequence[str]) -> float:
        return sum(_found(prediction, references)) / len(references)


class StringMatchPart(MeanMetric):
    """1 if a reference stands somewhere in the prediction, in any case of letters (RULER, for questions about
    documents)."""

    @staticmethod
    def one(prediction: str, references: Sequence[str]) -> float:
        return float(any(_found(prediction, references)))


class ExactMatch(MeanMetric):
    """1 if the prediction is a reference but for case, punctuation, articles and spaces (SQuAD, Rajpurkar 2016, arXiv
    1606.05250)."""

    @staticmethod
    def one(prediction: str, references: Sequence[str]) -> float:
        return float(normalized(prediction) in map(normalized, references))


class TokenF1(MeanMetric):
    """Harmonic mean of precision and recall of the words, with the best reference; words as in `ExactMatch` (SQuAD)."""

    @staticmethod
    def one(prediction: str, references: Sequence[str]) -> float:
        words = normalized(prediction)
        return max(_overlap(words, normalized(reference)) for reference in references)


class RougeL(MeanMetric):
    """ROUGE-L with stemmed words, with the best reference."""

    @staticmethod
    def one(prediction: str, references: Sequence[str]) -> float:
        return best_rouge(prediction, references, ("rougeL",))[0]


class RougeMean(MeanMetric):
    """Geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L, each with its best reference (SCROLLS, Shaham 2022, arXiv
    2201.03533, which takes it of the means over all examples; this one is taken of each example)."""

    @staticmethod
    def one(prediction: str, references: Sequence[str]) -> float:
        first, second, longest = best_rouge(prediction, references, ("rouge1", "rouge2", "rougeL"))
        return float((first * second * longest) ** (1 / 3))


class BabilongMatch(MeanMetric):
    """1 if, of the labels of a task that are not in the question, exactly one stands in the first sentence of the
    prediction, and it is the reference (BABILong, Kuratov 2024, arXiv 2406.10149)."""

    inputs: ClassVar[dict[str, Any]] = {"predictions": TEXT, "references": TEXTS, "questions": TEXT, "labels": TEXTS}

    @staticmethod
    def one(prediction: str, references: Sequence[str], question: str, labels: Sequence[str]) -> float:
        sentence, asked = prediction.lower().strip().split(".")[0], question.lower()
        named = {label.lower() for label in labels if label.lower() in sentence and label.lower() not in asked}
        return float(len(named) == 1 and named <= {reference.lower() for reference in references})


def normalized(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def first_line(text: str) -> str:
    """Return the first line with anything in it: where a short answer ends, for models that go on to write."""
    return text.strip().partition("\n")[0]


def best_rouge(prediction: str, references: Sequence[str], kinds: tuple[str, ...]) -> list[float]:
    """Return for each kind of ROUGE the F-measure with the reference for which it is highest.

    Raises:
        ImportError: without rouge_score, which the extra `eval` installs.
    """
    scorer = _scorer(kinds)
    scores = [scorer.score(reference, prediction) for reference in references]
    return [max(float(score[kind].fmeasure) for score in scores) for kind in kinds]


@cache
def _scorer(kinds: tuple[str, ...]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge_score: pip install hf_effattn[eval]") from error
    return RougeScorer(list(kinds), use_stemmer=True)


def _found(prediction: str, references: Iterable[str]) -> list[bool]:
    return [reference.lower() in prediction.lower() for reference in references]


def _overlap(words: list[str], others: list[str]) -> float:
    if not words or not others:
        return float(words == others)
    common = (Counter(words) & Counter(others)).total()
    return 2 * common / (len(words) + len(others))
