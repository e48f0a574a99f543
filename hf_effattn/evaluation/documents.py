"""Documents given by the user: rows with a document, a question and its answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..notation import whole_number
from .records import Whole, records
from .texts import Fitted, cleaned, counted, first_control, fit, read_text, were

__all__ = ["Fitted", "Rows", "Skipped", "fit", "read_rows", "read_text"]

logger = logging.getLogger(__name__)
NAMES = {  # under which a row may have a field
    "document": ("document", "text", "context", "report"),
    "question": ("question", "query"),
    "answers": ("answers", "answer", "summary"),
    "id": ("id",),
    "doc_id": ("doc_id",),
}
SHOWN = 20  # warnings about rows that were skipped


@dataclass(frozen=True)
class Skipped:
    """A row or a file that was not taken.

    Args:
        place: The file and the line, or the dataset and the row, both counted from 1.
        reason: What is wrong.
    """

    place: str
    reason: str


@dataclass
class Rows:
    """What was read.

    Args:
        rows: Dictionaries with `document`, `question` ("" if there is none), `answers` and, where there is one, `id`.
        skipped: What was not taken.
        replaced: Control characters for which there are spaces now.
        places: Of the rows: the file and the line, or the dataset and the row.
        altered: Where there are rows with such characters.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    replaced: int = 0
    places: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)

    def skip(self, place: str, reason: str) -> None:
        """Record what was not taken; the first few with a warning."""
        self.skipped.append(Skipped(place, reason))
        if len(self.skipped) <= SHOWN:
            logger.warning("skipped %s: %s", place, reason)


def read_rows(
    source: str | Path,
    split: str | None = None,
    streaming: bool = False,
    *,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    documents: str | Path | None = None,
    limit: int | None = None,
) -> Rows:
    """Read documents, with questions and answers where there are any; what is malformed is skipped and recorded.

    Args:
        source: A .jsonl or .json file with one object a line, a text (see `read_text`), a folder of these; a table
            (.parquet, .csv, .arrow), a folder of tables, a saved dataset, or the id of a dataset on the Hub.
        split: Of a dataset; needed where there are several. A folder is read by `datasets` if it is given.
        streaming: Whether `datasets` streams. The rows are kept all the same, so give a limit.
        name: The configuration of a dataset that has several.
        columns: What `document`, `question`, `answers`, `id` or `doc_id` are called in the source, such as
            {"question": "query"}. Rows without a column that is named here are malformed.
        documents: A source of the documents, with `doc_id`, for rows that have only the `doc_id` of theirs.
        limit: The most rows to take.

    Raises:
        ValueError: if there is no row to take; the message has the first reasons.
        FileNotFoundError: if there is no such file and the name can't be one on the Hub.
    """
    columns = dict(columns or {})
    for wanted in columns:
        if wanted not in NAMES:
            raise ValueError(f"unknown field {wanted!r} in columns; valid: {', '.join(NAMES)}")
    limit = None if limit is None else whole_number("limit", limit, 1)
    found = Rows()
    texts = None if documents is None else _by_id(documents, columns, found)
    for place, record in records(source, split, streaming, name):
        try:
            row, replaced = _row(record, columns, texts)
        except ValueError as error:
            found.skip(place, str(error))
            continue
        found.rows.append(row)
        found.places.append(place)
        if replaced:
            found.replaced += replaced
            found.altered.append(first_control(place, record["document"]) if isinstance(record, Whole) else place)
        if len(found.rows) == limit:
            break
    _conclude(found, source)
    return found


def _conclude(found: Rows, source: str | Path) -> None:
    """Warn about what has no warning of its own; raise an error if there is nothing else."""
    if not found.rows:
        reasons = "".join(f"\n  {skipped.place}: {skipped.reason}" for skipped in found.skipped[:5])
        count = were(len(found.skipped))
        raise ValueError(f"{source} has no usable row; {count} skipped{reasons and ':'}{reasons}")
    if len(found.skipped) > SHOWN:
        logger.warning("%s: %d skipped in all, of which the first %d were named", source, len(found.skipped), SHOWN)
    if found.replaced:
        count = counted(found.replaced, "control character")
        logger.warning("%s: %s replaced by spaces, first in %s", source, count, found.altered[0])


def _by_id(source: str | Path, columns: Mapping[str, str], found: Rows) -> dict[str, str]:
    """Return the documents of a source by their `doc_id`."""
    names = {name: column for name, column in columns.items() if name == "document"}
    names["id"] = columns.get("doc_id", "doc_id")
    read = read_rows(source, columns=names)
    found.skipped += read.skipped
    found.replaced += read.replaced
    found.altered += read.altered
    texts: dict[str, str] = {}
    for row in read.rows:
        if row.get("id") in texts:
            raise ValueError(f"{source} has two documents with the {names['id']} {row['id']!r}")
        if "id" in row:
            texts[row["id"]] = row["document"]
    return texts


def _row(record: Any, columns: Mapping[str, str], texts: Mapping[str, str] | None) -> tuple[dict[str, Any], int]:
    """Return a row with our names and how many control characters were replaced in it."""
    if isinstance(record, Exception):
        raise record
    if not isinstance(record, Mapping):
        raise ValueError(f"not an object with fields but {record!r:.60}")
    given = [_document(record, columns, texts), _value(record, columns, "question", "")]
    for name, value in zip(("document", "question"), given, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"the {name} is not a text but {value!r:.60}")
    clean = [cleaned(text) for text in (*given, *_answers(_value(record, columns, "answers")))]
    document, question, *answers = (text for text, _ in clean)
    if not document.strip():
        raise ValueError("the document is empty")
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer is empty")
    row = {"document": document, "question": question, "answers": answers}
    identity = _value(record, columns, "id")
    return row | ({} if identity is None else {"id": str(identity)}), sum(replaced for _, replaced in clean)


def _document(record: Mapping[str, Any], columns: Mapping[str, str], texts: Mapping[str, str] | None) -> Any:
    if texts is None:
        document = _value(record, columns, "document")
        if document is None:
            raise ValueError(f"no document under {', '.join(NAMES['document'])}; there is {', '.join(record)}")
        return document
    doc_id = str(_value(record, columns, "doc_id"))
    if doc_id not in texts:
        raise ValueError(f"there is no document with the doc_id {doc_id!r}")
    return texts[doc_id]


def _value(record: Mapping[str, Any], columns: Mapping[str, str], field_name: str, default: Any = None) -> Any:
    if field_name in columns and columns[field_name] not in record:
        raise ValueError(f"no {columns[field_name]!r}; there is {', '.join(map(str, record))}")
    names = (columns[field_name],) if field_name in columns else NAMES[field_name]
    return next((record[name] for name in names if record.get(name) is not None), default)


def _answers(value: Any) -> list[str]:
    if isinstance(value, Mapping):  # as in SQuAD, {"text": [...], "answer_start": [...]}
        value = value.get("text", value)
    answers = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(answers, (list, tuple)) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"the answers are not texts but {value!r:.60}")
    return list(answers)
