"""Records out of files, folders and datasets, as they are there."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .texts import DAMAGED, kind, opened, raw_text

ROWS = (".json", ".jsonl")  # files with one row a line
TABLES = (".arrow", ".csv", ".parquet")  # files with rows that `datasets` reads
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder that `save_to_disk` wrote
SPREAD = re.compile(rb"[\[{]|\[.*[\[{,]")  # a first line of JSON that goes on in the next


class Whole(dict[str, str]):
    """The record of a file that is one document."""


def records(source: str | Path, split: str | None, streaming: bool, name: str | None) -> Iterator[tuple[str, Any]]:
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
        yield str(path), Whole(document=raw_text(path), id=name, doc_id=name)
        return
    number = 0
    try:
        with opened(path) as file:
            begun = False
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if not begun and SPREAD.fullmatch(line.removeprefix(BOM_UTF8).strip()):
                    raise ValueError(f"{path}: JSON over several lines; one object a line is expected")
                begun = True
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
        try:
            return datasets.load_dataset(kind(path)[1:], data_files=str(path), split="train", streaming=streaming)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{path}: the table can't be read: {error.__cause__ or error}") from error
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
