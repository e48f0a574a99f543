"""The passkey."""

from __future__ import annotations

from ..base import TASKS, Example
from ..haystack import NOISE, hide, numbers, stretch
from .drawn import DrawnTask, even_depth

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
QUESTION, PREFIX = "What is the pass key?", " The pass key is"


@TASKS.register("passkey")
class Passkey(DrawnTask):
    """A number of five digits in sentences that repeat (landmark attention, Mohtashami 2023, arXiv 2305.16300). Here
    the depths are spread evenly, the number comes between sentences, and an answer is right if the number is in it."""

    max_new_tokens = 12

    def example(self, length: int, index: int) -> Example:
        (key,) = numbers(self.random(length, index), digits=5).first(1)
        needle, depth = f"The pass key is {key}. Remember it. {key} is the pass key.", even_depth(index)

        def build(size: int) -> tuple[str, list[float]]:
            text, places = hide(stretch(NOISE, 0, size), [needle], [depth])
            return f"{TASK}\n{text}\n{QUESTION}", places

        prompt, places = build(self.size(lambda size: build(size)[0] + PREFIX, length))
        return Example(prompt, (key,), PREFIX, {"depth": places[0]})
