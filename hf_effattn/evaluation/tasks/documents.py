"""Questions about documents that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from ..base import TASKS, Example
from ..metrics import RougeL, TokenF1
from .drawn import DrawnTask

Build = Callable[[int], tuple[str, dict[str, Any]]]  # a prompt by its size, and details


class RowsTask(DrawnTask):
    """Makes an example of each row of the documents, in random order, and leaves out those that are too long: an
    example has its whole document. Its details tell the row."""

    prompt: ClassVar[str]
    prefix: ClassVar[str]
    needs_question: ClassVar[bool] = True

    def examples(self, length: int, number: int) -> list[Example]:
        """Return `number` examples, or as many as there are rows that are short enough.

        Raises:
            ValueError: if there is none, or a row is not as it should be.
        """
        found: list[Example] = []
        shortest: list[int] = []
        for row in self.order:
            build = self.builder(row, length)
            shortest.append(self.material.count_tokens(build(1)[0] + self.prefix))
            if shortest[-1] <= self.room(length):
                prompt, details = build(self.largest(build, length))
                found.append(Example(prompt, tuple(self.rows[row]["answers"]), self.prefix, {"row": row, **details}))
            if len(found) == number:
                break
        if not found:
            raise ValueError(f"the shortest example has {min(shortest)} tokens; there is room for {self.room(length)}")
        return found

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows, which are as they should be."""
        if not self.material.documents:
            raise ValueError("there are no documents; this task is about rows with document, question and answers")
        for number, row in enumerate(self.material.documents):
            if fault := self.fault(row):
                raise ValueError(f"row {number} of the documents: {fault}")
        return list(self.material.documents)

    @cached_property
    def order(self) -> list[int]:
        """The rows in the order in which they become examples, the same at every length."""
        return self.random(0, 0).sample(range(len(self.rows)), len(self.rows))

    def fault(self, row: dict[str, Any]) -> str:
        """Return what is wrong with a row, or an empty text."""
        document, question, answers = (row.get(name) for name in ("document", "question", "answers"))
        if not isinstance(document, str) or not document.strip():
            return f"document must be a text that is not empty; got {document!r}"
        if self.needs_question and (not isinstance(question, str) or not question.strip()):
            return f"question must be a text that is not empty; got {question!r}"
        if not isinstance(answers, (list, tuple)) or not answers or not all(isinstance(x, str) and x for x in answers):
            return f"answers must be a list of texts that are not empty; got {answers!r}"
        return ""

    def builder(self, row: int, length: int) -> Build:
        """Return what gives the prompt about a row, the longer the larger its argument is; 1 for the shortest."""
        text = self.prompt.format(document=self.rows[row]["document"], question=self.rows[row].get("question"))
        return lambda size: (text, {})

    def largest(self, build: Build, length: int) -> int:
        """Return the size of the longest prompt that there is room for."""
        return 1


@TASKS.register("documents")
class Documents(RowsTask):
    """Questions about the given documents, one document and question an example. The score is the F1 of words of SQuAD
    (Rajpurkar 2016, arXiv 1606.05250), with the best of the answers."""

    metric = TokenF1
    score_name = "F1"
    max_new_tokens = 32
    prompt = (
        "Read the following text and answer the question about it with as few words as you can, without any "
        "explanation.\n\n{document}\n\nQuestion: {question}"
    )
    prefix = "\nAnswer:"


@TASKS.register("summaries")
class Summaries(RowsTask):
    """Summaries of the given documents, or long answers to questions about them, as in QMSum (Zhong 2021, arXiv
    2104.05938) and SQuALITY (Wang 2022, arXiv 2205.11465). The score is ROUGE-L with the best of the answers."""

    metric = RougeL
    score_name = "ROUGE-L"
    max_new_tokens = 256
    needs_question = False
    prompt = (
        "Read the following text. Then follow the instruction, or answer the question, in a paragraph.\n\n{document}"
        "\n\nInstruction or question: {question}"
    )
    prefix = "\nAnswer:"

    def builder(self, row: int, length: int) -> Build:
        question = self.rows[row].get("question") or "Summarize the text."
        text = self.prompt.format(document=self.rows[row]["document"], question=question)
        return lambda size: (text, {})
