"""Facts about persons, scattered over a text."""

from __future__ import annotations

import random
from typing import ClassVar

from ..base import TASKS, Example
from ..haystack import hide, sentences, stretch
from ..metrics import BabilongMatch
from ..stories import PLACES, Story, where_is_a_person, where_is_a_thing, where_was_a_thing
from .drawn import DrawnTask

PROMPT = (
    "Facts about the places of persons{carry} are hidden in the text below, in the order in which they happened. Read "
    "them, and answer the question about where {asked}. Name the place only.\n\n"
    'For example, from "{facts}" and "{shown}" follows the answer: {answer}.\n\nText:\n{text}\n\nQuestion: {question}'
)
PREFIX = " Answer:"
THINGS = {
    "carry": " and the things that they carry",
    "facts": "Charlie went to the hallway. Judith moved to the kitchen. Judith took the lamp there. "
    "Judith went to the office.",
}


@TASKS.register("babilong")
class Babilong(DrawnTask):
    """Two to ten sentences about persons that go to places, in order at random places of a text; where one of them is
    now is asked for (BABILong qa1, Kuratov 2024, arXiv 2406.10149, after bAbI, Weston 2015, arXiv 1502.05698; the facts
    are drawn here). Examples tell how many facts there are, and the depths of those that count."""

    metric = BabilongMatch
    score_name = "BABILong match"
    max_new_tokens = 20
    numbers: ClassVar[tuple[int, ...]] = (2, 4, 6, 8, 10)  # of facts
    words: ClassVar[dict[str, str]] = {
        "carry": "",
        "asked": "a person is now",
        "facts": "Charlie went to the hallway. Judith moved to the kitchen. Charlie travelled to the office.",
        "shown": "Where is Charlie?",
        "answer": "office",
    }

    def example(self, length: int, index: int) -> Example:
        chance = self.random(length, index)
        story = self.story(chance, chance.choice(self.numbers))
        depths = sorted(chance.random() for _ in story.facts)
        pieces = sentences(self.material.text)
        start = chance.randrange(len(pieces))

        def build(size: int) -> tuple[str, list[float]]:
            text, places = hide(stretch(pieces, start, size), story.facts, depths)
            return PROMPT.format(text=text, question=story.question, **self.words), places

        prompt, places = build(self.size(lambda size: build(size)[0] + PREFIX, length))
        counting = [places[fact] for fact in story.support]
        details = {"depths": counting, "facts": len(story.facts), "question": story.question}
        return Example(prompt, (story.answer,), PREFIX, details)

    @staticmethod
    def story(chance: random.Random, number: int) -> Story:
        """Return a story of at least so many facts."""
        return where_is_a_person(chance, number)

    def score(self, example: Example, answer: str) -> float:
        return BabilongMatch.one(answer, example.references, example.details["question"], PLACES)


@TASKS.register("babilong_qa2")
class BabilongThings(Babilong):
    """Six sentences or more about persons that go to places, take things and put them down; where a thing is now is
    asked for, which two of the facts tell (BABILong qa2)."""

    story = staticmethod(where_is_a_thing)
    numbers = (6, 10, 14, 18, 22)
    words = {**THINGS, "asked": "a thing is now", "shown": "Where is the lamp?", "answer": "office"}


@TASKS.register("babilong_qa3")
class BabilongWays(Babilong):
    """Twelve sentences or more about persons that go to places, take things and put them down; where a thing was before
    it came to a place is asked for, which three of the facts tell (BABILong qa3)."""

    story = staticmethod(where_was_a_thing)
    numbers = (12, 20, 28, 36, 44)
    words = {
        **THINGS,
        "asked": "a thing was before",
        "shown": "Where was the lamp before the office?",
        "answer": "kitchen",
    }
