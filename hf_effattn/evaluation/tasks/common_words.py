"""Common words, as RULER has them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from ..base import TASKS, Example
from ..haystack import words
from .drawn import DrawnTask

COMMON = 10  # words that are common
LONG = 4096  # tokens from which on words come more often
PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{text}\nQuestion: What are the 10 most common words in the above list?"
)
PREFIX = " Answer: The top 10 words that appear most often in the list are:"


class Times(NamedTuple):
    """How often words come: common and rare ones in the list, and in the one that is shown with its answer."""

    common: int
    rare: int
    shown_common: int
    shown_rare: int
    shown: int  # different words in the list that is shown


@TASKS.register("common_words")
class CommonWords(DrawnTask):
    """A list of words in which ten come 30 times and the others 3 times, 6 and 1 below 4,096 tokens; the ten are asked
    for, behind a short list with its answer (RULER cwe, Hsieh 2024, arXiv 2404.06654). The words are those of the given
    text."""

    max_new_tokens = 120

    def example(self, length: int, index: int) -> Example:
        chance = self.random(length, index)
        times = Times(30, 3, 10, 3, 40) if length >= LONG else Times(6, 1, 3, 1, 20)
        orders = [chance.random() for _ in range(2)]
        drawn = words(chance, self.material.text)
        start = COMMON + times.shown
        common, shown = drawn.first(COMMON), drawn.first(start)[COMMON:]
        top, others = shown[:COMMON], shown[COMMON:]
        question = PROMPT.format(text=_listed(top * times.shown_common + others * times.shown_rare, orders[0]))
        solved = f"{question}{PREFIX} {_numbered(top)}\n\n"

        def build(size: int) -> str:
            rare = drawn.first(start + size)[start:]
            return solved + PROMPT.format(text=_listed(common * times.common + rare * times.rare, orders[1]))

        size = self.size(lambda size: build(size) + PREFIX, length, least=COMMON)
        return Example(build(size), tuple(common), PREFIX)


def _listed(items: list[str], order: float) -> str:
    """Return a numbered list in an order that is random and, for the same items, always the same."""
    random.Random(order).shuffle(items)
    return _numbered(items)


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
