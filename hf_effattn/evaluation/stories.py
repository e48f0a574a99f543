"""Stories told in single facts: persons go to places and carry things, and a question follows."""

from __future__ import annotations

import random
from typing import NamedTuple

PERSONS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("moved", "went", "went back", "journeyed", "travelled")
TAKES = ("got", "grabbed", "picked up", "took")
DROPS = ("discarded", "dropped", "left", "put down")


class Story(NamedTuple):
    """Facts and a question about them.

    Args:
        facts: In the order in which they happen.
        question: What is asked behind the last of them.
        answer: The place that is right.
        support: The facts, by their numbers, that the answer follows from.
    """

    facts: list[str]
    question: str
    answer: str
    support: tuple[int, ...]


def where_is_a_person(chance: random.Random, number: int) -> Story:
    """Return a story of `number` facts that asks for the place of a person: one fact tells (bAbI's task 1)."""
    moves = [(chance.choice(PERSONS), chance.choice(PLACES)) for _ in range(number)]
    asked = chance.choice(sorted({person for person, _ in moves}))
    last = max(number for number, (person, _) in enumerate(moves) if person == asked)
    facts = [f"{person} {chance.choice(MOVES)} to the {place}." for person, place in moves]
    return Story(facts, f"Where is {asked}?", moves[last][1], (last,))


def where_is_a_thing(chance: random.Random, number: int) -> Story:
    """Return a story of `number` facts, or more if there is nothing to ask before, that asks for the place of a thing:
    where someone went, and what that person did with it, tell (bAbI's task 2)."""
    world = _World(chance)
    while len(world.facts) < number or not world.found:
        world.go_on()
    thing = chance.choice(sorted(world.found))
    place, support = world.found[thing]
    return Story(world.facts, f"Where is the {thing}?", place, support)


def where_was_a_thing(chance: random.Random, number: int) -> Story:
    """Return a story of `number` facts, or more if there is nothing to ask before, that asks where a thing was before
    it came to a place: who took it, and two moves of that person, tell (bAbI's task 3)."""
    world = _World(chance)
    while len(world.facts) < number or not world.ways():
        world.go_on()
    way = chance.choice(world.ways())
    return Story(world.facts, f"Where was the {way.thing} before the {way.end}?", way.start, way.support)


class _Way(NamedTuple):
    """Of a thing that is carried from one place to another."""

    thing: str
    start: str
    end: str
    support: tuple[int, ...]


class _World:
    """Persons, places and things, and what follows from the facts about them. Persons are nowhere until they go
    somewhere, so all is known of a thing once it has been taken."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.facts: list[str] = []
        self.lying = {thing: chance.choice(PLACES) for thing in THINGS}  # where things are that nobody has
        self.at: dict[str, tuple[str, int]] = {}  # where persons are, and the fact that tells
        self.held: dict[str, tuple[str, int]] = {}  # who has a thing, and the fact that tells
        self.found: dict[str, tuple[str, tuple[int, ...]]] = {}  # where a thing is, and the facts that tell
        self.carried: list[_Way] = []

    def ways(self) -> list[_Way]:
        """Return those of ways that a question can name by their end, for the thing was there only once."""
        been = [(way.thing, way.end) for way in self.carried]
        first = {way.thing: way.start for way in reversed(self.carried)}
        return [way for way in self.carried if been.count((way.thing, way.end)) == 1 and way.end != first[way.thing]]

    def go_on(self) -> None:
        """Let someone go somewhere, or take or put down a thing if there is one."""
        person = self.chance.choice(PERSONS)
        here = self.at[person][0] if person in self.at else None
        near = [thing for thing, place in self.lying.items() if place == here]
        has = [thing for thing, (holder, _) in self.held.items() if holder == person]
        if (has or near) and self.chance.random() < 0.5:
            self._touch(person, self.chance.choice(has + near))
        else:
            self._move(person, self.chance.choice([place for place in PLACES if place != here]), has)

    def _move(self, person: str, place: str, has: list[str]) -> None:
        number = len(self.facts)
        for thing in has:
            start, before = self.at[person]
            taken = self.held[thing][1]
            self.found[thing] = place, (taken, number)
            self.carried.append(_Way(thing, start, place, (*sorted((taken, before)), number)))
        self.at[person] = place, number
        self.facts.append(f"{person} {self.chance.choice(MOVES)} to the {place}.")

    def _touch(self, person: str, thing: str) -> None:
        number, (here, before) = len(self.facts), self.at[person]
        self.found[thing] = here, (before, number)
        verbs = DROPS if thing in self.held else TAKES
        if thing in self.held:
            del self.held[thing]
            self.lying[thing] = here
        else:
            del self.lying[thing]
            self.held[thing] = person, number
        self.facts.append(f"{person} {self.chance.choice(verbs)} the {thing}{self.chance.choice(('', ' there'))}.")
