"""Frequent words, as RULER has them."""

from __future__ import annotations

import math
import random
import string

from ..base import TASKS, Example
from ..haystack import Draws, letters
from .drawn import DrawnTask

FEWEST = 80  # words from which on the most frequent ones differ in how often they come
ALPHA = 2
ZETA = math.pi**2 / 6  # the sum of 1 / k ** ALPHA over all k
NOISE = "..."
PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {text}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


@TASKS.register("frequent_words")
class FrequentWords(DrawnTask):
    """Words of six random letters; the k-th comes in proportion to 1 / k². The first is dots, and the next three are
    asked for (RULER fwe, Hsieh 2024, arXiv 2404.06654)."""

    max_new_tokens = 50

    def example(self, length: int, index: int) -> Example:
        chance = self.random(length, index)
        order = chance.random()
        words = Draws(letters(chance, string.ascii_lowercase, 6).draw, start=[NOISE])

        def build(size: int) -> str:
            text = _text(words, size)
            random.Random(order).shuffle(text)
            return PROMPT.format(text=" ".join(text))

        size = self.size(lambda size: build(size) + PREFIX, length, least=FEWEST)
        return Example(build(size), tuple(words.first(4)[1:]), PREFIX)


def _text(words: Draws, size: int) -> list[str]:
    """Return about `size` words, as often as the Zeta distribution expects, those expected less than once left out."""
    often = size / ZETA
    times: list[int] = []
    while (number := int(often / (len(times) + 1) ** ALPHA)) > 0:
        times.append(number)
    return [word for word, number in zip(words.first(len(times)), times, strict=True) for _ in range(number)]
