"""Texts and documents for tasks, from what users name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .base import Material
from .documents import Rows, Skipped, read_rows
from .records import ROWS, TABLES
from .texts import HOW, counted, fit, kind, read_marked

TOO_LONG = ("skip", *HOW)


def default_text() -> str:
    """Return CPython's own language reference: 460,000 characters of prose that every Python has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Sources:
    """What users name.

    Args:
        texts: Files, folders, JSON lines, tables or Hub ids whose texts, one after the other, are haystack and
            passages; none for `default_text`.
        documents: A file, folder or Hub id of rows with `document`, `question` and `answers`.
        columns: What these are called there.
        split: Of a dataset of documents that has several.
        join: Where the documents are, if rows only have the `doc_id` of theirs.
        too_long: What becomes of documents longer than there is room for: "skip", "error", "truncate_middle",
            "truncate_end", or "slide" for an example of each piece.
    """

    texts: Sequence[str] = ()
    documents: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    join: str | None = None
    too_long: str = "skip"

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise ValueError(f"unknown way to treat documents that are too long {self.too_long!r}; valid: {TOO_LONG}")

    def gather(self, tokenizer: PreTrainedTokenizerBase, seed: int = 42) -> tuple[Material, list[Skipped]]:
        """Return the material of tasks for the tokenizer, and the rows and texts that were skipped. The documents have
        a `place`, which tells file and line.

        Raises:
            ValueError: if no text, or no document, can be read.
            FileNotFoundError: if a file is not there.
        """
        texts = self._texts()
        given = Rows()
        if self.documents is not None:
            given = read_rows(self.documents, columns=self.columns, documents=self.join, split=self.split)
        documents = tuple(row | {"place": place} for row, place in zip(given.rows, given.places, strict=True))
        shorten = None if self.too_long == "skip" else partial(fit, tokenizer=tokenizer, how=self.too_long)
        text = "\n\n".join(row["document"] for row in texts.rows) if texts.rows else default_text()
        altered = texts.altered + given.altered
        notes = []
        if altered:
            count = counted(len(altered), "document")
            notes.append(f"{count} had control characters, which became spaces; the first: {altered[0]}")
        material = Material(partial(count_tokens, tokenizer), text, seed, documents, shorten, notes=notes)
        return material, texts.skipped + given.skipped

    def _texts(self) -> Rows:
        """Return the texts as rows; what can't be read is skipped unless there is nothing else."""
        found = Rows()
        errors = []
        for name in self.texts:
            try:
                read = _text(name)
            except (ValueError, PermissionError) as error:
                errors.append(error)
                found.skip(name, " ".join(str(error).removeprefix(f"{Path(name).expanduser()}: ").split()))
                continue
            found.rows += read.rows
            found.skipped += read.skipped
            found.altered += read.altered
        if errors and not found.rows:
            raise ValueError("\n".join(map(str, errors))) from errors[0]
        return found


def _text(name: str) -> Rows:
    path = Path(name).expanduser()
    if not path.is_file() or kind(path) in (*ROWS, *TABLES):
        return read_rows(name)
    text, place = read_marked(path)
    return Rows([{"document": text}], altered=[place] if place else [])


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Return the tokens of a text, without special ones."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer begins a text with: BOS, or none."""
    first = list(tokenizer("a").input_ids[:1])
    return first if first == [tokenizer.bos_token_id] else []
