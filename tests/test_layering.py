"""The house: who may import whom, and how large a file may get."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_effattn

ROOT = Path(hf_effattn.__file__).parent
FLOORS = {
    "registry": 0,
    "notation": 0,
    "plotting": 0,
    "feature_maps": 1,
    "recurrences": 1,
    "patterns": 1,
    "selectors": 1,
    "evictions": 1,
    "plans": 1.7,  # they hold configs
    "config": 1.5,  # on floor 1, above the things it names
    "ops": 2,
    "cache": 3,
    "integration": 3.5,  # on floor 3, above the cache layers it binds
    "architectures": 4,
    "attention": 4,
    "targets": 4.5,  # between the facts about families and the conversion
    "convert": 5,
    "saving": 5.5,
    "report": 5.5,  # on floor 5, above the conversion it reports
    "recovery": 6,
    "evaluation": 6.5,  # it measures what was recovered
    "planning": 6.7,  # it evaluates what it tries
    "cli": 7,
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def parts(path: Path) -> tuple[str, ...]:
    names = path.relative_to(ROOT).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules a file imports: ours as paths below the package, others by name under ("", ...)."""
    found = set()
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {("", *alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(("", *(node.module or "").split(".")))
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level]
            module = tuple(node.module.split(".")) if node.module else ()
            found |= {base + module} if module else {(*base, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(parts(path)))
def test_imports_point_down(path: Path) -> None:
    mine = parts(path)[0]
    for module in imported(path):
        assert module[:2] != ("", "hf_effattn"), "imports within the package are relative"
        if module[0] == "" or module[0] == mine:
            continue
        assert FLOORS[module[0]] < FLOORS[mine], f"{mine} (floor {FLOORS[mine]}) imports {'.'.join(module)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(parts(path)))
def test_low_floors_know_nothing_of_transformers(path: Path) -> None:
    if FLOORS[parts(path)[0]] < 3:
        assert not {"transformers", "peft", "accelerate"} & {m[1] for m in imported(path) if m[0] == ""}


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(parts(path)))
def test_files_explain_one_idea(path: Path) -> None:
    limit = 400 if parts(path)[0] == "ops" else 260
    assert len(path.read_text().splitlines()) <= limit


def test_private_names_of_transformers_stay_in_integration() -> None:
    for path in FILES:
        if parts(path)[0] == "integration":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path.name} imports {private}"


def test_public_names_are_few() -> None:
    assert len(hf_effattn.__all__) <= 15
    assert all(hasattr(hf_effattn, name) for name in hf_effattn.__all__)
