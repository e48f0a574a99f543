"""Facts about where people are, scattered over a text."""

from __future__ import annotations

from ..base import TASKS, Example
from ..haystack import hide, sentences, stretch
from ..metrics import BabilongMatch
from .drawn import DrawnTask

PERSONS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
MOVES = ("moved", "went", "went back", "journeyed", "travelled")
PROMPT = (
    "Facts about the places of persons are hidden in the text below, in the order in which they happened. Read them, "
    "and answer the question about where a person is now. Name the place only.\n\n"
    'For example, from "Charlie went to the hallway. Judith moved to the kitchen. Charlie travelled to the office." '
    'and "Where is Charlie?" follows the answer: office.\n\nText:\n{text}\n\nQuestion: {question}'
)
PREFIX = " Answer:"


@TASKS.register("babilong")
class Babilong(DrawnTask):
    """Two to ten sentences about persons that go to places, in order at random places of a text; where one of them is
    now is asked for (BABILong qa1, Kuratov 2024, arXiv 2406.10149, after bAbI, Weston 2015, arXiv 1502.05698; the facts
    are drawn here). Examples tell how many facts there are, and the depth of the one that counts."""

    metric = BabilongMatch
    score_name = "BABILong match"
    max_new_tokens = 20

    def example(self, length: int, index: int) -> Example:
        chance = self.random(length, index)
        moves = [(chance.choice(PERSONS), chance.choice(PLACES)) for _ in range(chance.choice((2, 4, 6, 8, 10)))]
        asked = chance.choice(sorted({person for person, _ in moves}))
        last = max(number for number, (person, _) in enumerate(moves) if person == asked)
        facts = [f"{person} {chance.choice(MOVES)} to the {place}." for person, place in moves]
        depths = sorted(chance.random() for _ in facts)
        pieces = sentences(self.material.text)
        start = chance.randrange(len(pieces))

        def build(size: int) -> tuple[str, list[float]]:
            text, places = hide(stretch(pieces, start, size), facts, depths)
            return PROMPT.format(text=text, question=question(asked)), places

        prompt, places = build(self.size(lambda size: build(size)[0] + PREFIX, length))
        details = {"depth": places[last], "facts": len(facts), "question": question(asked)}
        return Example(prompt, (moves[last][1],), PREFIX, details)

    def score(self, example: Example, answer: str) -> float:
        return BabilongMatch.one(answer, example.references, example.details["question"], PLACES)


def question(person: str) -> str:
    return f"Where is {person}?"
