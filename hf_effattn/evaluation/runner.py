"""Runs variants of a model through tasks on the same examples, and can go on after it was killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..report import attention_report
from ..targets import find_targets, position_embeddings
from .base import TASKS, Example, Material, Task
from .lines import add_line, read_lines
from .report import Results
from .subject import Subject
from .variants import EVICTIONS_START_LATE, Variant, as_variant, digest_of, is_converted, mechanisms

RESULTS, SETTINGS = "results.jsonl", "settings.json"
SCORES = 2  # raised when tasks or scores change, so that a folder does not mix them
Key = tuple[str, str, int, int]  # variant, task, length, index of the example


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Args:
        tasks: Names of tasks.
        lengths: Tokens of an example.
        number: Examples of each task and length.
        variants: How the model is run.
        batch_size: Rows that generate together.
        chat: Whether prompts go through the chat template.
        seed: Of the examples.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    number: int
    variants: Sequence[Variant]
    batch_size: int = 1
    chat: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for name in self.tasks:
            TASKS.get(name)
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths), ("variants", self.variants)):
            if not values:
                raise ValueError(f"nothing to evaluate: no {name}")
        for value in (*self.lengths, self.number, self.batch_size):
            if value < 1:
                raise ValueError(f"lengths, number and batch_size must be at least 1; got {value}")
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants must differ; got {', '.join(names)}")

    def of_examples(self) -> dict[str, Any]:
        """Return what decides over the examples and their answers: what a run that goes on must agree in."""
        return {"seed": self.seed, "chat": self.chat}


@dataclass(frozen=True)
class Work:
    """Examples of one task and length, the same for all variants."""

    task: Task
    name: str
    length: int
    examples: list[Example]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    material: Material,
    folder: Path,
    advance: Callable[[str, int, int], None] = lambda description, done, total: None,
) -> Results:
    """Evaluate and return the results; each record goes to `folder/results.jsonl` as soon as it is there.

    A run that was killed goes on where it was: examples that have a record are not repeated.

    Args:
        material: What examples are made of; its `count_tokens` must be the tokenizer's.
        folder: Where results go; that of an earlier run with the same settings to go on with it.
        advance: Told what is being done, and tokens done and in all.

    Raises:
        ValueError: for unknown tasks or options of variants, lengths the model has no positions for, and a folder with
            results of other settings, in another dtype, or of other adapters. Nothing has been computed then.
    """
    notes = _check(model, settings)
    subject = Subject(model, tokenizer, settings.batch_size, settings.chat)
    material = replace(material, overhead=subject.overhead())
    works = [_work(name, length, settings.number, material) for name in settings.tasks for length in settings.lengths]
    dtype = str(model.dtype).removeprefix("torch.")
    model_name = str(model.config.name_or_path)
    identity = {**settings.of_examples(), "model": model_name, "dtype": dtype, "scores": SCORES}
    store = _Store(folder, identity)
    names = [variant.name for variant in settings.variants]
    wanted = {(v, w.name, w.length, i) for v in names for w in works for i in range(len(w.examples))}
    store.settings["notes"] = [*material.notes, *sorted({note for work in works for note in work.task.notes}), *notes]
    store.agrees(works)
    store.has_same_adapters(settings.variants)
    total = sum(key[2] for key in wanted)
    done = sum(key[2] for key in wanted if key in store.records)
    for variant in settings.variants:
        with as_variant(model, variant):
            for work in works:
                missing = [
                    i
                    for i in range(len(work.examples))
                    if (variant.name, work.name, work.length, i) not in store.records
                ]
                advance(f"{variant.name} · {work.name} {work.length:,}", done, total)
                results = work.task.run(subject, [work.examples[i] for i in missing], work.length)
                for index, record in zip(missing, results, strict=True):
                    record["example"] = _digest(work.examples[index])
                    store.add((variant.name, work.name, work.length, index), record)
                    done += work.length
                    advance(f"{variant.name} · {work.name} {work.length:,}", done, total)
            store.describe(variant.name, {str(n): attention_report(model, n).cache_bytes for n in settings.lengths})
    records = [record for key, record in store.records.items() if key in wanted]
    return Results(records, store.settings["cache_bytes"], notes=store.settings["notes"])


def _work(name: str, length: int, number: int, material: Material) -> Work:
    task = TASKS.get(name)(material)
    try:
        return Work(task, name, length, task.examples(length, number))
    except ValueError as error:
        raise ValueError(f"{name} at {length:,} tokens: {error}") from error


def _check(model: PreTrainedModel, settings: Settings) -> list[str]:
    """Find out beforehand what would fail after hours; return what the report should say of the rest."""
    as_given = [variant.mechanism is None for variant in settings.variants]
    if as_given != sorted(as_given, reverse=True):
        raise ValueError("variants that leave the model as it is must come first")
    if any(as_given) and not is_converted(model):
        raise ValueError("the model is not converted: it is dense as it is")
    evicting = [v.name for v in settings.variants if any(c.kind == "evicting" for c in mechanisms(model, v))]
    parallel = [name for name in settings.tasks if not TASKS.get(name).has_cache]
    notes = []
    if evicting and parallel:
        notes.append(f"{EVICTIONS_START_LATE} ({', '.join(parallel)} of {', '.join(evicting)})")
    positions = getattr(model.config, "max_position_embeddings", None)
    beyond = bool(positions and max(settings.lengths) > positions)
    whole = [name for name in settings.tasks if TASKS.get(name).fits_positions]
    in_steps = [name for name in settings.tasks if TASKS.get(name).has_cache and name not in whole]
    reading_on = in_steps if beyond else []
    if reading_on and _has_learned_positions(model):
        whole += reading_on
    elif reading_on:
        notes.append(
            f"{', '.join(reading_on)}: passages of more than {positions:,} tokens are read on beyond the positions the "
            "model was made for"
        )
    if beyond and whole:
        raise ValueError(
            f"length {max(settings.lengths):,} is more than the {positions:,} positions of the model, "
            f"and {', '.join(whole)} reads examples in one piece"
        )
    if not any(as_given):
        for variant in settings.variants:
            with as_variant(model, variant):
                pass
    return notes


def _has_learned_positions(model: PreTrainedModel) -> bool:
    return bool(position_embeddings(model, find_targets(model).architecture))


def _digest(example: Example) -> str:
    return hashlib.sha256(f"{example.prompt}{example.answer_prefix}{example.references}".encode()).hexdigest()[:16]


class _Store:
    """The records of a folder, in memory and on the disk.

    Args:
        identity: What all records of a folder must have in common.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / RESULTS
        self.settings: dict[str, Any] = {"identity": identity, "cache_bytes": {}}
        self.records: dict[Key, dict[str, Any]] = {}
        if (folder / SETTINGS).exists():
            self.settings = json.loads((folder / SETTINGS).read_text())
            before = self.settings["identity"]
            differing = [key for key in identity if identity[key] != before.get(key)]
            if differing:
                found = ", ".join(f"{key} was {before.get(key)!r}, is {identity[key]!r}" for key in differing)
                raise ValueError(f"{folder} holds results of other settings ({found}); give another folder")
        self._save()
        for record in read_lines(self.path):
            self.records[record["variant"], record["task"], record["length"], record["index"]] = record

    def add(self, key: Key, record: dict[str, Any]) -> None:
        variant, task, length, index = key
        whole = {"variant": variant, "task": task, "length": length, "index": index, **record}
        self.records[key] = whole
        add_line(self.path, whole)

    def agrees(self, works: Sequence[Work]) -> None:
        """Raise a ValueError if records are of other examples than these."""
        digests = {(w.name, w.length, i): _digest(example) for w in works for i, example in enumerate(w.examples)}
        for (_, name, length, index), record in self.records.items():
            if digests.get((name, length, index), record["example"]) != record["example"]:
                raise ValueError(
                    f"{self.folder} holds results of other examples ({name} at {length:,} tokens: another text, "
                    "documents, or way to cut them); give another folder"
                )

    def has_same_adapters(self, variants: Sequence[Variant]) -> None:
        """Note what adapters the variants have; raise a ValueError if there are records of others of their names."""
        known = self.settings.setdefault("adapters", {})
        found, recorded = {v.name: digest_of(v) for v in variants}, {key[0] for key in self.records}
        for name, digest in found.items():
            if name in recorded and known.get(name) != digest:
                raise ValueError(f"{self.folder} holds results of other weights of {name}; give another folder")
        known.update({name: digest for name, digest in found.items() if digest})
        self._save()

    def describe(self, variant: str, cache_bytes: dict[str, int]) -> None:
        self.settings["cache_bytes"].setdefault(variant, {}).update(cache_bytes)
        self._save()

    def _save(self) -> None:
        path = self.folder / SETTINGS
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.settings, indent=1) + "\n")
        new.replace(path)
