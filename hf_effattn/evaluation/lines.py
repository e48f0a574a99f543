"""Files of JSON lines to which a process adds until it ends or is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none if there is no file; a last line that was cut off while it was written is taken
    out of it."""
    if not path.exists():
        return []
    whole, _, cut = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    if cut:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    return [json.loads(line) for line in whole.split("\n") if line]


def add_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
