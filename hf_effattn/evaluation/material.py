"""Texts and documents for tasks, from what users name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .base import Material
from .documents import ROWS, Rows, Skipped, read_rows
from .texts import HOW, fit, kind, read_text

TOO_LONG = ("skip", *HOW)


def default_text() -> str:
    """Return CPython's own language reference: 460,000 characters of prose that every Python has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Sources:
    """What users name.

    Args:
        texts: Files, folders, JSON lines or Hub ids whose texts, one after the other, are haystack and passages; none
            for `default_text`.
        documents: A file, folder or Hub id of rows with `document`, `question` and `answers`.
        columns: What these are called there.
        join: Where the documents are, if rows only have the `doc_id` of theirs.
        too_long: What becomes of documents longer than there is room for: "skip", "error", "truncate_middle",
            "truncate_end", or "slide" for an example of each piece.
    """

    texts: Sequence[str] = ()
    documents: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    join: str | None = None
    too_long: str = "skip"

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise ValueError(f"unknown way to treat documents that are too long {self.too_long!r}; valid: {TOO_LONG}")

    def gather(self, tokenizer: PreTrainedTokenizerBase, seed: int = 42) -> tuple[Material, list[Skipped]]:
        """Return the material of tasks for the tokenizer, and the rows that were skipped.

        Raises:
            ValueError: if nothing can be read.
            FileNotFoundError: if a file is not there.
        """
        skipped: list[Skipped] = []
        parts = []
        for name in self.texts:
            path = Path(name).expanduser()
            if path.is_file() and kind(path) not in ROWS:
                parts.append(read_text(path))
                continue
            rows = read_rows(name)
            parts += [row["document"] for row in rows.rows]
            skipped += rows.skipped
        given = Rows()
        if self.documents is not None:
            given = read_rows(self.documents, columns=self.columns, documents=self.join)
        shorten = None if self.too_long == "skip" else partial(fit, tokenizer=tokenizer, how=self.too_long)
        text = "\n\n".join(parts) if parts else default_text()
        count = partial(count_tokens, tokenizer)
        return Material(count, text, seed, tuple(given.rows), shorten), skipped + given.skipped


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Return the tokens of a text, without special ones."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
