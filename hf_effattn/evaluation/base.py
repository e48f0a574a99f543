"""What an evaluation task is, and the registry of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ..registry import Registry
from .texts import Fitted

if TYPE_CHECKING:
    from .subject import Subject

TASKS: Registry[type[Task]] = Registry("task")
GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly, however many there are


@dataclass(frozen=True)
class Example:
    """One question to a model.

    Args:
        prompt: What the model reads.
        references: Answers that count as right; what that means is the task's `score`.
        answer_prefix: How the answer begins: behind the prompt, and behind the chat template where one is used.
        details: Facts about the example that reports may want, such as the depth of a needle.
    """

    prompt: str
    references: tuple[str, ...]
    answer_prefix: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What tasks are made of.

    Args:
        count_tokens: The tokens that a text has, without special ones.
        text: A long text: haystack, or what perplexity is measured on.
        seed: Of everything that is drawn; the same seed gives the same examples to every model.
        documents: Rows with `document`, `question` and `answers`, for tasks about given documents.
        shorten: `(text, tokens) -> Fitted`, what becomes of a document that is too long; None to leave it out.
        overhead: Tokens that the chat template and the tokenizer add to a prompt; `evaluate` measures them.
        notes: For the report: what was altered.
    """

    count_tokens: Callable[[str], int]
    text: str
    seed: int = 42
    documents: Sequence[dict[str, Any]] = ()
    shorten: Callable[[str, int], Fitted] | None = None
    overhead: int = 0
    notes: Sequence[str] = ()


class Task:
    """Examples of a given length and how to score them.

    A task is registered under the name that users type. Its docstring says what it is and where it comes from.

    Args:
        material: What examples are made of.
    """

    score_name: ClassVar[str] = "score"  # of what a report shows
    higher_is_better: ClassVar[bool] = True
    fits_positions: ClassVar[bool] = True  # whether the model reads an example in one piece
    has_cache: ClassVar[bool] = True  # whether it reads as it does while generating

    def __init__(self, material: Material) -> None:
        self.material = material
        self.notes: list[str] = []  # for the report: what was left out or cut

    def examples(self, length: int, number: int) -> list[Example]:
        """Return `number` examples whose prompt, answer prefix and answer have at most `length` tokens together.

        Raises:
            ValueError: if there is none so short.
        """
        raise NotImplementedError

    def run(self, subject: Subject, examples: Sequence[Example], length: int) -> Iterator[dict[str, Any]]:
        """Put the examples to a model; yield for each, in order, a JSON-able record with its "score"."""
        raise NotImplementedError

    @classmethod
    def total(cls, records: Sequence[dict[str, Any]]) -> float:
        """Return the score of all records together: their mean."""
        return sum(record["score"] for record in records) / len(records)


class GenerationTask(Task):
    """A task whose answers are generated, greedily, and compared with references."""

    max_new_tokens: ClassVar[int]

    def score(self, example: Example, answer: str) -> float:
        """Return how good the answer is, between 0 and 1."""
        raise NotImplementedError

    def further(self, example: Example, answer: str) -> dict[str, float]:
        """Return other scores of the answer, by the names under which the report has them too."""
        return {}

    def run(self, subject: Subject, examples: Sequence[Example], length: int) -> Iterator[dict[str, Any]]:
        for example, answer in zip(examples, subject.generate(examples, self.max_new_tokens), strict=True):
            further = self.further(example, answer.text)
            scores = {"score": self.score(example, answer.text)} | ({"further": further} if further else {})
            yield {**scores, "answer": answer.text, **answer.facts, **example.details}

    def random(self, length: int, index: int) -> random.Random:
        """Return the source of chance of one example: the same in every run and whatever else is asked."""
        return random.Random(f"{self.material.seed}/{type(self).__name__}/{length}/{index}")

    def room(self, length: int) -> int:
        """Return the tokens that the prompt and the answer prefix may have."""
        return length - self.max_new_tokens - self.material.overhead
