"""What long prompts are made of: sentences, words, keys and values, and places to hide something at."""

from __future__ import annotations

import random
import re
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, islice

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
LONGEST = 40  # words of a sentence; a longer one is cut, so that a text of sentences can be filled closely
FIRST_STEP = 8  # pieces whose tokens are counted first
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])|\n\s*\n")
PLAIN_WORD = re.compile(r"\b[a-z]{4,10}\b")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
ADJECTIVES = """
    able amber ancient bitter bold brave breezy brisk calm careful cheerful clever cold crimson curious dapper dusty
    eager early elegant faint fancy fierce fluffy gentle giant golden graceful grumpy happy hollow honest humble icy
    jolly kind lazy lively lonely lucky mellow mighty modest narrow noble patient plain polite proud quiet rapid rusty
    shiny silent slender sturdy sunny swift tender vivid
""".split()
NOUNS = """
    anchor apple badger basket beacon bridge button candle canyon carpet castle cherry cottage curtain desert dolphin
    drawer engine falcon feather forest garden glacier hammer harbor helmet island jacket kettle ladder lantern lemon
    meadow mirror mountain needle notebook orchard oyster paddle parrot pebble pencil pillow pocket puzzle rabbit ribbon
    river saddle shelf spider statue ticket tunnel turtle valley violin walnut window
""".split()


class Draws:
    """Different things that are drawn one after the other; the first ones do not depend on how many are asked for.

    Args:
        draw: Draws one thing.
        start: Things that come before those drawn.
    """

    def __init__(self, draw: Callable[[], str], start: Iterable[str] = ()) -> None:
        self.draw, self._found = draw, dict.fromkeys(start)

    def first(self, number: int) -> list[str]:
        while len(self._found) < number:
            self._found.setdefault(self.draw())
        return list(islice(self._found, number))


def keys(chance: random.Random) -> Draws:
    """Return keys of an adjective and a noun; RULER makes the same of the word lists of wonderwords."""
    return Draws(lambda: f"{chance.choice(ADJECTIVES)}-{chance.choice(NOUNS)}")


def numbers(chance: random.Random, digits: int = 7) -> Draws:
    return Draws(lambda: str(chance.randrange(10 ** (digits - 1), 10**digits)))


def uuids(chance: random.Random) -> Draws:
    return Draws(lambda: str(uuid.UUID(int=chance.getrandbits(128), version=4)))


def letters(chance: random.Random, alphabet: str, number: int) -> Draws:
    """Return words of `number` random letters."""
    return Draws(lambda: "".join(chance.choices(alphabet, k=number)))


def words(chance: random.Random, text: str) -> Draws:
    """Return words of a text in random order and, when there are no more, words coined of three syllables.

    RULER has the 8,000 words of wonderwords instead; a text of English prose with 100,000 words has about as many.
    """

    def coin() -> str:
        return "".join(chance.choice(CONSONANTS) + chance.choice(VOWELS) for _ in range(3))

    known = plain_words(text)
    return Draws(coin, chance.sample(known, len(known)))


@lru_cache(maxsize=4)
def plain_words(text: str) -> tuple[str, ...]:
    """Return the different words of a text that are written in 4 to 10 small letters, in alphabetical order."""
    return tuple(sorted(set(PLAIN_WORD.findall(text))))


@lru_cache(maxsize=4)
def sentences(text: str) -> tuple[str, ...]:
    """Return the sentences of a text, each on one line; those of more than `LONGEST` words are cut.

    Raises:
        ValueError: if the text has none.
    """
    found, start = [], 0
    for end in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
        spoken = text[start:end].split()
        found += [" ".join(spoken[i : i + LONGEST]) for i in range(0, len(spoken), LONGEST)]
        start = end
    if not found:
        raise ValueError("the text is empty; this task hides something in a text")
    return tuple(found)


def stretch(pieces: Sequence[str], start: int, number: int) -> list[str]:
    """Return `number` pieces from `start` on, going on with the first one behind the last."""
    rounds = -(-(start + number) // len(pieces))
    return list(pieces[start : start + number] if rounds <= 1 else (list(pieces) * rounds)[start : start + number])


def hide(
    pieces: Sequence[str], needles: Sequence[str], depths: Sequence[float], joint: str = " "
) -> tuple[str, list[float]]:
    """Return a text of pieces with needles between them, and the share of the text that really is before each.

    Args:
        needles: In the order in which they stand in the text.
        depths: Where each should be, from 0 to 1, ascending; it comes between the pieces that are nearest.
    """
    before = list(accumulate((len(piece) + len(joint) for piece in pieces), initial=0))
    result: list[str] = []
    places: list[float] = []
    done, whole = 0, max(before[-1], 1)
    for needle, depth in zip(needles, depths, strict=True):
        aim = depth * before[-1]
        place = bisect_left(before, aim, done, len(pieces))
        if place > done and aim - before[place - 1] < before[place] - aim:
            place -= 1
        result += [*pieces[done:place], needle]
        places.append(round(before[place] / whole, 4))
        done = place
    return joint.join([*result, *pieces[done:]]), places


def fill(build: Callable[[int], str], room: int, count_tokens: Callable[[str], int], least: int = 0) -> int:
    """Return the largest size for which the text `build(size)` has at most `room` tokens. It is found by guessing from
    the tokens that a piece has, since counting those of long texts takes time.

    Args:
        build: A text that gets longer with its argument.
        least: The smallest size that makes sense.

    Raises:
        ValueError: if even that is too long.
    """
    low, tokens = least, count_tokens(build(least))
    if tokens > room:
        raise ValueError(f"the shortest example has {tokens} tokens; there is room for {room}")
    rate, high = (room - tokens) / FIRST_STEP, None
    while high is None or high - low > 1:
        step = max(1, int((room - tokens) / max(rate, 0.5)))
        guess = low + step if high is None else min(low + step, high - 1)
        found = count_tokens(build(guess))
        rate = (found - tokens) / (guess - low)
        if found <= room:
            low, tokens = guess, found
        else:
            high = guess
    return low
