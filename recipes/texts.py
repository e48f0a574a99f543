"""Documents to train on: python recipes/texts.py [--documents PATH] --out held_out.jsonl writes those that are held out

Training sees nine tenths of them; which ones, their names say, so that runs agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_effattn.evaluation.documents import read_rows

HELD_OUT = 10  # one document of so many is held out
NOVELS = Path(__file__).parent / "novels" / "novels.jsonl.gz"
Document = tuple[str, str]  # name and text


def python_documents() -> Iterator[Document]:
    """Yield what every Python has: the topics of its language reference, and the modules of its standard library (not
    its packages, one of which holds the topics again)."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield f"stdlib/{file.name}", file.read_text(encoding="utf-8")


def sources_of(given: str | list[str] | None) -> dict[str, list[Document]]:
    """Return the documents of a file or folder, or of each of several, by its name; for None those of Python, and
    pieces of novels that come with the recipes. The same text comes once, so that it is on one side of the split."""
    found: dict[str, Iterable[Document]]
    if given is None:
        found = {"Python": python_documents(), "novels": documents(NOVELS)}
    else:
        paths = [given] if isinstance(given, str) else given
        if not paths:
            raise ValueError("documents are a file or folder, or a list of them; got an empty list")
        names = [Path(path).name for path in paths]
        found = {
            name if names.count(name) == 1 else path: documents(path) for name, path in zip(names, paths, strict=True)
        }
    first: dict[str, tuple[str, str]] = {}
    for source, rows in found.items():
        for name, text in rows:
            first.setdefault(text, (source, name))
    kept: dict[str, list[Document]] = {source: [] for source in found}
    for text, (source, name) in first.items():
        kept[source].append((name, text))
    return kept


def documents(path: str | Path) -> list[Document]:
    """Return the documents of a file, a folder or JSON lines."""
    rows = read_rows(Path(path).expanduser()).rows
    return [(name_of(row.get("id"), row["document"]), row["document"]) for row in rows]


def name_of(given: Any, text: str) -> str:
    """Return the name of a document, which is what it is called or made of its text."""
    return hashlib.sha256(text.encode()).hexdigest() if given is None else str(given)


def is_held_out(name: str) -> bool:
    """Return whether a document of this name is kept from training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def split(found: list[Document]) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and those held out. Each has one at least: where the names say nothing of the
    kind, the first by name changes sides; of a single document, the end is held out."""
    if len(found) == 1:
        ((name, text),) = found
        cut = len(text) - len(text) // HELD_OUT
        cut = text.rfind("\n", 0, cut) + 1 or cut
        return [(name, text[:cut])], [(f"{name}, its end", text[cut:])]
    sides = [is_held_out(name) for name, _ in found]
    if len(set(sides)) == 1:
        first = min(range(len(found)), key=lambda i: found[i])
        sides[first] = not sides[first]
    training, held_out = ([x for x, side in zip(found, sides, strict=True) if side == held] for held in (False, True))
    return training, held_out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", nargs="+", help="files or folders (default: Python's documents, and novels)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    held_out = [document for found in sources_of(options.documents).values() for document in split(found)[1]]
    options.out.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in held_out))
