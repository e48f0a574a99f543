"""Comparison of a converted run with the native one, test by test, under a table of reasons."""

from __future__ import annotations

import fnmatch
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Outcomes:
    """What a run of pytest gave.

    Args:
        conversions: Number of models that were converted.
        tests: "passed", "failed" or "skipped", and the error's message, of each test.
    """

    conversions: int
    tests: dict[str, dict[str, str]]

    @classmethod
    def load(cls, file: Path) -> Outcomes:
        return cls(**json.loads(file.read_text()))

    def outcome(self, test: str) -> str:
        return self.tests.get(test, {}).get("outcome", "not run")

    def message(self, test: str) -> str:
        return self.tests.get(test, {}).get("message") or self.outcome(test)


@dataclass(frozen=True)
class Reason:
    """Why some tests may fail on converted models.

    Args:
        tests: Patterns of test names (without file, class and parameters in brackets).
        message: What the failure must say to count as this one.
        why: The reason, for readers.
        kinds: Patterns of the kinds of conversion it holds for.
        without_attentions: Whether the tests must pass when they don't ask for attention weights.
    """

    tests: list[str]
    message: str
    why: str
    kinds: list[str] = field(default_factory=lambda: ["*"])
    without_attentions: bool = False

    def explains(self, test: str, kind: str, message: str) -> bool:
        name = test.rpartition("::")[2].partition("[")[0]
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.tests)
        return named and any(fnmatch.fnmatchcase(kind, p) for p in self.kinds) and self.message in message


@dataclass
class Comparison:
    """One kind of conversion against the native run.

    Args:
        native, passed: Tests that pass natively, and those of them that pass converted.
        known, unexplained: The others, with a reason or without.
    """

    suite: str
    kind: str
    conversions: int
    native: int
    passed: int
    known: dict[str, Reason]
    unexplained: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        known: dict[str, list[str]] = {}
        for test, reason in self.known.items():
            known.setdefault(reason.why, []).append(test)
        return {**asdict(self), "known": known}


def load_reasons(file: Path) -> list[Reason]:
    """Read the table of reasons."""
    return [Reason(**entry) for entry in tomllib.loads(file.read_text())["reason"]]


def compare(suite: str, kind: str, native: Outcomes, converted: Outcomes, reasons: list[Reason]) -> Comparison:
    """Compare a converted run with the native one; only tests that pass natively count.

    Raises:
        SystemExit: if no model was converted, so that nothing was compared.
    """
    if not converted.conversions:
        raise SystemExit(f"{suite} {kind}: no model was converted")
    wanted = [test for test in native.tests if native.outcome(test) == "passed"]
    found = Comparison(suite, kind, converted.conversions, len(wanted), 0, {}, {})
    for test in wanted:
        message = converted.message(test)
        reason = next((r for r in reasons if r.explains(test, kind, message)), None)
        if converted.outcome(test) == "passed":
            found.passed += 1
        elif reason is not None:
            found.known[test] = reason
        else:
            found.unexplained[test] = message
    return found


def failed_without_attentions(found: Comparison) -> list[str]:
    """Return the known failures that must pass when attention weights are not asked for."""
    return [test for test, reason in found.known.items() if reason.without_attentions]
