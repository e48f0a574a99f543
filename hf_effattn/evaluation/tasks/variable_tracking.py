"""Variable tracking, as RULER has it."""

from __future__ import annotations

import string
from collections.abc import Sequence

from ..base import TASKS, Example
from ..haystack import NOISE, hide, letters, numbers
from .drawn import DrawnTask

HOPS = 4
SHOWN = 5  # paragraphs of noise in the question that is shown with its answer
PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the "
    "value {value}, they are:"
)


@TASKS.register("variable_tracking")
class VariableTracking(DrawnTask):
    """A variable is set to a number and four more are set to one another, between sentences that repeat; all five names
    are asked for, behind another such question with its answer (RULER vt, Hsieh 2024, arXiv 2404.06654)."""

    max_new_tokens = 30

    def example(self, length: int, index: int) -> Example:
        chance = self.random(length, index)
        values = numbers(chance, digits=5).first(2)
        shown, names = (letters(chance, string.ascii_uppercase, number).first(HOPS + 1) for number in (3, 5))
        shown_depths, depths = (sorted(chance.random() for _ in range(HOPS + 1)) for _ in range(2))
        question, prefix = _question(shown, values[0], SHOWN, shown_depths)
        solved = f"{question}{prefix} {' '.join(shown)}\n\n"

        def build(size: int) -> tuple[str, str]:
            question, prefix = _question(names, values[1], size, depths)
            return solved + question, prefix

        prompt, prefix = build(self.size(lambda size: "".join(build(size)), length, least=HOPS + 1))
        return Example(prompt, tuple(names), prefix)


def _question(names: Sequence[str], value: str, size: int, depths: Sequence[float]) -> tuple[str, str]:
    """Return the prompt about a chain in `size` paragraphs of noise, and how the answer begins."""
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before}" for before, name in zip(names, names[1:], strict=False)]
    text, _ = hide([" ".join(NOISE)] * size, chain, depths, "\n")
    return PROMPT.format(text=text, value=value), PREFIX.format(number=len(names), value=value)
