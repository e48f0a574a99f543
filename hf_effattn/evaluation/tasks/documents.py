"""Questions about documents that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from ..base import TASKS, Example
from ..documents import SHOWN
from ..metrics import ExactMatch, RougeL, StringMatchPart, TokenF1, first_line
from ..texts import counted, were
from .drawn import DrawnTask

Build = Callable[[int], tuple[str, dict[str, Any]]]  # a prompt by its size, and details


class RowsTask(DrawnTask):
    """Makes examples of the rows of the documents, in random order. Details tell the row.

    An answer is a few words in one line, unless `is_short` is False. Its score is the F1 of words of SQuAD (Rajpurkar
    2016, arXiv 1606.05250), with the best reference; beside it stand the exact match of SQuAD, and RULER's match of any
    reference, anywhere in what was generated.
    """

    metric = TokenF1
    score_name = "F1"
    prompt: ClassVar[str]
    prefix: ClassVar[str]
    needs_question: ClassVar[bool] = True
    is_short: ClassVar[bool] = True  # so an answer that is cut can't be right, and what follows in new lines is ignored

    def examples(self, length: int, number: int) -> list[Example]:
        """Return `number` examples, or as many as the rows give; the notes tell how many were left out or cut.

        Raises:
            ValueError: if there is none, or a row is not as it should be.
        """
        found: list[Example] = []
        left_out = 0
        for row in self.order:
            made = self.examples_of(row, length)
            left_out += not made
            found += made
            if len(found) >= number:
                break
        if not found:
            shortest = min(self.least(row, length) for row in self.order)
            raise ValueError(f"the shortest example has {shortest} tokens; there is room for {self.room(length)}")
        if left_out:
            self.notes.append(f"{were(left_out, 'document')} left out as too long for {length:,} tokens")
        self._tell_of_long(found, length, number)
        return found[:number]

    def _tell_of_long(self, found: list[Example], length: int, number: int) -> None:
        """Add notes about documents that were cut or slid over."""
        cut = sum(bool(example.details.get("cuts")) for example in found[:number])
        if cut:
            self.notes.append(
                f"{were(cut, 'document')} cut to {length:,} tokens; the results tell which tokens are missing"
            )
        pieces = [example.details["row"] for example in found if example.details.get("cuts") == []]
        if pieces:
            taken = sum(example.details.get("cuts") == [] for example in found[:number])
            self.notes.append(
                f"{were(len(set(pieces)), 'document')} too long for {length:,} tokens and slid over in "
                f"{counted(len(pieces), 'piece')}{'' if taken == len(pieces) else f', the first {taken} of them taken'}"
            )

    def examples_of(self, row: int, length: int) -> list[Example]:
        """Return the examples that a row gives; none if it is too long."""
        if self.least(row, length) > self.room(length):
            return []
        build = self.builder(row, length)
        return [self.as_example(row, *build(self.largest(build, length)))]

    def least(self, row: int, length: int) -> int:
        """Return the tokens of the shortest prompt about a row."""
        return self.material.count_tokens(self.builder(row, length)(1)[0] + self.prefix)

    def as_example(self, row: int, prompt: str, details: dict[str, Any]) -> Example:
        return Example(prompt, tuple(self.rows[row]["answers"]), self.prefix, {"row": row, **details})

    def score(self, example: Example, answer: str) -> float:
        return super().score(example, first_line(answer) if self.is_short else answer)

    def further(self, example: Example, answer: str) -> dict[str, float]:
        if not self.is_short:
            return {}
        return {
            "exact match": ExactMatch.one(first_line(answer), example.references),
            "string match (any)": StringMatchPart.one(answer, example.references),
        }

    @cached_property
    def rows(self) -> dict[int, dict[str, Any]]:
        """The rows that are as they should be, by number; the notes tell of others."""
        if not self.material.documents:
            raise ValueError("there are no documents; this task is about rows with document, question and answers")
        faults = {number: self.fault(row) for number, row in enumerate(self.material.documents)}
        wrong = [f"{self.place(number)}: {fault}" for number, fault in faults.items() if fault]
        told = f"{were(len(wrong), 'row')} left out; {'; '.join(wrong[:SHOWN])}"
        if len(wrong) > SHOWN:
            told += f"; and {len(wrong) - SHOWN} more"
        if len(wrong) == len(faults):
            raise ValueError(told)
        if wrong:
            self.notes.append(told)
        return {number: row for number, row in enumerate(self.material.documents) if not faults[number]}

    @cached_property
    def order(self) -> list[int]:
        """The rows in the order in which they become examples, the same at every length."""
        return self.random(0, 0).sample(list(self.rows), len(self.rows))

    def place(self, row: int) -> str:
        """Return where a row is: file and line if they are known."""
        return str(self.material.documents[row].get("place", f"row {row} of the documents"))

    def fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a row, or an empty text."""
        document, question, answers = (row.get(name) for name in ("document", "question", "answers"))
        if not isinstance(document, str) or not document.strip():
            return f"document must be a text that is not empty; got {document!r}"
        if self.needs_question and (not isinstance(question, str) or not question.strip()):
            return f"question must be a text that is not empty; got {question!r}"
        if not isinstance(answers, (list, tuple)) or not answers or not all(isinstance(x, str) and x for x in answers):
            return f"answers must be a list of texts that are not empty; got {answers!r}"
        least = min(map(self.material.count_tokens, answers)) if self.is_short else 0
        if least > self.max_new_tokens:
            return f"the shortest answer has {least} tokens; at most {self.max_new_tokens} are generated"
        return ""

    def builder(self, row: int, length: int) -> Build:
        """Return what gives the prompt about a row, the longer the larger its argument is; 1 for the shortest."""
        raise NotImplementedError

    def largest(self, build: Build, length: int) -> int:
        """Return the size of the longest prompt that there is room for."""
        raise NotImplementedError


class OneDocument(RowsTask):
    """A task about one document at a time, which may be cut if the user says so."""

    default_question: ClassVar[str] = ""

    def examples_of(self, row: int, length: int) -> list[Example]:
        document = self.rows[row]["document"]
        if self.least(row, length) <= self.room(length):
            return [self.as_example(row, self.shown(row, document), {})]
        if self.material.shorten is None:
            return []
        room = (
            self.room(length) - self.material.count_tokens(self.shown(row, "") + self.prefix) - 2
        )  # tokens that may arise at the seams
        if room < 1:
            return []
        try:
            fitted = self.material.shorten(document, room)
        except ValueError as error:
            raise ValueError(f"{self.place(row)}: {error}") from error
        pieces = enumerate(self.shown(row, piece) for piece in fitted.pieces)
        details = {"document_tokens": fitted.num_tokens, "cuts": fitted.cuts}
        return [self.as_example(row, shown, {**details, "piece": number}) for number, shown in pieces]

    def least(self, row: int, length: int) -> int:
        return self.material.count_tokens(self.shown(row, self.rows[row]["document"]) + self.prefix)

    def shown(self, row: int, document: str) -> str:
        question = self.rows[row].get("question") or self.default_question
        return self.prompt.format(document=document, question=question)


@TASKS.register("documents")
class Documents(OneDocument):
    """Questions about the given documents, one document and question an example. The score is the F1 of words of SQuAD
    (Rajpurkar 2016, arXiv 1606.05250), with the best of the answers, of the first line that is generated."""

    max_new_tokens = 32
    prompt = (
        "Read the following text and answer the question about it with as few words as you can, without any "
        "explanation.\n\n{document}\n\nQuestion: {question}"
    )
    prefix = "\nAnswer:"


@TASKS.register("summaries")
class Summaries(OneDocument):
    """Summaries of the given documents, or long answers to questions about them, as in QMSum (Zhong 2021, arXiv
    2104.05938) and SQuALITY (Wang 2022, arXiv 2205.11465). The score is ROUGE-L with the best of the answers."""

    metric = RougeL
    score_name = "ROUGE-L"
    max_new_tokens = 256
    needs_question = False
    is_short = False
    default_question = "Summarize the text."
    prompt = (
        "Read the following text. Then follow the instruction, or answer the question, in a paragraph.\n\n{document}"
        "\n\nInstruction or question: {question}"
    )
    prefix = "\nAnswer:"
