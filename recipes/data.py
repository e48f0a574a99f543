"""Data to train on: windows of tokens, each out of one document, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from texts import Document, is_held_out, name_of, sources_of, split
from transformers import PreTrainedTokenizerBase

from hf_effattn.evaluation.documents import NAMES
from hf_effattn.evaluation.material import first_tokens
from hf_effattn.evaluation.texts import cleaned

BUFFER = 1000  # windows among which a stream is shuffled
TOGETHER = 16  # documents of a stream that are tokenised together


class Cutter:
    """Cuts documents into windows of tokens, each beginning as the tokenizer lets texts begin."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.start = tokenizer, first_tokens(tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []

    def places(self, tokens: list[list[int]], length: int) -> list[tuple[int, int]]:
        """Return document and first token of all windows. The last of a document ends with it and may share tokens with
        the one before; a document that is too short has none."""
        room, found = length - len(self.start), []
        for document, ids in enumerate(tokens):
            firsts = list(range(0, len(ids) - room + 1, room))
            found += [(document, first) for first in firsts]
            if firsts and len(ids) % room:
                found.append((document, len(ids) - room))
        return found

    def spread(self, texts: list[str], length: int, number: int) -> torch.Tensor:
        """Return `number` windows, or as many as there are, spread over the texts."""
        tokens = self.encode(texts)
        places = self.places(tokens, length)
        chosen = [places[i * len(places) // number] for i in range(number)] if len(places) > number else places
        return torch.tensor([self.window(tokens, place, length) for place in chosen])

    def window(self, tokens: list[list[int]], place: tuple[int, int], length: int) -> list[int]:
        document, first = place
        return self.start + tokens[document][first : first + length - len(self.start)]


class Windows:
    """Windows of documents that are all in memory.

    Args:
        source: What they are called together.
        found: The documents, on both sides of the split.
        tokenizer: Makes tokens of them.
        seed: Of the order, which differs from epoch to epoch.
    """

    def __init__(self, source: str, found: list[Document], tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        self.source, self.cutter, self.seed = source, Cutter(tokenizer), seed
        self.training, self.kept = ([text for _, text in side] for side in split(found))
        self.tokens = self.cutter.encode(self.training)

    def rows(self, length: int) -> list[list[int]]:
        """Return all windows to train on, in the order of the documents."""
        found = [self.cutter.window(self.tokens, place, length) for place in self.cutter.places(self.tokens, length)]
        if not found:
            raise ValueError(
                f"none of the {len(self.tokens)} documents of {self.source} to train on has {length} tokens"
            )
        return found

    def dataset(self, length: int) -> Any:
        """Return all windows to train on as rows with `input_ids`."""
        return [{"input_ids": row} for row in self.rows(length)]

    def held_out(self, length: int, number: int) -> torch.Tensor:
        """Return `number` windows, or as many as there are, spread over the documents held out."""
        return self.cutter.spread(self.kept, length, number)

    def batches(self, length: int, rows: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield batches `[rows, length]` without end, from batch `start` on."""
        windows = self.rows(length)
        epoch, order = -1, []
        for number in count(start):
            batch = []
            for index in range(number * rows, (number + 1) * rows):
                if index // len(windows) != epoch:
                    epoch = index // len(windows)
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(len(windows), generator=generator).tolist()
                batch.append(windows[order[index % len(windows)]])
            yield torch.tensor(batch)


class Stream:
    """Windows of the rows of a large .jsonl file, which `datasets` reads when needed; shuffled within a buffer."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        self.source, self.cutter, self.seed = str(Path(source).expanduser()), Cutter(tokenizer), seed

    def dataset(self, length: int, held_out: bool = False) -> Any:
        """Return the `IterableDataset` of one side of the split, in the order of the file: rows with `input_ids`."""
        import datasets

        rows = datasets.load_dataset("json", data_files=self.source, split="train", streaming=True)
        columns = list(next(iter(rows)))
        column = next((name for name in NAMES["document"] if name in columns), None)
        if column is None:
            raise ValueError(f"{self.source}: no document under {', '.join(NAMES['document'])}; there is {columns}")

        def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = [cleaned(text or "")[0] for text in batch[column]]
            names = map(name_of, batch.get("id", [None] * len(texts)), texts)
            tokens = self.cutter.encode([t for n, t in zip(names, texts, strict=True) if is_held_out(n) == held_out])
            return {"input_ids": [self.cutter.window(tokens, p, length) for p in self.cutter.places(tokens, length)]}

        return rows.map(cut, batched=True, batch_size=TOGETHER, remove_columns=columns)

    def held_out(self, length: int, number: int) -> torch.Tensor:
        return torch.tensor([row["input_ids"] for row in islice(self.dataset(length, held_out=True), number)])

    def batches(self, length: int, rows: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield batches `[rows, length]` without end, from batch `start` on; those before it are read and dropped."""
        windows = islice(self._endless(length), start * rows, None)
        while True:
            yield torch.tensor(list(islice(windows, rows)))

    def _endless(self, length: int) -> Iterator[list[int]]:
        dataset = self.dataset(length)
        for epoch in count():
            number = 0
            for row in dataset.shuffle(seed=self.seed * 1_000_003 + epoch, buffer_size=BUFFER):
                number += 1
                yield row["input_ids"]
            if not number:
                raise ValueError(f"no document of {self.source} to train on has {length} tokens")


class InTurn:
    """Sources that are read in turn, each as often as the others.

    Args:
        sources: By name.
    """

    def __init__(self, sources: Mapping[str, Windows | Stream]) -> None:
        self.sources = sources

    def dataset(self, length: int) -> Any:
        """Return rows with `input_ids`: of several sources one after the other, the shorter ones again and again."""
        found = [source.dataset(length) for source in self.sources.values()]
        if len(found) == 1:
            return found[0]
        return [rows[i % len(rows)] for i in range(max(map(len, found))) for rows in found]

    def held_out(self, length: int, number: int) -> torch.Tensor:
        """Return `number` windows, or as many as there are, of all sources alike."""
        sizes = [len(range(i, number, len(self.sources))) for i in range(len(self.sources))]
        found = [source.held_out(length, size) for source, size in zip(self.sources.values(), sizes, strict=True)]
        return torch.cat([windows for windows in found if len(windows)] or found[:1])

    def batches(self, length: int, rows: int, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield batches `[rows, length]` without end, from batch `start` on, each of one source."""
        sources = list(self.sources.values())
        before = [len(range(i, start, len(sources))) for i in range(len(sources))]
        found = [source.batches(length, rows, first) for source, first in zip(sources, before, strict=True)]
        for number in count(start):
            yield next(found[number % len(found)])


def open_data(given: str | list[str] | None, streaming: bool, tokenizer: PreTrainedTokenizerBase, seed: int) -> InTurn:
    """Return the windows of documents: see `sources_of`."""
    if not streaming:
        return InTurn({name: Windows(name, found, tokenizer, seed) for name, found in sources_of(given).items()})
    if not isinstance(given, str) or not given.lower().removesuffix(".gz").endswith(".jsonl"):
        raise ValueError(f"streaming reads one .jsonl or .jsonl.gz file; got {given}")
    return InTurn({Path(given).name: Stream(given, tokenizer, seed)})
