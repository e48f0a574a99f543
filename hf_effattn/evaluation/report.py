"""The report of an evaluation: Markdown that opens with ratios to the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..plans import DENSE
from .base import TASKS
from .variants import PARTS, name_of_part

Records = Sequence[dict[str, Any]]
RATES = {"prefill": "prefill_seconds", "decoding": "step_seconds"}  # keys of records
COSTS = {"cache": "cache bytes", "prefill": "time of prefill", "decoding": "time of decoding"}


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Args:
        records: Of all variants.
        cache_bytes: For each variant and length, of one row.
        against: The variant that the others are compared with.
        title: What was evaluated.
        notes: Lines for the end of the report: sources, what was skipped.
    """

    records: Records
    cache_bytes: dict[str, dict[str, int]]
    against: str = DENSE
    title: str = "Evaluation"
    notes: Sequence[str] = field(default=())

    @property
    def variants(self) -> list[str]:
        """Variants in the order they came in, the one compared with first."""
        names = list(dict.fromkeys(record["variant"] for record in self.records))
        return sorted(names, key=lambda name: name != self.against)

    @property
    def ablated(self) -> list[str]:
        """Variants of which there are parts alone, too."""
        names = self.variants
        return [name for name in names if any(name_of_part(name, part) in names for part in PARTS)]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(record["task"] for record in self.records))

    @property
    def lengths(self) -> list[int]:
        return sorted({record["length"] for record in self.records})

    def of(self, variant: str, task: str | None = None, length: int | None = None) -> list[dict[str, Any]]:
        """Return the records of a variant, of a task and a length if given."""
        wanted = {"variant": variant, "task": task, "length": length}
        keys = [key for key, value in wanted.items() if value is not None]
        return [record for record in self.records if all(record[key] == wanted[key] for key in keys)]

    def score(self, variant: str, task: str, length: int) -> float | None:
        found = self.of(variant, task, length)
        return TASKS.get(task).total(found) if found else None

    def seconds(self, variant: str, key: str, length: int) -> float | None:
        """Return the median seconds of a token: of the prompt, or of one more behind it. Whatever else the machine did
        for a while does not count."""
        found = [record for record in self.of(variant, length=length) if record.get(key) is not None]
        if not found:
            return None
        return median(record[key] / (record["prompt_tokens"] if key == RATES["prefill"] else 1) for record in found)

    def bytes(self, variant: str, length: int) -> int | None:
        return self.cache_bytes.get(variant, {}).get(str(length))

    def cost(self, kind: str, variant: str, length: int) -> float | None:
        """Return bytes of the "cache", or seconds of a token in "prefill" or "decoding"."""
        return self.bytes(variant, length) if kind == "cache" else self.seconds(variant, RATES[kind], length)

    def cheaper(self, kind: str, variant: str) -> dict[int, bool]:
        """Return for each length measured whether a variant costs less than the one it is compared with."""
        pairs = {n: [self.cost(kind, name, n) for name in (variant, self.against)] for n in self.lengths}
        return {n: own < other for n, (own, other) in pairs.items() if own is not None and other is not None}

    def break_even(self, kind: str, variant: str) -> int | None:
        """Return the length from which on a variant always costs less; None if there is none."""
        cheaper = self.cheaper(kind, variant)
        return next((n for n in cheaper if all(less for m, less in cheaper.items() if m >= n)), None)


def markdown(results: Results) -> str:
    """Return the report."""
    parts = [f"# {results.title}", _ratios(results), _break_even(results), _scores(results), _costs(results)]
    parts += [_context_gain(results)] if "context_gain" in results.tasks else []
    parts += ["\n".join(f"- {note}" for note in results.notes)] if results.notes else []
    return "\n\n".join(part for part in parts if part) + "\n"


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None for a single value."""
    number = len(values)
    if number < 2:
        return None
    mean = sum(values) / number
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1) / number)


def _ratios(results: Results) -> str:
    """The opening table: every variant over the one compared with."""
    against, length = results.against, results.lengths[-1]
    others = [variant for variant in results.variants if variant != against]
    if against not in results.variants or not others:
        return ""
    rows = []
    for task in results.tasks:
        for n in results.lengths:
            base = results.score(against, task, n)
            shown = [_ratio(results.score(variant, task, n), base) for variant in others]
            if base is not None:
                rows.append([f"{task} {_tokens(n)}{'' if TASKS.get(task).higher_is_better else ' ↓'}", *shown])
    for kind, name in COSTS.items():
        base = results.cost(kind, against, length)
        shown = [_ratio(results.cost(kind, variant, length), base) for variant in others]
        if any(shown):
            rows.append([f"{name} {_tokens(length)} ↓", *shown])
    intro = f"Each number is that of the variant over that of `{against}`, on the same examples; ↓ less is better."
    return f"{intro}\n\n{_table([f'over {against}', *others], rows)}"


def _scores(results: Results) -> str:
    rows = []
    for task in results.tasks:
        for length in results.lengths:
            found = [results.of(variant, task, length) for variant in results.variants]
            number = max(map(len, found))
            shown = {TASKS.get(task).score_name: [_score(task, records) for records in found]} if number else {}
            for name in dict.fromkeys(name for records in found for r in records for name in r.get("further", {})):
                shown[name] = [_mean([r["further"][name] for r in records if "further" in r]) for records in found]
            rows += [[f"{task} ({name})", _tokens(length), str(number), *cells] for name, cells in shown.items()]
    intro = "## Scores\n\nMeans with their standard errors over the examples."
    return f"{intro}\n\n{_table(['task', 'length', 'examples', *results.variants], rows)}"


def _score(task: str, records: Records) -> str:
    """The score of a task; where it is not a mean, there is no standard error of it."""
    if TASKS.get(task).higher_is_better:
        return _mean([record["score"] for record in records])
    return f"{TASKS.get(task).total(records):.3g}" if records else ""


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    error = standard_error(values)
    return f"{sum(values) / len(values):.3g}" + ("" if error is None else f" ± {error:.2g}")


def _costs(results: Results) -> str:
    rows = []
    for variant in results.variants:
        for length in results.lengths:
            held = results.bytes(variant, length)
            rates = [results.seconds(variant, key, length) for key in RATES.values()]
            shown = ["" if rate is None else f"{1 / rate:,.0f}" for rate in rates]
            rows.append([variant, _tokens(length), "" if held is None else f"{held / 1e6:.1f} MB", *shown])
    header = ["variant", "length", "cache of a row", "prefill [tokens/s]", "decoding [tokens/s]"]
    return f"## Costs\n\nSpeeds are those of a row in the batches that were run.\n\n{_table(header, rows)}"


def _break_even(results: Results) -> str:
    """From which of the measured lengths on a variant is cheaper."""
    lines = []
    for variant in results.variants:
        if variant == results.against:
            continue
        facts = []
        for kind in COSTS:
            start = results.break_even(kind, variant)
            if results.cheaper(kind, variant):
                facts.append(f"{kind} {'nowhere' if start is None else f'from {_tokens(start)} on'}")
        if facts:
            lines.append(f"- `{variant}` is cheaper than `{results.against}`: {', '.join(facts)}")
    return "Break-even among the lengths measured:\n\n" + "\n".join(lines) if lines else ""


def _context_gain(results: Results) -> str:
    rows = []
    for variant in results.variants:
        for length in results.lengths:
            found = [record["perplexity"] for record in results.of(variant, "context_gain", length)]
            if found:
                contexts = sorted(map(int, found[0]))
                means = [math.exp(sum(math.log(p[str(c)]) for p in found) / len(found)) for c in contexts]
                shown = [f"{_tokens(c)}: {mean:.2f}" for c, mean in zip(contexts, means, strict=True)]
                rows.append([variant, _tokens(length), *shown])
    intro = "## Perplexity of the last quarter of a passage, by the context it is read in"
    return f"{intro}\n\n{_table(['variant', 'length', 'a sixteenth', 'a quarter', 'the whole'], rows)}"


def _ratio(value: float | None, dense: float | None) -> str:
    if value is None or dense is None:
        return ""
    return "–" if not dense else f"{value / dense:.2f}"


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
