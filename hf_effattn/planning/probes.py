"""Calibration texts: documents as long as the context, with something hidden in them that is asked for at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..evaluation.documents import read_rows
from ..evaluation.haystack import keys, numbers
from ..evaluation.material import first_tokens

DEPTHS = (0.05, 0.25, 0.45, 0.65)  # of the needles: far enough from the end that windows do not reach them
HIDDEN = (  # things of which numbers are not expected, lengths of texts in contexts, and depths of the things in them
    ("spell", 0.5, 0.05),  # plans have to do for shorter texts, too
    ("call sign", 0.5, 0.15),
    ("sign", 0.5, 0.25),
    ("magic key", 0.5, 0.35),
    ("message", 1.0, 0.45),
    ("gate key", 0.5, 0.55),
    ("recipe", 0.5, 0.65),
    ("secret word", 0.5, 0.75),
    ("master key", 0.5, 0.85),
    ("treasure", 1.0, 0.95),
    ("riddle", 0.25, 0.1),
    ("silver key", 0.25, 0.3),
    ("map", 0.25, 0.5),
    ("chest", 0.25, 0.7),
    ("oath", 0.25, 0.85),
    ("old coin", 0.25, 0.95),
)
DIGITS = 5
AT_ONCE = 8192  # tokens of texts that are read at once, if they are not of one text
NEARBY = 64  # tokens among which a place between sentences or lines is looked for
NEEDLE = " The secret number of the {key} is {value}. Remember it."
QUESTION = "\n\nWhat is the secret number of the {key}? The secret number of the {key} is"
SAID = " The {thing} is {value}. Remember it. {value} is the {thing}."  # as in passkey retrieval (arXiv 2305.16300)
ASKED = "\nWhat is the {thing}? The {thing} is"
NOISE = " The road is long. The river is wide. The night is quiet. We walk on, step by step."


class Probe(NamedTuple):
    """One calibration text.

    Args:
        ids: Its tokens `[T + 1]`.
        is_text, is_answer: Which of the last T are of the document, and of answers to what was hidden in it `[T]`.
        start: The number of tokens before its end: the questions, and what is measured of the document.
    """

    ids: torch.Tensor
    is_text: torch.Tensor
    is_answer: torch.Tensor
    start: int

    @property
    def first(self) -> int:
        """The first token of which anything is measured: of a document all are, else those of the end."""
        return 0 if bool(self.is_text.any()) else self.start

    @property
    def answer_tokens(self) -> float:
        """The tokens of an answer, in the mean."""
        begins = self.is_answer[1:] & ~self.is_answer[:-1]
        return int(self.is_answer.sum()) / max(int(begins.sum()), 1)

    @property
    def questions(self) -> Probe:
        """The same with nothing but the answers to measure, before which all is the beginning."""
        return self._replace(is_text=torch.zeros_like(self.is_text), start=len(self.document.ids))

    @property
    def document(self) -> Probe:
        """The same up to the end of the document, without what is asked about it."""
        stop = int(self.is_text.nonzero().max()) + 1
        return Probe(self.ids[: stop + 1], self.is_text[:stop], self.is_answer[:stop], self.start)

    def since(self, token: int) -> Probe:
        """Return what comes from this token on."""
        return Probe(self.ids[token:], self.is_text[token:], self.is_answer[token:], max(self.start - token, 0))


Batch = Sequence[Probe]  # texts of the same length and start that are read at once, of nothing but answers


def make_probes(
    documents: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    number: int,
    seed: int,
    measured: int = 512,
) -> list[Probe]:
    """Return calibration texts of `context_length` + 1 tokens of one document each.

    Args:
        documents: A file, folder or dataset (see `read_rows`), or texts. The longest ones are taken.
        number: Of texts; if there are fewer long documents, several are of the same.
        measured: Tokens of the document in the end of a text.

    Raises:
        ValueError: if no document is long enough; the message has the longest.
    """
    texts = _texts(documents)
    length = context_length + 1
    tokens = sorted(_encoded(tokenizer, texts), key=len, reverse=True)
    chance = random.Random(f"plan/{seed}")
    first = first_tokens(tokenizer)
    whole = [_questions(tokenizer, chance) for _ in range(number)]
    rooms = [length - len(first) - sum(len(x) for x in (*needles, *asked)) for needles, asked in whole]
    if min(rooms) < length // 2:
        raise ValueError(f"a context of {context_length} tokens has no room for a text and questions; use a longer one")
    places = [(ids, at) for at in range(number) for ids in tokens if len(ids) >= (at + 1) * max(rooms)]
    if not places:
        raise ValueError(
            f"no document is long enough for a context of {context_length:,} tokens: the longest of {len(tokens)} has "
            f"{len(tokens[0]):,}, and {max(rooms):,} are needed; give longer documents or a smaller context_length"
        )
    if len(places) < number:
        raise ValueError(
            f"the documents have {len(places)} stretches of {max(rooms):,} tokens; {number} are asked for: give more "
            "documents, or a smaller number"
        )
    found = []
    for (ids, at), room, (needles, asked) in zip(places, rooms, whole, strict=False):
        hidden = dict(zip(DEPTHS, needles, strict=True))
        found.append(_assembled(tokenizer, first, ids[at * room : (at + 1) * room], hidden, asked, measured))
    return found


def make_asked(tokenizer: PreTrainedTokenizerBase, context_length: int, seed: int) -> list[Batch]:
    """Return texts of `context_length` + 1 tokens, a half or a quarter of them, of nothing but a few sentences over and
    over, with one thing hidden in each, that is asked for so that a model which has not found it says anything but a
    number."""
    chance, first = random.Random(f"asked/{seed}"), first_tokens(tokenizer)
    found = []
    for (thing, share, depth), value in zip(HIDDEN, numbers(chance, DIGITS).first(len(HIDDEN)), strict=True):
        said, asked = SAID.format(thing=thing, value=value), ASKED.format(thing=thing)
        noise, needle, *rest = _encoded(tokenizer, [NOISE, said, asked, f" {value}"])
        room = max(int(share * context_length) + 1 - len(first) - sum(map(len, (needle, *rest))), len(noise))
        text = (noise * (room // len(noise) + 1))[:room]
        found.append(_assembled(tokenizer, first, text, {depth: needle}, rest, 0))
    return _batches(found)


def _batches(probes: Sequence[Probe]) -> list[Batch]:
    """Return the texts with those of the same length together, the end of which begins where the longest end does."""
    alike: dict[int, list[Probe]] = {}
    for probe in probes:
        alike.setdefault(len(probe.ids), []).append(probe)
    found: list[Batch] = []
    for length, own in alike.items():
        start, number = min(probe.start for probe in own), max(AT_ONCE // length, 1)
        own = [probe._replace(start=start) for probe in own]
        found += [own[index : index + number] for index in range(0, len(own), number)]
    return found


def _texts(documents: str | Path | Sequence[str]) -> list[str]:
    if isinstance(documents, (str, Path)):
        return [row["document"] for row in read_rows(documents).rows]
    texts = list(documents)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"documents are a file, a folder, a dataset, or a list of texts; got {documents!r:.80}")
    return texts


def _questions(tokenizer: PreTrainedTokenizerBase, chance: random.Random) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of needles, and of questions and answers in turn, in another order."""
    pairs = list(zip(keys(chance).first(len(DEPTHS)), numbers(chance, DIGITS).first(len(DEPTHS)), strict=True))
    needles = [NEEDLE.format(key=key.replace("-", " "), value=value) for key, value in pairs]
    chance.shuffle(pairs)
    asked = [x for key, value in pairs for x in (QUESTION.format(key=key.replace("-", " ")), f" {value}")]
    return _encoded(tokenizer, needles), _encoded(tokenizer, asked)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def _assembled(
    tokenizer: PreTrainedTokenizerBase,
    first: list[int],
    text: list[int],
    needles: dict[float, list[int]],
    asked: list[list[int]],
    measured: int,
) -> Probe:
    """Return the text with needles, by depth, and questions; without `measured` tokens of it none of them counts."""
    ids, kinds = list(first), [0] * len(first)  # 1: of the document, 2: of an answer
    done = 0
    for depth, needle in needles.items():
        place = _between(tokenizer, text, int(depth * len(text)))
        ids += text[done:place] + needle
        kinds += [int(measured > 0)] * (place - done) + [0] * len(needle)
        done = place
    ids += text[done:]
    kinds += [int(measured > 0)] * (len(text) - done)
    start = max(len(ids) - 1 - min(measured, len(text) - done), 0)
    for number, part in enumerate(asked):
        ids += part
        kinds += [2 * (number % 2)] * len(part)
    marks = torch.tensor(kinds[1:])
    return Probe(torch.tensor(ids), marks == 1, marks == 2, start)


def _between(tokenizer: PreTrainedTokenizerBase, text: list[int], place: int) -> int:
    """Return the first place from `place` on that is behind the end of a sentence or a line, or `place` itself."""
    for near in range(place, min(place + NEARBY, len(text))):
        if near and str(tokenizer.decode(text[near - 1])).rstrip(" ").endswith((".", "!", "?", "\n")):
            return near
    return place
