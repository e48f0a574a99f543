"""Needles in a haystack, as RULER has them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

from ..base import TASKS, Example
from ..haystack import Draws, hide, keys, numbers, sentences, stretch, uuids
from .drawn import DrawnTask, even_depth

GRID = 40  # depths, equally spaced, that several needles are drawn from
PROMPTS = {  # whether several values are asked for; in RULER's words, since scores depend on them
    False: "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{text}\n"
    "What is the special magic {kind} for {keys} mentioned in the provided text?",
    True: "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind}s afterwards.\n{text}\n"
    "What are all the special magic {kind}s for {keys} mentioned in the provided text?",
}
PREFIXES = {
    False: " The special magic {kind} for {keys} mentioned in the provided text is",
    True: " The special magic {kind}s for {keys} mentioned in the provided text are",
}


class Needles(DrawnTask):
    """Sentences that give numbers for keys are hidden in a text; the numbers of one or more keys are asked for (RULER,
    Hsieh 2024, arXiv 2404.06654).

    The text is the given one from a random sentence on, repeated where it is short. RULER has essays: scores are
    comparable in kind only.
    """

    max_new_tokens = 128
    num_keys: ClassVar[int] = 1
    num_values: ClassVar[int] = 1  # of each key
    num_queries: ClassVar[int] = 1  # keys that are asked for
    kind: ClassVar[str] = "number"
    joint: ClassVar[str] = " "

    def example(self, length: int, index: int) -> Example:
        chance = self.random(length, index)
        names, values = self.draws(chance)
        known = names.first(self.num_keys)
        told = [key for key in known for _ in range(self.num_values)]
        facts = list(zip(told, values.first(len(told)), strict=True))
        asked = chance.sample(known, self.num_queries)
        references = tuple(value for name in asked for key, value in facts if key == name)
        chance.shuffle(facts)
        depths = [even_depth(index)]
        if len(facts) > 1:
            depths = sorted(place / (GRID - 1) for place in chance.sample(range(GRID), len(facts)))
        pieces, needles = self.haystack(chance), [self.needle(*fact) for fact in facts]
        several, words = len(references) > 1, {"kind": self.kind, "keys": _listed(asked)}

        def build(size: int) -> tuple[str, list[float]]:
            text, places = hide(pieces(size), needles, depths, self.joint)
            return PROMPTS[several].format(text=text, **words), places

        prefix = PREFIXES[several].format(**words)
        prompt, places = build(self.size(lambda size: build(size)[0] + prefix, length))
        details = {} if several else {"depth": places[[key for key, _ in facts].index(asked[0])]}
        return Example(prompt, references, prefix, details)

    def draws(self, chance: random.Random) -> tuple[Draws, Draws]:
        """Return where keys and values come from."""
        return keys(chance), numbers(chance)

    def haystack(self, chance: random.Random) -> Callable[[int], list[str]]:
        """Return what gives any number of pieces that needles are hidden between."""
        text = sentences(self.material.text)
        start = chance.randrange(len(text))
        return lambda size: stretch(text, start, size)

    def needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.kind}s for {key} is: {value}."


@TASKS.register("niah_single")
class SingleNeedle(Needles):
    """One number in a text (RULER niah_single_2); the depths are spread evenly over the examples."""


@TASKS.register("niah_multikey")
class MultiKey(Needles):
    """The numbers of four keys in a text, one of which is asked for (RULER niah_multikey_1)."""

    num_keys = 4


@TASKS.register("niah_multivalue")
class MultiValue(Needles):
    """Four numbers of one key in a text, all of which are asked for (RULER niah_multivalue)."""

    num_values = 4


@TASKS.register("niah_multiquery")
class MultiQuery(Needles):
    """The numbers of four keys in a text, all of which are asked for (RULER niah_multiquery)."""

    num_keys = num_queries = 4


@TASKS.register("niah_multikey_3")
class AllNeedles(Needles):
    """Nothing but sentences that give a UUID for a UUID, one of which is asked for (RULER niah_multikey_3); the depths
    are spread evenly over the examples."""

    kind = "uuid"
    joint = "\n"

    def draws(self, chance: random.Random) -> tuple[Draws, Draws]:
        return uuids(chance), uuids(chance)

    def haystack(self, chance: random.Random) -> Callable[[int], list[str]]:
        others = uuids(chance)
        return Draws(lambda: self.needle(others.draw(), others.draw())).first


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
