"""Questions about one of many documents."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ..base import TASKS
from ..haystack import stretch
from .documents import Build, RowsTask

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@TASKS.register("distractor_qa")
class DistractorQA(RowsTask):
    """A question about one of the given documents, which stands at a random place among others (RULER qa_1, Hsieh 2024,
    arXiv 2404.06654, with the paragraphs of SQuAD). The others repeat where there are too few of them; those
    that there is no room for are left out. The score is the F1 of words, as of `documents`; RULER's is told beside
    it."""

    max_new_tokens = 32
    prompt = f"{ORDER}\n\nThe following are given documents.\n\n{{document}}\n\n{ORDER}\n\nQuestion: {{question}}"
    prefix = " Answer:"

    def builder(self, row: int, length: int) -> Build:
        chance = self.random(length, row)
        gold, question = self.rows[row]["document"], self.rows[row]["question"]
        left = self.room(length) - self.material.count_tokens(self.shown([gold], question) + self.prefix)
        others = [text for text in self.tokens if text != gold]
        others = [text for text in others if self.tokens[text] <= left] or [min(others, key=self.tokens.__getitem__)]
        chance.shuffle(others)
        depth = chance.random()

        def build(size: int) -> tuple[str, dict[str, Any]]:
            place = round(depth * size)
            texts = stretch(others, 0, size)
            texts.insert(place, gold)
            before, whole = (sum(map(len, part)) for part in (texts[:place], texts[:place] + texts[place + 1 :]))
            details = {"depth": round(before / whole, 4), "documents": size + 1}
            return self.shown(texts, question), details

        return build

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The different documents, with the tokens that each adds to a prompt."""
        found = dict.fromkeys(row["document"] for row in self.rows.values())
        if len(found) < 2:
            raise ValueError("distractor_qa needs at least 2 different documents; all rows have the same")
        return {text: self.material.count_tokens(f"\n\nDocument 10:\n{text}") for text in found}

    def shown(self, texts: list[str], question: str) -> str:
        numbered = (f"Document {number}:\n{text}" for number, text in enumerate(texts, start=1))
        return self.prompt.format(document="\n\n".join(numbered), question=question)

    def largest(self, build: Build, length: int) -> int:
        return self.size(lambda size: build(size)[0] + self.prefix, length)
