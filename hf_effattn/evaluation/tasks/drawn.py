"""Tasks whose examples are drawn one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from ..base import GOLDEN, Example, GenerationTask
from ..haystack import fill
from ..metrics import MeanMetric, StringMatchAll


class DrawnTask(GenerationTask):
    """Draws each example by itself, from the seed, the length and its index."""

    metric: ClassVar[type[MeanMetric]] = StringMatchAll
    score_name = "string match"

    def examples(self, length: int, number: int) -> list[Example]:
        return [self.example(length, index) for index in range(number)]

    def example(self, length: int, index: int) -> Example:
        """Return the example with a number.

        Raises:
            ValueError: if the shortest is too long.
        """
        raise NotImplementedError

    def score(self, example: Example, answer: str) -> float:
        return self.metric.one(answer, example.references)

    def size(self, build: Callable[[int], str], length: int, least: int = 1) -> int:
        """Return the largest size for which `build(size)`, prompt and answer prefix, leaves room for the answer."""
        return fill(build, self.room(length), self.material.count_tokens, least)


def even_depth(index: int) -> float:
    """Return a depth between 0 and 1; those of the first examples are spread evenly, however many there are."""
    return (0.5 + index * GOLDEN) % 1.0
