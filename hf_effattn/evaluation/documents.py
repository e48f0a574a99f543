"""Documents given by the user: rows with a document, a question and its answers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..notation import whole_number
from .texts import DAMAGED, Fitted, cleaned, fit, kind, opened, raw_text, read_text

__all__ = ["Fitted", "Rows", "Skipped", "fit", "read_rows", "read_text"]

logger = logging.getLogger(__name__)
ROWS = (".json", ".jsonl")  # files with one row a line
TABLES = (".arrow", ".csv", ".parquet")  # files with rows that `datasets` reads
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder that `save_to_disk` wrote
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
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    replaced: int = 0

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
    for place, record in _records(source, split, streaming, name):
        try:
            row, replaced = _row(record, columns, texts)
        except ValueError as error:
            found.skip(place, str(error))
            continue
        found.rows.append(row)
        found.replaced += replaced
        if len(found.rows) == limit:
            break
    _conclude(found, source)
    return found


def _conclude(found: Rows, source: str | Path) -> None:
    """Warn about what has no warning of its own; raise an error if there is nothing else."""
    if not found.rows:
        reasons = "".join(f"\n  {skipped.place}: {skipped.reason}" for skipped in found.skipped[:5])
        raise ValueError(f"{source} has no usable row; {len(found.skipped)} were skipped{reasons and ':'}{reasons}")
    if len(found.skipped) > SHOWN:
        logger.warning("%s: %d skipped in all, of which the first %d were named", source, len(found.skipped), SHOWN)
    if found.replaced:
        logger.warning("%s: %d control characters replaced by spaces", source, found.replaced)


def _by_id(source: str | Path, columns: Mapping[str, str], found: Rows) -> dict[str, str]:
    """Return the documents of a source by their `doc_id`."""
    names = {name: column for name, column in columns.items() if name == "document"}
    names["id"] = columns.get("doc_id", "doc_id")
    read = read_rows(source, columns=names)
    found.skipped += read.skipped
    found.replaced += read.replaced
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


def _records(source: str | Path, split: str | None, streaming: bool, name: str | None) -> Iterator[tuple[str, Any]]:
    """Yield rows as they are in the source, or the error that is there instead, with the places."""
    path = Path(source).expanduser()
    if path.is_file() and split is not None:
        raise ValueError(f"{path} is a file and has no splits; got split={split!r}")
    if path.is_file() and kind(path) not in TABLES:
        yield from _in_file(path, path.name)
    elif path.is_dir() and split is None and not _is_dataset(path):
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                try:
                    yield from _in_file(file, inside.as_posix())
                except (ValueError, OSError) as error:
                    yield str(file), ValueError(str(error).removeprefix(f"{file}: "))
    elif not path.exists() and (isinstance(source, Path) or re.search(r"^[./~]|/.*/|\\|\.[A-Za-z]\w*$", source)):
        raise FileNotFoundError(f"there is no file or folder {source}")
    else:
        for number, record in enumerate(_in_dataset(path, str(source), split, streaming, name), 1):
            yield f"{source}, row {number}", record


def _in_file(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    if kind(path) not in ROWS:
        yield str(path), {"document": raw_text(path), "id": name, "doc_id": name}
        return
    number = 0
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(line)
    except DAMAGED as error:
        raise ValueError(f"{path}: the file is damaged behind line {number}: {error}") from error


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return ValueError(f"byte {error.start} of the line is not UTF-8")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        return ValueError(f"not JSON that can be read: {error}")


def _is_dataset(path: Path) -> bool:
    files = [file for file in path.rglob("*") if file.is_file()]
    tables = [file.name for file in files if kind(file) in TABLES or file.name in SAVED]
    others = [file.name for file in files if kind(file) in (".htm", ".html", ".jsonl", ".pdf", ".rst", ".txt")]
    if tables and others:
        raise ValueError(f"{path} has tables ({tables[0]}) and other files ({others[0]}): read them one by one")
    return bool(tables)


def _in_dataset(path: Path, source: str, split: str | None, streaming: bool, name: str | None) -> Any:
    import datasets  # takes a second, and files don't need it

    if path.is_file():
        return datasets.load_dataset(kind(path)[1:], data_files=str(path), split="train", streaming=streaming)
    if any((path / saved).is_file() for saved in SAVED):
        data: Any = datasets.load_from_disk(str(path))
        data = data if isinstance(data, dict) else {str(data.split): data}
    else:
        data = datasets.load_dataset(str(path) if path.is_dir() else source, name, split=split, streaming=streaming)
    if not isinstance(data, dict):
        return data
    if split not in data and (len(data) > 1 or split is not None):
        raise ValueError(f"{source} has the splits {', '.join(map(str, data))}; got split={split!r}")
    return data[split] if split in data else next(iter(data.values()))
