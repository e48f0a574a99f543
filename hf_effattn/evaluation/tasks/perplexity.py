"""Perplexity of passages of a text: in windows, by position, and through the cache."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..base import GOLDEN, TASKS, Example, Task
from ..subject import Subject

FIRST_BUCKET = 64


class PassageTask(Task):
    """A task about how likely passages are: `length` tokens of the text each, spread evenly over it; they overlap where
    the text is short. Whatever the model reads begins with BOS if the tokenizer lets texts begin so; else its first
    token is read but not predicted."""

    score_name = "perplexity"
    higher_is_better = False
    has_cache = False

    def examples(self, length: int, number: int) -> list[Example]:
        starts = [match.start() for match in re.finditer(r"\S+", self.material.text)]
        last = len(starts) - length - 2  # each word has a token at least
        if last < 0:
            raise ValueError(f"the text has {len(starts)} words; a passage of {length} tokens needs {length + 2}")
        found = []
        for index in range(number):
            first = int(last * (index * GOLDEN % 1.0))
            passage = self.material.text[starts[first] : starts[first + length + 1]]
            found.append(Example(passage, (), details={"passage": index}))
        return found

    def ids(self, subject: Subject, example: Example, length: int) -> torch.Tensor:
        """Return `length + 1` tokens of a passage: `length` to read, and as many to predict."""
        ids = subject.begun(subject.ids(example.prompt))
        if len(ids) <= length:
            raise ValueError(f"a passage of {length + 1} words has {len(ids)} tokens only")
        return ids[: length + 1]

    def losses_alone(self, subject: Subject, ids: torch.Tensor) -> torch.Tensor:
        """Return the losses of a stretch of a passage read by itself: of each token after the first, which makes way
        for BOS where texts begin with it."""
        return subject.losses(subject.begun(ids[len(subject.first_tokens) :]))


def by_position(losses: torch.Tensor) -> dict[str, list[float]]:
    """Return sum and number of losses `[T]` for positions below 64, 64 to 127, 128 to 255 and so on, by upper bound."""
    found, low, high = {}, 0, FIRST_BUCKET
    while low < len(losses):
        part = losses[low:high]
        found[str(high)] = [float(part.double().sum()), len(part)]
        low, high = high, 2 * high
    return found


@TASKS.register("perplexity")
class Perplexity(PassageTask):
    """Perplexity of passages, each token predicted from all before it in the passage. A passage longer than the
    model's positions is read in windows that move by half; each token counts once, with the longest past."""

    fits_positions = False

    def run(self, subject: Subject, examples: Sequence[Example], length: int) -> Iterator[dict[str, Any]]:
        longest = getattr(subject.model.config, "max_position_embeddings", None) or length
        for example in examples:
            ids = self.ids(subject, example, length)
            losses = self.losses(subject, ids, longest)
            mean = float(losses.double().mean())
            yield {
                "score": math.exp(mean),
                "loss": mean,
                "tokens": len(losses),
                "by_position": by_position(losses),
                **example.details,
            }

    def losses(self, subject: Subject, ids: torch.Tensor, longest: int) -> torch.Tensor:
        """Return the loss of each token after the first."""
        found, total = [subject.losses(ids[: longest + 1])], len(ids) - 1
        done = min(longest, total)
        while done < total:
            end = min(done + longest // 2, total)
            found.append(self.losses_alone(subject, ids[end - longest : end + 1])[done - end :])
            done = end
        return torch.cat(found)

    @classmethod
    def total(cls, records: Sequence[dict[str, Any]]) -> float:
        tokens = sum(record["tokens"] for record in records)
        return math.exp(sum(record["loss"] * record["tokens"] for record in records) / tokens)


@TASKS.register("perplexity_cached")
class CachedPerplexity(Perplexity):
    """Perplexity of passages read through the cache, one token at a time: what decoding sees (StreamingLLM's way of
    measuring, Xiao 2023, arXiv 2309.17453). It equals `perplexity`, or a cache is wrong; but an `eviction` acts only
    here, and a passage longer than the model's positions is read on without windows."""

    has_cache = True

    def losses(self, subject: Subject, ids: torch.Tensor, longest: int) -> torch.Tensor:
        return subject.losses_through_cache(ids)


@TASKS.register("context_gain")
class ContextGain(PassageTask):
    """How much a long context helps: nats by which the last quarter of a passage is likelier when the model reads all
    of the passage than when it reads windows of a sixteenth. Records hold the perplexity for windows of a sixteenth, a
    quarter, and the whole; each window stands behind one token more, or BOS. The ratio to dense is the gain
    retained."""

    score_name = "gain [nats]"
    higher_is_better = True

    def run(self, subject: Subject, examples: Sequence[Example], length: int) -> Iterator[dict[str, Any]]:
        if length < 64:
            raise ValueError(f"context_gain needs at least 64 tokens; got {length}")
        targets = length // 4
        for example in examples:
            ids = self.ids(subject, example, length)
            means = {}
            for context in (length // 16, length // 4, length):
                if context == length:
                    losses = subject.losses(ids)[-targets:]
                else:
                    starts = range(len(ids) - 1 - targets, len(ids) - 1, context)
                    losses = torch.cat([self.losses_alone(subject, ids[s : s + context + 1]) for s in starts])
                means[context] = float(losses.double().mean())
            shortest, longest = means[length // 16], means[length]
            yield {
                "score": shortest - longest,
                "perplexity": {str(context): math.exp(mean) for context, mean in means.items()},
                **example.details,
            }
